// Matrix products on the tensor cores of sm_80 and newer, with what a layer does around them: csrc/cuda/gemm.h says what.
// A block of 8 warps owns 128 x 128 of the output, a warp 64 x 32 of it in float32 registers; K is walked in steps of 32,
// three steps in shared memory, two of them on the way (cp.async). A low-rank term comes first, into the same registers.
// Shared memory: 16-byte chunks, exchanged (xor) so that neither ldmatrix nor the copies meet bank conflicts.
// Operands whose rows are not multiples of 16 bytes take another way, through registers.
// Every sum is made by one block, in one order: no atomics, the result is the same in every run.
// FLOPs: 2 M N (K + rank). Bytes: a once every 128 columns of the output and b once every 128 rows, mostly from L2.
#include "cuda/gemm.h"

#include "cuda/gemm_epilogue.h"
#include "cuda/pipeline.h"

namespace llmfast::cuda {
namespace {

constexpr int kTile = kGemmTile, kStep = 32, kStages = 3, kThreads = 256;
constexpr int kTileElements = kTile * kStep;
constexpr int kSharedBytes = kStages * 2 * kTileElements * 2;

// Where the chunk of 8 elements from (row, k) on lies: of a tile of 128 rows of 32, or of 32 rows of 128.
template <bool kAlongK>
__device__ inline int chunk_at(int row, int k) {
  return kAlongK ? row * kStep + ((k >> 3) ^ (row >> 1 & 3)) * 8 : k * kTile + ((row >> 3) ^ (k & 7)) * 8;
}

struct Source {
  const void* data;
  int64_t stride;
  int rows, K;   // beyond them, zeros
  bool aligned;  // whole chunks, at multiples of 16 bytes
};

// Brings rows [row0, row0 + 128) of k in [k0, k0 + 32) to `tile`. kDirect: the source is aligned.
template <typename T, bool kAlongK, bool kDirect>
__device__ inline void load_tile(T* tile, const Source& source, int row0, int k0) {
#pragma unroll
  for (int i = 0; i < kTileElements / 8 / kThreads; ++i) {
    const int chunk = i * kThreads + threadIdx.x;
    const int row = kAlongK ? chunk / (kStep / 8) : chunk % (kTile / 8) * 8;
    const int k = kAlongK ? chunk % (kStep / 8) * 8 : chunk / (kTile / 8);
    const int outer = kAlongK ? row0 + row : k0 + k, inner = kAlongK ? k0 + k : row0 + row;
    const int inners = kAlongK ? source.K : source.rows;
    const bool there = outer < (kAlongK ? source.rows : source.K) && inner < inners;
    T* to = tile + chunk_at<kAlongK>(row, k);
    const T* from = static_cast<const T*>(source.data) + (there ? outer * source.stride + inner : 0);
    if constexpr (kDirect) {
      cp_async16(to, from, there);
    } else {
      Pack<T, 8> pack;
      if (source.aligned && there) {
        pack = *reinterpret_cast<const Pack<T, 8>*>(from);
      } else {
#pragma unroll
        for (int e = 0; e < 8; ++e) pack.v[e] = there && inner + e < inners ? from[e] : T(0.f);
      }
      *reinterpret_cast<Pack<T, 8>*>(to) = pack;
    }
  }
}

// acc += the product of two tiles in shared memory, for the 64 x 32 elements of the warp from (m, n) on.
template <typename T, bool kBAlongK>
__device__ inline void multiply(const T* a_tile, const T* b_tile, int m, int n, float (&acc)[4][4][4]) {
  const int lane = threadIdx.x & 31, j = lane & 7, low = lane >> 3 & 1, high = lane >> 4;
#pragma unroll
  for (int k = 0; k < kStep; k += 16) {
    uint32_t a[4][4], b[2][4];
#pragma unroll
    for (int i = 0; i < 4; ++i) ldmatrix<4>(a[i], a_tile + chunk_at<true>(m + i * 16 + low * 8 + j, k + high * 8));
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if constexpr (kBAlongK)
        ldmatrix<4>(b[i], b_tile + chunk_at<true>(n + i * 16 + high * 8 + j, k + low * 8));
      else
        ldmatrix<4, true>(b[i], b_tile + chunk_at<false>(n + i * 16 + high * 8, k + low * 8 + j));
    }
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int l = 0; l < 4; ++l) {
        const uint32_t pair[2] = {b[l / 2][l % 2 * 2], b[l / 2][l % 2 * 2 + 1]};
        mma_m16n8k16<T>(acc[i][l], a[i], pair);
      }
  }
}

template <typename T, bool kBAlongK, Epilogue kEpilogue, bool kDirect>
__global__ void __launch_bounds__(kThreads, kDirect ? 2 : 1)
    gemm_kernel(const __grid_constant__ Gemm g, const bool a_aligned, const bool b_aligned, const bool low_aligned,
                const bool low_b_aligned) {
  LLMFAST_DYN_SHARED(T, shared, 128);
  int row_tile, column_tile;
  tile_of(g, row_tile, column_tile);
  const int m0 = row_tile * kTile, n0 = column_tile * kTile;
  const Source a{g.a.data, g.a.stride, g.M, g.K, a_aligned};
  const Source b{g.b.data, g.b.stride, g.N, g.K, b_aligned};
  const Source low{g.low, g.rank, g.M, g.rank, low_aligned};
  const Source low_b{g.low_b, kBAlongK ? g.rank : g.N, g.N, g.rank, low_b_aligned};

  const int low_steps = (g.rank + kStep - 1) / kStep, steps = low_steps + (g.K + kStep - 1) / kStep;
  const auto load = [&](int step) {
    T* tile = shared + step % kStages * 2 * kTileElements;
    if (kEpilogue == Epilogue::plain && step < low_steps) {
      load_tile<T, true, kDirect>(tile, low, m0, step * kStep);
      load_tile<T, kBAlongK, kDirect>(tile + kTileElements, low_b, n0, step * kStep);
    } else {
      const int k0 = (step - low_steps) * kStep;
      load_tile<T, true, kDirect>(tile, a, m0, k0);
      load_tile<T, kBAlongK, kDirect>(tile + kTileElements, b, n0, k0);
    }
  };

  const int warp = threadIdx.x / 32, lane = threadIdx.x & 31;
  const int m = warp / 4 * 64, n = warp % 4 * 32;
  const int row0 = m0 + m + lane / 4, column0 = n0 + n + lane % 4 * 2;
  float acc[4][4][4] = {};
  for (int step = 1 - kStages; step < steps; ++step) {
    if (!next_stage<kStages>(step, steps, load)) continue;
    const T* tile = shared + step % kStages * 2 * kTileElements;
    multiply<T, kBAlongK>(tile, tile + kTileElements, m, n, acc);
    if (kEpilogue == Epilogue::plain && step + 1 == low_steps && g.dropout.seed) drop(g.dropout, row0, column0, acc);
  }

  float sums[4][2] = {};
  finish<T, kEpilogue>(g, row0, column0, acc, sums);
  if constexpr (kEpilogue == Epilogue::activate_backward) {
    if (!g.sums) return;
    // Over the 8 rows of a fragment by shuffles, over the two warps above each other through shared memory.
    __syncthreads();
    float* shares = reinterpret_cast<float*>(shared);
    sum_over_warp(sums, shares + warp / 4 * kTile + n);
    __syncthreads();
    const int column = n0 + threadIdx.x;
    if (threadIdx.x < kTile && column < g.N)
      g.sums[int64_t(row_tile) * g.N + column] = shares[threadIdx.x] + shares[kTile + threadIdx.x];
  }
}

bool aligned(const void* data, int64_t stride, int inner) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride % 8 == 0 && inner % 8 == 0;
}

template <typename T, bool kBAlongK, Epilogue kEpilogue>
cudaError_t launch(const Gemm& g, cudaStream_t stream) {
  const int64_t tiles = int64_t(gemm_row_tiles(g.M)) * gemm_row_tiles(g.N);
  if (tiles > 0x7FFFFFFF) return cudaErrorInvalidValue;
  const bool a = aligned(g.a.data, g.a.stride, g.K), b = aligned(g.b.data, g.b.stride, kBAlongK ? g.K : g.N);
  const bool low = aligned(g.low, g.rank, g.rank);
  const int low_width = kBAlongK ? g.rank : g.N;
  const bool low_b = aligned(g.low_b, low_width, low_width);
  const auto run = [&](auto kernel) {
    LLMFAST_LAUNCH(kernel, unsigned(tiles), kThreads, kSharedBytes, stream, g, a, b, low, low_b);
    return cudaGetLastError();
  };
  return a && b && low && low_b ? run(gemm_kernel<T, kBAlongK, kEpilogue, true>)
                                : run(gemm_kernel<T, kBAlongK, kEpilogue, false>);
}

template <typename T>
cudaError_t choose(const Gemm& g, cudaStream_t stream) {
  if (g.activation != Activation::none)
    return g.backward ? launch<T, false, Epilogue::activate_backward>(g, stream)
                      : launch<T, true, Epilogue::activate>(g, stream);
  return g.b.along_k ? launch<T, true, Epilogue::plain>(g, stream) : launch<T, false, Epilogue::plain>(g, stream);
}

}  // namespace

cudaError_t gemm(const Gemm& g, int capability, cudaStream_t stream) {
  if (g.M == 0 || g.N == 0) return cudaSuccess;
  const bool fits = g.a.along_k && (g.activation == Activation::none || (g.b.along_k != g.backward && g.rank == 0));
  if (!fits) return cudaErrorInvalidValue;
  if constexpr (kHasSm90)
    if (capability == 90)
      if (const auto done = gemm_sm90(g, stream)) return *done;
  switch (g.dtype) {
    case DType::f16: return choose<__half>(g, stream);
    case DType::bf16: return choose<__nv_bfloat16>(g, stream);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace llmfast::cuda
