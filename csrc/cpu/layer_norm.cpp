#include "cpu/layer_norm.h"

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "layer_norm_checks.h"
#include "stable.h"

namespace llmfast::cpu {

using torch::stable::parallel_for;

namespace {

// Elements that are worth a thread.
constexpr int64_t kGrain = 32768;

}  // namespace

void layer_norm_forward(const LayerNormForward& a, int64_t rows) {
  const auto& kernels = LLMFAST_SIMD(layer_norm);
  parallel_for(0, rows, std::max<int64_t>(1, kGrain / std::max<int64_t>(a.n, 1)),
               [&](int64_t row0, int64_t row1) { kernels.forward(a, row0, row1); });
}

void layer_norm_backward(const LayerNormBackward& a, int64_t rows) {
  const auto& kernels = LLMFAST_SIMD(layer_norm);
  // The chunks depend on the number of rows alone, so that the sums do not depend on the number of threads.
  const int64_t n = a.n, chunks = std::clamp<int64_t>(rows / 64, 1, 64);
  const int64_t stride = (a.db ? 2 : a.w ? 1 : 0) * n;
  std::vector<float> partial(chunks * stride);
  const int64_t chunk_elements = std::max<int64_t>(1, rows * n / chunks);
  parallel_for(0, chunks, std::max<int64_t>(1, kGrain / chunk_elements), [&](int64_t c0, int64_t c1) {
    for (int64_t c = c0; c < c1; ++c) {
      LayerNormBackward part = a;
      part.dw = partial.data() + c * stride;
      if (a.db) part.db = part.dw + n;
      kernels.backward(part, rows * c / chunks, rows * (c + 1) / chunks);
    }
  });
  const auto add_up = [&](const float* first, float* out) {
    if (out)
      parallel_for(0, n, std::max<int64_t>(1, kGrain / chunks),
                   [&](int64_t i0, int64_t i1) { kernels.sum_rows(first, chunks, stride, i0, i1, out); });
  };
  add_up(partial.data(), a.dw);
  add_up(partial.data() + n, a.db);
}

namespace {

using torch::stable::contiguous;
using torch::stable::new_empty;
using MaybeTensor = std::optional<Tensor>;

Dtype dtype_of(const char* name, const Tensor& t) {
  if (t.scalar_type() == ScalarType::BFloat16) return Dtype::bf16;
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float, name, " must be float32 or bfloat16 on a CPU, got ",
                  torch::headeronly::toString(t.scalar_type()));
  return Dtype::f32;
}

MaybeTensor to_float(const MaybeTensor& t) {
  if (!t) return t;
  return contiguous(t->scalar_type() == ScalarType::Float ? *t : torch::stable::to(*t, ScalarType::Float));
}

float* floats(const Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }
const float* floats(const MaybeTensor& t) { return t ? static_cast<const float*>(t->const_data_ptr()) : nullptr; }

Dropout dropout_of(double p, const MaybeTensor& seed) {
  STD_TORCH_CHECK(p >= 0 && p < 1, "dropout_p must lie in [0, 1), got ", p);
  if (p == 0) return make_dropout(0, 0);
  STD_TORCH_CHECK(seed && seed->scalar_type() == ScalarType::Long && seed->numel() == 1 && seed->is_cpu(),
                  "seed must be one int64 where dropout_p is above 0");
  return make_dropout(*static_cast<const int64_t*>(seed->const_data_ptr()), p);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> add_layer_norm_fwd(const Tensor& x_in, const Tensor& residual_in,
                                                              const MaybeTensor& weight, const MaybeTensor& bias,
                                                              double eps, double dropout_p, const MaybeTensor& seed) {
  const auto [rows, n] = row_shape(residual_in);
  check_forward(residual_in, weight, bias, n);
  check_shape("x", x_in, residual_in);
  STD_TORCH_CHECK(x_in.scalar_type() == residual_in.scalar_type() || x_in.scalar_type() == ScalarType::BFloat16,
                  "x must be bfloat16 or have residual's dtype");
  const Tensor x = contiguous(x_in), residual = contiguous(residual_in);
  const auto w = to_float(weight), b = to_float(bias);
  Tensor y = new_empty(residual, residual.sizes()), s = new_empty(residual, residual.sizes());
  Tensor mean = new_empty(s, {rows}, ScalarType::Float), rstd = new_empty(s, {rows}, ScalarType::Float);
  LayerNormForward a{};
  a.n = n;
  a.eps = float(eps);
  a.w = floats(w);
  a.b = floats(b);
  a.residual = residual.const_data_ptr();
  a.branch = x.const_data_ptr();
  a.dropout = dropout_of(dropout_p, seed);
  a.s = s.mutable_data_ptr();
  a.y = y.mutable_data_ptr();
  a.mean = floats(mean);
  a.rstd = floats(rstd);
  a.s_dtype = a.y_dtype = dtype_of("residual", residual);
  a.branch_dtype = dtype_of("x", x);
  layer_norm_forward(a, rows);
  return {y, s, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_fwd(const Tensor& x_in, const MaybeTensor& weight,
                                                  const MaybeTensor& bias, double eps) {
  const auto [rows, n] = row_shape(x_in);
  check_forward(x_in, weight, bias, n);
  const Tensor x = contiguous(x_in);
  const auto w = to_float(weight), b = to_float(bias);
  Tensor y = new_empty(x, x.sizes());
  Tensor mean = new_empty(x, {rows}, ScalarType::Float), rstd = new_empty(x, {rows}, ScalarType::Float);
  LayerNormForward a{};
  a.n = n;
  a.eps = float(eps);
  a.w = floats(w);
  a.b = floats(b);
  a.residual = x.const_data_ptr();
  a.y = y.mutable_data_ptr();
  a.mean = floats(mean);
  a.rstd = floats(rstd);
  a.s_dtype = a.y_dtype = dtype_of("x", x);
  layer_norm_forward(a, rows);
  return {y, mean, rstd};
}

// The gradients of s (through y, and beside it where ds_in is given), of a branch where `branch` is given, and of the
// parameters.
std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Tensor& dy_in, const MaybeTensor& ds_in, const Tensor& s_in,
                                                    const MaybeTensor& weight, const Tensor& mean, const Tensor& rstd,
                                                    bool has_bias, std::optional<ScalarType> branch,
                                                    const Dropout& dropout) {
  const RowShape shape = row_shape(s_in);
  check_backward(dy_in, s_in, weight, mean, rstd, has_bias, shape);
  if (ds_in) check_like("ds", *ds_in, s_in);
  const Tensor s = contiguous(s_in), dy = contiguous(dy_in);
  const Tensor ds_before = contiguous(ds_in ? *ds_in : s_in);
  const auto w = to_float(weight);
  Tensor ds = new_empty(s, s.sizes());
  Tensor dbranch = branch ? new_empty(s, s.sizes(), *branch) : new_empty(s, {0});
  Tensor dw = new_empty(s, {w ? shape.n : 0}, ScalarType::Float);
  Tensor db = new_empty(s, {has_bias ? shape.n : 0}, ScalarType::Float);
  LayerNormBackward a{};
  a.n = shape.n;
  a.w = floats(w);
  a.dy = dy.const_data_ptr();
  a.s = s.const_data_ptr();
  a.mean = static_cast<const float*>(mean.const_data_ptr());
  a.rstd = static_cast<const float*>(rstd.const_data_ptr());
  a.ds_in = ds_in ? ds_before.const_data_ptr() : nullptr;
  a.ds = ds.mutable_data_ptr();
  a.dropout = dropout;
  a.dw = w ? floats(dw) : nullptr;
  a.db = has_bias ? floats(db) : nullptr;
  a.s_dtype = a.y_dtype = dtype_of("x", s);
  if (branch) {
    a.dbranch = dbranch.mutable_data_ptr();
    a.branch_dtype = dtype_of("the branch", dbranch);
  }
  layer_norm_backward(a, shape.rows);
  const ScalarType parameter_dtype = (weight ? *weight : s).scalar_type();
  if (parameter_dtype == ScalarType::Float) return {dbranch, ds, dw, db};
  return {dbranch, ds, torch::stable::to(dw, parameter_dtype), torch::stable::to(db, parameter_dtype)};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_bwd(const Tensor& dy, const Tensor& x, const MaybeTensor& weight,
                                                  const Tensor& mean, const Tensor& rstd, bool has_bias) {
  auto [none, dx, dw, db] = backward(dy, std::nullopt, x, weight, mean, rstd, has_bias, std::nullopt, make_dropout(0, 0));
  return {dx, dw, db};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> add_layer_norm_bwd(const Tensor& dy, const MaybeTensor& ds, const Tensor& s,
                                                              const MaybeTensor& weight, const Tensor& mean,
                                                              const Tensor& rstd, bool has_bias, ScalarType x_dtype,
                                                              double dropout_p, const MaybeTensor& seed) {
  const bool own = dropout_p > 0 || x_dtype != s.scalar_type();
  return backward(dy, ds, s, weight, mean, rstd, has_bias, own ? std::optional(x_dtype) : std::nullopt,
                  dropout_of(dropout_p, seed));
}

}  // namespace
}  // namespace llmfast::cpu

STABLE_TORCH_LIBRARY_IMPL(llmfast, CPU, m) {
  m.impl("layer_norm_fwd", TORCH_BOX(&llmfast::cpu::layer_norm_fwd));
  m.impl("layer_norm_bwd", TORCH_BOX(&llmfast::cpu::layer_norm_bwd));
  m.impl("add_layer_norm_fwd", TORCH_BOX(&llmfast::cpu::add_layer_norm_fwd));
  m.impl("add_layer_norm_bwd", TORCH_BOX(&llmfast::cpu::add_layer_norm_bwd));
}
