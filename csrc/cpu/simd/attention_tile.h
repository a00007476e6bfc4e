#pragma once
// What attention's blocks need beyond tile.h: sums that stay float32 in scratch, panels wider than the tile, pairs of rows.
#include "cpu/simd/math.h"
#include "cpu/simd/tile.h"

namespace llmfast::cpu {
namespace {

inline int64_t round_up(int64_t n, int64_t multiple) { return ceil_div(n, multiple) * multiple; }

// The unit that elements of type T are multiplied in, and the type that P and dS are rounded to for it.
template <typename T>
struct UnitFor {
  using type = FloatUnit;
};
#if defined(__AVX512BF16__)
template <>
struct UnitFor<uint16_t> {
  using type = Pairs;
};
#endif
template <int Depth>
struct ElementForDepth {
  using type = float;
};
template <>
struct ElementForDepth<2> {
  using type = uint16_t;
};
template <typename Unit>
using ElementOf = typename ElementForDepth<Unit::depth>::type;

// v in the first n lanes, n >= 0, and `rest` in the others.
inline Vec first_lanes(Vec v, int64_t n, float rest = 0.f) {
  Bits lane;
  for (int l = 0; l < kLanes; ++l) lane[l] = uint32_t(l);
  return lane < uint32_t(n) ? v : Vec{} + rest;
}

// v, a product that is not to be fused with the sum it goes into.
inline Vec rounded(Vec v) {
#if defined(__x86_64__)
  asm("" : "+v"(v));
#elif defined(__aarch64__)
  asm("" : "+w"(v));
#endif
  return v;
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

// One unit of each of kLanes columns, from `Unit::depth` rows.
template <typename Unit>
inline void store_unit(float* to, const Vec* rows) {
  Bits unit = bits_of(rows[0]);
  if constexpr (Unit::depth == 2) unit = bf16_bits(rows[0]) | bf16_bits(rows[1]) << 16;
  memcpy(to, &unit, sizeof unit);
}

// Rows of D elements, one after the other, in whole units.
template <typename Unit, typename T>
void copy_rows(const T* from, int64_t stride, int64_t rows, int64_t D, uint32_t* to) {
  const int64_t units = ceil_div(D, Unit::depth);
  for (int64_t r = 0; r < rows; ++r, from += stride, to += units)
    for (int64_t u = 0; u < units; u += kLanes) {
      const Bits b = Unit::along_k(from + u * Unit::depth, D - u * Unit::depth);
      memcpy(to + u, &b, size_t(smaller(kLanes, units - u)) * sizeof(uint32_t));
    }
}

// C (MR, Vecs vectors) [+]= A B over `units`: unit u of row i of A at a[i * row_step + u * unit_step], B's vectors of it at
// b[u * b_step].
template <typename Unit, int MR, int Vecs>
void float_tile(int64_t units, const uint32_t* a, int64_t row_step, int64_t unit_step, const uint32_t* b, int64_t b_step,
                float* c, int64_t c_step, bool add) {
  Vec sums[MR][Vecs] = {};
  for (int64_t u = 0; u < units; ++u, a += unit_step, b += b_step) {
    Bits bu[Vecs];
#pragma GCC unroll 4
    for (int j = 0; j < Vecs; ++j) memcpy(&bu[j], b + j * kLanes, sizeof bu[j]);
#pragma GCC unroll 8
    for (int i = 0; i < MR; ++i) {
      const Bits unit = Bits{} + a[i * row_step];
#pragma GCC unroll 4
      for (int j = 0; j < Vecs; ++j) sums[i][j] = Unit::multiply_add(sums[i][j], unit, bu[j]);
    }
  }
  // Added only now: a long sum over many blocks then rounds once a block, not once a term.
#pragma GCC unroll 8
  for (int i = 0; i < MR; ++i, c += c_step)
#pragma GCC unroll 4
    for (int j = 0; j < Vecs; ++j) Wide::store(c + j * kLanes, add ? Wide::load(c + j * kLanes) + sums[i][j] : sums[i][j]);
}

template <typename Unit>
struct FloatTiles {
  using Tile = void (*)(int64_t, const uint32_t*, int64_t, int64_t, const uint32_t*, int64_t, float*, int64_t, bool);
  template <int Vecs>
  static Tile of(int64_t rows) {
    static constexpr Tile tiles[kTileRows] = {float_tile<Unit, 1, Vecs>, float_tile<Unit, 2, Vecs>,
                                              float_tile<Unit, 3, Vecs>, float_tile<Unit, 4, Vecs>,
                                              float_tile<Unit, 5, Vecs>, float_tile<Unit, 6, Vecs>};
    return tiles[rows - 1];
  }
  // For 1 to kTileRows rows, 1 to kTileVecs vectors.
  static Tile of(int64_t rows, int64_t vecs) {
    if constexpr (kTileVecs == 4) {
      if (vecs == 4) return of<4>(rows);
      if (vecs == 3) return of<3>(rows);
    }
    return vecs == 2 ? of<2>(rows) : of<1>(rows);
  }
};

}  // namespace
}  // namespace llmfast::cpu
