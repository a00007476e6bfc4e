#include "cuda/layer_norm.h"

#include <optional>
#include <tuple>

#include "cuda/glue.h"
#include "layer_norm_checks.h"

namespace llmfast::cuda {
namespace {

using torch::stable::contiguous;
using torch::stable::new_empty;

DType dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return DType::f32;
    case ScalarType::Half: return DType::f16;
    case ScalarType::BFloat16: return DType::bf16;
    default:
      STD_TORCH_CHECK(false, "x must be float32, float16 or bfloat16, got ",
                      torch::headeronly::toString(x.scalar_type()));
  }
}

int width(int64_t n) {
  STD_TORCH_CHECK(n <= kLayerNormMaxWidth, "the last dimension of x must be at most ", kLayerNormMaxWidth,
                  " on CUDA, got ", n);
  return int(n);
}

std::optional<Tensor> packed(const std::optional<Tensor>& t) { return t ? contiguous(*t) : t; }
const void* data(const std::optional<Tensor>& t) { return t ? t->const_data_ptr() : nullptr; }
float* floats(Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }
bool is_float(const Tensor& t) { return t.scalar_type() == ScalarType::Float; }

std::tuple<Tensor, Tensor, Tensor> layer_norm_fwd(const Tensor& x_in, const std::optional<Tensor>& weight,
                                                  const std::optional<Tensor>& bias, double eps) {
  const RowShape shape = row_shape(x_in);
  check_forward(x_in, weight, bias, shape.n);
  const DType dtype = dtype_of(x_in);
  const int n = width(shape.n);
  const OnDeviceOf device(x_in);
  const Tensor x = contiguous(x_in);
  const auto w = packed(weight), b = packed(bias);
  Tensor y = new_empty(x, x.sizes());
  Tensor mean = new_empty(x, {shape.rows}, ScalarType::Float), rstd = new_empty(x, {shape.rows}, ScalarType::Float);
  if (shape.rows == 0) return {y, mean, rstd};
  const bool float_parameters = is_float(w ? *w : x);
  STD_CUDA_CHECK(layer_norm_forward({dtype, float_parameters, x.const_data_ptr(), data(w), data(b),
                                     y.mutable_data_ptr(), floats(mean), floats(rstd), shape.rows, n, float(eps)},
                                    device.multiprocessors(), device.stream()));
  return {y, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_bwd(const Tensor& dy_in, const Tensor& x_in,
                                                  const std::optional<Tensor>& weight, const Tensor& mean,
                                                  const Tensor& rstd, bool has_bias) {
  const RowShape shape = row_shape(x_in);
  check_backward(dy_in, x_in, weight, mean, rstd, has_bias, shape);
  const DType dtype = dtype_of(x_in);
  const int n = width(shape.n);
  const OnDeviceOf device(x_in);
  const Tensor x = contiguous(x_in), dy = contiguous(dy_in);
  const auto w = packed(weight);
  const ScalarType parameter_dtype = (w ? *w : x).scalar_type();
  Tensor dx = new_empty(x, x.sizes());
  Tensor dw = torch::stable::new_zeros(x, {w ? n : 0}, parameter_dtype);
  Tensor db = torch::stable::new_zeros(x, {has_bias ? n : 0}, parameter_dtype);
  if (shape.rows == 0) return {dx, dw, db};
  const int64_t blocks = layer_norm_backward_blocks(shape.rows, n, device.multiprocessors());
  Tensor partial = new_empty(x, {(int64_t(w.has_value()) + int64_t(has_bias)) * blocks * n}, ScalarType::Float);
  STD_CUDA_CHECK(layer_norm_backward(
      {dtype, parameter_dtype == ScalarType::Float, dy.const_data_ptr(), x.const_data_ptr(), data(w),
       static_cast<const float*>(mean.const_data_ptr()), static_cast<const float*>(rstd.const_data_ptr()),
       dx.mutable_data_ptr(), w ? dw.mutable_data_ptr() : nullptr, has_bias ? db.mutable_data_ptr() : nullptr,
       floats(partial), shape.rows, n},
      device.multiprocessors(), device.stream()));
  return {dx, dw, db};
}

}  // namespace
}  // namespace llmfast::cuda

STABLE_TORCH_LIBRARY_IMPL(llmfast, CUDA, m) {
  m.impl("layer_norm_fwd", TORCH_BOX(&llmfast::cuda::layer_norm_fwd));
  m.impl("layer_norm_bwd", TORCH_BOX(&llmfast::cuda::layer_norm_bwd));
}
