#include "cuda/cross_entropy.h"

#include "cuda/glue.h"

namespace llmfast::cuda {
namespace {

Tensor softmax_gradient_(Tensor z, const MaybeTensor& bias, const Tensor& target, const MaybeTensor& scale,
                         double smoothing) {
  STD_TORCH_CHECK(z.dim() == 2 && z.stride(1) == 1 && z.size(1) > 0 && z.size(1) < (int64_t(1) << 31),
                  "z must be (rows, V) with contiguous rows of 1 to 2^31 - 1 elements");
  const int64_t rows = z.size(0), V = z.size(1);
  STD_TORCH_CHECK(rows < (int64_t(1) << 31), "z must have fewer than 2^31 rows, got ", rows);
  const auto check = [&](const char* name, const Tensor& t, ScalarType type, int64_t n) {
    STD_TORCH_CHECK(t.dim() == 1 && t.size(0) == n && t.scalar_type() == type && t.is_contiguous() &&
                        t.device() == z.device(),
                    name, " must be a contiguous ", torch::headeronly::toString(type), " tensor of shape (", n,
                    ",) on z's device");
  };
  if (bias) check("bias", *bias, z.scalar_type(), V);
  check("target", target, ScalarType::Long, rows);
  if (scale) check("scale", *scale, ScalarType::Float, rows);
  const DType dtype = dtype_of("z", z.scalar_type());
  const OnDeviceOf device(z);
  Tensor loss = torch::stable::new_empty(z, {rows}, ScalarType::Float);
  LLMFAST_CUDA_CHECK(softmax_gradient(
      {dtype, z.mutable_data_ptr(), data(bias), static_cast<const int64_t*>(target.const_data_ptr()),
       static_cast<const float*>(data(scale)), floats(loss), rows, z.stride(0), int(V), float(smoothing)},
      device.stream()));
  return loss;
}

}  // namespace
}  // namespace llmfast::cuda

LLMFAST_CUDA_OPS(m) { m.impl("softmax_gradient_", TORCH_BOX(&llmfast::cuda::softmax_gradient_)); }
