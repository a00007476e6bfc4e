#pragma once
// The dialect of CUDA that every kernel keeps to, so that the same source also runs on a CPU (csrc/emulation/):
// LLMFAST_SHARED, LLMFAST_DYN_SHARED and LLMFAST_LAUNCH instead of __shared__, extern __shared__ and <<<>>>.
#ifdef LLMFAST_EMULATE
#include "emulation/cuda_on_cpu.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#define LLMFAST_SHARED(T, name, n) __shared__ T name[n]
#define LLMFAST_DYN_SHARED(T, name, alignment)                         \
  extern __shared__ __align__(alignment) unsigned char name##_bytes[]; \
  T* name = reinterpret_cast<T*>(name##_bytes)
#define LLMFAST_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  kernel<<<grid, block, shared_bytes, stream>>>(__VA_ARGS__)
#endif
#include <cstdint>

namespace llmfast::cuda {

enum class DType { f32, f16, bf16 };

#if defined(LLMFAST_SM90A) || defined(LLMFAST_EMULATE)
inline constexpr bool kHasSm90 = true;  // whether the kernels of Hopper (csrc/cuda/*_sm90.cu) are in this build
#else
inline constexpr bool kHasSm90 = false;
#endif

// N elements that move as one (16-byte) access where the address is aligned to them.
template <typename T, int N>
struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Pack {
  T v[N];
};

}  // namespace llmfast::cuda
