#pragma once
// Between torch's tensors and the launchers: for the .cpp files beside the kernels only.
#include <cuda_runtime_api.h>

#include "stable.h"

// These live in libtorch_cuda.so. As weak references they are null under a CPU build of torch, where the library must
// load as well.
#pragma weak aoti_torch_get_current_cuda_stream
#pragma weak torch_get_current_cuda_blas_handle
#pragma weak torch_c10_cuda_check_msg
#pragma weak torch_c10_cuda_free_error_msg

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/macros.h>

namespace llmfast::cuda {

// Makes x's device the current one while it lives, and tells what a launch there needs.
class OnDeviceOf {
 public:
  explicit OnDeviceOf(const Tensor& x) : device_(x.get_device_index()), guard_(device_) {
    STD_TORCH_CHECK(&aoti_torch_get_current_cuda_stream != nullptr, "this PyTorch has no CUDA support");
    STD_CUDA_CHECK(cudaSetDevice(device_));  // the CUDA runtime in this library is not torch's copy
    STD_CUDA_CHECK(cudaDeviceGetAttribute(&multiprocessors_, cudaDevAttrMultiProcessorCount, device_));
  }
  int multiprocessors() const { return multiprocessors_; }
  cudaStream_t stream() const {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_, &stream));
    return static_cast<cudaStream_t>(stream);
  }

 private:
  int32_t device_;
  torch::stable::accelerator::DeviceGuard guard_;
  int multiprocessors_ = 0;
};

}  // namespace llmfast::cuda
