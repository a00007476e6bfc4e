// lora_linear CASES SEED [DTYPE]: random passes of csrc/cuda/lora_linear.cu over a matrix, for either product or both, against
// float64, each under two schedules and with early and late copies, which must agree bit for bit. lora_linear huge: offsets
// beyond 2^31.
#include "cuda/lora_linear.h"

#include "driver.h"

namespace {

void test(DType any) {
  const DType dtype = any == DType::f32 ? DType::bf16 : any;
  const bool even = pick(0, 1);  // whole chunks everywhere
  const auto size = [&](int most) { return even ? 8 * pick(1, most / 8) : pick(1, most); };
  const int rows = size(400), columns = size(400), makes = pick(1, 3), shift = even || pick(0, 1) ? 0 : 1;
  const bool makes_p = makes & 1, makes_q = makes & 2;
  const int rank = size(makes == 3 ? kOnePassRank : pick(0, 2) ? 20 : 140);
  LowRank a{dtype, nullptr, rows, columns, rank};
  a.rank_first = pick(0, 1);
  const int64_t seed = int64_t(pick(0, 1 << 30)) << 20;
  if (pick(0, 1)) a.dropout = make_dropout(&seed, 0.1 * pick(1, 9));
  a.factor = 0.25f * pick(1, 8);
  Buffer x(dtype, size_t(rows) * columns, 1, shift), v(dtype, size_t(columns) * rank, 1), u(dtype, size_t(rows) * rank, 1);
  a.x = x.data();
  if (makes_p) a.v = v.data();
  if (makes_q) a.u = u.data();
  share_out(a, makes_p, makes_q, pick(0, 1) ? 1 : pick(2, 6));  // one: shares that fill every stage

  struct Result {
    Buffer p, q;
  };
  const auto run = [&](unsigned schedule, bool late) {
    emu::config.seed = schedule;
    emu::config.late_copies = late;
    Result r{Buffer(DType::f32, makes_p ? size_t(a.column_shares) * rows * rank : 0),
             Buffer(DType::f32, makes_q ? size_t(a.row_shares) * columns * rank : 0)};
    LowRank now = a;
    if (makes_p) now.p = r.p.floats();
    if (makes_q) now.q = r.q.floats();
    if (low_rank(now, nullptr) != cudaSuccess) throw Mismatch("refused");
    return r;
  };
  const bool late = pick(0, 1);
  Result got = run(0, late), again = run(1 + pick(0, 1 << 20), !late);
  same("p", got.p, again.p);
  same("q", got.q, again.q);

  std::vector<double> xs(x.n);
  for (int i = 0; i < rows; ++i)
    for (int j = 0; j < columns; ++j) {
      const bool stays = !a.dropout.seed || kept<1>(seed, a.dropout.drop, i, j);
      xs[size_t(i) * columns + j] = stays ? x[size_t(i) * columns + j] : 0;
    }
  // of v and q, which lie alike
  const auto place = [&](int column, int k) { return a.rank_first ? size_t(k) * columns + column : size_t(column) * rank + k; };
  const auto add_shares = [](Buffer& shares, size_t n) {
    for (size_t i = n; i < shares.n; ++i) shares.at<float>(i % n) += shares.at<float>(i);
  };
  add_shares(got.p, size_t(rows) * rank);
  add_shares(got.q, size_t(columns) * rank);
  for (int k = 0; k < rank; ++k) {
    for (int i = 0; i < rows && makes_p; ++i) {
      double want = 0, most = 0;
      for (int j = 0; j < columns; ++j) {
        const double term = xs[size_t(i) * columns + j] * v[place(j, k)] * a.factor;
        want += term, most += std::fabs(term);
      }
      expect("p", got.p, size_t(i) * rank + k, want, 1e-6 * (most + 1));
    }
    for (int j = 0; j < columns && makes_q; ++j) {
      double want = 0, most = 0;
      for (int i = 0; i < rows; ++i) {
        const double term = xs[size_t(i) * columns + j] * u[size_t(i) * rank + k];
        want += term, most += std::fabs(term);
      }
      expect("q", got.q, place(j, k), want, 1e-6 * (most + 1));
    }
  }
}

// Only the last block of a (3,000,000, 1000) matrix runs: its offsets, and those of the shares of p, lie beyond 2^31.
void test_huge() {
  const int rows = 3000000, columns = 1000, rank = 16;
  auto *x = reserve<__half>(int64_t(rows) * columns), *u = reserve<__half>(int64_t(rows) * rank);
  auto* v = reserve<__half>(int64_t(columns) * rank);
  const int64_t last_x = int64_t(rows) * columns - 1, last_u = int64_t(rows) * rank - 1, last_v = int64_t(columns) * rank - 1;
  x[last_x] = 3.f;
  u[last_u] = 2.f;
  v[last_v] = 5.f;
  LowRank a{DType::f16, x, rows, columns, rank};
  a.v = v, a.u = u;
  share_out(a, true, true, 1 << 20);
  const int64_t last_p = int64_t(a.column_shares) * rows * rank - 1, last_q = int64_t(a.row_shares) * columns * rank - 1;
  a.p = reserve<float>(last_p + 1), a.q = reserve<float>(last_q + 1);
  emu::config.only_block = int64_t(a.row_shares) * a.column_shares - 1;
  if (low_rank(a, nullptr) != cudaSuccess) throw Mismatch("refused");
  if (a.p[last_p] != 15.f || a.q[last_q] != 6.f) throw Mismatch("WRONG huge product");
}

}  // namespace

int main(int argc, char** argv) { return run_driver(argc, argv, test, test_huge); }
