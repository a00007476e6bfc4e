// Matrix products of Hopper: csrc/cuda/gemm.h says what, for aligned operands of which a lies along k.
// A block owns 128 x 128 of the output. One thread of its first warpgroup copies tiles of 64 k by tensor map (TMA) to four
// stages of shared memory; the two others each multiply 64 x 128 with wgmma, straight from shared memory into float32
// registers. Barriers in shared memory tell the ones that a stage is full and the other that it is empty. A low-rank term
// comes first, by the same ways into the same registers.
// Every sum is made by one warpgroup, in one order: no atomics, the result is the same in every run.
// FLOPs: 2 M N (K + rank). Bytes: a once every 128 columns of the output and b once every 128 rows, mostly from L2.
#include "cuda/gemm_epilogue.h"
#include "cuda/hopper.h"

namespace llmfast::cuda {
namespace {

constexpr int kTile = kGemmTile, kStep = kTileRow, kStages = 4, kThreads = 384;
constexpr int kTileBytes = kTile * kStep * 2;  // of an operand's stage
constexpr int kSharedBytes = kStages * 2 * kTileBytes + 2 * kStages * 8;

struct Maps {
  TensorMap a, b, low, low_b;
};

#if LLMFAST_SM90_CODE
// Rows [row, row + 128) of k in [k, k + 64): of an operand along k one box, else two of 64 rows of 64 elements.
template <bool kAlongK>
__device__ inline void copy_tile(unsigned char* tile, const TensorMap* map, int row, int k, uint64_t* full) {
  if constexpr (kAlongK) {
    tma_load(tile, map, row, k, full);
  } else {
    tma_load(tile, map, k, row, full);
    tma_load(tile + kTileBytes / 2, map, k, row + kTileRow, full);
  }
}
#endif

template <typename T, bool kBAlongK, Epilogue kEpilogue>
__global__ void __launch_bounds__(kThreads) gemm_sm90_kernel(const __grid_constant__ Gemm g, const __grid_constant__ Maps maps) {
#if LLMFAST_SM90_CODE
  LLMFAST_DYN_SHARED(unsigned char, shared, 1024);
  uint64_t* full = reinterpret_cast<uint64_t*>(shared + kStages * 2 * kTileBytes);
  uint64_t* empty = full + kStages;
  int row_tile, column_tile;
  tile_of(g, row_tile, column_tile);
  const int m0 = row_tile * kTile, n0 = column_tile * kTile;
  const int low_steps = (g.rank + kStep - 1) / kStep, steps = low_steps + (g.K + kStep - 1) / kStep;
  if (threadIdx.x == 0) {
    for (int s = 0; s < kStages; ++s) {
      barrier_init(full + s, 1);
      barrier_init(empty + s, 2 * 128);
    }
    barrier_init_fence();
  }
  __syncthreads();

  if (threadIdx.x < 128) {
    fewer_registers<40>();
    if (threadIdx.x > 0) return;
    for (int step = 0; step < steps; ++step) {
      const int s = step % kStages;
      unsigned char* tile = shared + s * 2 * kTileBytes;
      barrier_wait(empty + s, (step / kStages & 1) ^ 1);
      barrier_arrive_expect(full + s, 2 * kTileBytes);
      if (kEpilogue == Epilogue::plain && step < low_steps) {
        copy_tile<true>(tile, &maps.low, m0, step * kStep, full + s);
        copy_tile<kBAlongK>(tile + kTileBytes, &maps.low_b, n0, step * kStep, full + s);
      } else {
        const int k0 = (step - low_steps) * kStep;
        copy_tile<true>(tile, &maps.a, m0, k0, full + s);
        copy_tile<kBAlongK>(tile + kTileBytes, &maps.b, n0, k0, full + s);
      }
    }
    return;
  }

  more_registers<232>();
  const int group = threadIdx.x / 128 - 1, warp = threadIdx.x / 32 % 4, lane = threadIdx.x & 31;
  const int row0 = m0 + group * 64 + warp * 16 + lane / 4, column0 = n0 + lane % 4 * 2;
  float acc[1][16][4] = {};
  for (int step = 0; step < steps; ++step) {
    const int s = step % kStages;
    const uint32_t tile = shared_address(shared + s * 2 * kTileBytes);
    barrier_wait(full + s, step / kStages & 1);
    uint64_t a = descriptor_along_k(tile + group * (kTileBytes / 2));
    uint64_t b = kBAlongK ? descriptor_along_k(tile + kTileBytes) : descriptor_across_k(tile + kTileBytes, kTileBytes / 2);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < kStep; k += 16) {
      wgmma<T, kTile, !kBAlongK>(reinterpret_cast<float(&)[64]>(acc), a, b, true);
      a = step_along_k(a);
      b = kBAlongK ? step_along_k(b) : step_across_k(b);
    }
    wgmma_commit();
    if (kEpilogue == Epilogue::plain && step + 1 == low_steps && g.dropout.seed) {
      wgmma_wait<0>();
      if (step > 0) barrier_arrive(empty + (step - 1) % kStages);
      drop(g.dropout, row0, column0, acc);
      continue;
    }
    wgmma_wait<1>();  // the step before is done with its stage
    if (step > 0) barrier_arrive(empty + (step - 1) % kStages);
  }
  wgmma_wait<0>();

  float sums[16][2] = {};
  finish<T, kEpilogue>(g, row0, column0, acc, sums);
  if constexpr (kEpilogue == Epilogue::activate_backward) {
    if (!g.sums) return;
    // Over the 8 rows of a fragment by shuffles, over the 8 warps through shared memory, which nobody else uses any more.
    named_barrier(1, 256);
    float* shares = reinterpret_cast<float*>(shared);
    sum_over_warp(sums, shares + (group * 4 + warp) * kTile);
    named_barrier(1, 256);
    const int i = threadIdx.x - 128;
    if (i >= kTile || n0 + i >= g.N) return;
    float s = 0.f;
    for (int w = 0; w < 8; ++w) s += shares[w * kTile + i];
    g.sums[int64_t(row_tile) * g.N + n0 + i] = s;
  }
#endif
}

bool aligned(const void* data, int64_t stride) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride % 8 == 0;
}

// The map of an operand whose tiles have 128 rows and 64 k.
bool map_of(TensorMap* map, const void* data, int64_t stride, bool along_k, int rows, int k) {
  return along_k ? make_tensor_map(map, data, rows, k, stride, kTile) : make_tensor_map(map, data, k, rows, stride, kStep);
}

template <typename T, bool kBAlongK, Epilogue kEpilogue>
cudaError_t launch(const Gemm& g, const Maps& maps, cudaStream_t stream) {
  const auto kernel = gemm_sm90_kernel<T, kBAlongK, kEpilogue>;
  const int64_t tiles = int64_t(gemm_row_tiles(g.M)) * gemm_row_tiles(g.N);
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
  if (error != cudaSuccess) return error;
  LLMFAST_LAUNCH(kernel, unsigned(tiles), kThreads, kSharedBytes, stream, g, maps);
  return cudaGetLastError();
}

template <typename T>
cudaError_t choose(const Gemm& g, const Maps& maps, cudaStream_t stream) {
  if (g.activation != Activation::none)
    return g.backward ? launch<T, false, Epilogue::activate_backward>(g, maps, stream)
                      : launch<T, true, Epilogue::activate>(g, maps, stream);
  return g.b.along_k ? launch<T, true, Epilogue::plain>(g, maps, stream) : launch<T, false, Epilogue::plain>(g, maps, stream);
}

}  // namespace

std::optional<cudaError_t> gemm_sm90(const Gemm& g, cudaStream_t stream) {
  const int64_t tiles = int64_t(gemm_row_tiles(g.M)) * gemm_row_tiles(g.N);
  if (g.K < 1 || tiles > 0x7FFFFFFF) return std::nullopt;
  const int low_b_stride = g.b.along_k ? g.rank : g.N;
  if (!aligned(g.a.data, g.a.stride) || !aligned(g.b.data, g.b.stride) || !aligned(g.low, g.rank) ||
      !aligned(g.low_b, low_b_stride))
    return std::nullopt;
  Maps maps{};
  if (!map_of(&maps.a, g.a.data, g.a.stride, true, g.M, g.K) || !map_of(&maps.b, g.b.data, g.b.stride, g.b.along_k, g.N, g.K))
    return std::nullopt;
  if (g.rank && (!map_of(&maps.low, g.low, g.rank, true, g.M, g.rank) ||
                 !map_of(&maps.low_b, g.low_b, low_b_stride, g.b.along_k, g.N, g.rank)))
    return std::nullopt;
  switch (g.dtype) {
    case DType::f16: return choose<__half>(g, maps, stream);
    case DType::bf16: return choose<__nv_bfloat16>(g, maps, stream);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace llmfast::cuda
