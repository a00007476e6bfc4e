// gemm CASES SEED [DTYPE]: random products of csrc/cuda/gemm.cu and gemm_sm90.cu, with every layout and epilogue, against float64, each under
// two schedules and with early and late copies, which must agree bit for bit. gemm huge: offsets beyond 2^31.
#include "cuda/gemm.h"

#include "activations.h"
#include "driver.h"

namespace {

// A matrix of `rows` and K, contiguous along K or along the rows.
struct Matrix {
  bool along_k;
  int64_t stride;
  Buffer buffer;
  Matrix(DType dtype, int rows, int K, bool along_k_, int extra, int shift)
      : along_k(along_k_), stride((along_k ? K : rows) + extra),
        buffer(dtype, size_t((along_k ? rows : K) - 1) * stride + (along_k ? K : rows), 1, shift) {}
  double at(int row, int k) { return buffer[along_k ? row * stride + k : k * stride + row]; }
  GemmOperand operand() { return {buffer.data(), stride, along_k}; }
};

int size() { return pick(0, 2) ? pick(1, 150) : 8 * pick(1, 18); }

void test(DType any) {
  const DType dtype = any == DType::f32 ? DType::bf16 : any;
  const int kind = pick(0, 3);  // plain, with a low-rank term, activated, backward through an activation
  const bool plain = kind < 2, low = kind == 1, backward = kind == 3;
  const bool even = pick(0, 1);  // what the fast kernels take
  const auto pick_size = [&] { return even ? 8 * pick(1, 20) : size(); };
  // Seldom so many rows that their tiles make two groups, or so many terms that the stages come round again.
  const int rare = pick(0, 9), M = rare == 0 ? 8 * pick(130, 160) : pick_size(), N = pick_size();
  const int K = rare == 0 ? 8 * pick(1, 4) : rare < 3 ? 8 * pick(40, 90) : pick_size();
  const int rank = !low ? 0 : even ? 8 * pick(1, 20) : pick(1, 40);
  const bool b_along_k = plain ? pick(0, 1) : !backward;
  const int extra = even ? 0 : pick(0, 3), shift = even || pick(0, 1) ? 0 : 1;
  Matrix a(dtype, M, K, true, extra, shift), b(dtype, N, K, b_along_k, extra, shift);
  Matrix low_a(dtype, M, std::max(rank, 1), true, 0, 0), low_b(dtype, N, std::max(rank, 1), b_along_k, 0, 0);
  Buffer bias(dtype, !backward && pick(0, 1) ? N : 0, 1), h_in(dtype, backward ? size_t(M) * N : 0, 1);
  const int64_t seed = int64_t(pick(0, 1 << 30)) << 20;
  Gemm g{};
  g.dtype = dtype;
  g.M = M, g.N = N, g.K = K, g.rank = rank;
  g.a = a.operand(), g.b = b.operand();
  if (low) g.low = low_a.buffer.data(), g.low_b = low_b.buffer.data();
  if (low && pick(0, 2)) g.dropout = make_dropout(&seed, 0.1 * pick(1, 9));
  if (bias.n) g.bias = bias.data();
  if (!plain) g.activation = Activation(pick(1, 3));
  g.backward = backward;
  const int capability = pick(0, even ? 3 : 1) ? 90 : 80;
  const bool keep = pick(0, 1), sums = backward && pick(0, 2);

  struct Result {
    Buffer out, kept, sums;
  };
  const auto run = [&](unsigned schedule, bool late) {
    emu::config.seed = schedule;
    emu::config.late_copies = late;
    Result r{Buffer(dtype, size_t(M) * N), Buffer(dtype, !plain && keep ? size_t(M) * N : 0),
             Buffer(DType::f32, sums ? size_t(gemm_row_tiles(M)) * N : 0)};
    Gemm now = g;
    now.out = r.out.data();
    if (r.kept.n) (backward ? now.act : now.h) = r.kept.data();
    if (backward) now.h = h_in.data();
    if (sums) now.sums = r.sums.floats();
    if (gemm(now, capability, nullptr) != cudaSuccess) throw Mismatch("refused");
    return r;
  };
  const bool late = pick(0, 1);
  Result got = run(0, late), again = run(1 + pick(0, 1 << 20), !late);
  same("out", got.out, again.out);
  same("what is kept", got.kept, again.kept);
  same("sums", got.sums, again.sums);

  for (int n = 0; n < N; ++n) {
    std::vector<double> sum(gemm_row_tiles(M)), sum_size(gemm_row_tiles(M));
    for (int m = 0; m < M; ++m) {
      double v = 0, most = 0;
      for (int k = 0; k < rank; ++k) v += low_a.at(m, k) * low_b.at(n, k), most += std::fabs(low_a.at(m, k) * low_b.at(n, k));
      if (g.dropout.seed && !kept<1>(seed, g.dropout.drop, m, n)) v = 0;
      for (int k = 0; k < K; ++k) {
        v += a.at(m, k) * b.at(n, k);
        most += std::fabs(a.at(m, k) * b.at(n, k));
      }
      if (bias.n) v += bias[n];
      const size_t at = size_t(m) * N + n;
      const double slack = 1e-6 * (most + 1);
      if (kind == 2) {
        if (keep) expect("h", got.kept, at, v, slack);
        v = act(g.activation, v);
      }
      if (backward) {
        if (keep) expect("a", got.kept, at, act(g.activation, h_in[at]), 1e-6 * (1 + std::fabs(h_in[at])));
        v *= act_slope(g.activation, h_in[at]);
        sum[m / kGemmTile] += v;
        sum_size[m / kGemmTile] += slack * 2;
      }
      expect("out", got.out, at, v, 2 * slack);
    }
    for (int t = 0; t < gemm_row_tiles(M) && sums; ++t)
      expect("sums", got.sums, size_t(t) * N + n, sum[t], sum_size[t] + 1e-6 * std::fabs(sum[t]));
  }
}

// Only the last block of a (3,000,000, 1000) output runs: its offsets, and those of a and h, lie beyond 2^31.
void test_huge() {
  const int M = 3000000, N = 1000, K = 1000;
  auto *a = reserve<__half>(int64_t(M) * K), *h = reserve<__half>(int64_t(M) * N), *out = reserve<__half>(int64_t(M) * N);
  auto* b = reserve<__half>(int64_t(N) * K);
  a[int64_t(M) * K - 1] = 3.f;
  b[int64_t(N) * K - 1] = 2.f;
  Gemm g{};
  g.dtype = DType::f16;
  g.M = M, g.N = N, g.K = K;
  g.a = {a, K, true}, g.b = {b, K, true};
  g.activation = Activation::relu;
  g.h = h, g.out = out;
  emu::config.only_block = int64_t(gemm_row_tiles(M)) * gemm_row_tiles(N) - 1;
  const int64_t last = int64_t(M) * N - 1;
  for (int capability : {80, 90}) {
    out[last] = h[last] = 0.f;
    if (gemm(g, capability, nullptr) != cudaSuccess) throw Mismatch("refused");
    if (float(out[last]) != 6.f || float(h[last]) != 6.f) throw Mismatch("WRONG huge product");
  }
}

}  // namespace

int main(int argc, char** argv) { return run_driver(argc, argv, test, test_huge); }
