#pragma once
// Packing and products of attention's blocks, see attention.cpp.
#include "cpu/simd/math.h"
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
  static void store(Element* to, Vec v) { Wide::store(to, v); }
  static void store_rows(float* to, const Vec* rows) { Wide::store(to, rows[0]); }
};

#if defined(__AVX512BF16__)
struct Pairs {
  using Element = uint16_t;
  static constexpr int unit = 2;
  static Vec fma(Vec sum, uint32_t a, Vec b) {
    return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(int(a)), (__m512bh)b);
  }
  static Halves rounded(Vec v) { return (Halves)_mm512_cvtneps_pbh((__m512)v); }
  static void store(Element* to, Vec v) {
    const Halves h = rounded(v);
    memcpy(to, &h, sizeof h);
  }
  // Pairs (rows[0][j], rows[1][j]), at the place of the first row of floats.
  static void store_rows(float* to, const Vec* rows) {
    const Bits low = __builtin_convertvector(rounded(rows[0]), Bits), high = __builtin_convertvector(rounded(rows[1]), Bits);
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

// v in the first n lanes, n >= 0, and `rest` in the others.
inline Vec first_lanes(Vec v, int64_t n, float rest = 0.f) {
  Bits lane;
  for (int l = 0; l < kLanes; ++l) lane[l] = uint32_t(l);
  return lane < uint32_t(n) ? v : Vec{} + rest;
}

inline Vec larger(Vec a, Vec b) { return a > b ? a : b; }

// The largest lane.
inline float largest(Vec v) {
  Quad q[kLanes / 4];
  memcpy(q, &v, sizeof q);
  for (int half = kLanes / 8; half; half /= 2)
    for (int i = 0; i < half; ++i) q[i] = q[i] > q[i + half] ? q[i] : q[i + half];
  const float a = q[0][0] > q[0][1] ? q[0][0] : q[0][1], b = q[0][2] > q[0][3] ? q[0][2] : q[0][3];
  return a > b ? a : b;
}

// ---- Packing ----

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

// One stage of transposing a square of words: exchanges the off-diagonal blocks of H x H in rows a and b = a + H.
template <int... Lane>
struct Lanes {
  template <int H>
  static void exchange(Bits& a, Bits& b) {
    const Bits low = __builtin_shufflevector(a, b, (Lane & H ? kLanes + Lane - H : Lane)...);
    b = __builtin_shufflevector(a, b, (Lane & H ? kLanes + Lane : Lane + H)...);
    a = low;
  }
};
#if defined(__AVX512F__)
using AllLanes = Lanes<0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15>;
#elif defined(__AVX2__)
using AllLanes = Lanes<0, 1, 2, 3, 4, 5, 6, 7>;
#else
using AllLanes = Lanes<0, 1, 2, 3>;
#endif

template <int H = kLanes / 2>
inline __attribute__((always_inline)) void transpose(Bits (&rows)[kLanes]) {
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i)
    if (!(i & H)) AllLanes::exchange<H>(rows[i], rows[i + H]);
  if constexpr (H > 1) transpose<H / 2>(rows);
}

// The words [w, w + kLanes) of a row of D elements, zeros behind its end.
template <typename E, typename T>
inline Bits row_words(const T* row, int64_t w, int64_t D) {
  const T* from = row + w * E::unit;
  const int64_t n = D - w * E::unit;
  T rest[kLanes * E::unit];
  if (n < kLanes * E::unit) {
    memset(rest, 0, sizeof rest);
    memcpy(rest, from, size_t(n) * sizeof(T));
    from = rest;
  }
  Bits words;
  if constexpr (E::unit == 1) {
    const Vec v = Wide::load(from);
    memcpy(&words, &v, sizeof v);
  } else {
    memcpy(&words, from, sizeof words);
  }
  return words;
}

// Panels of kPanel rows, a word of each after the other: (panels, depth, kPanel).
template <typename E, typename T>
void pack_transposed(const T* from, int64_t stride, int64_t rows, int64_t D, uint32_t* to) {
  const int64_t depth = round_up(D, E::unit) / E::unit;
  for (int64_t panel = 0; panel < rows; panel += kPanel, to += kPanel * depth)
    for (int64_t part = 0; part < kPanel; part += kLanes)
      for (int64_t w = 0; w < depth; w += kLanes) {
        const int64_t r0 = panel + part;
        Bits square[kLanes];
#pragma GCC unroll 16
        for (int64_t r = 0; r < kLanes; ++r)
          square[r] = r0 + r < rows ? row_words<E>(from + (r0 + r) * stride, w, D) : Bits{};
        transpose(square);
        for (int64_t i = 0; i < kLanes && w + i < depth; ++i) memcpy(to + (w + i) * kPanel + part, &square[i], sizeof(Bits));
      }
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
  Vec sum[Rows][Vecs] = {};
  if (add) {
    const float* from = c;
#pragma GCC unroll 8
    for (int i = 0; i < Rows; ++i, from += c_step)
#pragma GCC unroll 4
      for (int j = 0; j < Vecs; ++j) sum[i][j] = Wide::load(from + j * kLanes);
  }
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
  for (int i = 0; i < Rows; ++i, c += c_step)
#pragma GCC unroll 4
    for (int j = 0; j < Vecs; ++j) Wide::store(c + j * kLanes, sum[i][j]);
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
