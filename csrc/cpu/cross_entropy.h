#pragma once
#include <cstdint>

#include "cpu/isa.h"

namespace llmfast::cpu {

// What the cross-entropy does to a block of logits between its products. A block is some words of the vocabulary by n rows
// of x: z[word * stride + row], so that a row's sums run down a column, in all lanes of a vector at once. T is float, or
// bfloat16 as uint16_t.
template <typename T>
struct CrossEntropyBlock {
  // z += bias[word] where there is one; top = max(z), sum = sum of exp(z - top), total = sum of z (where not null), each (n,);
  // e = exp(z - top) where not null, of z's stride and maybe z itself.
  void (*exponentials)(float* z, int64_t stride, int64_t words, int64_t n, const float* bias, T* e, float* top, float* sum,
                       float* total);
  // e = factor[row] e - shift[row]; shift may be null.
  void (*scale)(T* e, int64_t stride, int64_t words, int64_t n, const float* factor, const float* shift);
  // sums[word] += the sum of e over the rows.
  void (*add_rows)(const T* e, int64_t stride, int64_t words, int64_t n, float* sums);
  void (*store)(T* e, float value);
};

struct CrossEntropyTable {
  CrossEntropyBlock<float> f32;
  CrossEntropyBlock<uint16_t> bf16;
  // Of all blocks together, from tops and sums (blocks, stride): top and sum (n,); tops become exp(tops - top).
  void (*combine)(float* tops, const float* sums, int64_t stride, int64_t blocks, int64_t n, float* top, float* sum);
};

}  // namespace llmfast::cpu

LLMFAST_DECLARE_SIMD(CrossEntropyTable, cross_entropy)
