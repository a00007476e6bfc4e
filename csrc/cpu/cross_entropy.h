#pragma once
#include <cstdint>

#include "cpu/isa.h"

namespace llmfast::cpu {

// Row kernels of the cross-entropy for logits z of type T (float, or bfloat16 as uint16_t): V columns, `stride` elements
// from row to row. s: label smoothing.
template <typename T>
struct CrossEntropyRows {
  // For rows [row0, row1): losses[r] = lse(z) - (1 - s) z[target[r]] - s mean(z). With weights, z becomes its gradient,
  // weights[r] (softmax(z) - (1 - s) onehot(target[r]) - s / V), and its columns [V, stride) become 0.
  void (*losses)(T* z, int64_t stride, int64_t V, const int64_t* target, const float* weights, double s, float* losses,
                 int64_t row0, int64_t row1);
  // sums[c] += sum of z[r][c] over r < rows, for columns c in [column0, column1).
  void (*add_columns)(const T* z, int64_t stride, int64_t rows, float* sums, int64_t column0, int64_t column1);
};

struct CrossEntropyTable {
  CrossEntropyRows<float> f32;
  CrossEntropyRows<uint16_t> bf16;
};

}  // namespace llmfast::cpu

LLMFAST_DECLARE_SIMD(CrossEntropyTable, cross_entropy)
