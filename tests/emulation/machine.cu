// machine NAME: one kernel with or without a planted fault; prints "ok" or what the emulator says of it.
#include <cstdio>
#include <memory>

#include "cuda/mma.h"

namespace {

int out[1024];

__global__ void swap_lanes(bool sync) {
  LLMFAST_SHARED(int, values, 64);
  values[threadIdx.x] = int(threadIdx.x) * 3;
  if (sync) __syncwarp();
  out[threadIdx.x] = values[threadIdx.x ^ 1];
}

// Threads of warp 0 and of warp 1 come to the barrier by different calls, on one line of source.
__global__ void two_barriers(bool divergent) {
  // clang-format off
  if (divergent && threadIdx.x < 32) { out[threadIdx.x] = 1; __syncthreads(); } else { out[threadIdx.x] = 2; __syncthreads(); }
  // clang-format on
}

__global__ void early_exit() {
  if (threadIdx.x == 7) return;
  __syncthreads();
  out[threadIdx.x] = 1;
}

__global__ void warp_sums() {
  int v = int(threadIdx.x);
  for (int offset = 16; offset; offset >>= 1) v += __shfl_xor_sync(~0u, v, offset);
  const int below = __shfl_down_sync(~0u, int(threadIdx.x), 1);
  out[threadIdx.x] = v + below + int(__ballot_sync(~0u, threadIdx.x & 1)) + __shfl_sync(~0u, int(threadIdx.x), 3);
}

__global__ void dynamic(int n, int alignment) {
  LLMFAST_DYN_SHARED(int, values, alignment);
  for (int i = threadIdx.x; i < n; i += blockDim.x) values[i] = i;
  __syncthreads();
  if (threadIdx.x == 0) out[0] = values[n - 1];
}

__global__ void uninitialised() {
  LLMFAST_SHARED(float, values, 32);
  if (threadIdx.x < 31) values[threadIdx.x] = 1.f;
  __syncthreads();
  out[threadIdx.x] = values[threadIdx.x] == 1.f;
}

__global__ void huge_frame() {
  volatile char frame[300 << 10];
  frame[0] = 1;
  out[0] = frame[0];
}

__global__ void same_cell(int* cell) {
  if (threadIdx.x == 0) *cell = int(blockIdx.x);
}

__global__ void copies(const int* from, bool waits) {
  LLMFAST_DYN_SHARED(int, values, 16);
  llmfast::cuda::cp_async16(values + 4 * threadIdx.x, from + 4 * threadIdx.x);
  llmfast::cuda::cp_async_commit();
  if (waits) llmfast::cuda::cp_async_wait<0>();
}

void require(bool condition) {
  if (!condition) throw emu::Error("WRONG RESULT");
}

void run(const std::string& name) {
  if (name == "swap") {
    LLMFAST_LAUNCH(swap_lanes, 1, 64, 0, nullptr, true);
    require(out[0] == 3 && out[1] == 0 && out[62] == 189);
  } else if (name == "swap-without-sync") {
    LLMFAST_LAUNCH(swap_lanes, 1, 64, 0, nullptr, false);
    require(out[0] == 3 && out[1] == 0);
  } else if (name == "one-barrier") {
    LLMFAST_LAUNCH(two_barriers, 1, 64, 0, nullptr, false);
  } else if (name == "two-barriers") {
    LLMFAST_LAUNCH(two_barriers, 1, 64, 0, nullptr, true);
  } else if (name == "early-exit") {
    LLMFAST_LAUNCH(early_exit, 1, 64, 0, nullptr);
  } else if (name == "warp-collectives") {
    LLMFAST_LAUNCH(warp_sums, 2, 64, 0, nullptr);
    require(out[5] == 496 + 6 + int(0xAAAAAAAA) + 3 && out[63] == 1520 + 63 + int(0xAAAAAAAA) + 35);
  } else if (name == "partial-warp") {
    LLMFAST_LAUNCH(warp_sums, 1, 40, 0, nullptr);
  } else if (name == "dynamic") {
    LLMFAST_LAUNCH(dynamic, 1, 32, 400, nullptr, 100, 16);
    require(out[0] == 99);
  } else if (name == "dynamic-overrun") {
    LLMFAST_LAUNCH(dynamic, 1, 32, 400, nullptr, 101, 16);
  } else if (name == "dynamic-alignment") {
    LLMFAST_LAUNCH(dynamic, 1, 32, 400, nullptr, 100, 2048);
  } else if (name == "dynamic-64-KiB") {
    LLMFAST_LAUNCH(dynamic, 1, 32, 65536, nullptr, 100, 16);
  } else if (name == "dynamic-64-KiB-allowed") {
    require(cudaFuncSetAttribute(dynamic, cudaFuncAttributeMaxDynamicSharedMemorySize, 65536) == cudaSuccess);
    LLMFAST_LAUNCH(dynamic, 1, 32, 65536, nullptr, 16384, 16);
    require(out[0] == 16383);
  } else if (name == "1025-threads") {
    LLMFAST_LAUNCH(two_barriers, 1, 1025, 0, nullptr, false);
  } else if (name == "uninitialised") {
    LLMFAST_LAUNCH(uninitialised, 1, 32, 0, nullptr);
    require(out[31] == 1);
  } else if (name == "huge-frame") {
    LLMFAST_LAUNCH(huge_frame, 1, 1, 0, nullptr);
  } else if (name == "copies" || name == "copies-without-wait") {
    alignas(16) const int from[128] = {};
    LLMFAST_LAUNCH(copies, 1, 32, 512, nullptr, from, name == "copies");
  } else if (name == "blocks-share-a-cell") {
    auto cell = std::make_unique<int>(0);
    LLMFAST_LAUNCH(same_cell, 2, 32, 0, nullptr, cell.get());
  } else {
    throw emu::Error("no such kernel");
  }
}

}  // namespace

int main(int argc, char** argv) {
  for (unsigned seed : {0u, 1u, 5u}) {
    emu::config.seed = seed;
    try {
      run(argc > 1 ? argv[1] : "");
    } catch (const emu::Error& error) {
      puts(error.what());
      return 1;
    }
  }
  puts("ok");
}
