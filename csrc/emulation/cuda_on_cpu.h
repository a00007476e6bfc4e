#pragma once
// CUDA C++ for the dialect of csrc/cuda/dialect.h, without CUDA: g++ -x c++ -DLLMFAST_EMULATE kernel.cu
// The machine below it is in machine.h. What it cannot see: the memory model beyond barriers, occupancy, coalescing.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "emulation/machine.h"

// ---- language -------------------------------------------------------------------------------------------------------
#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define LLMFAST_SHARED(T, name, n)                             \
  static emu::StaticShared<T, (n)> name##_storage(#name);      \
  T(&name)[n] = name##_storage.get()
#define LLMFAST_DYN_SHARED(T, name, alignment) T* name = emu::dynamic_shared<T>(alignment)
#define LLMFAST_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  ((void)(stream), emu::launch(#kernel, dim3(grid), dim3(block), shared_bytes, kernel, ##__VA_ARGS__))

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
using cudaStream_t = void*;
inline cudaError_t cudaGetLastError() { return cudaSuccess; }  // a failed launch throws emu::Error
enum { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
template <typename F>
cudaError_t cudaFuncSetAttribute(F* kernel, int, int bytes) {
  if (bytes > 227 << 10) return cudaErrorInvalidValue;
  emu::machine.dynamic_limit[reinterpret_cast<const void*>(kernel)] = bytes;
  return cudaSuccess;
}

// ---- barriers and warp collectives ----------------------------------------------------------------------------------
// Not inlined, so that the return address tells the call.
#define LLMFAST_MEETS __attribute__((noinline, noipa))
#define LLMFAST_HERE const char *file = __builtin_FILE(), int line = __builtin_LINE()
#define LLMFAST_SITE emu::Site{__builtin_return_address(0), file, line}

LLMFAST_MEETS inline void __syncthreads(LLMFAST_HERE) { emu::block_barrier(LLMFAST_SITE); }
LLMFAST_MEETS inline void __syncwarp(unsigned mask = ~0u, LLMFAST_HERE) {
  emu::warp_collective("__syncwarp", mask, nullptr, nullptr, LLMFAST_SITE, true);
}

namespace emu {
struct Lane {
  uint64_t in, out;
  int source;
};
inline int lane() { return machine.current->linear & 31; }

template <typename T>
T shuffle(const char* what, unsigned mask, T v, int source, Site site) {
  static_assert(sizeof(T) <= 8);
  Quiet quiet;
  Lane mine{0, 0, source};
  memcpy(&mine.in, &v, sizeof(T));
  const auto op = [](void** lanes, unsigned m) {
    for (int l = 0; l < 32; ++l) {
      if (!(m >> l & 1)) continue;
      auto* to = static_cast<Lane*>(lanes[l]);
      const auto* from = static_cast<const Lane*>(lanes[to->source]);
      to->out = from ? from->in : ~uint64_t(0);  // a lane outside the mask gives poison
    }
  };
  warp_collective(what, mask, &mine, op, site, false);
  memcpy(&v, &mine.out, sizeof(T));
  return v;
}
}  // namespace emu

template <typename T>
LLMFAST_MEETS T __shfl_sync(unsigned mask, T v, int source, int width = 32, LLMFAST_HERE) {
  return emu::shuffle("__shfl_sync", mask, v, (emu::lane() & ~(width - 1)) | (source & (width - 1)), LLMFAST_SITE);
}
template <typename T>
LLMFAST_MEETS T __shfl_xor_sync(unsigned mask, T v, int x, int width = 32, LLMFAST_HERE) {
  const int lane = emu::lane(), source = lane ^ x;
  return emu::shuffle("__shfl_xor_sync", mask, v, source / width <= lane / width ? source : lane, LLMFAST_SITE);
}
template <typename T>
LLMFAST_MEETS T __shfl_down_sync(unsigned mask, T v, unsigned delta, int width = 32, LLMFAST_HERE) {
  const int lane = emu::lane(), source = lane + int(delta);
  return emu::shuffle("__shfl_down_sync", mask, v, source / width == lane / width ? source : lane, LLMFAST_SITE);
}
LLMFAST_MEETS inline unsigned __ballot_sync(unsigned mask, bool predicate, LLMFAST_HERE) {
  emu::Lane mine{predicate, 0, 0};
  const auto op = [](void** lanes, unsigned m) {
    unsigned votes = 0;
    for (int l = 0; l < 32; ++l)
      if (m >> l & 1) votes |= unsigned(static_cast<emu::Lane*>(lanes[l])->in) << l;
    for (int l = 0; l < 32; ++l)
      if (m >> l & 1) static_cast<emu::Lane*>(lanes[l])->out = votes;
  };
  emu::warp_collective("__ballot_sync", mask, &mine, op, LLMFAST_SITE, false);
  return unsigned(mine.out);
}

// ---- arithmetic -----------------------------------------------------------------------------------------------------
inline float rsqrtf(float x) { return float(1.0 / std::sqrt(double(x))); }

struct __nv_bfloat16 {
  uint16_t bits;
  __nv_bfloat16() = default;
  __nv_bfloat16(float f) {  // round to nearest, ties to even
    uint32_t u;
    memcpy(&u, &f, 4);
    bits = f != f ? 0x7FFF : uint16_t((u + 0x7FFF + (u >> 16 & 1)) >> 16);
  }
  operator float() const {
    const uint32_t u = uint32_t(bits) << 16;
    float f;
    memcpy(&f, &u, 4);
    return f;
  }
};

struct __half {
  uint16_t bits;
  __half() = default;
  __half(float f) {
    const _Float16 h = _Float16(f);
    memcpy(&bits, &h, 2);
  }
  operator float() const {
    _Float16 h;
    memcpy(&h, &bits, 2);
    return float(h);
  }
};
