#pragma once
// Between torch's tensors and the launchers: for the .cpp files beside the kernels only. Under LLMFAST_EMULATE they make a
// library whose ops run the emulated kernels on CPU tensors, which tests load.
#include <optional>

#include "cuda/philox.h"
#include "stable.h"

#ifdef LLMFAST_EMULATE
#define LLMFAST_CUDA_OPS(m) LLMFAST_CUDA_OPS_OF(llmfast_emulated, CPU, m)
#else
#include <cuda_runtime_api.h>
#define LLMFAST_CUDA_OPS(m) LLMFAST_CUDA_OPS_OF(llmfast, CUDA, m)

// These live in libtorch_cuda.so. As weak references they are null under a CPU build of torch, where the library must
// load as well.
#pragma weak aoti_torch_get_current_cuda_stream
#pragma weak torch_get_current_cuda_blas_handle
#pragma weak torch_c10_cuda_check_msg
#pragma weak torch_c10_cuda_free_error_msg

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/macros.h>
#endif
#define LLMFAST_CUDA_OPS_OF(name, device, m) STABLE_TORCH_LIBRARY_IMPL(name, device, m)

namespace llmfast::cuda {

using MaybeTensor = std::optional<Tensor>;

#ifdef LLMFAST_EMULATE
#define LLMFAST_CUDA_CHECK(call) STD_TORCH_CHECK((call) == cudaSuccess, #call " failed")

struct OnDeviceOf {
  explicit OnDeviceOf(const Tensor&) {}
  int multiprocessors() const { return 3; }
  int capability() const { return 90; }  // operands that are not aligned take the other product all the same
  cudaStream_t stream() const { return nullptr; }
};
#else
#define LLMFAST_CUDA_CHECK STD_CUDA_CHECK

// Makes x's device the current one while it lives, and tells what a launch there needs.
class OnDeviceOf {
 public:
  explicit OnDeviceOf(const Tensor& x) : device_(x.get_device_index()), guard_(device_) {
    STD_TORCH_CHECK(&aoti_torch_get_current_cuda_stream != nullptr, "this PyTorch has no CUDA support");
    STD_CUDA_CHECK(cudaSetDevice(device_));  // the CUDA runtime in this library is not torch's copy
    STD_CUDA_CHECK(cudaDeviceGetAttribute(&multiprocessors_, cudaDevAttrMultiProcessorCount, device_));
    int major = 0, minor = 0;
    STD_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device_));
    STD_CUDA_CHECK(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device_));
    capability_ = 10 * major + minor;
  }
  int multiprocessors() const { return multiprocessors_; }
  int capability() const { return capability_; }  // 10 major + minor
  void* blas_handle() const {  // of this device and stream; also a cuBLASLt handle
    void* handle = nullptr;
    TORCH_ERROR_CODE_CHECK(torch_get_current_cuda_blas_handle(&handle));
    return handle;
  }
  cudaStream_t stream() const {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_, &stream));
    return static_cast<cudaStream_t>(stream);
  }

 private:
  int32_t device_;
  torch::stable::accelerator::DeviceGuard guard_;
  int multiprocessors_ = 0, capability_ = 0;
};
#endif

inline DType dtype_of(const char* name, ScalarType type) {
  switch (type) {
    case ScalarType::Float: return DType::f32;
    case ScalarType::Half: return DType::f16;
    case ScalarType::BFloat16: return DType::bf16;
    default:
      STD_TORCH_CHECK(false, name, " must be float32, float16 or bfloat16, got ",
                      torch::headeronly::toString(type));
  }
}

inline const void* data(const MaybeTensor& t) { return t ? t->const_data_ptr() : nullptr; }
inline float* floats(Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }
inline const float* floats(const Tensor& t) { return static_cast<const float*>(t.const_data_ptr()); }

// The dropout of probability p by `seed`, one int64 on x's device.
inline Dropout dropout_of(double p, const MaybeTensor& seed, const Tensor& x) {
  STD_TORCH_CHECK(p >= 0 && p < 1, "dropout_p must lie in [0, 1), got ", p);
  if (p == 0) return {};
  STD_TORCH_CHECK(seed && seed->scalar_type() == ScalarType::Long && seed->numel() == 1 && seed->device() == x.device(),
                  "seed must be one int64 on x's device where dropout_p is above 0");
  return make_dropout(static_cast<const int64_t*>(seed->const_data_ptr()), p);
}

}  // namespace llmfast::cuda
