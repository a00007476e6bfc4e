#pragma once
#include <cstdint>

#include "cpu/gemm.h"
#include "cpu/isa.h"
#include "cpu/philox.h"

namespace llmfast::cpu {

// y = (s - mean(s)) rstd w + b with s = residual + dropout(branch), over the rows of contiguous (rows, n) arrays.
struct LayerNormForward {
  int64_t n;
  float eps;
  const float *w, *b;     // (n,), or null; b only beside w
  const void* residual;   // of s_dtype
  const void* branch;     // of branch_dtype; null: s is the residual
  Dropout dropout;
  void* s;                // of s_dtype, may be the residual; written only with a branch
  void* y;                // of y_dtype
  float *mean, *rstd;     // (rows,), written
  Dtype s_dtype, branch_dtype, y_dtype;
};

// ds = ds_in + the gradient of s through y; dbranch = ds, dropped out as branch was.
struct LayerNormBackward {
  int64_t n;
  const float* w;         // (n,), or null
  const void* dy;         // of y_dtype
  const void* s;          // of s_dtype
  const float *mean, *rstd;
  const void* ds_in;      // of s_dtype: the gradient that reaches s beside y's; or null
  void* ds;               // of s_dtype; may be ds_in, and dy where the dtypes are one
  void* dbranch;          // of branch_dtype; null: not wanted
  Dropout dropout;
  float *dw, *db;         // (n,), written; null: not wanted; dw only beside w, db only beside dw
  Dtype s_dtype, branch_dtype, y_dtype;
};

// On PyTorch's threads; the bits do not depend on their number.
void layer_norm_forward(const LayerNormForward& a, int64_t rows);
void layer_norm_backward(const LayerNormBackward& a, int64_t rows);

struct LayerNormTable {
  // Rows [row0, row1). backward adds to dw and db.
  void (*forward)(const LayerNormForward& a, int64_t row0, int64_t row1);
  void (*backward)(const LayerNormBackward& a, int64_t row0, int64_t row1);
  // out[i] = sum over c < count of part[c * stride + i], for i in [begin, end).
  void (*sum_rows)(const float* part, int64_t count, int64_t stride, int64_t begin, int64_t end, float* out);
};

}  // namespace llmfast::cpu

LLMFAST_DECLARE_SIMD(LayerNormTable, layer_norm)
