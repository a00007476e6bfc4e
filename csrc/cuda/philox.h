#pragma once
// The dropout masks of csrc/cpu/philox.h on a GPU: the same bits for the same seed, row and column.
#include "cuda/dialect.h"

namespace llmfast::cuda {

// seed: one number in the GPU's memory; null where nothing is dropped.
struct Dropout {
  const int64_t* seed = nullptr;
  uint32_t drop = 0;
  float scale = 1.f;
};

// p in [0, 1), rounded to a multiple of 2^-32.
inline Dropout make_dropout(const int64_t* seed, double p) {
  const double two32 = 4294967296.0, drop = p * two32 + 0.5;
  const uint32_t limit = drop >= two32 ? 0xFFFFFFFFu : uint32_t(drop);
  return {seed, limit, float(two32 / (two32 - limit))};
}

#if defined(__CUDACC__) || defined(LLMFAST_EMULATE)
__device__ inline void philox(uint64_t seed, int64_t row, int64_t quad, uint32_t (&words)[4]) {
  uint32_t c0 = uint32_t(quad), c1 = uint32_t(row), c2 = uint32_t(row >> 32), c3 = uint32_t(quad >> 32);
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t(0xD2511F53u) * c0, p1 = uint64_t(0xCD9E8D57u) * c2;
    c0 = uint32_t(p1 >> 32) ^ c1 ^ k0;
    c2 = uint32_t(p0 >> 32) ^ c3 ^ k1;
    c1 = uint32_t(p1);
    c3 = uint32_t(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  words[0] = c0;
  words[1] = c1;
  words[2] = c2;
  words[3] = c3;
}

// Bit i: whether the element (row, column + i) is kept, i < N. N is 1, or column is a multiple of 4 or (N = 2) even.
template <int N>
__device__ inline unsigned kept(uint64_t seed, uint32_t drop, int64_t row, int64_t column) {
  static_assert(N == 1 || N == 2 || N % 4 == 0);
  unsigned bits = 0;
#pragma unroll
  for (int i = 0; i < N; i += 4) {
    uint32_t words[4];
    philox(seed, row, (column + i) >> 2, words);
    const int first = N < 4 ? int(column & 3) : 0;
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      const int at = N < 4 ? w - first : i + w;
      if (at >= 0 && at < N) bits |= unsigned(words[w] >= drop) << at;
    }
  }
  return bits;
}
#endif

}  // namespace llmfast::cuda
