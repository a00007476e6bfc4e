// LayerNorm over contiguous rows of N <= 8192 elements of T (float32, float16, bfloat16), statistics and sums in float32.
//   forward:  mean = sum(x) / N, rstd = 1 / sqrt(sum((x - mean)^2) / N + eps), y = (x - mean) rstd w + b
//   backward: with g = dy w and h = (x - mean) rstd:  dx = rstd (g - sum(g) / N - h sum(g h) / N),
//             dw = sum over rows of dy h, db = sum over rows of dy
// Before it, where there is a residual:  s = residual + dropout(x), which takes x's place, and after the backward:
//             dresidual = dx + ds, dx = dropout mask * dresidual   (x is then s, ds what reaches s beside y)
// A block of G x Y threads holds Y rows at a time, each row in the registers of G threads (16 elements a thread), so that
// memory is touched once: 2 (forward) and 3 (backward) times rows N sizeof(T) bytes, with a residual 4 and up to 5.
// The backward is a persistent grid of one block a multiprocessor. A thread keeps its columns' share of dw and db in
// registers over all its rows; a block adds up its Y shares and writes one row of partial sums, and a second kernel adds
// those rows. No atomics: the result is the same in every run.
#include "cuda/layer_norm.h"

namespace llmfast::cuda {
namespace {

constexpr int kElements = 16;  // of a row, a thread
constexpr int kMaxThreads = kLayerNormMaxWidth / kElements;
constexpr int kMaxWarps = kMaxThreads / 32;
constexpr int kForwardThreads = 128;
constexpr int kColumns = 32, kRowGroups = 8;  // of the block that adds partial sums

// Sum over the G = blockDim.x threads of a row. Uses `scratch` (one float a warp); the caller alternates between two of
// them, so that one barrier a sum is enough.
__device__ inline float row_sum(float v, float* scratch) {
  for (int offset = 16; offset; offset >>= 1) v += __shfl_xor_sync(~0u, v, offset);
  if (blockDim.x == 32) return v;
  const int warps = blockDim.x / 32, first = threadIdx.y * warps;
  if ((threadIdx.x & 31) == 0) scratch[first + threadIdx.x / 32] = v;
  __syncthreads();
  v = 0.f;
  for (int i = 0; i < warps; ++i) v += scratch[first + i];
  return v;
}

// Element e of the thread's N-element pack p is column((p * G + x) * N + e).
template <int N>
__device__ inline int pack_column(int p) {
  return (p * int(blockDim.x) + int(threadIdx.x)) * N;
}

// The thread's part of a row, as float; zeros beyond n and for a row that is not there.
template <int N, typename T>
__device__ inline void load_row(const T* row, bool there, int n, float (&out)[kElements]) {
#pragma unroll
  for (int p = 0; p < kElements / N; ++p) {
    const int column = pack_column<N>(p);
    if (there && column < n) {
      const auto pack = *reinterpret_cast<const Pack<T, N>*>(row + column);
#pragma unroll
      for (int e = 0; e < N; ++e) out[p * N + e] = float(pack.v[e]);
    } else {
#pragma unroll
      for (int e = 0; e < N; ++e) out[p * N + e] = 0.f;
    }
  }
}

template <int N, typename T>
__device__ inline void store_row(T* row, int n, const float (&in)[kElements]) {
#pragma unroll
  for (int p = 0; p < kElements / N; ++p) {
    const int column = pack_column<N>(p);
    if (column >= n) continue;
    Pack<T, N> pack;
#pragma unroll
    for (int e = 0; e < N; ++e) pack.v[e] = T(in[p * N + e]);
    *reinterpret_cast<Pack<T, N>*>(row + column) = pack;
  }
}

// Dropout of the thread's part of a row.
template <int N>
__device__ inline void drop_row(const Dropout& dropout, int64_t row, float (&v)[kElements]) {
  const uint64_t seed = uint64_t(*dropout.seed);
  unsigned bits = 0;
#pragma unroll 1
  for (int p = 0; p < kElements / N; ++p) bits |= kept<N>(seed, dropout.drop, row, pack_column<N>(p)) << p * N;
#pragma unroll
  for (int i = 0; i < kElements; ++i) v[i] = bits >> i & 1 ? v[i] * dropout.scale : 0.f;
}

template <typename T, typename W, int N, bool kAdd>
__global__ void __launch_bounds__(kMaxThreads)
    forward_kernel(const T* x, const T* residual, const W* w, const W* b, T* stored, T* y, float* mean, float* rstd,
                   int64_t rows, int n, float eps, Dropout dropout) {
  LLMFAST_SHARED(float, scratch, 2 * kMaxWarps);
  // Every thread of a block makes the same number of steps: row_sum has a barrier.
  for (int64_t row0 = int64_t(blockIdx.x) * blockDim.y; row0 < rows; row0 += int64_t(gridDim.x) * blockDim.y) {
    const int64_t row = row0 + threadIdx.y;
    const bool there = row < rows;
    float v[kElements];
    load_row<N>(x + row * n, there, n, v);
    if constexpr (kAdd) {
      if (dropout.seed) drop_row<N>(dropout, row, v);
      float r[kElements];
      load_row<N>(residual + row * n, there, n, r);
#pragma unroll
      for (int i = 0; i < kElements; ++i) v[i] = float(T(v[i] + r[i]));  // the backward pass sees what was stored
      if (there) store_row<N>(stored + row * n, n, v);
    }
    float s = 0.f;
#pragma unroll
    for (int i = 0; i < kElements; ++i) s += v[i];
    const float mu = row_sum(s, scratch) / n;
    s = 0.f;
#pragma unroll
    for (int p = 0; p < kElements / N; ++p)
#pragma unroll
      for (int e = 0; e < N; ++e) {
        const float d = pack_column<N>(p) < n ? v[p * N + e] - mu : 0.f;
        v[p * N + e] = d;
        s += d * d;
      }
    const float rs = rsqrtf(row_sum(s, scratch + kMaxWarps) / n + eps);
    if (!there) continue;
    if (threadIdx.x == 0) {
      mean[row] = mu;
      rstd[row] = rs;
    }
#pragma unroll
    for (int i = 0; i < kElements; ++i) v[i] *= rs;
    float parameter[kElements];
    if (w) {
      load_row<N>(w, true, n, parameter);
#pragma unroll
      for (int i = 0; i < kElements; ++i) v[i] *= parameter[i];
    }
    if (b) {
      load_row<N>(b, true, n, parameter);
#pragma unroll
      for (int i = 0; i < kElements; ++i) v[i] += parameter[i];
    }
    store_row<N>(y + row * n, n, v);
  }
}

// Adds the Y shares of the block and writes them to `out` (n,). `sums` is shared memory for n floats.
template <int N>
__device__ inline void write_partial(const float (&share)[kElements], float* sums, float* out, int n) {
  for (int y = 0; y < int(blockDim.y); ++y) {
    if (int(threadIdx.y) == y)
#pragma unroll
      for (int p = 0; p < kElements / N; ++p)
#pragma unroll
        for (int e = 0; e < N; ++e) {
          const int column = pack_column<N>(p) + e;
          if (column >= n) continue;
          const float sum = y ? sums[column] + share[p * N + e] : share[p * N + e];
          if (y + 1 < int(blockDim.y))
            sums[column] = sum;
          else
            out[column] = sum;
        }
    __syncthreads();
  }
}

template <typename T, typename W, int N, bool kAdd>
__global__ void __launch_bounds__(kMaxThreads)
    backward_kernel(const T* dy, const T* ds, const T* x, const W* w, const float* mean, const float* rstd, T* dx,
                    T* dropped, float* dw_partial, float* db_partial, int64_t rows, int n, Dropout dropout) {
  LLMFAST_SHARED(float, scratch, 4 * kMaxWarps);
  LLMFAST_DYN_SHARED(float, sums, 16);
  float dw[kElements] = {}, db[kElements] = {};
  int turn = 0;
  for (int64_t row0 = int64_t(blockIdx.x) * blockDim.y; row0 < rows; row0 += int64_t(gridDim.x) * blockDim.y) {
    const int64_t row = row0 + threadIdx.y;
    const bool there = row < rows;
    const float mu = there ? mean[row] : 0.f, rs = there ? rstd[row] : 0.f;
    float h[kElements], g[kElements];
    load_row<N>(x + row * n, there, n, h);
    load_row<N>(dy + row * n, there, n, g);
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      h[i] = (h[i] - mu) * rs;  // beyond n, g is zero and h is never used alone
      dw[i] += g[i] * h[i];
      db[i] += g[i];
    }
    if (w) {
      float weight[kElements];
      load_row<N>(w, true, n, weight);
#pragma unroll
      for (int i = 0; i < kElements; ++i) g[i] *= weight[i];
    }
    float sum_g = 0.f, sum_gh = 0.f;
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      sum_g += g[i];
      sum_gh += g[i] * h[i];
    }
    sum_g = row_sum(sum_g, scratch + 2 * turn * kMaxWarps) / n;
    sum_gh = row_sum(sum_gh, scratch + (2 * turn + 1) * kMaxWarps) / n;
    turn ^= 1;
#pragma unroll
    for (int i = 0; i < kElements; ++i) g[i] = rs * (g[i] - sum_g - h[i] * sum_gh);
    if constexpr (kAdd) {
      if (ds) {
        load_row<N>(ds + row * n, there, n, h);
#pragma unroll
        for (int i = 0; i < kElements; ++i) g[i] += h[i];
      }
    }
    if (there) store_row<N>(dx + row * n, n, g);
    if constexpr (kAdd) {
      if (dropped && there) {
        drop_row<N>(dropout, row, g);
        store_row<N>(dropped + row * n, n, g);
      }
    }
  }
  if (dw_partial) write_partial<N>(dw, sums, dw_partial + int64_t(blockIdx.x) * n, n);
  if (db_partial) write_partial<N>(db, sums, db_partial + int64_t(blockIdx.x) * n, n);
}

// out (n,) = sum of the rows of partial (blocks, n), for dw where blockIdx.y is 0 and for db where it is 1.
template <typename W>
__global__ void __launch_bounds__(kColumns* kRowGroups)
    add_partials_kernel(const float* dw_partial, const float* db_partial, W* dw, W* db, int blocks, int n) {
  LLMFAST_SHARED(float, sums, kRowGroups * kColumns);
  const float* partial = blockIdx.y ? db_partial : dw_partial;
  W* out = blockIdx.y ? db : dw;
  const int column = blockIdx.x * kColumns + threadIdx.x;
  float s = 0.f;
  if (column < n)
    for (int r = threadIdx.y; r < blocks; r += kRowGroups) s += partial[int64_t(r) * n + column];
  sums[threadIdx.y * kColumns + threadIdx.x] = s;
  __syncthreads();
  if (threadIdx.y || column >= n) return;
  s = 0.f;
  for (int r = 0; r < kRowGroups; ++r) s += sums[r * kColumns + threadIdx.x];
  out[column] = W(s);
}

// Threads of a row: whole warps, 16 elements a thread.
int row_threads(int n) { return (n + 32 * kElements - 1) / (32 * kElements) * 32; }

template <typename... P>
bool aligned(const P*... pointers) {
  return ((reinterpret_cast<uintptr_t>(pointers) % 16 == 0) && ...);
}

template <typename T, typename W, int N, bool kAdd>
cudaError_t forward(const LayerNormForward& a, int multiprocessors, cudaStream_t stream) {
  const int x = row_threads(a.n), y = x < kForwardThreads ? kForwardThreads / x : 1;
  const int64_t steps = (a.rows + y - 1) / y, most = int64_t(multiprocessors) * 32;
  LLMFAST_LAUNCH((forward_kernel<T, W, N, kAdd>), unsigned(steps < most ? steps : most), dim3(x, y), 0, stream,
                 static_cast<const T*>(a.x), static_cast<const T*>(a.residual), static_cast<const W*>(a.w),
                 static_cast<const W*>(a.b), static_cast<T*>(a.s), static_cast<T*>(a.y), a.mean, a.rstd, a.rows, a.n,
                 a.eps, a.dropout);
  return cudaGetLastError();
}

template <typename T, typename W, int N, bool kAdd>
cudaError_t backward(const LayerNormBackward& a, int multiprocessors, cudaStream_t stream) {
  const int x = row_threads(a.n), blocks = layer_norm_backward_blocks(a.rows, a.n, multiprocessors);
  float* dw_partial = a.dw ? a.partial : nullptr;
  float* db_partial = a.db ? a.partial + int64_t(blocks) * a.n : nullptr;
  LLMFAST_LAUNCH((backward_kernel<T, W, N, kAdd>), unsigned(blocks), dim3(x, kMaxThreads / x), a.n * sizeof(float),
                 stream, static_cast<const T*>(a.dy), static_cast<const T*>(a.ds), static_cast<const T*>(a.x),
                 static_cast<const W*>(a.w), a.mean, a.rstd, static_cast<T*>(a.dx), static_cast<T*>(a.dropped), dw_partial,
                 db_partial, a.rows, a.n, a.dropout);
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess || !a.dw) return error;
  LLMFAST_LAUNCH((add_partials_kernel<W>), dim3((a.n + kColumns - 1) / kColumns, a.db ? 2 : 1), dim3(kColumns, kRowGroups), 0,
                 stream, dw_partial, db_partial, static_cast<W*>(a.dw), static_cast<W*>(a.db), blocks, a.n);
  return cudaGetLastError();
}

// Calls f(T(), W(), N, add) for the types of x and of the parameters and the elements of an access.
template <typename Args, typename F>
cudaError_t dispatch(const Args& a, bool is_aligned, bool add, F f) {
  const auto with_add = [&](auto t, auto w, auto n) {
    return add ? f(t, w, n, std::true_type()) : f(t, w, n, std::false_type());
  };
  const auto with_types = [&](auto t, auto w) {
    constexpr int kFull = 16 / sizeof(t);
    return is_aligned && a.n % kFull == 0 ? with_add(t, w, std::integral_constant<int, kFull>())
                                          : with_add(t, w, std::integral_constant<int, 1>());
  };
  const auto with_dtype = [&](auto t) { return a.float_parameters ? with_types(t, float()) : with_types(t, t); };
  switch (a.dtype) {
    case DType::f32: return with_types(float(), float());
    case DType::f16: return with_dtype(__half());
    case DType::bf16: return with_dtype(__nv_bfloat16());
  }
  return cudaErrorInvalidValue;
}

}  // namespace

int layer_norm_backward_blocks(int64_t rows, int n, int multiprocessors) {
  const int64_t rows_at_once = kMaxThreads / row_threads(n), steps = (rows + rows_at_once - 1) / rows_at_once;
  return int(steps < multiprocessors ? steps : multiprocessors);
}

cudaError_t layer_norm_forward(const LayerNormForward& a, int multiprocessors, cudaStream_t stream) {
  const bool is_aligned = aligned(a.x, a.residual, a.w, a.b, a.s, a.y);
  return dispatch(a, is_aligned, a.residual != nullptr, [&](auto t, auto w, auto n, auto add) {
    return forward<decltype(t), decltype(w), decltype(n)::value, decltype(add)::value>(a, multiprocessors, stream);
  });
}

cudaError_t layer_norm_backward(const LayerNormBackward& a, int multiprocessors, cudaStream_t stream) {
  const bool is_aligned = aligned(a.dy, a.ds, a.x, a.w, a.dx, a.dropped);
  return dispatch(a, is_aligned, a.ds || a.dropped, [&](auto t, auto w, auto n, auto add) {
    return backward<decltype(t), decltype(w), decltype(n)::value, decltype(add)::value>(a, multiprocessors, stream);
  });
}

}  // namespace llmfast::cuda
