#pragma once
// What the products of csrc/cuda/gemm.h do with their accumulators. Those of a thread are fragments of mma_m16n8k16:
// acc[i][l][2 half + e] is the element (row0 + 16 i + 8 half, column0 + 8 l + e), row0 and column0 those of the first.
#include "cuda/gemm.h"
#include "cuda/math.h"

namespace llmfast::cuda {

enum class Epilogue { plain, activate, activate_backward };

// Elements (row, column) and (row, column + 1) of a matrix of N columns, as float; zeros outside.
template <typename T>
__device__ inline void load_pair(const T* from, int64_t at, int column, int N, float (&v)[2]) {
#pragma unroll
  for (int e = 0; e < 2; ++e) v[e] = column + e < N ? float(from[at + e]) : 0.f;
}

template <typename T>
__device__ inline void store_pair(T* to, int64_t at, int column, int N, const float (&v)[2]) {
  if (sizeof(T) == 2 && N % 2 == 0) {  // then `at` is even
    if (column < N) *reinterpret_cast<Pack<T, 2>*>(to + at) = {{T(v[0]), T(v[1])}};
    return;
  }
#pragma unroll
  for (int e = 0; e < 2; ++e)
    if (column + e < N) to[at + e] = T(v[e]);
}

// Makes what is asked for of the product v at (row, column) and (row, column + 1), and stores it; sums += what was stored.
template <typename T, Epilogue kEpilogue>
__device__ inline void finish_pair(const Gemm& g, int row, int column, const float (&bias)[2], float (&v)[2], float (&sums)[2]) {
  const int64_t at = int64_t(row) * g.N + column;
#pragma unroll
  for (int e = 0; e < 2; ++e) v[e] += bias[e];
  if constexpr (kEpilogue == Epilogue::activate) {
    if (g.h) store_pair(static_cast<T*>(g.h), at, column, g.N, v);
#pragma unroll
    for (int e = 0; e < 2; ++e) v[e] = activate(g.activation, v[e]);
  }
  if constexpr (kEpilogue == Epilogue::activate_backward) {
    float h[2];
    load_pair(static_cast<const T*>(g.h), at, column, g.N, h);
    const float act[2] = {activate(g.activation, h[0]), activate(g.activation, h[1])};
    if (g.act) store_pair(static_cast<T*>(g.act), at, column, g.N, act);
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      v[e] *= activate_backward(g.activation, h[e]);
      sums[e] += v[e];
    }
  }
  store_pair(static_cast<T*>(g.out), at, column, g.N, v);
}

// Dropout of the accumulators.
template <int kRows, int kColumns>
__device__ inline void drop(const Dropout& dropout, int row0, int column0, float (&acc)[kRows][kColumns][4]) {
  static_assert(kRows * kColumns == 16);
  const uint64_t seed = uint64_t(*dropout.seed);
  unsigned bits[2] = {};
#pragma unroll 1
  for (int i = 0; i < 16; ++i)  // rolled: sixteen times the generator would be longer than the rest of the kernel
#pragma unroll
    for (int half = 0; half < 2; ++half)
      bits[half] |= kept<2>(seed, dropout.drop, row0 + 16 * (i / kColumns) + 8 * half, column0 + 8 * (i % kColumns)) << 2 * i;
#pragma unroll
  for (int i = 0; i < 64; ++i)
    if (!(bits[i >> 1 & 1] >> (i / 4 * 2 + (i & 1)) & 1)) acc[i / 4 / kColumns][i / 4 % kColumns][i % 4] = 0.f;
}

// Finishes and stores all of them; sums: of what the thread has stored, by column.
template <typename T, Epilogue kEpilogue, int kRows, int kColumns>
__device__ inline void finish(const Gemm& g, int row0, int column0, const float (&acc)[kRows][kColumns][4],
                              float (&sums)[kColumns][2]) {
#pragma unroll
  for (int l = 0; l < kColumns; ++l) {
    const int column = column0 + 8 * l;
    float bias[2] = {};
    if (g.bias) load_pair(static_cast<const T*>(g.bias), column, column, g.N, bias);
#pragma unroll
    for (int i = 0; i < kRows; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = row0 + 16 * i + 8 * half;
        if (row >= g.M) continue;
        float v[2] = {acc[i][l][2 * half], acc[i][l][2 * half + 1]};
        finish_pair<T, kEpilogue>(g, row, column, bias, v, sums[l]);
      }
  }
}

// The sums of a warp, over the 8 rows of its fragments, for its 8 kColumns columns.
template <int kColumns>
__device__ inline void sum_over_warp(const float (&sums)[kColumns][2], float* out) {
  const int lane = threadIdx.x & 31;
#pragma unroll
  for (int l = 0; l < kColumns; ++l)
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      float s = sums[l][e];
      for (int offset = 4; offset < 32; offset *= 2) s += __shfl_xor_sync(~0u, s, offset);
      if (lane < 4) out[8 * l + lane * 2 + e] = s;
    }
}

// The row and column of the block's tile: tiles are numbered in groups of 8 rows, so that blocks that run together share
// operands in L2.
__device__ inline void tile_of(const Gemm& g, int& row_tile, int& column_tile) {
  constexpr int kGroup = 8;
  const int rows = (g.M + kGemmTile - 1) / kGemmTile, columns = (g.N + kGemmTile - 1) / kGemmTile;
  const int first = int(blockIdx.x) / (kGroup * columns) * kGroup, place = int(blockIdx.x) % (kGroup * columns);
  const int height = rows - first < kGroup ? rows - first : kGroup;
  row_tile = first + place % height;
  column_tile = place / height;
}

}  // namespace llmfast::cuda
