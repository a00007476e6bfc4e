#pragma once
// Functions of F = Vec or float for the kernels of this folder. A NaN stays one.
#include "cpu/simd/vec.h"

#if defined(__AVX512F__)
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

template <typename F>
inline F at_least(F x, float low) {
  return x < low ? F{} + low : x;
}
template <typename F>
inline F at_most(F x, float high) {
  return x > high ? F{} + high : x;
}

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

// Of the standard normal distribution: its density times sqrt(2 pi), and its upper tail 1 - cdf(z) = erfc(z / sqrt(2)) / 2
// with relative error 4e-6, for 0 <= z <= 13.
template <typename F>
struct NormalTail {
  F density, tail;
  explicit NormalTail(F z) {
    density = exp_bounded(z * z * -0.5f);
    const F t = 1.f / (z * 0.28f + 1.f);
    F p = t * 2.2497296e-2f - 8.1914753e-2f;  // minimax of tail / density, relative error 5.1e-8
    p = p * t + 6.6735116e-2f;
    p = p * t + 2.4384931e-2f;
    p = p * t + 5.0768096e-2f;
    p = p * t + 9.3162191e-2f;
    p = p * t + 1.0064677e-1f;
    p = p * t + 1.1203557e-1f;
    p = p * t + 1.1168481e-1f;
    tail = density * (p * t);
  }
};

}  // namespace
}  // namespace llmfast::cpu
