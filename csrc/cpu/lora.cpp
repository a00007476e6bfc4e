// The raw ops lora_linear_fwd and lora_linear_bwd:  y = x W^T + b + S B^T with S = scaling d(x) A^T, d: dropout.
//   dB = dy^T S,  dS = scaling dy B,  dA = dS^T d(x),  dW = dy^T x,  dx = dy W + d(dS A)
// The low-rank terms are computed first, in float32, and the large products start from them.
#include <optional>
#include <tuple>

#include "cpu/activation.h"
#include "cpu/dropout.h"
#include "cpu/operand.h"

namespace llmfast::cpu {
namespace {

using MaybeTensor = std::optional<Tensor>;

// The arguments that both ops share, checked.
struct Lora {
  Matrix x;
  Weight w;
  Matrix A, B;
  int64_t N, K, O, r;  // rows of x, its width, the width of y, the rank
  float scaling;
  Dtype dtype;
  Dropout mask;

  Lora(const Tensor& x_in, const Tensor& weight, const Tensor& lora_A, const Tensor& lora_B, double scaling,
       double dropout_p, const MaybeTensor& seed, ScalarType type)
      : x("x", x_in), w("weight", weight, weight.size(0), x.columns), A("lora_A", lora_A, lora_A.size(0), x.columns),
        B("lora_B", lora_B, w.rows, A.rows), N(x.rows), K(x.columns), O(w.rows), r(A.rows), scaling(float(scaling)),
        dtype(dtype_of("dtype", type)), mask(make_dropout(0, 0)) {
    STD_TORCH_CHECK(dropout_p >= 0 && dropout_p < 1, "dropout_p must lie in [0, 1), got ", dropout_p);
    if (dropout_p == 0) return;
    STD_TORCH_CHECK(seed && seed->scalar_type() == ScalarType::Long && seed->numel() == 1 && seed->is_cpu(),
                    "seed must be one int64 where dropout_p is above 0");
    mask = make_dropout(*static_cast<const int64_t*>(seed->const_data_ptr()), dropout_p);
  }

  // d(x), which is x itself where nothing is dropped.
  Matrix dropped() const {
    if (!mask.drop) return x;
    Matrix y = new_matrix(x.tensor, {N, K}, x.tensor.scalar_type());
    dropout_rows(mask, x.dtype, x.data(), y.data(), N, K);
    return y;
  }

  // c = a b times scaling, (N, r) in float32.
  Matrix scaled(Operand a, Operand b, int64_t terms) const {
    Matrix c = new_matrix(x.tensor, {N, r}, ScalarType::Float);
    gemm(product(c, a, b, terms, dtype));
    auto* values = static_cast<float*>(c.data());
    for (int64_t i = 0; i < N * r; ++i) values[i] *= scaling;
    return c;
  }
};

// Float32 memory of c's shape for what the product into c starts from: c itself where it is float32.
Matrix start_of(Matrix& c) {
  return c.dtype == Dtype::f32 ? c : new_matrix(c.tensor, {c.rows, c.columns}, ScalarType::Float);
}

// c = a b + start.
Product product_from(const Matrix& start, Matrix& c, Operand a, Operand b, int64_t K, Dtype compute) {
  Product p = product(c, a, b, K, compute);
  p.residual = static_cast<const float*>(start.data());
  p.residual_stride = start.columns;
  return p;
}

std::tuple<Tensor, Tensor> lora_linear_fwd(const Tensor& x_in, const Tensor& weight, const MaybeTensor& bias,
                                           const Tensor& lora_A, const Tensor& lora_B, double scaling, double dropout_p,
                                           const MaybeTensor& seed, ScalarType type) {
  const Lora l(x_in, weight, lora_A, lora_B, scaling, dropout_p, seed, type);
  const Bias b("bias", bias, l.O);
  Matrix y = new_matrix(x_in, with_width(x_in, l.O), type), start = start_of(y);
  const Matrix low = l.scaled(l.dropped().operand(), l.A.operand(true), l.K);
  gemm(product(start, low.operand(), l.B.operand(true), l.r, l.dtype));
  Product main = product_from(start, y, l.x.operand(), l.w.operand(true), l.K, l.dtype);
  main.bias = b.data();
  gemm(main);
  return {y.tensor, low.tensor};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> lora_linear_bwd(const Tensor& dy_in, const Tensor& x_in,
                                                                   const Tensor& low_in, const Tensor& weight,
                                                                   const Tensor& lora_A, const Tensor& lora_B,
                                                                   double scaling, double dropout_p,
                                                                   const MaybeTensor& seed, ScalarType type,
                                                                   int64_t wanted) {
  const Lora l(x_in, weight, lora_A, lora_B, scaling, dropout_p, seed, type);
  const Matrix dy("dy", dy_in, l.N, l.O), low("low", low_in, l.N, l.r);
  const auto wants = [&](int input) { return (wanted >> input & 1) != 0; };
  const bool x_grad = wants(0), w_grad = wants(1), b_grad = wants(2), A_grad = wants(3), B_grad = wants(4);
  Matrix dx = new_matrix(x_in, with_width(x_in, l.K), x_in.scalar_type(), x_grad);
  Matrix dA = new_matrix(x_in, {l.r, l.K}, lora_A.scalar_type(), A_grad);
  Matrix dB = new_matrix(x_in, {l.O, l.r}, lora_B.scalar_type(), B_grad);
  Sums db(x_in, l.O, b_grad);

  const Tensor dw = l.w.gradient(dy, l.x, l.dtype, w_grad);
  if (b_grad) column_sums(dy.dtype, dy.data(), l.O, db.data(), l.N, l.O);
  if (B_grad) gemm(product(dB, dy.operand(true), low.operand(), l.N, l.dtype));
  if (x_grad || A_grad) {
    const Matrix dlow = l.scaled(dy.operand(), l.B.operand(), l.O);
    if (A_grad) gemm(product(dA, dlow.operand(true), l.dropped().operand(), l.N, l.dtype));
    if (x_grad) {
      Matrix start = start_of(dx);
      gemm(product(start, dlow.operand(), l.A.operand(), l.r, l.dtype));
      if (l.mask.drop) dropout_rows(l.mask, Dtype::f32, start.data(), start.data(), l.N, l.K);
      gemm(product_from(start, dx, dy.operand(), l.w.operand(), l.O, l.dtype));
    }
  }
  return {dx.tensor, dw, db.as(weight.scalar_type()), dA.tensor, dB.tensor};
}

}  // namespace
}  // namespace llmfast::cpu

STABLE_TORCH_LIBRARY_IMPL(llmfast, CPU, m) {
  m.impl("lora_linear_fwd", TORCH_BOX(&llmfast::cpu::lora_linear_fwd));
  m.impl("lora_linear_bwd", TORCH_BOX(&llmfast::cpu::lora_linear_bwd));
}
