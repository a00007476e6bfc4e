#pragma once
// Register tiles: the inner product of every matrix product on the CPU, and the packing of its operands.
//
// B is packed in panels of up to kTileVecs vectors of columns, one row of 32-bit units for every step along K; A is read
// in place, or packed. A unit is one float, or, where the CPU multiplies bfloat16, a pair of them that are neighbours along
// K. Without such instructions a bfloat16 product rounds its operands to bfloat16 and multiplies them as floats.
#include "cpu/simd/vec.h"

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace llmfast::cpu {
namespace {

inline constexpr int kTileRows = 6;
#if defined(__AVX512F__)
inline constexpr int kTileVecs = 4;  // 24 of 32 registers hold sums
#else
inline constexpr int kTileVecs = 2;  // 12 of 16
#endif
inline constexpr int kPanel = kTileVecs * kLanes;

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline Bits bits_of(Vec v) {
  Bits b;
  memcpy(&b, &v, sizeof b);
  return b;
}
inline Vec vec_of(Bits b) {
  Vec v;
  memcpy(&v, &b, sizeof v);
  return v;
}

// bfloat16 (to nearest, ties to even) in the lower half of every lane.
inline Bits bf16_bits(Vec v) {
#if defined(__AVX512BF16__)
  return __builtin_convertvector((Halves)_mm512_cvtneps_pbh((__m512)v), Bits);
#else
  const Bits b = bits_of(v), rounded = (b + 0x7FFF + ((b >> 16) & 1)) >> 16, nan = (Bits)(v != v);
  return (rounded & ~nan) | (nan & 0x7FC0);
#endif
}

// The first n of kLanes elements, zeros behind them.
#if defined(__AVX512F__)
inline Vec load_first(const float* p, int64_t n) {
  if (n >= kLanes) return Wide::load(p);
  return (Vec)_mm512_maskz_loadu_ps(__mmask16((1u << n) - 1), p);
}
inline Vec load_first(const uint16_t* p, int64_t n) {
  if (n >= kLanes) return Wide::load(p);
  const auto halves = (Halves)_mm256_maskz_loadu_epi16(__mmask16((1u << n) - 1), p);
  return vec_of(__builtin_convertvector(halves, Bits) << 16);
}
#else
template <typename T>
inline Vec load_first(const T* p, int64_t n) {
  if (n >= kLanes) return Wide::load(p);
  T padded[kLanes] = {};
  for (int64_t i = 0; i < n; ++i) padded[i] = p[i];
  return Wide::load(padded);
}
#endif

// ---- Units -----------------------------------------------------------------------------------------------------------

// Products of floats. Rounded: of floats that are first rounded to bfloat16.
template <bool Rounded>
struct Floats {
  static constexpr int depth = 1;  // elements along K in a unit
  template <typename T>
  static constexpr bool in_place = sizeof(T) == 4 && !Rounded;  // A may be read where it lies

  static Vec rounded(Vec v, const float*) { return Rounded ? vec_of(bf16_bits(v) << 16) : v; }
  static Vec rounded(Vec v, const uint16_t*) { return v; }

  // kLanes units of a row whose elements are neighbours along K, of which n elements are there.
  template <typename T>
  static Bits along_k(const T* p, int64_t n) {
    return bits_of(rounded(load_first(p, n), p));
  }
  // kLanes columns of one unit: of `depth` rows (here one), `rows` of which are there.
  template <typename T>
  static Bits across(const T* p, int64_t, int64_t, int64_t n) {
    return bits_of(rounded(load_first(p, n), p));
  }
  static Vec multiply_add(Vec sum, Bits a, Bits b) { return sum + vec_of(a) * vec_of(b); }
};

#if defined(__AVX512BF16__)
// Products of pairs of bfloat16, the even element in the lower half.
struct Pairs {
  static constexpr int depth = 2;
  template <typename T>
  static constexpr bool in_place = sizeof(T) == 2;

  static Bits along_k(const uint16_t* p, int64_t n) {
    Bits b = {};
    if (n >= 2 * kLanes) {
      memcpy(&b, p, sizeof b);
    } else {
      uint16_t padded[2 * kLanes] = {};
      for (int64_t i = 0; i < n; ++i) padded[i] = p[i];
      memcpy(&b, padded, sizeof b);
    }
    return b;
  }
  static Bits along_k(const float* p, int64_t n) {
    return (Bits)_mm512_cvtne2ps_pbh((__m512)load_first(p + (n > kLanes ? kLanes : 0), n - kLanes < 0 ? 0 : n - kLanes),
                                     (__m512)load_first(p, n));
  }
  static Bits half(const uint16_t* p, int64_t n) { return bits_of(load_first(p, n)) >> 16; }
  static Bits half(const float* p, int64_t n) { return bf16_bits(load_first(p, n)); }
  template <typename T>
  static Bits across(const T* p, int64_t stride, int64_t rows, int64_t n) {
    const Bits even = half(p, n);
    return rows > 1 ? even | half(p + stride, n) << 16 : even;
  }
  static Vec multiply_add(Vec sum, Bits a, Bits b) {
    return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
  }
};
using BfloatUnit = Pairs;
#else
using BfloatUnit = Floats<true>;
#endif
using FloatUnit = Floats<false>;

// ---- Packing ---------------------------------------------------------------------------------------------------------

// rows[i][j] <-> rows[j][i], by exchanging blocks of 1, 2, 4, ... lanes.
template <int Step>
inline __attribute__((always_inline)) void exchange(Bits* rows) {
  Bits low, high;  // a: the first vector, a + kLanes: the second
  for (int l = 0; l < kLanes; ++l) {
    low[l] = uint32_t((l & Step) ? kLanes + (l ^ Step) : l);
    high[l] = uint32_t((l & Step) ? kLanes + l : (l ^ Step));
  }
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    if (i & Step) continue;
    const Bits a = rows[i], b = rows[i + Step];
    rows[i] = shuffle(a, b, low);
    rows[i + Step] = shuffle(a, b, high);
  }
}

inline void transpose(Bits* rows) {
  exchange<1>(rows);
  exchange<2>(rows);
  if constexpr (kLanes >= 8) exchange<4>(rows);
  if constexpr (kLanes >= 16) exchange<8>(rows);
}

// Columns [0, n) of B, k elements deep, from p[column * stride + k]: to[unit * width + column], width a multiple of kLanes,
// zeros where B has ended.
template <typename Unit, typename T>
void pack_transposed(const T* p, int64_t stride, int64_t n, int64_t k, int64_t width, uint32_t* to) {
  const int64_t units = ceil_div(k, Unit::depth);
  for (int64_t column = 0; column < width; column += kLanes)
    for (int64_t unit = 0; unit < units; unit += kLanes) {
      Bits rows[kLanes];
      const int64_t left = k - unit * Unit::depth;
      for (int i = 0; i < kLanes; ++i)
        rows[i] = column + i < n ? Unit::along_k(p + (column + i) * stride + unit * Unit::depth, left) : Bits{};
      transpose(rows);
      const int64_t count = smaller(kLanes, units - unit);
      for (int64_t i = 0; i < count; ++i) memcpy(to + (unit + i) * width + column, &rows[i], sizeof rows[i]);
    }
}

// The same from p[k * stride + column].
template <typename Unit, typename T>
void pack_rows(const T* p, int64_t stride, int64_t n, int64_t k, int64_t width, uint32_t* to) {
  const int64_t units = ceil_div(k, Unit::depth);
  for (int64_t unit = 0; unit < units; ++unit)
    for (int64_t column = 0; column < width; column += kLanes) {
      const int64_t row = unit * Unit::depth;
      const Bits b = column < n ? Unit::across(p + row * stride + column, stride, k - row, n - column) : Bits{};
      memcpy(to + unit * width + column, &b, sizeof b);
    }
}

// kTileRows rows of A, k elements deep, from p[k * stride + row]: to[unit * kTileRows + row]. `rows` are left in A, fewer
// or more than that.
template <typename Unit, typename T>
inline void pack_tile(const T* p, int64_t stride, int64_t rows, int64_t k, uint32_t* to) {
  constexpr int64_t spill = kLanes > kTileRows ? ceil_div(kLanes - kTileRows, kTileRows) : 0;
  for (; k > 0; k -= Unit::depth, p += Unit::depth * stride, to += kTileRows)
#pragma GCC unroll 2
    for (int i = 0; i < kTileRows; i += kLanes) {
      const Bits b = i < rows ? Unit::across(p + i, stride, k, rows - i) : Bits{};
      // A long vector may spill into the next units, which are yet to come.
      if (i + kLanes <= kTileRows || (spill && k > spill * Unit::depth))
        memcpy(to + i, &b, sizeof b);
      else
        memcpy(to + i, &b, kTileRows % kLanes * sizeof(uint32_t));
    }
}

// One row of A, k elements from p on, unit by unit.
template <typename Unit, typename T>
inline void pack_row(const T* p, int64_t k, uint32_t* to) {
  for (; k >= kLanes * Unit::depth; k -= kLanes * Unit::depth, p += kLanes * Unit::depth, to += kLanes) {
    const Bits b = Unit::along_k(p, k);
    memcpy(to, &b, sizeof b);
  }
  if (k > 0) {
    const Bits b = Unit::along_k(p, k);
    for (int64_t i = 0; i < ceil_div(k, Unit::depth); ++i) to[i] = b[i];
  }
}

// ---- Tiles -----------------------------------------------------------------------------------------------------------

// Where the units of A lie, in bytes: row m, unit u at base + m * row + u * unit.
struct Rows {
  const char* base;
  int64_t row, unit;
};

// What a tile does with its sums; residual and c may be the same.
struct Store {
  void* c;
  int64_t c_stride;
  bool accumulate;
  const float* bias;
  const float* residual;
  int64_t residual_stride;
};

// The end of a tile whose last columns are not there.
template <typename C>
__attribute__((noinline)) void store_ragged(const float* sums, int64_t rows, int64_t width, int64_t n, const Store& out) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < n; ++j) {
      float v = sums[i * width + j];
      C* c = static_cast<C*>(out.c) + i * out.c_stride + j;
      if (out.accumulate) v += One::load(c);
      if (out.bias) v += out.bias[j];
      if (out.residual) v += out.residual[i * out.residual_stride + j];
      One::store(c, v);
    }
}

// C (MR, n) of one panel of Vecs vectors, `units` deep.
template <typename Unit, int MR, int Vecs, typename C>
void tile(const Rows& a, const uint32_t* panel, int64_t units, int64_t n, const Store& out) {
  Vec sums[MR][Vecs];
#pragma GCC unroll 8
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < Vecs; ++j) sums[i][j] = Vec{};
  if (out.accumulate)  // what will be added to may lie far away
    for (int i = 0; i < MR; ++i)
      for (int j = 0; j < Vecs * kLanes; j += 64 / int(sizeof(C)))
        __builtin_prefetch(static_cast<C*>(out.c) + i * out.c_stride + j, 1);
  const char *top = a.base, *low = a.base + 3 * a.row;
  const int64_t row = a.row, step = a.unit;
  for (int64_t u = 0; u < units; ++u) {
    Bits b[Vecs];
#pragma GCC unroll 4
    for (int j = 0; j < Vecs; ++j) {
      memcpy(&b[j], panel + j * kLanes, sizeof b[j]);
      __builtin_prefetch(panel + j * kLanes + 8 * Vecs * kLanes);
    }
#pragma GCC unroll 8
    for (int i = 0; i < MR; ++i) {
      uint32_t unit;
      memcpy(&unit, i < 3 ? top + i * row : low + (i - 3) * row, sizeof unit);
      const Bits broadcast = Bits{} + unit;
#pragma GCC unroll 4
      for (int j = 0; j < Vecs; ++j) sums[i][j] = Unit::multiply_add(sums[i][j], broadcast, b[j]);
    }
    top += step;
    low += step;
    panel += Vecs * kLanes;
  }
  if (n < Vecs * kLanes) {
    float whole[MR * Vecs * kLanes];
    memcpy(whole, sums, sizeof whole);
    return store_ragged<C>(whole, MR, Vecs * kLanes, n, out);
  }
#pragma GCC unroll 8
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < Vecs; ++j) {
      const int64_t column = j * kLanes;
      Vec v = sums[i][j];
      C* c = static_cast<C*>(out.c) + i * out.c_stride + column;
      if (out.accumulate) v += Wide::load(c);
      if (out.bias) v += Wide::load(out.bias + column);
      if (out.residual) v += Wide::load(out.residual + i * out.residual_stride + column);
      Wide::store(c, v);
    }
}

template <typename Unit, int Vecs, typename C>
inline void tile_rows(int64_t rows, const Rows& a, const uint32_t* panel, int64_t units, int64_t n, const Store& out) {
  switch (rows) {
    case 6: return tile<Unit, 6, Vecs, C>(a, panel, units, n, out);
    case 5: return tile<Unit, 5, Vecs, C>(a, panel, units, n, out);
    case 4: return tile<Unit, 4, Vecs, C>(a, panel, units, n, out);
    case 3: return tile<Unit, 3, Vecs, C>(a, panel, units, n, out);
    case 2: return tile<Unit, 2, Vecs, C>(a, panel, units, n, out);
    default: return tile<Unit, 1, Vecs, C>(a, panel, units, n, out);
  }
}

// C (rows <= kTileRows, n <= width) of one panel `width` wide.
template <typename Unit, typename C>
inline void multiply_tile(int64_t rows, int64_t n, int64_t width, const Rows& a, const uint32_t* panel, int64_t units,
                          const Store& out) {
  switch (width / kLanes) {
#if defined(__AVX512F__)
    case 4: return tile_rows<Unit, 4, C>(rows, a, panel, units, n, out);
    case 3: return tile_rows<Unit, 3, C>(rows, a, panel, units, n, out);
#endif
    case 2: return tile_rows<Unit, 2, C>(rows, a, panel, units, n, out);
    default: return tile_rows<Unit, 1, C>(rows, a, panel, units, n, out);
  }
}

}  // namespace
}  // namespace llmfast::cpu
