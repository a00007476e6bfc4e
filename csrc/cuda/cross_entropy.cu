// The loss of rows of logits, and the gradient that takes their place; statistics and sums in float32.
// A block a row, which is read twice (the second time mostly from L2) and written once: 3 rows V sizeof(T) bytes, or one
// reading where the loss alone is wanted. Rows begin anywhere: scalars up to the first 16-byte boundary, then packs, then
// scalars. No atomics: the result is the same in every run.
// Source: the running maximum and sum are Milakov and Gimelshein's, "Online normalizer calculation for softmax", 2018.
#include "cuda/cross_entropy.h"

#include <cmath>

#include "cuda/math.h"

namespace llmfast::cuda {
namespace {

constexpr int kThreads = 512, kWarps = kThreads / 32;

// f(column, element) for every element of row[0, V), some of them in packs; kWrite: what f leaves is stored.
template <bool kWrite, typename T, typename F>
__device__ inline void for_each(T* row, int V, F f) {
  constexpr int N = 16 / sizeof(T);
  const int misfit = int(reinterpret_cast<uintptr_t>(row) % 16 / sizeof(T));
  const int head = misfit == 0 ? 0 : N - misfit < V ? N - misfit : V;
  const int packs = (V - head) / N, tail = head + packs * N;
  const auto scalar = [&](int i) {
    T v = row[i];
    f(i, v);
    if (kWrite) row[i] = v;
  };
  if (int(threadIdx.x) < head) scalar(threadIdx.x);
  for (int p = threadIdx.x; p < packs; p += kThreads) {
    auto* at = reinterpret_cast<Pack<T, N>*>(row + head) + p;
    Pack<T, N> pack = *at;
#pragma unroll
    for (int e = 0; e < N; ++e) f(head + p * N + e, pack.v[e]);
    if (kWrite) *at = pack;
  }
  if (tail + int(threadIdx.x) < V) scalar(tail + threadIdx.x);
}

constexpr float kLowest = -3e38f;  // where a running maximum begins: finite, so that -inf - kLowest is no NaN

// Two shares (maximum, sum of 2^(z - maximum)) of a row as one.
__device__ inline void join(float& top, float& sum, float other_top, float other_sum) {
  const float most = fmaxf(top, other_top);
  sum = sum * fast_exp2(top - most) + other_sum * fast_exp2(other_top - most);
  top = most;
}

template <typename T>
__global__ void __launch_bounds__(kThreads) softmax_gradient_kernel(SoftmaxGradient a) {
  LLMFAST_SHARED(float, shares, 3 * kWarps);
  LLMFAST_SHARED(float, at_target, 1);
  T* row = static_cast<T*>(a.z) + int64_t(blockIdx.x) * a.stride;
  const T* bias = static_cast<const T*>(a.bias);
  const int target = int(a.target[blockIdx.x]), warp = threadIdx.x / 32;
  const bool smooth = a.smoothing != 0.f;

  float top = kLowest, sum = 0.f, total = 0.f;  // of z log2(e), for exp2
  for_each<false>(row, a.V, [&](int v, T& element) {
    const float z = float(element) + (bias ? float(bias[v]) : 0.f);
    if (v == target) at_target[0] = z;
    if (smooth) total += z;
    const float x = z * kLog2e;
    if (x > top) {  // seldom
      sum *= fast_exp2(top - x);
      top = x;
    }
    sum += fast_exp2(x - top);
  });
  for (int offset = 16; offset; offset >>= 1) {
    const float other_top = __shfl_xor_sync(~0u, top, offset), other_sum = __shfl_xor_sync(~0u, sum, offset);
    total += __shfl_xor_sync(~0u, total, offset);
    join(top, sum, other_top, other_sum);
  }
  if (threadIdx.x % 32 == 0) {
    shares[warp] = top;
    shares[kWarps + warp] = sum;
    shares[2 * kWarps + warp] = total;
  }
  __syncthreads();
  top = kLowest;
  sum = total = 0.f;
  for (int w = 0; w < kWarps; ++w) {
    join(top, sum, shares[w], shares[kWarps + w]);
    total += shares[2 * kWarps + w];
  }
  if (threadIdx.x == 0) {
    // The largest logit first: what is left to add to log(sum) is a difference of logits.
    const float log_sum = logf(sum), most = top * (1.f / kLog2e);
    float loss = log_sum + (1.f - a.smoothing) * (most - at_target[0]);
    if (smooth) loss += a.smoothing * (most - total / a.V);
    a.loss[blockIdx.x] = loss;
  }
  if (!a.scale) return;
  const float scale = a.scale[blockIdx.x], share = a.smoothing / a.V, factor = scale / sum;
  for_each<true>(row, a.V, [&](int v, T& element) {
    const float z = float(element) + (bias ? float(bias[v]) : 0.f);
    float dz = fast_exp2(z * kLog2e - top) * factor - scale * share;
    if (v == target) dz -= scale * (1.f - a.smoothing);
    element = T(dz);
  });
}

template <typename T>
cudaError_t launch(const SoftmaxGradient& a, cudaStream_t stream) {
  LLMFAST_LAUNCH((softmax_gradient_kernel<T>), unsigned(a.rows), kThreads, 0, stream, a);
  return cudaGetLastError();
}

}  // namespace

cudaError_t softmax_gradient(const SoftmaxGradient& a, cudaStream_t stream) {
  if (a.rows == 0) return cudaSuccess;
  switch (a.dtype) {
    case DType::f32: return launch<float>(a, stream);
    case DType::f16: return launch<__half>(a, stream);
    case DType::bf16: return launch<__nv_bfloat16>(a, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace llmfast::cuda
