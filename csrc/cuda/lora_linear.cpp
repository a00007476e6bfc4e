// The raw ops lora_linear_fwd and lora_linear_bwd:  y = x W^T + b + S B^T with S = scaling d(x) A^T, d: dropout.
//   dS = scaling dy B,  dx = dy W + d(dS A),  dB = dy^T S,  dA = dS^T d(x),  dW = dy^T x
// All but dW are csrc/cuda/gemm.cu: the low-rank term goes into the accumulators of the large product, and dropout's mask
// is made where x is read, or on the accumulators; its scale is in S and dS.
#include <algorithm>
#include <tuple>

#include "cuda/products.h"

namespace llmfast::cuda {
namespace {

using torch::stable::new_empty;

struct Lora {
  ScalarType type;
  DType dtype;
  Tensor x, w, A, B;
  int64_t N, K, O, r;  // rows of x, its width, the width of y, the rank
  Dropout dropout;
  float factor;

  Lora(const Tensor& x_in, const Tensor& weight, const Tensor& lora_A, const Tensor& lora_B, double scaling, double p,
       const MaybeTensor& seed, ScalarType type)
      : type(type), dtype(dtype_of("dtype", type)), x(as_rows("x", x_in, type)),
        w(as_parameter("weight", weight, {weight.size(0), x.size(1)}, x, type)),
        A(as_parameter("lora_A", lora_A, {lora_A.size(0), x.size(1)}, x, type)),
        B(as_parameter("lora_B", lora_B, {w.size(0), A.size(0)}, x, type)), N(x.size(0)), K(x.size(1)), O(w.size(0)),
        r(A.size(0)), dropout(dropout_of(p, seed, x)), factor(float(scaling) * dropout.scale) {
    STD_TORCH_CHECK(dtype != DType::f32, "takes float16 or bfloat16 on CUDA, not float32");
  }

  Gemm product(int64_t rows, int64_t columns, int64_t terms, GemmOperand a, GemmOperand b) const {
    Gemm g;
    g.dtype = dtype;
    g.M = int(rows), g.N = int(columns), g.K = int(terms);
    g.a = a, g.b = b;
    return g;
  }
  void drop(Gemm& g, Dropped which) const {
    if (!dropout.seed) return;
    g.dropout = dropout;
    g.dropped = which;
  }
  // The (rows, columns) product of two tensors over all N rows, in shares of those rows, of dtype `to`.
  Tensor over_rows(Gemm g, ScalarType to, const OnDeviceOf& device) const {
    const int tiles = gemm_row_tiles(g.M) * gemm_row_tiles(g.N), most = std::max(1, g.K / 256);
    g.splits = std::clamp(2 * device.multiprocessors() / std::max(tiles, 1), 1, most);
    g.out_float = true;
    Tensor shares = new_empty(x, {g.splits, g.M, g.N}, ScalarType::Float);
    g.out = shares.mutable_data_ptr();
    LLMFAST_CUDA_CHECK(gemm(g, device.capability(), device.stream()));
    return column_sum(shares, to, true);
  }
};

std::tuple<Tensor, Tensor> lora_linear_fwd(const Tensor& x_in, const Tensor& weight, const MaybeTensor& bias,
                                           const Tensor& lora_A, const Tensor& lora_B, double scaling, double dropout_p,
                                           const MaybeTensor& seed, ScalarType type) {
  const Lora l(x_in, weight, lora_A, lora_B, scaling, dropout_p, seed, type);
  const OnDeviceOf device(x_in);
  const MaybeTensor b = as_bias("bias", bias, l.O, l.x, type);
  Tensor low = new_empty(l.x, {l.N, l.r}, ScalarType::Float), y = new_empty(l.x, with_width(x_in, l.O));
  Gemm first = l.product(l.N, l.r, l.K, along_k(l.x), along_k(l.A));
  l.drop(first, Dropped::a);
  first.factor = l.factor;
  first.out_float = true;
  first.out = low.mutable_data_ptr();
  LLMFAST_CUDA_CHECK(gemm(first, device.capability(), device.stream()));
  const Tensor rounded = torch::stable::to(low, type);
  Gemm main = l.product(l.N, l.O, l.K, along_k(l.x), along_k(l.w));
  main.low = rounded.const_data_ptr(), main.low_b = l.B.const_data_ptr(), main.rank = int(l.r);
  main.bias = data(b);
  main.out = y.mutable_data_ptr();
  LLMFAST_CUDA_CHECK(gemm(main, device.capability(), device.stream()));
  return {y, low};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> lora_linear_bwd(const Tensor& dy_in, const Tensor& x_in,
                                                                   const Tensor& low_in, const Tensor& weight,
                                                                   const Tensor& lora_A, const Tensor& lora_B,
                                                                   double scaling, double dropout_p,
                                                                   const MaybeTensor& seed, ScalarType type,
                                                                   int64_t wanted) {
  const Lora l(x_in, weight, lora_A, lora_B, scaling, dropout_p, seed, type);
  const OnDeviceOf device(x_in);
  const Tensor dy = as_rows("dy", dy_in, type), low = as_parameter("low", low_in, {l.N, l.r}, l.x, type);
  STD_TORCH_CHECK(dy.size(0) == l.N && dy.size(1) == l.O, "dy must have the shape of y");
  const auto wants = [&](int input) { return (wanted >> input & 1) != 0; };
  const bool x_grad = wants(0), A_grad = wants(3), B_grad = wants(4);
  Tensor dx = new_empty(l.x, x_grad ? with_width(x_in, l.K) : std::vector<int64_t>{0});
  Tensor dA = new_empty(lora_A, {0}), dB = new_empty(lora_B, {0});
  if (B_grad) dB = l.over_rows(l.product(l.O, l.r, l.N, across_k(dy), across_k(low)), lora_B.scalar_type(), device);
  if (x_grad || A_grad) {
    Tensor dlow = new_empty(l.x, {l.N, l.r});
    Gemm first = l.product(l.N, l.r, l.O, along_k(dy), across_k(l.B));
    first.factor = l.factor;
    first.out = dlow.mutable_data_ptr();
    LLMFAST_CUDA_CHECK(gemm(first, device.capability(), device.stream()));
    if (A_grad) {
      Gemm g = l.product(l.r, l.K, l.N, across_k(dlow), across_k(l.x));
      l.drop(g, Dropped::b);
      dA = l.over_rows(g, lora_A.scalar_type(), device);
    }
    if (x_grad) {
      Gemm main = l.product(l.N, l.K, l.O, along_k(dy), across_k(l.w));
      main.low = dlow.const_data_ptr(), main.low_b = l.A.const_data_ptr(), main.rank = int(l.r);
      l.drop(main, Dropped::low);
      main.out = dx.mutable_data_ptr();
      LLMFAST_CUDA_CHECK(gemm(main, device.capability(), device.stream()));
    }
  }
  return {torch::stable::to(dx, x_in.scalar_type()), weight_gradient(weight, dy, l.x, wants(1)),
          column_sum(dy, weight.scalar_type(), wants(2)), dA, dB};
}

}  // namespace
}  // namespace llmfast::cuda

LLMFAST_CUDA_OPS(m) {
  m.impl("lora_linear_fwd", TORCH_BOX(&llmfast::cuda::lora_linear_fwd));
  m.impl("lora_linear_bwd", TORCH_BOX(&llmfast::cuda::lora_linear_bwd));
}
