// The raw ops mlp_fwd and mlp_bwd:  y = act(h) W2^T + b2 with h = x W1^T + b1. Only x and h are kept: the backward pass
// computes a = act(h) again, beside the activation's gradient, which needs the same exponential.
//   dW2 = dy^T a,  dh = (dy W2) act'(h),  dW1 = dh^T x,  dx = dh W1
#include <optional>
#include <string>
#include <tuple>

#include "cpu/activation.h"
#include "cpu/operand.h"

namespace llmfast::cpu {
namespace {

Activation activation_of(const std::string& name) {
  if (name == "gelu_tanh") return Activation::gelu_tanh;
  if (name == "gelu") return Activation::gelu;
  STD_TORCH_CHECK(name == "relu", "activation must be gelu_tanh, gelu or relu, got ", name);
  return Activation::relu;
}

std::tuple<Tensor, Tensor> mlp_fwd(const Tensor& x_in, const Tensor& fc_weight, const std::optional<Tensor>& fc_bias,
                                   const Tensor& proj_weight, const std::optional<Tensor>& proj_bias,
                                   const std::string& activation, ScalarType type, bool keep) {
  const Activation act = activation_of(activation);
  const Dtype dtype = dtype_of("dtype", type);
  const Matrix x("x", x_in);
  const Weight w1("fc_weight", fc_weight, fc_weight.size(0), x.columns);
  const int64_t N = x.rows, M = w1.rows;
  const Weight w2("proj_weight", proj_weight, proj_weight.size(0), M);
  const Bias b1("fc_bias", fc_bias, M), b2("proj_bias", proj_bias, w2.rows);
  Matrix y = new_matrix(x_in, with_width(x_in, w2.rows), type), h = new_matrix(x_in, {N, M}, type);
  Matrix a = keep ? new_matrix(x_in, {N, M}, type) : h;
  Product fc = product(h, x.operand(), w1.operand(true), x.columns, dtype);
  fc.bias = b1.data();
  gemm(fc);
  activation_forward(act, dtype, h.data(), a.data(), N * M);
  Product proj = product(y, a.operand(), w2.operand(true), M, dtype);
  proj.bias = b2.data();
  gemm(proj);
  return {y.tensor, keep ? h.tensor : new_matrix(x_in, {0}, type).tensor};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> mlp_bwd(const Tensor& dy_in, const Tensor& x_in, const Tensor& h_in,
                                                           const Tensor& fc_weight, const Tensor& proj_weight,
                                                           const std::string& activation, int64_t wanted) {
  const Activation act = activation_of(activation);
  const Matrix dy("dy", dy_in), x("x", x_in);
  const Weight w1("fc_weight", fc_weight, fc_weight.size(0), x.columns);
  const int64_t N = x.rows, C = x.columns, M = w1.rows, O = dy.columns;
  const Matrix h("h", h_in, N, M);
  const Weight w2("proj_weight", proj_weight, O, M);
  STD_TORCH_CHECK(dy.rows == N, "dy must have as many rows as x");
  const auto wants = [&](int input) { return (wanted >> input & 1) != 0; };
  const bool x_grad = wants(0), w1_grad = wants(1), b1_grad = wants(2), w2_grad = wants(3), b2_grad = wants(4);
  const bool h_grad = x_grad || w1_grad || b1_grad;
  const ScalarType type = h_in.scalar_type();
  Matrix dx = new_matrix(x_in, with_width(x_in, C), x_in.scalar_type(), x_grad);
  Sums db1(x_in, M, b1_grad), db2(x_in, O, b2_grad);
  Matrix a = new_matrix(x_in, {N, M}, type, w2_grad), dh = new_matrix(x_in, {N, M}, type, h_grad);

  if (h_grad) {
    gemm(product(dh, dy.operand(), w2.operand(), O, h.dtype));
    activation_backward(act, h.dtype, h.data(), dh.data(), dh.data(), w2_grad ? a.data() : nullptr,
                        b1_grad ? db1.data() : nullptr, N, M);
  } else if (w2_grad) {
    activation_forward(act, h.dtype, h.data(), a.data(), N * M);
  }
  const Tensor dw2 = w2.gradient(dy, a, h.dtype, w2_grad);
  if (b2_grad) column_sums(dy.dtype, dy.data(), O, db2.data(), N, O);
  const Tensor dw1 = w1.gradient(dh, x, h.dtype, w1_grad);
  if (x_grad) gemm(product(dx, dh.operand(), w1.operand(), M, h.dtype));
  return {dx.tensor, dw1, db1.as(fc_weight.scalar_type()), dw2, db2.as(proj_weight.scalar_type())};
}

}  // namespace
}  // namespace llmfast::cpu

STABLE_TORCH_LIBRARY_IMPL(llmfast, CPU, m) {
  m.impl("mlp_fwd", TORCH_BOX(&llmfast::cpu::mlp_fwd));
  m.impl("mlp_bwd", TORCH_BOX(&llmfast::cpu::mlp_bwd));
}
