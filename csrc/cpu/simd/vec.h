#pragma once
// Vectors of the instruction set at hand, by the compilers' vector extensions, one source for all; intrinsics only where the
// compilers find no good instruction by themselves.
//
// Files of this folder are compiled once per instruction set. Everything in them but the tables lives in an anonymous
// namespace and no header of the standard library with inline functions is included: else the linker could hand an
// AVX-512 copy of a shared function to a CPU that has none.
#if defined(__AVX2__)
#include <immintrin.h>
#endif
#include <math.h>
#include <stdint.h>
#include <string.h>

namespace llmfast::cpu {
namespace {

#if defined(__AVX512F__)
inline constexpr int kLanes = 16;
#elif defined(__AVX2__)
inline constexpr int kLanes = 8;
#else
inline constexpr int kLanes = 4;
#endif
typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Bits __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));

// Lanes of two vectors: lane l of the result is lane from[l] of a, or lane from[l] - kLanes of b. `from` is a constant.
template <typename V>
inline __attribute__((always_inline)) V shuffle(V a, V b, Bits from) {
#if defined(__clang__)
  V v;
  for (int l = 0; l < kLanes; ++l) v[l] = from[l] < kLanes ? a[from[l]] : b[from[l] - kLanes];
  return v;
#else
  return __builtin_shuffle(a, b, from);
#endif
}

// Full vectors. A kernel is written once over Wide and One (for the rest of a row), see for_row.
struct Wide {
  using F = Vec;
  static constexpr int width = kLanes;
  static Vec load(const float* p) {
    Vec v;
    memcpy(&v, p, sizeof v);
    return v;
  }
  static Vec load(const uint16_t* p) {  // bfloat16: the upper half of a float
#if defined(__AVX2__) && !defined(__AVX512F__)  // one instruction, of which GCC 12 makes four
    const Bits wide = (Bits)_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
    Halves h;
    memcpy(&h, p, sizeof h);
    const Bits wide = __builtin_convertvector(h, Bits);
#endif
    const Bits b = wide << 16;
    Vec v;
    memcpy(&v, &b, sizeof v);
    return v;
  }
  static void store(float* p, Vec v) { memcpy(p, &v, sizeof v); }
  static void store(uint16_t* p, Vec v) {  // round to nearest, ties to even; a NaN stays one
#if defined(__AVX512BF16__)
    const __m256bh h = _mm512_cvtneps_pbh((__m512)v);
    memcpy(p, &h, sizeof h);
#else
    Bits b;
    memcpy(&b, &v, sizeof v);
    const Bits rounded = (b + 0x7FFF + ((b >> 16) & 1)) >> 16;
    const Bits nan = (Bits)(v != v);
    const Halves h = __builtin_convertvector((rounded & ~nan) | (nan & 0x7FC0), Halves);
    memcpy(p, &h, sizeof h);
#endif
  }
};

struct One {
  using F = float;
  static constexpr int width = 1;
  static float load(const float* p) { return *p; }
  static float load(const uint16_t* p) {
    const uint32_t b = uint32_t(*p) << 16;
    float v;
    memcpy(&v, &b, sizeof v);
    return v;
  }
  static void store(float* p, float v) { *p = v; }
  static void store(uint16_t* p, float v) {
    uint32_t b;
    memcpy(&b, &v, sizeof v);
    *p = v != v ? 0x7FC0 : uint16_t((b + 0x7FFF + ((b >> 16) & 1)) >> 16);
  }
};

// The sum of a vector's lanes, by halves.
typedef float Quad __attribute__((vector_size(16)));
inline float across(Vec v) {
  Quad q[kLanes / 4];
  memcpy(q, &v, sizeof q);
  for (int half = kLanes / 8; half; half /= 2)
    for (int i = 0; i < half; ++i) q[i] += q[i + half];
  return (q[0][0] + q[0][2]) + (q[0][1] + q[0][3]);
}

// A sum over a row: `Accumulators` chains of vectors hide the latency of an addition, one float takes the rest.
template <int Accumulators>
struct Sum {
  Vec wide[Accumulators] = {};
  float one = 0.f;
  void add(int slot, Vec v) { wide[slot] += v; }
  void add(int, float v) { one += v; }
  float total() const {
    Vec v = wide[0];
    for (int a = 1; a < Accumulators; ++a) v += wide[a];
    return across(v) + one;
  }
};

// f(lanes, i, slot) over i in [begin, end): `Unroll` slots of full vectors at a time, then single ones, then floats.
template <int Unroll, typename F>
inline __attribute__((always_inline)) void for_row(int64_t begin, int64_t end, F f) {
  int64_t i = begin;
  for (; i + Unroll * kLanes <= end; i += Unroll * kLanes)
#pragma GCC unroll 8
    for (int slot = 0; slot < Unroll; ++slot) f(Wide(), i + slot * kLanes, slot);
  for (; i + kLanes <= end; i += kLanes) f(Wide(), i, 0);
  for (; i < end; ++i) f(One(), i, 0);
}

}  // namespace
}  // namespace llmfast::cpu
