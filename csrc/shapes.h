#pragma once
// What the glue of the CPU and of the CUDA kernels asks of shapes and strides.
#include <vector>

#include "stable.h"

namespace llmfast {

// Whether a weight (out, in) lies as (in, out): the transposed view of one that its owner keeps so (GPT-2's Conv1D).
inline bool lies_transposed(const Tensor& w) {
  return w.dim() == 2 && w.stride(0) == 1 && w.stride(1) == w.size(0) && !w.is_contiguous();
}

// x's shape with another last dimension.
inline std::vector<int64_t> with_width(const Tensor& x, int64_t width) {
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = width;
  return sizes;
}

}  // namespace llmfast
