// The narrow products of lora_linear, csrc/cuda/lora_linear.h says which, on the tensor cores of sm_80 and newer.
// A block of 4 warps walks over its share of x in tiles of 64 rows and 128 columns, which cp.async brings to shared memory
// some tiles ahead, together with what they are multiplied with. Dropout's mask is made on the tile, once. Of p a warp
// owns 16 rows, its sums run over the columns of the share; of q a warp owns 32 columns, its sums run over the rows.
// A block adds in one order, and shares are added up by another kernel: no atomics, the result is the same in every run.
// FLOPs: 2 rows columns rank for p, as many for q. Bytes: x once every 64 ranks, 8 rank rows columns / 128 for the shares
// of p where q is made in the same pass, else little beside x: memory-bound.
#include "cuda/lora_linear.h"

#include "cuda/pipeline.h"

namespace llmfast::cuda {
namespace {

constexpr int kRows = 64, kColumns = 128, kThreads = 128;

// A contiguous matrix in global memory; beyond its end, zeros.
template <typename T>
struct Matrix {
  const T* data;
  int rows, columns;
  bool aligned;  // whole chunks of 8 elements, at multiples of 16 bytes
  __device__ Matrix(const void* p, int rows_, int columns_)
      : data(static_cast<const T*>(p)), rows(rows_), columns(columns_),
        aligned(reinterpret_cast<uintptr_t>(p) % 16 == 0 && columns_ % 8 == 0) {}
};

// Where the chunk of 8 elements from (row, column) on lies in a tile of rows of W elements: exchanged (xor), so that equal
// chunks of eight rows lie in different banks.
template <int W, typename T>
__device__ inline T* chunk_of(T* tile, int row, int column) {
  constexpr int kChunks = W / 8, kRowsOfBanks = kChunks < 8 ? 8 / kChunks : 1, kExchanged = kChunks < 8 ? kChunks : 8;
  return tile + row * W + ((column / 8) ^ (row / kRowsOfBanks % kExchanged)) * 8;
}

// Brings kHeight rows of W elements from (row0, column0) on to a tile.
template <int kHeight, int W, typename T>
__device__ inline void load_tile(T* tile, const Matrix<T>& from, int row0, int column0) {
  static_assert(kHeight * W / 8 % kThreads == 0);
#pragma unroll
  for (int n = 0; n < kHeight * W / 8 / kThreads; ++n) {
    const int chunk = n * kThreads + threadIdx.x, row = chunk / (W / 8), column = chunk % (W / 8) * 8;
    const bool there = row0 + row < from.rows && column0 + column < from.columns;
    const T* source = from.data + (there ? int64_t(row0 + row) * from.columns + column0 + column : 0);
    T* to = chunk_of<W>(tile, row, column);
    if (from.aligned) {
      cp_async16(to, source, there);
    } else {
      for (int e = 0; e < 8; ++e) to[e] = there && column0 + column + e < from.columns ? source[e] : T(0.f);
    }
  }
}

// Zeros what dropout takes of the tile of x from (row0, column0) on.
template <typename T>
__device__ inline void drop_tile(T* tile, const Dropout& dropout, int row0, int column0) {
  const uint64_t seed = uint64_t(*dropout.seed);
  for (int chunk = threadIdx.x; chunk < kRows * kColumns / 8; chunk += kThreads) {
    const int row = chunk / (kColumns / 8), column = chunk % (kColumns / 8) * 8;
    const unsigned bits = kept<8>(seed, dropout.drop, row0 + row, column0 + column);
    T* at = chunk_of<kColumns>(tile, row, column);
#pragma unroll
    for (int e = 0; e < 8; ++e)
      if (!(bits >> e & 1)) at[e] = T(0.f);
  }
}

// acc += a b for a fragment a (16, 16), and rows [k, k + 16) of the tile b (K, R) or, along k, of its transpose (R, K).
template <int R, int K, typename T>
__device__ inline void add_product(float (&acc)[R / 8][4], const uint32_t (&a)[4], T* b, int k, bool along_k) {
  const int lane = threadIdx.x & 31, j = lane & 7, low = lane >> 3 & 1, high = lane >> 4;
#pragma unroll
  for (int n = 0; n < R; n += 16) {
    uint32_t r[4];
    if (along_k)
      ldmatrix<4>(r, chunk_of<K>(b, n + high * 8 + j, k + low * 8));
    else
      ldmatrix<4, true>(r, chunk_of<R>(b, k + low * 8 + j, n + high * 8));
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t pair[2] = {r[2 * i], r[2 * i + 1]};
      mma_m16n8k16<T>(acc[n / 8 + i], a, pair);
    }
  }
}

template <int R, bool kP, bool kQ>
struct Layout {  // of a stage in shared memory, in elements
  static constexpr int kV = kRows * kColumns, kU = kV + (kP ? kColumns * R : 0), kSize = kU + (kQ ? kRows * R : 0);
  static constexpr int kStages = R == kOnePassRank ? 3 : 2, kBytes = kStages * kSize * 2;
};

template <typename T, int R, bool kP, bool kQ>
__global__ void __launch_bounds__(kThreads) low_rank_kernel(const __grid_constant__ LowRank a) {
  using In = Layout<R, kP, kQ>;
  constexpr int kStages = In::kStages;
  LLMFAST_DYN_SHARED(T, shared, 128);
  const Matrix<T> x(a.x, a.rows, a.columns), u(a.u, a.rows, a.rank);
  const Matrix<T> v(a.v, a.rank_first ? a.rank : a.columns, a.rank_first ? a.columns : a.rank);
  const int row_share = blockIdx.x / a.column_shares, column_share = blockIdx.x % a.column_shares, rank0 = blockIdx.y * R;
  const int first_row = row_share * a.row_tiles * kRows, first_column = column_share * a.column_tiles * kColumns;
  const int rows_left = (a.rows - first_row + kRows - 1) / kRows;
  const int steps = (rows_left < a.row_tiles ? rows_left : a.row_tiles) * a.column_tiles;
  const auto row_of = [&](int step) { return first_row + step / a.column_tiles * kRows; };
  const auto column_of = [&](int step) { return first_column + step % a.column_tiles * kColumns; };
  const auto load = [&](int step) {
    T* tile = shared + step % kStages * In::kSize;
    load_tile<kRows, kColumns>(tile, x, row_of(step), column_of(step));
    if constexpr (kP) {
      if (a.rank_first)
        load_tile<R, kColumns>(tile + In::kV, v, rank0, column_of(step));
      else
        load_tile<kColumns, R>(tile + In::kV, v, column_of(step), rank0);
    }
    if constexpr (kQ) load_tile<kRows, R>(tile + In::kU, u, row_of(step), rank0);
  };

  const int warp = threadIdx.x / 32, lane = threadIdx.x & 31;
  const int j = lane & 7, low = lane >> 3 & 1, high = lane >> 4;
  float p[R / 8][4] = {}, q[2][R / 8][4] = {};
  for (int step = 1 - kStages; step < steps; ++step) {
    if (!next_stage<kStages>(step, steps, load)) continue;
    T* tile = shared + step % kStages * In::kSize;
    if (a.dropout.seed) {
      drop_tile(tile, a.dropout, row_of(step), column_of(step));
      __syncthreads();
    }
    if constexpr (kP) {
#pragma unroll
      for (int k = 0; k < kColumns; k += 16) {
        uint32_t fragment[4];
        ldmatrix<4>(fragment, chunk_of<kColumns>(tile, warp * 16 + low * 8 + j, k + high * 8));
        add_product<R, kColumns>(p, fragment, tile + In::kV, k, a.rank_first);
      }
      if ((step + 1) % a.column_tiles == 0) {
        float* out = a.p + int64_t(column_share) * a.rows * a.rank;
#pragma unroll
        for (int n = 0; n < R / 8; ++n)
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const int row = row_of(step) + warp * 16 + lane / 4 + e / 2 * 8, r = rank0 + n * 8 + lane % 4 * 2 + e % 2;
            if (row < a.rows && r < a.rank) out[int64_t(row) * a.rank + r] = p[n][e] * a.factor;
            p[n][e] = 0.f;
          }
      }
    }
    if constexpr (kQ) {
#pragma unroll
      for (int k = 0; k < kRows; k += 16)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          uint32_t fragment[4];
          ldmatrix<4, true>(fragment, chunk_of<kColumns>(tile, k + high * 8 + j, warp * 32 + i * 16 + low * 8));
          add_product<R, kRows>(q[i], fragment, tile + In::kU, k, false);
        }
    }
  }
  if constexpr (kQ) {
    float* out = a.q + int64_t(row_share) * a.columns * a.rank;
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int n = 0; n < R / 8; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int column = first_column + warp * 32 + i * 16 + lane / 4 + e / 2 * 8;
          const int r = rank0 + n * 8 + lane % 4 * 2 + e % 2;
          if (column < a.columns && r < a.rank)
            out[a.rank_first ? int64_t(r) * a.columns + column : int64_t(column) * a.rank + r] = q[i][n][e];
        }
  }
}

template <typename T, int R, bool kP, bool kQ>
cudaError_t launch(const LowRank& a, cudaStream_t stream) {
  const auto kernel = low_rank_kernel<T, R, kP, kQ>;
  constexpr int kBytes = Layout<R, kP, kQ>::kBytes;
  const int64_t blocks = int64_t(a.row_shares) * a.column_shares;
  if (blocks > 0x7FFFFFFF) return cudaErrorInvalidValue;
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (error != cudaSuccess) return error;
  LLMFAST_LAUNCH(kernel, dim3(unsigned(blocks), unsigned((a.rank + R - 1) / R)), kThreads, kBytes, stream, a);
  return cudaGetLastError();
}

template <typename T>
cudaError_t choose(const LowRank& a, cudaStream_t stream) {
  constexpr int kFew = kOnePassRank, kMany = 64;
  const bool few = a.rank <= kFew;
  if (a.p && a.q) return few ? launch<T, kFew, true, true>(a, stream) : cudaErrorInvalidValue;
  if (a.p) return few ? launch<T, kFew, true, false>(a, stream) : launch<T, kMany, true, false>(a, stream);
  return few ? launch<T, kFew, false, true>(a, stream) : launch<T, kMany, false, true>(a, stream);
}

int divide_up(int a, int b) { return a / b + (a % b != 0); }

}  // namespace

void share_out(LowRank& a, bool makes_p, bool makes_q, int multiprocessors) {
  const int rows = divide_up(a.rows, kRows), columns = divide_up(a.columns, kColumns);
  const auto tiles = [&](int here, int there) {  // of a share, so that there are enough of them
    const int shares = divide_up(2 * multiprocessors, there > 0 ? there : 1);
    return here > shares ? divide_up(here, shares) : 1;
  };
  a.row_tiles = makes_q ? tiles(rows, columns) : 1;
  a.column_tiles = makes_p && !makes_q ? tiles(columns, rows) : 1;
  a.row_shares = divide_up(rows, a.row_tiles);
  a.column_shares = divide_up(columns, a.column_tiles);
}

cudaError_t low_rank(const LowRank& a, cudaStream_t stream) {
  if (a.rows == 0 || a.columns == 0 || a.rank == 0 || (!a.p && !a.q)) return cudaSuccess;
  switch (a.dtype) {
    case DType::f16: return choose<__half>(a, stream);
    case DType::bf16: return choose<__nv_bfloat16>(a, stream);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace llmfast::cuda
