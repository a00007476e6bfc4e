#pragma once
// Matrices of torch tensors and the plain products, which are cuBLAS's by way of torch; for the glue of mlp and lora_linear.
#include "cuda/gemm.h"
#include "cuda/glue.h"
#include "shapes.h"

namespace llmfast::cuda {

// x (..., n) as (rows, n), contiguous, of dtype.
inline Tensor as_rows(const char* name, const Tensor& x, ScalarType type) {
  STD_TORCH_CHECK(x.dim() >= 1, name, " must have at least one dimension");
  int64_t rows = 1;
  for (int64_t d = 0; d + 1 < x.dim(); ++d) rows *= x.size(d);
  const int64_t n = x.size(x.dim() - 1);
  STD_TORCH_CHECK(rows < (int64_t(1) << 31) && n < (int64_t(1) << 31), name, " must have fewer than 2^31 rows and columns");
  return torch::stable::contiguous(torch::stable::reshape(torch::stable::to(x, type), {rows, n}));
}

// A parameter of the shape `sizes` and on x's device, contiguous, of dtype.
inline Tensor as_parameter(const char* name, const Tensor& t, const std::vector<int64_t>& sizes, const Tensor& x, ScalarType type) {
  bool same = t.dim() == int64_t(sizes.size()) && t.device() == x.device();
  for (size_t d = 0; same && d < sizes.size(); ++d) same = t.size(int64_t(d)) == sizes[d];
  STD_TORCH_CHECK(same, name, " does not have the shape that the other arguments ask for, or is on another device");
  return torch::stable::contiguous(torch::stable::to(t, type));
}
inline MaybeTensor as_bias(const char* name, const MaybeTensor& t, int64_t n, const Tensor& x, ScalarType type) {
  return t ? MaybeTensor(as_parameter(name, *t, {n}, x, type)) : t;
}

inline Tensor transposed(const Tensor& t) { return torch::stable::transpose(t, 0, 1); }

// dy^T x for dy (N, out) and x (N, in), of the weight's dtype and layout; without elements where not wanted.
inline Tensor weight_gradient(const Tensor& weight, const Tensor& dy, const Tensor& x, bool wanted) {
  if (!wanted) return torch::stable::new_empty(weight, {0});
  const Tensor dw = lies_transposed(weight) ? transposed(torch::stable::matmul(transposed(x), dy))
                                            : torch::stable::matmul(transposed(dy), x);
  return torch::stable::to(dw, weight.scalar_type());
}

// The column sums of (N, n) in a parameter's dtype; without elements where not wanted.
inline Tensor column_sum(const Tensor& x, ScalarType type, bool wanted) {
  if (!wanted) return torch::stable::new_empty(x, {0}, type);
  const int64_t first = 0;
  return torch::stable::to(torch::stable::sum(x, torch::headeronly::IntHeaderOnlyArrayRef(&first, 1), false, ScalarType::Float), type);
}

// x w^T + bias.
inline Tensor linear(const Tensor& x, const Tensor& w, const MaybeTensor& bias) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(x), torch::stable::detail::from(w),
                                    torch::stable::detail::from(bias)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::linear", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

inline GemmOperand along_k(const Tensor& t) { return {t.const_data_ptr(), t.size(1), true}; }
inline GemmOperand across_k(const Tensor& t) { return {t.const_data_ptr(), t.size(1), false}; }

}  // namespace llmfast::cuda
