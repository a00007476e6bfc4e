#pragma once
// Packing and products of attention's blocks, see attention.cpp.
#include "cpu/simd/vec.h"
#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace llmfast::cpu {
namespace {

constexpr int64_t kTileRows = 6;
#if defined(__AVX512F__)
constexpr int kTileVecs = 4;  // of 32 vector registers
#else
constexpr int kTileVecs = 2;  // of 16
#endif
constexpr int64_t kPanel = kTileVecs * kLanes;

constexpr int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

struct Floats {
  using Element = float;
  static constexpr int unit = 1;
  static Vec fma(Vec sum, uint32_t a, Vec b) {
    float f;
    memcpy(&f, &a, sizeof f);
    return sum + f * b;
  }
  static void store_rows(float* to, const Vec* rows, int64_t) { Wide::store(to, rows[0]); }
};

#if defined(__AVX512BF16__)
struct Pairs {
  using Element = uint16_t;
  static constexpr int unit = 2;
  static Vec fma(Vec sum, uint32_t a, Vec b) {
    return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(int(a)), (__m512bh)b);
  }
  // Pairs (rows[0][j], rows[1][j]), at the place of the first row of floats.
  static void store_rows(float* to, const Vec* rows, int64_t) {
    const Bits low = __builtin_convertvector((Halves)_mm512_cvtneps_pbh((__m512)rows[0]), Bits);
    const Bits high = __builtin_convertvector((Halves)_mm512_cvtneps_pbh((__m512)rows[1]), Bits);
    const Bits both = low | high << 16;
    memcpy(to, &both, sizeof both);
  }
};
template <typename T>
struct ComputeFor {
  using type = Pairs;
};
#else
template <typename T>
struct ComputeFor {
  using type = Floats;
};
#endif
template <>
struct ComputeFor<float> {
  using type = Floats;
};
template <typename T>
using ComputeOf = typename ComputeFor<T>::type;

// ---- Vectors ----

inline Vec first_lanes(Vec v, int64_t n) {
  if (n >= kLanes) return v;
  Bits index;
  for (int l = 0; l < kLanes; ++l) index[l] = uint32_t(l);
  const Bits keep = (Bits)(index < uint32_t(n < 0 ? 0 : n));
  Bits bits;
  memcpy(&bits, &v, sizeof v);
  bits &= keep;
  memcpy(&v, &bits, sizeof v);
  return v;
}

inline float sum_of(Vec v) {
  float s[kLanes];
  memcpy(s, &v, sizeof v);
  for (int half = kLanes / 2; half; half /= 2)
    for (int l = 0; l < half; ++l) s[l] += s[l + half];
  return s[0];
}

// The largest of start and x[0, n) * scale.
inline float max_of(const float* x, int64_t n, float scale, float start) {
  Vec top = Vec{} + start;
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes) {
    const Vec v = Wide::load(x + j) * scale;
    top = v > top ? v : top;
  }
  float s[kLanes];
  memcpy(s, &top, sizeof top);
  for (; j < n; ++j) s[0] = x[j] * scale > s[0] ? x[j] * scale : s[0];
  for (int l = 1; l < kLanes; ++l) s[0] = s[l] > s[0] ? s[l] : s[0];
  return s[0];
}

inline Vec exponential(Vec x) {
  const Vec low = Vec{} - 87.f;
  const Vec c = x > low ? x : low;
  const Vec t = c * 1.44269504f, magic = Vec{} + 12582912.f, n = (t + magic) - magic, f = c - n * 0.693359375f + n * 2.12194440e-4f;
  Vec p = Vec{} + 1.9875691500e-4f;
  p = p * f + 1.3981999507e-3f;
  p = p * f + 8.3334519073e-3f;
  p = p * f + 4.1665795894e-2f;
  p = p * f + 1.6666665459e-1f;
  p = p * f + 5.0000001201e-1f;
  p = p * f * f + f + 1.f;
  const Vec k = t + magic;
  Bits e;
  memcpy(&e, &k, sizeof e);
  e = (e + 127) << 23;
  Vec two;
  memcpy(&two, &e, sizeof e);
  return x < low ? Vec{} : x == x ? p * two : x;
}

// ---- Packing ----

inline float as_float(float x) { return x; }
inline float as_float(uint16_t x) { return One::load(&x); }

// Rows of D elements, one word after the other along the row: (rows, depth).
template <typename E, typename T>
void copy_rows(const T* from, int64_t stride, int64_t rows, int64_t D, uint32_t* to) {
  const int64_t depth = round_up(D, E::unit) / E::unit;
  for (int64_t r = 0; r < rows; ++r, from += stride, to += depth) {
    if constexpr (E::unit == 1) {
      for_row<2>(0, D, [&](auto lanes, int64_t i, int) { lanes.store(reinterpret_cast<float*>(to) + i, lanes.load(from + i)); });
    } else {
      if (D % 2) to[depth - 1] = 0;
      memcpy(to, from, size_t(D) * sizeof(T));
    }
  }
}

template <typename E, typename T>
uint32_t word(const T* row, int64_t w, int64_t D) {
  uint32_t bits = 0;
  if constexpr (E::unit == 1) {
    const float f = as_float(row[w]);
    memcpy(&bits, &f, sizeof bits);
  } else {
    bits = row[2 * w] | (2 * w + 1 < D ? uint32_t(row[2 * w + 1]) << 16 : 0);
  }
  return bits;
}

// Panels of kPanel rows, a word of each after the other: (panels, depth, kPanel).
template <typename E, typename T>
void pack_transposed(const T* from, int64_t stride, int64_t rows, int64_t D, uint32_t* to) {
  const int64_t depth = round_up(D, E::unit) / E::unit;
  for (int64_t r0 = 0; r0 < rows; r0 += kPanel, to += kPanel * depth)
    for (int64_t w = 0; w < depth; ++w)
      for (int64_t r = 0; r < kPanel; ++r) to[w * kPanel + r] = r0 + r < rows ? word<E>(from + (r0 + r) * stride, w, D) : 0;
}

// Rows, or pairs of rows: (rows / unit, D in whole vectors).
template <typename E, typename T>
void pack_natural(const T* from, int64_t stride, int64_t rows, int64_t D, uint32_t* to) {
  const int64_t width = round_up(D, kLanes);
  for (int64_t r = 0; r < rows; r += E::unit, to += width, from += E::unit * stride) {
    if constexpr (E::unit == 1) {
      for_row<2>(0, D, [&](auto lanes, int64_t i, int) { lanes.store(reinterpret_cast<float*>(to) + i, lanes.load(from + i)); });
    } else {
      const bool pair = r + 1 < rows;
      int64_t i = 0;
      for (; i + kLanes <= D; i += kLanes) {
        Halves low, high = {};
        memcpy(&low, from + i, sizeof low);
        if (pair) memcpy(&high, from + stride + i, sizeof high);
        const Bits both = __builtin_convertvector(low, Bits) | __builtin_convertvector(high, Bits) << 16;
        memcpy(to + i, &both, sizeof both);
      }
      for (; i < D; ++i) to[i] = from[i] | (pair ? uint32_t(from[stride + i]) << 16 : 0);
    }
    for (int64_t i = D; i < width; ++i) to[i] = 0;
  }
}

// ---- Products ----

template <typename E, int Rows, int Vecs>
void tile_of(int64_t depth, const uint32_t* a, int64_t row_step, int64_t k_step, const uint32_t* b, int64_t b_step,
             float* c, int64_t c_step, bool add) {
  Vec sum[Rows][Vecs];
#pragma GCC unroll 8
  for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < Vecs; ++j) sum[i][j] = add ? Wide::load(c + i * c_step + j * kLanes) : Vec{};
  for (int64_t k = 0; k < depth; ++k, a += k_step, b += b_step) {
    Vec bk[Vecs];
#pragma GCC unroll 4
    for (int j = 0; j < Vecs; ++j) memcpy(&bk[j], b + j * kLanes, sizeof(Vec));
#pragma GCC unroll 8
    for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < Vecs; ++j) sum[i][j] = E::fma(sum[i][j], a[i * row_step], bk[j]);
  }
#pragma GCC unroll 8
  for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < Vecs; ++j) Wide::store(c + i * c_step + j * kLanes, sum[i][j]);
}

// C (rows, vecs vectors) (+)= A B over `depth` words.
template <typename E>
void tile(int64_t rows, int64_t vecs, int64_t depth, const uint32_t* a, int64_t row_step, int64_t k_step,
          const uint32_t* b, int64_t b_step, float* c, int64_t c_step, bool add) {
  using F = void (*)(int64_t, const uint32_t*, int64_t, int64_t, const uint32_t*, int64_t, float*, int64_t, bool);
#define LLMFAST_ROW(V) {tile_of<E, 1, V>, tile_of<E, 2, V>, tile_of<E, 3, V>, tile_of<E, 4, V>, tile_of<E, 5, V>, tile_of<E, 6, V>}
#if defined(__AVX512F__)
  static constexpr F tiles[kTileVecs][kTileRows] = {LLMFAST_ROW(1), LLMFAST_ROW(2), LLMFAST_ROW(3), LLMFAST_ROW(4)};
#else
  static constexpr F tiles[kTileVecs][kTileRows] = {LLMFAST_ROW(1), LLMFAST_ROW(2)};
#endif
#undef LLMFAST_ROW
  tiles[vecs - 1][rows - 1](depth, a, row_step, k_step, b, b_step, c, c_step, add);
}

}  // namespace
}  // namespace llmfast::cpu
