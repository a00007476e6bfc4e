#pragma once
#include "cuda/dialect.h"
#include "cuda/philox.h"

namespace llmfast::cuda {

// A row lives in the registers of one block.
inline constexpr int kLayerNormMaxWidth = 8192;

// Contiguous (rows, n) arrays of `dtype`; w and b (n,) may be null (b only beside w), and are float32 if float_parameters, else `dtype`.
struct LayerNormForward {
  DType dtype;
  bool float_parameters;
  const void *x, *w, *b;
  void* y;
  float *mean, *rstd;
  int64_t rows;
  int n;
  float eps;
  const void* residual = nullptr;  // where given, s = residual + dropout(x) is stored, and is what is normalised
  void* s = nullptr;
  Dropout dropout = {};
};

// dw (n,) of w's type is null where w is; db (n,) of w's type may be null. `partial` is scratch: float32 (blocks, n) for
// each of dw and db asked for.
struct LayerNormBackward {
  DType dtype;
  bool float_parameters;
  const void *dy, *x, *w;
  const float *mean, *rstd;
  void *dx, *dw, *db;
  float* partial;
  int64_t rows;
  int n;
  const void* ds = nullptr;  // added to dx: the gradient that reaches the sum beside y's
  void* dropped = nullptr;   // dropout's mask times dx
  Dropout dropout = {};
};

// Blocks that the backward runs on a GPU of `multiprocessors`, and hence the rows of its scratch.
int layer_norm_backward_blocks(int64_t rows, int n, int multiprocessors);

cudaError_t layer_norm_forward(const LayerNormForward& a, int multiprocessors, cudaStream_t stream);
cudaError_t layer_norm_backward(const LayerNormBackward& a, int multiprocessors, cudaStream_t stream);

}  // namespace llmfast::cuda
