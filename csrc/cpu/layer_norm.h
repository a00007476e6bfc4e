#pragma once
#include <cstdint>

#include "cpu/isa.h"

namespace llmfast::cpu {

// Row kernels of LayerNorm for x of type T (float, or bfloat16 as uint16_t): rows [row0, row1) of contiguous (rows, n)
// arrays. w, b: float (n,) or null; b only beside w.
template <typename T>
struct LayerNormRows {
  void (*forward)(const T* x, const float* w, const float* b, T* y, float* mean, float* rstd, int64_t row0, int64_t row1,
                  int64_t n, float eps);
  // Writes dx and adds to dw (n,), null where w is, and to db (n,), which may be null.
  void (*backward)(const T* dy, const T* x, const float* w, const float* mean, const float* rstd, T* dx, float* dw,
                   float* db, int64_t row0, int64_t row1, int64_t n);
};

struct LayerNormTable {
  LayerNormRows<float> f32;
  LayerNormRows<uint16_t> bf16;
  // out[i] = sum over c < count of part[c * stride + i], for i in [begin, end).
  void (*sum_rows)(const float* part, int64_t count, int64_t stride, int64_t begin, int64_t end, float* out);
};

}  // namespace llmfast::cpu

LLMFAST_DECLARE_SIMD(LayerNormTable, layer_norm)
