#pragma once
#include "cuda/dialect.h"

namespace llmfast::cuda {

enum class Activation { none, gelu_tanh, gelu, relu };

// a = act(h), n contiguous elements of dtype.
cudaError_t activation_forward(DType dtype, Activation activation, const void* h, void* a, int64_t n, cudaStream_t stream);
// dh *= act'(h) and, where given, a = act(h).
cudaError_t activation_backward(DType dtype, Activation activation, const void* h, void* dh, void* a, int64_t n,
                                cudaStream_t stream);

}  // namespace llmfast::cuda
