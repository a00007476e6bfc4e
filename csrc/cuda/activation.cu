// Activations by themselves, beside products that are not ours (float32). A thread an access of 16 bytes; memory is touched
// once: 2 n sizeof(T) bytes forward, 3 or 4 n backward.
#include "cuda/activation.h"

#include "cuda/math.h"

namespace llmfast::cuda {
namespace {

constexpr int kThreads = 256;

template <typename T, bool kBackward>
__global__ void __launch_bounds__(kThreads) activation_kernel(Activation activation, const T* h, T* dh, T* a, int64_t n) {
  constexpr int N = 16 / sizeof(T);
  const int64_t at = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * N;
  if (at >= n) return;
  const bool whole = at + N <= n;
  Pack<T, N> in, gradient, out;
  if (whole) {
    in = *reinterpret_cast<const Pack<T, N>*>(h + at);
    if (kBackward) gradient = *reinterpret_cast<const Pack<T, N>*>(dh + at);
  }
#pragma unroll
  for (int e = 0; e < N; ++e) {
    if (!whole) {
      in.v[e] = at + e < n ? h[at + e] : T(0.f);
      if (kBackward) gradient.v[e] = at + e < n ? dh[at + e] : T(0.f);
    }
    out.v[e] = T(activate(activation, float(in.v[e])));
    if (kBackward) gradient.v[e] = T(float(gradient.v[e]) * activate_backward(activation, float(in.v[e])));
  }
  if (whole) {
    if (a) *reinterpret_cast<Pack<T, N>*>(a + at) = out;
    if (kBackward) *reinterpret_cast<Pack<T, N>*>(dh + at) = gradient;
    return;
  }
#pragma unroll
  for (int e = 0; e < N; ++e) {
    if (at + e >= n) break;
    if (a) a[at + e] = out.v[e];
    if (kBackward) dh[at + e] = gradient.v[e];
  }
}

template <bool kBackward>
cudaError_t run(DType dtype, Activation activation, const void* h, void* dh, void* a, int64_t n, cudaStream_t stream) {
  const auto launch = [&](auto t) {
    using T = decltype(t);
    const int64_t blocks = (n + kThreads * 16 / int(sizeof(T)) - 1) / (kThreads * 16 / int(sizeof(T)));
    if (blocks == 0) return cudaSuccess;
    if (blocks > 0x7FFFFFFF) return cudaErrorInvalidValue;
    LLMFAST_LAUNCH((activation_kernel<T, kBackward>), unsigned(blocks), kThreads, 0, stream, activation,
                   static_cast<const T*>(h), static_cast<T*>(dh), static_cast<T*>(a), n);
    return cudaGetLastError();
  };
  switch (dtype) {
    case DType::f32: return launch(float());
    case DType::f16: return launch(__half());
    case DType::bf16: return launch(__nv_bfloat16());
  }
  return cudaErrorInvalidValue;
}

}  // namespace

cudaError_t activation_forward(DType dtype, Activation activation, const void* h, void* a, int64_t n, cudaStream_t stream) {
  return run<false>(dtype, activation, h, nullptr, a, n, stream);
}

cudaError_t activation_backward(DType dtype, Activation activation, const void* h, void* dh, void* a, int64_t n,
                                cudaStream_t stream) {
  return run<true>(dtype, activation, h, dh, a, n, stream);
}

}  // namespace llmfast::cuda
