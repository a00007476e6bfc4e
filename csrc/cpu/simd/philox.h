#pragma once
// The dropout masks of csrc/cpu/philox.h, 2 kLanes neighbouring columns at a time.
#include "cpu/philox.h"
#include "cpu/simd/vec.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace llmfast::cpu {
namespace {

constexpr int kDropoutStep = 2 * kLanes;
typedef uint64_t Bits64 __attribute__((vector_size(4 * kLanes)));

// Products of the lower halves of the lanes.
inline Bits64 multiply_low(Bits64 a, Bits64 b) {
#if defined(__AVX512F__)
  return (Bits64)_mm512_maskz_mul_epu32(0xFF, (__m512i)a, (__m512i)b);  // the plain one warns in GCC 12
#elif defined(__AVX2__)
  return (Bits64)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
  return (Bits64)_mm_mul_epu32((__m128i)a, (__m128i)b);
#else
  return (a & 0xFFFFFFFF) * (b & 0xFFFFFFFF);
#endif
}

// The 32-bit words of columns [column, column + kDropoutStep); column is a multiple of 4.
inline void philox_words(uint64_t seed, int64_t row, int64_t column, Bits words[2]) {
  uint64_t numbers[kLanes / 2];
  for (int l = 0; l < kLanes / 2; ++l) numbers[l] = uint64_t(l);
  Bits64 c0;
  memcpy(&c0, numbers, sizeof c0);
  c0 += uint64_t(column) / 4;
  // A counter's 32-bit word lies in the lower half of its lane; the upper half is rubbish that no product reads.
  Bits64 c3 = c0 >> 32, c1 = Bits64{} + (uint64_t(row) & 0xFFFFFFFF), c2 = Bits64{} + (uint64_t(row) >> 32);
  uint32_t key0 = uint32_t(seed), key1 = uint32_t(seed >> 32);
#pragma GCC unroll 10
  for (int round = 0; round < Philox::rounds; ++round) {
    const Bits64 p0 = multiply_low(c0, Bits64{} + Philox::multiplier0);
    const Bits64 p1 = multiply_low(c2, Bits64{} + Philox::multiplier1);
    c0 = (p1 >> 32) ^ c1 ^ key0;
    c1 = p1;
    c2 = (p0 >> 32) ^ c3 ^ key1;
    c3 = p0;
    key0 += Philox::weyl0;
    key1 += Philox::weyl1;
  }
  const Bits64 first = (c0 & 0xFFFFFFFF) | (c1 << 32), second = (c2 & 0xFFFFFFFF) | (c3 << 32);
  uint64_t a[kLanes / 2], b[kLanes / 2], pairs[kLanes];
  memcpy(a, &first, sizeof a);
  memcpy(b, &second, sizeof b);
  for (int l = 0; l < kLanes / 2; ++l) {
    pairs[2 * l] = a[l];
    pairs[2 * l + 1] = b[l];
  }
  memcpy(words, pairs, sizeof pairs);
}

// d.scale where an element stays, 0 where it is dropped.
inline Vec dropout_factor(const Dropout& d, Bits words) {
  const Vec scale = Vec{} + d.scale;
  Bits bits;
  memcpy(&bits, &scale, sizeof bits);
  bits &= (Bits)(words >= d.drop);
  Vec factor;
  memcpy(&factor, &bits, sizeof factor);
  return factor;
}

// f(lanes, i, factor) for the columns i in [begin, end) of a row: as for_row, with the factor of dropout (0 or d.scale).
// begin is a multiple of 4.
template <typename F>
inline __attribute__((always_inline)) void for_dropout(const Dropout& d, int64_t row, int64_t begin, int64_t end, F f) {
  Bits words[2];
  int64_t i = begin;
  for (; i + kDropoutStep <= end; i += kDropoutStep) {
    philox_words(d.seed, row, i, words);
    f(Wide(), i, dropout_factor(d, words[0]));
    f(Wide(), i + kLanes, dropout_factor(d, words[1]));
  }
  if (i == end) return;
  philox_words(d.seed, row, i, words);
  const Vec factors[2] = {dropout_factor(d, words[0]), dropout_factor(d, words[1])};
  float rest[kDropoutStep];
  memcpy(rest, factors, sizeof rest);
  const int64_t start = i;
  if (i + kLanes <= end) {
    f(Wide(), i, factors[0]);
    i += kLanes;
  }
  for (; i < end; ++i) f(One(), i, rest[i - start]);
}

}  // namespace
}  // namespace llmfast::cpu
