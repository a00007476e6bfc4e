#include "cuda/layer_norm.h"

#include <tuple>

#include "cuda/glue.h"
#include "layer_norm_checks.h"

namespace llmfast::cuda {
namespace {

using torch::stable::contiguous;
using torch::stable::new_empty;

int width(int64_t n) {
  STD_TORCH_CHECK(n <= kLayerNormMaxWidth, "the last dimension of x must be at most ", kLayerNormMaxWidth,
                  " on CUDA, got ", n);
  return int(n);
}

MaybeTensor packed(const MaybeTensor& t) { return t ? contiguous(*t) : t; }
bool is_float(const Tensor& t) { return t.scalar_type() == ScalarType::Float; }

struct Normed {
  Tensor y, s, mean, rstd;
};

// s is x itself without a residual.
Normed forward(const Tensor& x_in, const MaybeTensor& residual_in, const MaybeTensor& weight, const MaybeTensor& bias,
               double eps, Dropout dropout) {
  const RowShape shape = row_shape(x_in);
  check_forward(x_in, weight, bias, shape.n);
  if (residual_in) check_like("residual", *residual_in, x_in);
  const DType dtype = dtype_of("x", x_in.scalar_type());
  const int n = width(shape.n);
  const OnDeviceOf device(x_in);
  const Tensor x = contiguous(x_in);
  const auto residual = packed(residual_in), w = packed(weight), b = packed(bias);
  Tensor y = new_empty(x, x.sizes()), s = residual ? new_empty(x, x.sizes()) : x;
  Tensor mean = new_empty(x, {shape.rows}, ScalarType::Float), rstd = new_empty(x, {shape.rows}, ScalarType::Float);
  if (shape.rows == 0) return {y, s, mean, rstd};
  const bool float_parameters = is_float(w ? *w : x);
  LLMFAST_CUDA_CHECK(layer_norm_forward(
      {dtype, float_parameters, x.const_data_ptr(), data(w), data(b), y.mutable_data_ptr(), floats(mean), floats(rstd),
       shape.rows, n, float(eps), data(residual), residual ? s.mutable_data_ptr() : nullptr, dropout},
      device.multiprocessors(), device.stream()));
  return {y, s, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_fwd(const Tensor& x, const MaybeTensor& weight, const MaybeTensor& bias,
                                                  double eps) {
  const Normed done = forward(x, std::nullopt, weight, bias, eps, {});
  return {done.y, done.mean, done.rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> add_layer_norm_fwd(const Tensor& x, const Tensor& residual,
                                                              const MaybeTensor& weight, const MaybeTensor& bias,
                                                              double eps, double dropout_p, const MaybeTensor& seed) {
  const Normed done = forward(x, residual, weight, bias, eps, dropout_of(dropout_p, seed, x));
  return {done.y, done.s, done.mean, done.rstd};
}

// The gradients of a branch where `own`, else of no elements; of s through y and beside it (ds_in); of the parameters.
std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Tensor& dy_in, const MaybeTensor& ds_in, const Tensor& s_in,
                                                    const MaybeTensor& weight, const Tensor& mean, const Tensor& rstd,
                                                    bool has_bias, bool own, Dropout dropout) {
  const RowShape shape = row_shape(s_in);
  check_backward(dy_in, s_in, weight, mean, rstd, has_bias, shape);
  if (ds_in) check_like("ds", *ds_in, s_in);
  const DType dtype = dtype_of("x", s_in.scalar_type());
  const int n = width(shape.n);
  const OnDeviceOf device(s_in);
  const Tensor s = contiguous(s_in), dy = contiguous(dy_in);
  const auto w = packed(weight), ds_before = packed(ds_in);
  const ScalarType parameter_dtype = (w ? *w : s).scalar_type();
  Tensor ds = new_empty(s, s.sizes()), dbranch = own ? new_empty(s, s.sizes()) : new_empty(s, {0});
  Tensor dw = torch::stable::new_zeros(s, {w ? n : 0}, parameter_dtype);
  Tensor db = torch::stable::new_zeros(s, {has_bias ? n : 0}, parameter_dtype);
  if (shape.rows == 0) return {dbranch, ds, dw, db};
  const int64_t blocks = layer_norm_backward_blocks(shape.rows, n, device.multiprocessors());
  Tensor partial = new_empty(s, {(int64_t(w.has_value()) + int64_t(has_bias)) * blocks * n}, ScalarType::Float);
  LLMFAST_CUDA_CHECK(layer_norm_backward(
      {dtype, parameter_dtype == ScalarType::Float, dy.const_data_ptr(), s.const_data_ptr(), data(w), floats(mean),
       floats(rstd), ds.mutable_data_ptr(), w ? dw.mutable_data_ptr() : nullptr,
       has_bias ? db.mutable_data_ptr() : nullptr, floats(partial), shape.rows, n, data(ds_before),
       own ? dbranch.mutable_data_ptr() : nullptr, dropout},
      device.multiprocessors(), device.stream()));
  return {dbranch, ds, dw, db};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_bwd(const Tensor& dy, const Tensor& x, const MaybeTensor& weight,
                                                  const Tensor& mean, const Tensor& rstd, bool has_bias) {
  auto [none, dx, dw, db] = backward(dy, std::nullopt, x, weight, mean, rstd, has_bias, false, {});
  return {dx, dw, db};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> add_layer_norm_bwd(const Tensor& dy, const MaybeTensor& ds, const Tensor& s,
                                                              const MaybeTensor& weight, const Tensor& mean,
                                                              const Tensor& rstd, bool has_bias, ScalarType x_dtype,
                                                              double dropout_p, const MaybeTensor& seed) {
  STD_TORCH_CHECK(x_dtype == s.scalar_type(), "on CUDA x must have residual's dtype");
  const Dropout dropout = dropout_of(dropout_p, seed, s);
  return backward(dy, ds, s, weight, mean, rstd, has_bias, dropout_p > 0, dropout);
}

}  // namespace
}  // namespace llmfast::cuda

LLMFAST_CUDA_OPS(m) {
  m.impl("layer_norm_fwd", TORCH_BOX(&llmfast::cuda::layer_norm_fwd));
  m.impl("layer_norm_bwd", TORCH_BOX(&llmfast::cuda::layer_norm_bwd));
  m.impl("add_layer_norm_fwd", TORCH_BOX(&llmfast::cuda::add_layer_norm_fwd));
  m.impl("add_layer_norm_bwd", TORCH_BOX(&llmfast::cuda::add_layer_norm_bwd));
}
