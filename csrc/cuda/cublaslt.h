#pragma once
#include <string>

#include "cuda/dialect.h"

namespace llmfast::cuda {

// One product of cuBLASLt with the tanh-GELU in its epilogue; row-major, contiguous, of dtype (f16, bf16).
struct LtProduct {
  DType dtype;
  int64_t N, M, K;
  const void* x;  // (N, K)
  const void* w;  // forward (M, K), backward (K, M)
  bool backward;
  void* bias;  // (M,): forward read, or null; backward written: the column sums of out, or null
  void* h;     // (N, M): forward written, or null; backward read
  void* out;   // (N, M): gelu(x w^T + bias), or x w * gelu'(h)
};

// "cuBLASLt 12.8.4", or why there is none.
struct LtState {
  bool found;
  std::string text;
};
const LtState& cublaslt_state();

// False where cuBLASLt has no such product; handle: torch's cuBLAS handle of the device.
bool cublaslt_product(const LtProduct& p, void* handle, void* workspace, size_t workspace_bytes, cudaStream_t stream);

}  // namespace llmfast::cuda
