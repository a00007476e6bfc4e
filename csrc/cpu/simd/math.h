#pragma once
// Functions of F = Vec or float for the kernels of this folder. A NaN stays one.
#include "cpu/simd/vec.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace llmfast::cpu {
namespace {

inline Bits to_bits(Vec v) {
  Bits b;
  memcpy(&b, &v, sizeof v);
  return b;
}
inline uint32_t to_bits(float v) {
  uint32_t b;
  memcpy(&b, &v, sizeof v);
  return b;
}
inline Vec from_bits(Bits b) {
  Vec v;
  memcpy(&v, &b, sizeof v);
  return v;
}
inline float from_bits(uint32_t b) {
  float v;
  memcpy(&v, &b, sizeof v);
  return v;
}

// The larger and the smaller of two; the compilers do not find the instruction by themselves.
inline Vec at_least(Vec x, float low) {
#if defined(__AVX512F__)
  return (Vec)_mm512_maskz_max_ps(0xFFFF, _mm512_set1_ps(low), (__m512)x);  // the plain one warns in GCC 12
#elif defined(__AVX2__)
  return (Vec)_mm256_max_ps(_mm256_set1_ps(low), (__m256)x);
#else
  return x < low ? Vec{} + low : x;
#endif
}
inline Vec at_most(Vec x, float high) {
#if defined(__AVX512F__)
  return (Vec)_mm512_maskz_min_ps(0xFFFF, _mm512_set1_ps(high), (__m512)x);
#elif defined(__AVX2__)
  return (Vec)_mm256_min_ps(_mm256_set1_ps(high), (__m256)x);
#else
  return x > high ? Vec{} + high : x;
#endif
}
inline float at_least(float x, float low) { return x < low ? low : x; }
inline float at_most(float x, float high) { return x > high ? high : x; }

inline Vec magnitude(Vec x) { return from_bits(to_bits(x) & 0x7FFFFFFF); }
inline float magnitude(float x) { return fabsf(x); }

// exp(x) = mantissa 2^n with x = n log(2) + r and |r| <= log(2) / 2, for |x| < 2^21. Adding 1.5 2^23 rounds to an integer
// and leaves it in the lowest bits.
template <typename F>
struct SplitExp {
  static constexpr float shift = 12582912.f;
  F shifted, mantissa;
  explicit SplitExp(F x) {
    shifted = x * 1.44269504f + shift;
    const F n = shifted - shift;
    const F r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // log(2) in two parts, the first times n exact
    F p = r * 1.3813145e-3f + 8.3694188e-3f;                  // minimax, relative error 3.3e-9
    p = p * r + 4.1668456e-2f;
    p = p * r + 1.6666515e-1f;
    p = p * r + 4.9999994e-1f;
    mantissa = (p * r + 1.f) * r + 1.f;
  }
};

// exp(x) to 1.5 ulp for |x| <= 87.3, where neither it nor its reciprocal is infinite or denormal.
template <typename F>
inline F exp_bounded(F x) {
  const SplitExp<F> s(x);
  return from_bits(to_bits(s.mantissa) + (to_bits(s.shifted) << 23));
}

template <typename F>
inline F scale_by_power(const SplitExp<F>& s) {
  // In two steps of half the exponent each, since 2^n alone may not be a number where the product is.
  const auto n = (to_bits(s.shifted) & 0x7FFFFF) - (0x400000 - 512), half = n >> 1;  // both plus an offset, to be unsigned
  return s.mantissa * from_bits((half - 256 + 127) << 23) * from_bits((n - half - 256 + 127) << 23);
}
#if defined(__AVX512F__)
inline Vec scale_by_power(const SplitExp<Vec>& s) {
  return (Vec)_mm512_maskz_scalef_ps(0xFFFF, (__m512)s.mantissa, (__m512)(s.shifted - s.shift));
}
#endif

// exp(x) to 1.5 ulp for every x: 0 at -infinity, denormals where it is one.
template <typename F>
inline F exp_any(F x) {
  return scale_by_power(SplitExp<F>(at_most(at_least(x, -104.f), 89.f)));
}

// 2^x with relative error 2e-7, for |x| <= 126.
template <typename F>
inline F exp2_bounded(F x) {
  constexpr float shift = 12582912.f;
  const F shifted = x + shift, f = x - (shifted - shift);
  F p = f * 1.3263358e-3f + 9.6725812e-3f;  // minimax, relative error 9.7e-8
  p = p * f + 5.5507466e-2f;
  p = p * f + 2.4022226e-1f;
  p = p * f + 6.9314694e-1f;
  return from_bits(to_bits(p * f + 1.f) + (to_bits(shifted) << 23));
}

// Of the standard normal distribution: its density times sqrt(2 pi), and its upper tail 1 - cdf(z) = erfc(z / sqrt(2)) / 2
// with error 6e-8, for 0 <= z <= 13.
template <typename F>
struct NormalTail {
  F density, tail;
  explicit NormalTail(F z) {
    density = exp2_bounded(z * z * -0.72134752f);
    const F t = 1.f / (z * 0.28f + 1.f);
    F p = t * -1.0632829e-1f + 3.9206591e-1f;  // minimax of tail / density, weighted by z density: error 1.1e-8
    p = p * t - 2.4066774e-1f;
    p = p * t + 2.7197093e-1f;
    p = p * t + 6.6230066e-2f;
    p = p * t + 1.1672904e-1f;
    tail = density * (p * t);
  }
};

}  // namespace
}  // namespace llmfast::cpu
