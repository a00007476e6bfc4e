// The raw ops lora_linear_fwd and lora_linear_bwd:  y = x W^T + b + S B^T with S = scaling d(x) A^T, d: dropout.
//   dS = scaling dy B,  dB = dy^T S,  dx = dy W + d(dS A),  dA = dS^T d(x),  dW = dy^T x
// y and dx are products of csrc/cuda/gemm.cu, the low-rank term in the same accumulators, where dx's dropout is made as
// well. S, dS, dB and dA are those of csrc/cuda/lora_linear.cu: dS and dB come of one pass over dy (of two above a rank of
// kOnePassRank), S and dA of one over x each, with dropout's mask made on the way; dropout's scale is in S and dS.
// Backward without dW, which a frozen weight does not want, reads dy twice and x once, in bytes of two-byte elements
//   2 N (2 O + K) + 2 N K for dx + 8 r N O / 128 for the shares of dS;  with a pass for each product: 2 N (3 O + K) + 2 N K.
#include <tuple>

#include "cuda/lora_linear.h"
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

  Gemm product(int64_t columns, int64_t terms, GemmOperand a, GemmOperand b) const {
    Gemm g;
    g.dtype = dtype;
    g.M = int(N), g.N = int(columns), g.K = int(terms);
    g.a = a, g.b = b;
    return g;
  }

  // One pass over `large`, x or dy: large v times the factor, (N, r), and large^T u, which lies as A or B does; in float32,
  // without elements where v or u is null.
  std::tuple<Tensor, Tensor> pass(const Tensor& large, bool is_x, const Tensor* v, const Tensor* u,
                                  const OnDeviceOf& device) const {
    LowRank a{dtype, large.const_data_ptr(), int(N), int(large.size(1)), int(r), is_x, is_x ? dropout : Dropout{}, factor};
    share_out(a, v != nullptr, u != nullptr, device.multiprocessors());
    const int64_t n = a.columns;
    Tensor p = new_empty(x, {v ? a.column_shares : 0, N, r}, ScalarType::Float);
    Tensor q = new_empty(x, {u ? a.row_shares : 0, is_x ? r : n, is_x ? n : r}, ScalarType::Float);
    if (v) a.v = v->const_data_ptr(), a.p = floats(p);
    if (u) a.u = u->const_data_ptr(), a.q = floats(q);
    LLMFAST_CUDA_CHECK(low_rank(a, device.stream()));
    return {column_sum(p, ScalarType::Float, v), column_sum(q, ScalarType::Float, u)};
  }
};

std::tuple<Tensor, Tensor> lora_linear_fwd(const Tensor& x_in, const Tensor& weight, const MaybeTensor& bias,
                                           const Tensor& lora_A, const Tensor& lora_B, double scaling, double dropout_p,
                                           const MaybeTensor& seed, ScalarType type) {
  const Lora l(x_in, weight, lora_A, lora_B, scaling, dropout_p, seed, type);
  const OnDeviceOf device(x_in);
  const MaybeTensor b = as_bias("bias", bias, l.O, l.x, type);
  const Tensor low = std::get<0>(l.pass(l.x, true, &l.A, nullptr, device)), rounded = torch::stable::to(low, type);
  Tensor y = new_empty(l.x, with_width(x_in, l.O));
  Gemm main = l.product(l.O, l.K, along_k(l.x), along_k(l.w));
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
  const bool x_grad = wants(0), A_grad = wants(3);
  const Tensor *B = x_grad || A_grad ? &l.B : nullptr, *S = wants(4) ? &low : nullptr;
  Tensor dlow, dB;
  if (l.r <= kOnePassRank || !B || !S) {
    std::tie(dlow, dB) = l.pass(dy, false, B, S, device);
  } else {
    dlow = std::get<0>(l.pass(dy, false, B, nullptr, device));
    dB = std::get<1>(l.pass(dy, false, nullptr, S, device));
  }
  dlow = torch::stable::to(dlow, type);
  const Tensor dA = std::get<1>(l.pass(l.x, true, nullptr, A_grad ? &dlow : nullptr, device));
  Tensor dx = new_empty(l.x, x_grad ? with_width(x_in, l.K) : std::vector<int64_t>{0});
  if (x_grad) {
    Gemm main = l.product(l.K, l.O, along_k(dy), across_k(l.w));
    main.low = dlow.const_data_ptr(), main.low_b = l.A.const_data_ptr(), main.rank = int(l.r);
    main.dropout = l.dropout;
    main.out = dx.mutable_data_ptr();
    LLMFAST_CUDA_CHECK(gemm(main, device.capability(), device.stream()));
  }
  return {torch::stable::to(dx, x_in.scalar_type()), weight_gradient(weight, dy, l.x, wants(1)),
          column_sum(dy, weight.scalar_type(), wants(2)), torch::stable::to(dA, lora_A.scalar_type()),
          torch::stable::to(dB, lora_B.scalar_type())};
}

}  // namespace
}  // namespace llmfast::cuda

LLMFAST_CUDA_OPS(m) {
  m.impl("lora_linear_fwd", TORCH_BOX(&llmfast::cuda::lora_linear_fwd));
  m.impl("lora_linear_bwd", TORCH_BOX(&llmfast::cuda::lora_linear_bwd));
}
