// The raw ops mlp_fwd and mlp_bwd:  y = act(h) W2^T + b2 with h = x W1^T + b1.
//   dW2 = dy^T a,  dh = (dy W2) act'(h),  dW1 = dh^T x,  dx = dh W1
// In float16 and bfloat16 the products beside the activation are csrc/cuda/gemm.cu, with bias, activation, its derivative
// and the sums for db1 inside; in float32 they are cuBLAS's beside csrc/cuda/activation.cu. The other products are cuBLAS's.
// LLMFAST_CUDA_MLP=cublaslt has cuBLASLt's epilogues do what ours do, for gelu_tanh, where it can: to compare the two.
#include <cstdlib>
#include <string>
#include <tuple>

#include "cuda/activation.h"
#include "cuda/cublaslt.h"
#include "cuda/products.h"

namespace llmfast::cuda {
namespace {

using torch::stable::matmul;
using torch::stable::new_empty;

Activation activation_of(const std::string& name) {
  if (name == "gelu_tanh") return Activation::gelu_tanh;
  if (name == "gelu") return Activation::gelu;
  STD_TORCH_CHECK(name == "relu", "activation must be gelu_tanh, gelu or relu, got ", name);
  return Activation::relu;
}

#ifndef LLMFAST_EMULATE
bool prefers_cublaslt() {
  const char* choice = std::getenv("LLMFAST_CUDA_MLP");
  return choice && std::string(choice) == "cublaslt";
}
// Which code makes the products beside the activation in 16 bits, for `llmfast info`.
std::string mlp_products() {
  const LtState& lt = cublaslt_state();
  if (!prefers_cublaslt()) return "ours (" + std::string(lt.found ? "LLMFAST_CUDA_MLP=cublaslt: " : "") + lt.text + ")";
  return lt.found ? lt.text + " for gelu_tanh, else ours" : "ours (" + lt.text + ")";
}
#endif

// Whether cuBLASLt has made the product.
bool by_cublaslt([[maybe_unused]] const LtProduct& p, [[maybe_unused]] Activation act, [[maybe_unused]] const Tensor& x,
                 [[maybe_unused]] const OnDeviceOf& device) {
#ifdef LLMFAST_EMULATE
  return false;
#else
  if (act != Activation::gelu_tanh || p.N == 0 || p.M == 0 || p.K == 0 || !prefers_cublaslt()) return false;
  constexpr int64_t kWorkspaceBytes = 32 << 20;  // what NVIDIA advises for Hopper
  Tensor workspace = new_empty(x, {kWorkspaceBytes}, ScalarType::Byte);
  return cublaslt_product(p, device.blas_handle(), workspace.mutable_data_ptr(), kWorkspaceBytes, device.stream());
#endif
}

std::tuple<Tensor, Tensor> mlp_fwd(const Tensor& x_in, const Tensor& fc_weight, const MaybeTensor& fc_bias,
                                   const Tensor& proj_weight, const MaybeTensor& proj_bias, const std::string& activation,
                                   ScalarType type, bool keep) {
  const Activation act = activation_of(activation);
  const DType dtype = dtype_of("dtype", type);
  const OnDeviceOf device(x_in);
  const Tensor x = as_rows("x", x_in, type);
  const int64_t N = x.size(0), C = x.size(1), M = fc_weight.size(0), O = proj_weight.size(0);
  const Tensor w1 = as_parameter("fc_weight", fc_weight, {M, C}, x, type);
  const Tensor w2 = as_parameter("proj_weight", proj_weight, {O, M}, x, type);
  const MaybeTensor b1 = as_bias("fc_bias", fc_bias, M, x, type), b2 = as_bias("proj_bias", proj_bias, O, x, type);
  Tensor a = new_empty(x, {N, M}), h = new_empty(x, {0});
  if (dtype == DType::f32) {
    h = linear(x, w1, b1);
    LLMFAST_CUDA_CHECK(activation_forward(dtype, act, h.const_data_ptr(), a.mutable_data_ptr(), N * M, device.stream()));
    if (!keep) h = new_empty(x, {0});
  } else {
    if (keep) h = new_empty(x, {N, M});
    void* kept_h = keep ? h.mutable_data_ptr() : nullptr;
    const LtProduct product{dtype, N, M, C, x.const_data_ptr(), w1.const_data_ptr(), false, const_cast<void*>(data(b1)), kept_h,
                            a.mutable_data_ptr()};
    Gemm g;
    g.dtype = dtype;
    g.M = int(N), g.N = int(M), g.K = int(C);
    g.a = along_k(x), g.b = along_k(w1);
    g.bias = data(b1);
    g.activation = act;
    g.h = kept_h;
    g.out = a.mutable_data_ptr();
    if (!by_cublaslt(product, act, x, device)) LLMFAST_CUDA_CHECK(gemm(g, device.capability(), device.stream()));
  }
  return {torch::stable::reshape(linear(a, w2, b2), with_width(x_in, O)), h};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> mlp_bwd(const Tensor& dy_in, const Tensor& x_in, const Tensor& h,
                                                           const Tensor& fc_weight, const Tensor& proj_weight,
                                                           const std::string& activation, int64_t wanted) {
  const Activation act = activation_of(activation);
  const ScalarType type = h.scalar_type();
  const DType dtype = dtype_of("h", type);
  const OnDeviceOf device(x_in);
  const Tensor x = as_rows("x", x_in, type), dy = as_rows("dy", dy_in, type);
  const int64_t N = x.size(0), C = x.size(1), M = fc_weight.size(0), O = proj_weight.size(0);
  STD_TORCH_CHECK(dy.size(0) == N && dy.size(1) == O, "dy must have the shape of y");
  STD_TORCH_CHECK(h.dim() == 2 && h.size(0) == N && h.size(1) == M && h.is_contiguous(), "h must be what mlp_fwd gave");
  const Tensor w1 = as_parameter("fc_weight", fc_weight, {M, C}, x, type);
  const Tensor w2 = as_parameter("proj_weight", proj_weight, {O, M}, x, type);
  const auto wants = [&](int input) { return (wanted >> input & 1) != 0; };
  const bool x_grad = wants(0), fc_grad = wants(1), fc_bias_grad = wants(2), proj_grad = wants(3);

  Tensor dh, a = new_empty(x, {proj_grad ? N : 0, M}), sums;
  if (dtype == DType::f32) {
    dh = matmul(dy, w2);
    LLMFAST_CUDA_CHECK(activation_backward(dtype, act, h.const_data_ptr(), dh.mutable_data_ptr(),
                                           proj_grad ? a.mutable_data_ptr() : nullptr, N * M, device.stream()));
    sums = dh;
  } else {
    dh = new_empty(x, {N, M});
    void* read_h = const_cast<void*>(h.const_data_ptr());
    Tensor lt_sums = new_empty(x, {1, fc_bias_grad ? M : 0});
    const LtProduct product{dtype, N, M, O, dy.const_data_ptr(), w2.const_data_ptr(), true,
                            fc_bias_grad ? lt_sums.mutable_data_ptr() : nullptr, read_h, dh.mutable_data_ptr()};
    sums = new_empty(x, {fc_bias_grad ? gemm_row_tiles(int(N)) : 0, M}, ScalarType::Float);
    Gemm g;
    g.dtype = dtype;
    g.M = int(N), g.N = int(M), g.K = int(O);
    g.a = along_k(dy), g.b = across_k(w2);
    g.activation = act;
    g.backward = true;
    g.h = read_h;
    g.act = proj_grad ? a.mutable_data_ptr() : nullptr;
    g.sums = fc_bias_grad ? floats(sums) : nullptr;
    g.out = dh.mutable_data_ptr();
    if (by_cublaslt(product, act, x, device)) {
      sums = lt_sums;
      if (proj_grad)
        LLMFAST_CUDA_CHECK(activation_forward(dtype, act, read_h, a.mutable_data_ptr(), N * M, device.stream()));
    } else {
      LLMFAST_CUDA_CHECK(gemm(g, device.capability(), device.stream()));
    }
  }
  Tensor dx = x_grad ? torch::stable::to(torch::stable::reshape(matmul(dh, w1), with_width(x_in, C)), x_in.scalar_type())
                     : new_empty(x_in, {0});
  return {dx, weight_gradient(fc_weight, dh, x, fc_grad), column_sum(sums, fc_weight.scalar_type(), fc_bias_grad),
          weight_gradient(proj_weight, dy, a, proj_grad), column_sum(dy, proj_weight.scalar_type(), wants(4))};
}

}  // namespace
}  // namespace llmfast::cuda

LLMFAST_CUDA_OPS(m) {
  m.impl("mlp_fwd", TORCH_BOX(&llmfast::cuda::mlp_fwd));
  m.impl("mlp_bwd", TORCH_BOX(&llmfast::cuda::mlp_bwd));
}

#ifndef LLMFAST_EMULATE
STABLE_TORCH_LIBRARY_IMPL(llmfast, CompositeExplicitAutograd, m) {
  m.impl("mlp_products", TORCH_BOX(&llmfast::cuda::mlp_products));
}
#endif
