#include "cpu/layer_norm.h"

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "layer_norm_checks.h"
#include "stable.h"

namespace llmfast::cpu {
namespace {

using torch::stable::contiguous;
using torch::stable::new_empty;
using torch::stable::parallel_for;

// Elements that are worth a thread.
constexpr int64_t kGrain = 32768;

template <typename F>
auto by_dtype(const Tensor& x, F f) {
  if (x.scalar_type() == ScalarType::BFloat16) return f(uint16_t(), LLMFAST_SIMD(layer_norm).bf16);
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float, "x must be float32 or bfloat16 on a CPU, got ",
                  torch::headeronly::toString(x.scalar_type()));
  return f(float(), LLMFAST_SIMD(layer_norm).f32);
}

std::optional<Tensor> to_float(const std::optional<Tensor>& t) {
  if (!t) return t;
  return contiguous(t->scalar_type() == ScalarType::Float ? *t : torch::stable::to(*t, ScalarType::Float));
}

const float* data(const std::optional<Tensor>& t) {
  return t ? static_cast<const float*>(t->const_data_ptr()) : nullptr;
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_fwd(const Tensor& x_in, const std::optional<Tensor>& weight,
                                                  const std::optional<Tensor>& bias, double eps) {
  const auto [rows, n] = row_shape(x_in);
  check_forward(x_in, weight, bias, n);
  const Tensor x = contiguous(x_in);
  const auto w = to_float(weight), b = to_float(bias);
  Tensor y = new_empty(x, x.sizes());
  Tensor mean = new_empty(x, {rows}, ScalarType::Float), rstd = new_empty(x, {rows}, ScalarType::Float);
  by_dtype(x, [&, rows = rows, n = n](auto zero, const auto& kernels) {
    using T = decltype(zero);
    const auto* xp = static_cast<const T*>(x.const_data_ptr());
    auto* yp = static_cast<T*>(y.mutable_data_ptr());
    auto* mp = static_cast<float*>(mean.mutable_data_ptr());
    auto* rp = static_cast<float*>(rstd.mutable_data_ptr());
    parallel_for(0, rows, std::max<int64_t>(1, kGrain / std::max<int64_t>(n, 1)), [&](int64_t row0, int64_t row1) {
      kernels.forward(xp, data(w), data(b), yp, mp, rp, row0, row1, n, float(eps));
    });
  });
  return {y, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_bwd(const Tensor& dy_in, const Tensor& x_in,
                                                  const std::optional<Tensor>& weight, const Tensor& mean,
                                                  const Tensor& rstd, bool has_bias) {
  const RowShape shape = row_shape(x_in);
  const int64_t rows = shape.rows, n = shape.n;
  check_backward(dy_in, x_in, weight, mean, rstd, has_bias, shape);
  const Tensor x = contiguous(x_in), dy = contiguous(dy_in);
  const auto w = to_float(weight);
  const bool has_weight = w.has_value();
  Tensor dx = new_empty(x, x.sizes());
  Tensor dw = new_empty(x, {has_weight ? n : 0}, ScalarType::Float);
  Tensor db = new_empty(x, {has_bias ? n : 0}, ScalarType::Float);

  // The chunks depend on the number of rows alone, so that the sums do not depend on the number of threads.
  const int64_t chunks = std::clamp<int64_t>(rows / 64, 1, 64);
  const int64_t stride = (int64_t(has_weight) + int64_t(has_bias)) * n;
  std::vector<float> partial(chunks * stride);
  by_dtype(x, [&](auto zero, const auto& kernels) {
    using T = decltype(zero);
    const auto* dyp = static_cast<const T*>(dy.const_data_ptr());
    const auto* xp = static_cast<const T*>(x.const_data_ptr());
    const auto* mp = static_cast<const float*>(mean.const_data_ptr());
    const auto* rp = static_cast<const float*>(rstd.const_data_ptr());
    auto* dxp = static_cast<T*>(dx.mutable_data_ptr());
    const int64_t chunk_elements = std::max<int64_t>(1, rows * n / chunks);
    parallel_for(0, chunks, std::max<int64_t>(1, kGrain / chunk_elements), [&](int64_t c0, int64_t c1) {
      for (int64_t c = c0; c < c1; ++c) {
        float* sums = partial.data() + c * stride;
        kernels.backward(dyp, xp, data(w), mp, rp, dxp, has_weight ? sums : nullptr,
                         has_bias ? sums + n : nullptr, rows * c / chunks, rows * (c + 1) / chunks, n);
      }
    });
  });
  const auto& kernels = LLMFAST_SIMD(layer_norm);
  const int64_t grain = std::max<int64_t>(1, kGrain / chunks);
  const auto add_up = [&](const float* first, Tensor& out) {
    auto* op = static_cast<float*>(out.mutable_data_ptr());
    parallel_for(0, out.numel(), grain,
                 [&](int64_t i0, int64_t i1) { kernels.sum_rows(first, chunks, stride, i0, i1, op); });
  };
  add_up(partial.data(), dw);
  add_up(partial.data() + (has_bias ? n : 0), db);
  const ScalarType parameter_dtype = (weight ? *weight : x).scalar_type();
  if (parameter_dtype != ScalarType::Float)
    return {dx, torch::stable::to(dw, parameter_dtype), torch::stable::to(db, parameter_dtype)};
  return {dx, dw, db};
}

}  // namespace
}  // namespace llmfast::cpu

STABLE_TORCH_LIBRARY_IMPL(llmfast, CPU, m) {
  m.impl("layer_norm_fwd", TORCH_BOX(&llmfast::cpu::layer_norm_fwd));
  m.impl("layer_norm_bwd", TORCH_BOX(&llmfast::cpu::layer_norm_bwd));
}
