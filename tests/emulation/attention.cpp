// attention CASES SEED [DTYPE]: random cases of csrc/cuda/attention_*.cu against float64, each under two schedules, which
// must agree bit for bit. attention huge: offsets beyond 2^31.
#include "cuda/attention.h"

#include "driver.h"

namespace {

// A (B, H, T, D) array of one of the layouts that a model has, alone in its memory, to the last element.
struct Array {
  Buffer buffer;
  int64_t batch, head, row, first;
  Array(DType dtype, int B, int H, int T, int D, int layout, float scale)
      : buffer(dtype, size_t(B) * H * T * D * (layout == 2 ? 3 : 1), scale), batch(int64_t(H) * T * D), head(int64_t(T) * D),
        row(D), first(0) {
    if (layout) batch = int64_t(T) * H * D, head = D, row = int64_t(H) * D;  // (B, T, H, D)
    if (layout == 2) batch *= 3, row *= 3, first = pick(0, 2) * int64_t(H) * D;  // a third of a packed (B, T, 3, H, D)
  }
  size_t at(int b, int h, int t, int d) const { return size_t(first + b * batch + h * head + t * row + d); }
  double operator()(int b, int h, int t, int d) { return buffer[at(b, h, t, d)]; }
  template <typename H>
  H heads() {
    return {static_cast<unsigned char*>(buffer.data()) + first * buffer.size(), batch, head, row};
  }
};

struct Result {
  Array out, dq, dk, dv;
  Buffer lse, delta;
};


void test(DType dtype) {
  const bool several = !pick(0, 2);  // tiles of keys, so that each place in shared memory is written again
  const int B = several ? 1 : pick(1, 2), H = several ? 1 : pick(1, 2), D = 8 * (pick(0, 2) ? pick(4, 16) : pick(1, 16));
  const int Tk = several ? pick(70, 260) : pick(1, 70);
  const int longer = several || pick(0, 1) ? pick(1, 20) : pick(128, 150);  // whole blocks of queries without keys
  const int Tq = pick(0, 1) ? Tk : pick(0, 2) ? pick(1, Tk) : Tk + longer;
  const float scale = pick(0, 5) ? 1.f / std::sqrt(float(D)) : (pick(0, 2) - 1) * 0.2f;
  const int64_t seed = int64_t(pick(0, 1 << 30)) << 33 | pick(0, 1 << 30);
  const Dropout dropout = pick(0, 2) ? Dropout{} : make_dropout(&seed, pick(1, 9) * 0.1);
  std::vector<int64_t> kv_lens, doc_ids;
  const int capability = pick(0, 1) ? 80 : 90;
  if (!pick(0, capability == 90 ? 5 : 1))  // with lengths it is never Hopper's kernel
    for (int b = 0; b < B; ++b) kv_lens.push_back(pick(0, 1) ? pick(0, Tk) : 0);
  if (!pick(0, 2))
    for (int b = 0; b < B; ++b)
      for (int j = 0, doc = 0; j < Tk; ++j) doc_ids.push_back((doc += !pick(0, 20)) + (int64_t(1) << 40));
  const int layout = pick(0, 2);
  Array q(dtype, B, H, Tq, D, layout, 1), k(dtype, B, H, Tk, D, layout, 1), v(dtype, B, H, Tk, D, layout, 1),
      dout(dtype, B, H, Tq, D, pick(0, 1), 1);
  // What lies beyond a row's length is never read as a number.
  for (size_t b = 0; b < kv_lens.size(); ++b)
    for (int h = 0; h < H; ++h)
      for (int j = int(kv_lens[b]); j < Tk; ++j)
        for (int d = 0; d < D; ++d) {
          k.buffer.set(k.at(int(b), h, j, d), NAN);
          v.buffer.set(v.at(int(b), h, j, d), NAN);
        }
  const Attention a{dtype, B, H, Tq, Tk, D, scale, dropout, kv_lens.empty() ? nullptr : kv_lens.data(),
                    doc_ids.empty() ? nullptr : doc_ids.data(), q.heads<Heads>(), k.heads<Heads>(), v.heads<Heads>()};
  const auto run = [&](unsigned schedule) {
    emu::config.seed = schedule;
    emu::config.late_copies = schedule != 1;  // in any order from 2 on
    const auto empty = [&](int T) { return Array(dtype, B, H, T, D, 1, 0); };
    const size_t rows = size_t(B) * H * Tq;
    Result r{empty(Tq), empty(Tq), empty(Tk), empty(Tk), Buffer(DType::f32, rows), Buffer(DType::f32, rows)};
    attention_forward({a, r.out.heads<MutableHeads>(), r.lse.floats()}, capability, nullptr);
    const auto expect_choice = [&] {
      const bool hopper = emu::machine.kernel.find("sm90") != std::string::npos;
      if (hopper != (capability == 90 && dtype != DType::f32 && kv_lens.empty())) throw Mismatch("WRONG choice of a kernel");
    };
    expect_choice();
    attention_backward({a, r.out.heads<Heads>(), dout.heads<Heads>(), r.lse.floats(), r.delta.floats(),
                        r.dq.heads<MutableHeads>(), r.dk.heads<MutableHeads>(), r.dv.heads<MutableHeads>()},
                       capability, nullptr);
    expect_choice();
    return r;
  };
  Result got = run(0), again = run(pick(0, 2) ? 2 + pick(0, 1 << 20) : 1);

  // Roundings: of the weights and of ds to the type, and of the type's own inputs to a product.
  const double unit = dtype == DType::f32 ? 4e-6 : dtype == DType::f16 ? 0x1p-10 : 0x1p-7;
  for (int b = 0; b < B; ++b)
    for (int h = 0; h < H; ++h) {
      const int keys = kv_lens.empty() ? Tk : int(kv_lens[b]);
      std::vector<double> dk(size_t(Tk) * D), dv(dk.size()), size_dk(dk.size()), size_dv(dk.size());
      for (int i = 0; i < Tq; ++i) {
        const int own = i + Tk - Tq;
        std::vector<double> p(Tk), stays(Tk, 1), s(Tk);
        double top = -INFINITY, total = 0;
        const auto sees = [&](int j) {
          return j <= own && j < keys && (doc_ids.empty() || doc_ids[b * Tk + j] == doc_ids[b * Tk + own]);
        };
        for (int j = 0; j < Tk; ++j) {
          if (!sees(j)) continue;
          for (int d = 0; d < D; ++d) s[j] += q(b, h, i, d) * k(b, h, j, d) * scale;
          top = std::max(top, s[j]);
          if (dropout.seed)
            stays[j] = kept<1>(seed, dropout.drop, (int64_t(b * H + h) << 32) + i, j) ? double(dropout.scale) : 0.0;
        }
        for (int j = 0; j < Tk; ++j) total += sees(j) ? p[j] = std::exp(s[j] - top) : 0;
        for (int j = 0; j < Tk && total; ++j) p[j] /= total;
        const size_t row = size_t(b * H + h) * Tq + i;
        if (total)
          expect("lse", got.lse, row, top + std::log(total), 2e-6 * (std::fabs(top) + 10));
        else if (got.lse[row] != INFINITY)
          throw Mismatch("WRONG lse of a query without keys");
        std::vector<double> dp(Tk);
        double delta = 0, most = 0;
        for (int d = 0; d < D; ++d) {
          double out = 0, size = 0;
          for (int j = 0; j < Tk; ++j)
            if (sees(j)) {
              out += p[j] * stays[j] * v(b, h, j, d);
              size += p[j] * stays[j] * std::fabs(v(b, h, j, d));
              dp[j] += dout(b, h, i, d) * v(b, h, j, d) * stays[j];
              most += std::fabs(dout(b, h, i, d) * v(b, h, j, d)) * stays[j] * p[j];
            }
          expect("out", got.out.buffer, got.out.at(b, h, i, d), out, unit * size + 1e-7);
          delta += out * dout(b, h, i, d);
        }
        std::vector<double> dq(D), size_dq(D);
        for (int j = 0; j < Tk; ++j) {
          if (!sees(j)) continue;
          // delta comes from a rounded out, p from the lse: errors in proportion to p.
          const double ds = p[j] * (dp[j] - delta), size = p[j] * (std::fabs(dp[j]) + std::fabs(delta) + most);
          for (int d = 0; d < D; ++d) {
            dq[d] += ds * k(b, h, j, d) * scale;
            size_dq[d] += size * std::fabs(k(b, h, j, d) * scale);
            dk[size_t(j) * D + d] += ds * q(b, h, i, d) * scale;
            size_dk[size_t(j) * D + d] += size * std::fabs(q(b, h, i, d) * scale);
            dv[size_t(j) * D + d] += p[j] * stays[j] * dout(b, h, i, d);
            size_dv[size_t(j) * D + d] += p[j] * stays[j] * std::fabs(dout(b, h, i, d));
          }
        }
        for (int d = 0; d < D; ++d) expect("dq", got.dq.buffer, got.dq.at(b, h, i, d), dq[d], unit * size_dq[d] + 1e-7);
      }
      for (int j = 0; j < Tk; ++j)
        for (int d = 0; d < D; ++d) {
          const size_t e = size_t(j) * D + d;
          expect("dk", got.dk.buffer, got.dk.at(b, h, j, d), dk[e], unit * size_dk[e] + 1e-7);
          expect("dv", got.dv.buffer, got.dv.at(b, h, j, d), dv[e], unit * size_dv[e] + 1e-7);
        }
    }
  same("out", got.out.buffer, again.out.buffer);
  same("lse", got.lse, again.lse);
  same("dq", got.dq.buffer, again.dq.buffer);
  same("dk", got.dk.buffer, again.dk.buffer);
  same("dv", got.dv.buffer, again.dv.buffer);
}

// The last head alone runs, once in arrays whose offsets lie beyond 2^31 elements and once in compact ones.
void compare_huge(int capability, int B, int T, int64_t row, int64_t batch) {
  constexpr int D = 64;
  const int64_t end = (B - 1) * batch + T * row;
  const auto run = [&](bool huge, std::vector<uint16_t>& out, std::vector<uint16_t>& gradients) {
    const int heads = huge ? B : 1;
    const int64_t size = huge ? end : int64_t(T) * D, step = huge ? row : D, to_batch = huge ? batch : 0;
    const int64_t first = (heads - 1) * to_batch;  // of the last head
    const auto array = [&] { return reserve<__nv_bfloat16>(size); };
    __nv_bfloat16 *q = array(), *k = array(), *v = array(), *o = array(), *dout = array(), *dq = array(), *dk = array(),
                  *dv = array();
    rng.seed(5);
    for (__nv_bfloat16* p : {q, k, v, dout})
      for (int t = 0; t < T; ++t)
        for (int d = 0; d < D; ++d) p[first + t * step + d] = float(pick(-100, 100)) / 64;
    float *lse = reserve<float>(int64_t(heads) * T), *delta = reserve<float>(int64_t(heads) * T);
    const auto read = [&](const void* p) { return Heads{p, to_batch, 0, step}; };
    const auto write = [&](void* p) { return MutableHeads{p, to_batch, 0, step}; };
    const Attention a{DType::bf16, heads, 1, T, T, D, 0.125f, {}, nullptr, nullptr, read(q), read(k), read(v)};
    emu::config.only_block = heads - 1;
    attention_forward({a, write(o), lse}, capability, nullptr);
    attention_backward({a, read(o), read(dout), lse, delta, write(dq), write(dk), write(dv)}, capability, nullptr);
    for (int t = 0; t < T; ++t)
      for (int d = 0; d < D; ++d) {
        const int64_t at = first + t * step + d;
        out.push_back(o[at].bits);
        for (__nv_bfloat16* p : {dq, dk, dv}) gradients.push_back(p[at].bits);
      }
    for (void* p : {q, k, v, o, dout, dq, dk, dv}) munmap(p, size * 2);
    munmap(lse, int64_t(heads) * T * 4);
    munmap(delta, int64_t(heads) * T * 4);
  };
  std::vector<uint16_t> out, gradients, want, want_gradients;
  run(true, out, gradients);
  run(false, want, want_gradients);
  const auto nonzero = [](uint16_t x) { return x & 0x7FFF; };
  if (std::count_if(want.begin(), want.end(), nonzero) < T * D / 2) throw Mismatch("WRONG: the compact result is zero");
  if (out != want || gradients != want_gradients) throw Mismatch("WRONG huge result");
}

void test_huge() {
  for (int capability : {80, 90}) {
    compare_huge(capability, 1, 100, int64_t(1) << 25, 0);       // rows
    compare_huge(capability, (1 << 24) - 1, 128, 64, 128 * 64);  // heads, and rows of lse and delta
  }
}

}  // namespace

int main(int argc, char** argv) { return run_driver(argc, argv, test, test_huge); }
