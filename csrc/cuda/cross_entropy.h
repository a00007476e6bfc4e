#pragma once
#include "cuda/dialect.h"

namespace llmfast::cuda {

// Logits z (rows, V) of `dtype`, row r from z + r * stride on, and the rows' targets in [0, V).
struct SoftmaxGradient {
  DType dtype;
  void* z;
  const void* bias;       // (V,) of `dtype`, or null: z + bias are the logits
  const int64_t* target;  // (rows,)
  const float* scale;     // (rows,), or null: z stays as it is
  float* loss;            // (rows,)
  int64_t rows, stride;
  int V;
  float smoothing;
};

// loss = lse(z) - (1 - s) z[t] - s mean(z), and in place z = scale (softmax(z) - (1 - s) onehot(t) - s / V), s: smoothing.
cudaError_t softmax_gradient(const SoftmaxGradient& a, cudaStream_t stream);

}  // namespace llmfast::cuda
