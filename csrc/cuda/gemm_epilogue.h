#pragma once
// What the products of csrc/cuda/gemm.h do with their accumulators, two neighbouring columns at a time.
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
  for (int e = 0; e < 2; ++e) v[e] = v[e] * g.factor + bias[e];
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
  if (kEpilogue == Epilogue::plain && g.out_float)
    store_pair(static_cast<float*>(g.out) + int64_t(blockIdx.z) * g.M * g.N, at, column, g.N, v);
  else
    store_pair(static_cast<T*>(g.out), at, column, g.N, v);
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
