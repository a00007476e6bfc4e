#pragma once
// How products are cut into blocks, for all that compose the kernels of gemm_kernels.h.
#include <algorithm>
#include <cstdint>

#include "cpu/gemm_kernels.h"

namespace llmfast::cpu {

constexpr int64_t kMacsPerThread = 1 << 17;  // a second thread must bring more than it costs

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// Elements along K of a block of a product M x N: a multiple of 16 units, in equal parts.
inline int64_t block_depth(const GemmKernels& kernels, int64_t M, int64_t N, int64_t K) {
  constexpr int64_t kUnits = 1024;     // a panel of it stays in the second cache
  constexpr int64_t kSmallC = 1 << 14;  // below, blocks are short: there, a library sums in short chains too
  const int64_t units = std::max<int64_t>(ceil_div(K, kernels.depth), 1);
  const int64_t longest = M * N <= kSmallC ? kernels.short_units : kUnits;
  return round_up(ceil_div(units, ceil_div(units, longest)), 16) * kernels.depth;
}

}  // namespace llmfast::cpu
