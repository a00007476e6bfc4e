#pragma once
// Products of a few rows with a weight matrix, for decoding: every weight is read once, in the order of memory.
//   y[m, n] = sum_k w[n, k] x[m, k]        w (rows, K) and x (M, K) contiguous; y (M, rows), contiguous
// The bits of an element depend on its own row of w and of x alone, not on `rows`, M or the number of threads.
#include <cstdint>

#include "cpu/isa.h"

namespace llmfast::cpu {

template <typename W, typename X>
using Gemv = void (*)(const W* w, int64_t rows, int64_t K, const X* x, int64_t M, float* y);

struct GemvTable {
  Gemv<float, float> f32;
  Gemv<uint16_t, float> bf16;
  // Integer products, exact up to the last sum: -127 <= w <= 127 and x from `quantize`. The caller multiplies by the scales.
  Gemv<int8_t, int16_t> int8;
  // q = x / scale, rounded, in [-32767, 32767]. Returns the scale, which is not finite where x is not.
  float (*quantize)(const float* x, int64_t K, int16_t* q);
};

}  // namespace llmfast::cpu

LLMFAST_DECLARE_SIMD(GemvTable, gemv)
