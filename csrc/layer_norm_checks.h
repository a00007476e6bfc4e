#pragma once
// What the CPU and the CUDA LayerNorm ask of their arguments.
#include <cstdint>
#include <optional>

#include "stable.h"

namespace llmfast {

struct RowShape {
  int64_t rows, n;
};

// Rows without elements count as none.
inline RowShape row_shape(const Tensor& x) {
  STD_TORCH_CHECK(x.dim() >= 1, "x must have at least one dimension");
  const int64_t n = x.size(x.dim() - 1);
  return {n ? x.numel() / n : 0, n};
}

inline void check_parameter(const char* name, const Tensor& t, const Tensor& x, int64_t n) {
  STD_TORCH_CHECK(t.dim() == 1 && t.size(0) == n, name, " must have shape (", n, ",), the last dimension of x");
  STD_TORCH_CHECK(t.scalar_type() == x.scalar_type() || t.scalar_type() == ScalarType::Float, name,
                  " must be float32 or have x's dtype ", torch::headeronly::toString(x.scalar_type()), ", got ",
                  torch::headeronly::toString(t.scalar_type()));
  STD_TORCH_CHECK(t.device() == x.device(), name, " must be on x's device");
}

inline void check_forward(const Tensor& x, const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
                          int64_t n) {
  STD_TORCH_CHECK(weight || !bias, "bias needs a weight beside it");
  if (weight) check_parameter("weight", *weight, x, n);
  if (!bias) return;
  check_parameter("bias", *bias, x, n);
  STD_TORCH_CHECK(bias->scalar_type() == weight->scalar_type(), "bias must have weight's dtype ",
                  torch::headeronly::toString(weight->scalar_type()), ", got ",
                  torch::headeronly::toString(bias->scalar_type()));
}

inline void check_shape(const char* name, const Tensor& t, const Tensor& x) {
  STD_TORCH_CHECK(t.device() == x.device(), name, " must be on x's device");
  bool same = t.dim() == x.dim();
  for (int64_t d = 0; same && d < x.dim(); ++d) same = t.size(d) == x.size(d);
  STD_TORCH_CHECK(same, name, " must have x's shape");
}

inline void check_like(const char* name, const Tensor& t, const Tensor& x) {
  STD_TORCH_CHECK(t.scalar_type() == x.scalar_type(), name, " must have x's dtype ",
                  torch::headeronly::toString(x.scalar_type()), ", got ",
                  torch::headeronly::toString(t.scalar_type()));
  check_shape(name, t, x);
}

inline void check_backward(const Tensor& dy, const Tensor& x, const std::optional<Tensor>& weight, const Tensor& mean,
                           const Tensor& rstd, bool has_bias, RowShape shape) {
  STD_TORCH_CHECK(weight || !has_bias, "has_bias needs a weight");
  check_like("dy", dy, x);
  if (weight) check_parameter("weight", *weight, x, shape.n);
  const Tensor* statistics[] = {&mean, &rstd};
  for (int i = 0; i < 2; ++i) {
    const Tensor& t = *statistics[i];
    STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float && t.dim() == 1 && t.size(0) == shape.rows && t.is_contiguous() &&
                        t.device() == x.device(),
                    i ? "rstd" : "mean", " must be a contiguous float32 tensor of shape (", shape.rows,
                    ",) on x's device");
  }
}

}  // namespace llmfast
