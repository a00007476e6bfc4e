// Causal attention, backward, for sm_80 and newer:
//   p = exp(s - lse)    dv = (mask * p)^T dout    dp = mask * (dout v^T)
//   ds = p (dp - delta), delta = rowsum(dout * out)    dq = scale ds k    dk = scale ds^T q
// Two kernels, each of which makes the scores again: dq belongs to the block that owns the queries (and writes delta), dk and
// dv to the one that owns the keys. So no sum is shared: no atomics, the same bits in every run. A warp owns 16 rows; the
// rows of the other kind pass by in tiles of kOthers, which cp.async brings in while the tile before is in work. dk and dv
// have keys as rows, so that p^T and ds^T come out of the tensor cores as what goes in again.
// Bytes moved: q, k, v, out, dout and the gradients once, and the other kind once more for each block, mostly from L2.
// FLOPs: 14 D a visible pair. Source: Dao, "FlashAttention-2", 2023.
#include "cuda/attention_tile.h"

namespace llmfast::cuda {
namespace {

template <typename T, int D>
struct Backward {
  static constexpr bool kNarrow = sizeof(T) == 2;
  static constexpr int kWarps = kNarrow ? 8 : 4, kRows = kWarps * 16, kThreads = kWarps * 32;
  static constexpr int kOthers = (kNarrow ? 64 : 32) / (D / 64);
  static constexpr int kTileBytes = (2 * kRows + 4 * kOthers) * D * int(sizeof(T));
  static constexpr int kBytes = kTileBytes + 4 * kOthers * int(sizeof(float));
  static_assert(kBytes <= kMaxSharedBytes);
};

template <typename T, int D, bool kDropout>
__global__ void __launch_bounds__(Backward<T, D>::kThreads) queries_kernel(const AttentionBackward a, int blocks) {
  using Shape = Backward<T, D>;
  constexpr int kKeys = Shape::kOthers, kWidth = 16 / sizeof(T);
  LLMFAST_DYN_SHARED(T, q_tile, 128);
  T* dout_tile = q_tile + Shape::kRows * D;
  T* k_tiles = dout_tile + Shape::kRows * D;
  T* v_tiles = k_tiles + 2 * kKeys * D;

  const int which = blockIdx.x / blocks, batch = which / a.H, head = which % a.H;
  const int query0 = (blocks - 1 - int(blockIdx.x % blocks)) * Shape::kRows;  // those that see most keys first
  const int lane = lane_of_warp(), g = lane / 4, t = lane % 4, warp_row = int(threadIdx.x / 32) * 16;
  const int query = query0 + warp_row;  // the warp's first
  const Mask mask(a, batch);
  const T *q = head_of<T>(a.q, batch, head), *k = head_of<T>(a.k, batch, head), *v = head_of<T>(a.v, batch, head);
  const T *out = head_of<T>(a.out, batch, head), *dout = head_of<T>(a.dout, batch, head);
  const int tiles = (mask.end_of_keys(query0 + Shape::kRows) + kKeys - 1) / kKeys;
  const auto load_keys = [&](int tile) {
    const int at = tile % 2 * kKeys * D;
    load_rows<kKeys, D, Shape::kThreads>(k_tiles + at, k, a.k.row, tile * kKeys, mask.keys, a.D);
    load_rows<kKeys, D, Shape::kThreads>(v_tiles + at, v, a.v.row, tile * kKeys, mask.keys, a.D);
  };
  load_rows<Shape::kRows, D, Shape::kThreads>(q_tile, q, a.q.row, query0, a.Tq, a.D);
  load_rows<Shape::kRows, D, Shape::kThreads>(dout_tile, dout, a.dout.row, query0, a.Tq, a.D);
  cp_async_commit();
  if (tiles) load_keys(0);
  cp_async_commit();
  cp_async_wait<1>();
  __syncthreads();

  // delta of row lane / 2: two lanes share a row.
  float delta[2], lse[2];
  const int64_t first_row = int64_t(which) * a.Tq + query;
  {
    const int row = lane / 2;
    float all = 0.f;
    for (int chunk = lane % 2; query + row < a.Tq && chunk * kWidth < a.D; chunk += 2) {
      const auto left = *reinterpret_cast<const Pack<T, kWidth>*>(out + (query + row) * a.out.row + chunk * kWidth);
      const auto right = *reinterpret_cast<const Pack<T, kWidth>*>(chunk_of<D>(dout_tile, warp_row + row, chunk));
#pragma unroll
      for (int e = 0; e < kWidth; ++e) all += float(left.v[e]) * float(right.v[e]);
    }
    all += __shfl_xor_sync(~0u, all, 1);
    if (lane % 2 == 0 && query + row < a.Tq) a.delta[first_row + row] = all;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      delta[h] = __shfl_sync(~0u, all, 2 * (g + 8 * h));
      lse[h] = query + g + 8 * h < a.Tq ? a.lse[first_row + g + 8 * h] * kLog2E : INFINITY;
    }
  }

  const float scale = a.scale * kLog2E;
  float dq[1][D / 8][4] = {};
  for (int tile = 0; tile < tiles; ++tile) {
    if (tile + 1 < tiles) load_keys(tile + 1);
    cp_async_commit();
    cp_async_wait<1>();
    __syncthreads();
    const int at = tile % 2 * kKeys * D, key0 = tile * kKeys;
    const auto rows_of = [&](T* rows) {
      return [=](int, int step) {
        typename Mma<T>::A f;
        load_a<D>(f, rows, warp_row, step);
        return f;
      };
    };
    float s[1][kKeys / 8][4], dp[1][kKeys / 8][4];
    multiply_rows<D, 1, kKeys>(s, rows_of(q_tile), k_tiles + at);
    multiply_rows<D, 1, kKeys>(dp, rows_of(dout_tile), v_tiles + at);
    const bool all_seen = mask.sees_all(query, key0 + kKeys);
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n) {
      unsigned stays = 15;
      if constexpr (kDropout)
        stays = kept_of_queries(uint64_t(*a.dropout.seed), a.dropout.drop, (int64_t(which) << 32) + query, key0 + n * 8);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int h = e / 2;
        const bool seen = all_seen || mask.sees(query + g + 8 * h, key0 + n * 8 + t * 2 + e % 2);
        const float p = seen ? fast_exp2(s[0][n][e] * scale - lse[h]) : 0.f;
        const float gain = !kDropout ? 1.f : stays >> e & 1 ? a.dropout.scale : 0.f;
        dp[0][n][e] = p * (dp[0][n][e] * gain - delta[h]);
      }
    }
    add_product<D, 1, kKeys>(dq, dp, k_tiles + at);
    __syncthreads();  // before the next tile but one is written over this one
  }
  cp_async_wait<0>();
  const float factor[2] = {a.scale, a.scale};
  store_rows<D>(dq[0], factor, q_tile + warp_row * D, head_of<T>(a.dq, batch, head), a.dq.row, query, a.Tq, a.D);
}

template <typename T, int D, bool kDropout>
__global__ void __launch_bounds__(Backward<T, D>::kThreads) keys_kernel(const AttentionBackward a, int blocks) {
  using Shape = Backward<T, D>;
  constexpr int kQueries = Shape::kOthers;
  LLMFAST_DYN_SHARED(T, k_tile, 128);
  T* v_tile = k_tile + Shape::kRows * D;
  T* q_tiles = v_tile + Shape::kRows * D;
  T* dout_tiles = q_tiles + 2 * kQueries * D;
  float* lse_tiles = reinterpret_cast<float*>(dout_tiles + 2 * kQueries * D);
  float* delta_tiles = lse_tiles + 2 * kQueries;

  const int which = blockIdx.x / blocks, batch = which / a.H, head = which % a.H;
  const int key0 = int(blockIdx.x % blocks) * Shape::kRows;  // those that most queries see first
  const int lane = lane_of_warp(), g = lane / 4, t = lane % 4, warp_row = int(threadIdx.x / 32) * 16;
  const int key = key0 + warp_row;  // the warp's first
  const Mask mask(a, batch);
  const T *q = head_of<T>(a.q, batch, head), *k = head_of<T>(a.k, batch, head), *v = head_of<T>(a.v, batch, head);
  const T* dout = head_of<T>(a.dout, batch, head);
  const float *lse = a.lse + int64_t(which) * a.Tq, *delta = a.delta + int64_t(which) * a.Tq;
  const int first_tile = larger(key0 - mask.offset, 0) / kQueries;  // earlier queries see none of these keys
  const int tiles = key0 < mask.keys ? (a.Tq + kQueries - 1) / kQueries : 0;
  const auto load_queries = [&](int tile) {
    const int stage = tile % 2, at = stage * kQueries * D, i = threadIdx.x, query = tile * kQueries + i;
    load_rows<kQueries, D, Shape::kThreads>(q_tiles + at, q, a.q.row, tile * kQueries, a.Tq, a.D);
    load_rows<kQueries, D, Shape::kThreads>(dout_tiles + at, dout, a.dout.row, tile * kQueries, a.Tq, a.D);
    if (i < kQueries) {
      cp_async4(lse_tiles + stage * kQueries + i, query < a.Tq ? lse + query : lse, query < a.Tq);
      cp_async4(delta_tiles + stage * kQueries + i, query < a.Tq ? delta + query : delta, query < a.Tq);
    }
  };
  load_rows<Shape::kRows, D, Shape::kThreads>(k_tile, k, a.k.row, key0, mask.keys, a.D);
  load_rows<Shape::kRows, D, Shape::kThreads>(v_tile, v, a.v.row, key0, mask.keys, a.D);
  if (first_tile < tiles) load_queries(first_tile);
  cp_async_commit();

  const float scale = a.scale * kLog2E;
  float dk[1][D / 8][4] = {}, dv[1][D / 8][4] = {};
  for (int tile = first_tile; tile < tiles; ++tile) {
    if (tile + 1 < tiles) load_queries(tile + 1);
    cp_async_commit();
    cp_async_wait<1>();
    __syncthreads();
    const int stage = tile % 2, at = stage * kQueries * D, query0 = tile * kQueries;
    const auto rows_of = [&](T* rows) {
      return [=](int, int step) {
        typename Mma<T>::A f;
        load_a<D>(f, rows, warp_row, step);
        return f;
      };
    };
    float p[1][kQueries / 8][4], dp[1][kQueries / 8][4];
    multiply_rows<D, 1, kQueries>(p, rows_of(k_tile), q_tiles + at);
    multiply_rows<D, 1, kQueries>(dp, rows_of(v_tile), dout_tiles + at);
    const bool all_seen = mask.sees_all(query0, key + 16);
#pragma unroll
    for (int n = 0; n < kQueries / 8; ++n) {
      unsigned stays = 15;
      if constexpr (kDropout)
        stays = kept_of_keys(uint64_t(*a.dropout.seed), a.dropout.drop, (int64_t(which) << 32) + query0 + n * 8, key);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int i = n * 8 + t * 2 + e % 2;
        const bool seen = all_seen || mask.sees(query0 + i, key + g + e / 2 * 8);
        const float weight = seen ? fast_exp2(p[0][n][e] * scale - lse_tiles[stage * kQueries + i] * kLog2E) : 0.f;
        const float gain = !kDropout ? 1.f : stays >> e & 1 ? a.dropout.scale : 0.f;
        p[0][n][e] = weight * gain;
        dp[0][n][e] = weight * (dp[0][n][e] * gain - delta_tiles[stage * kQueries + i]);
      }
    }
    add_product<D, 1, kQueries>(dv, p, dout_tiles + at);
    add_product<D, 1, kQueries>(dk, dp, q_tiles + at);
    __syncthreads();  // before the next tile but one is written over this one
  }
  cp_async_wait<0>();  // of a block that no query sees: k and v
  __syncthreads();
  const float factor[2] = {a.scale, a.scale}, one[2] = {1.f, 1.f};
  store_rows<D>(dk[0], factor, k_tile + warp_row * D, head_of<T>(a.dk, batch, head), a.dk.row, key, a.Tk, a.D);
  store_rows<D>(dv[0], one, v_tile + warp_row * D, head_of<T>(a.dv, batch, head), a.dv.row, key, a.Tk, a.D);
}

}  // namespace

cudaError_t attention_backward(const AttentionBackward& a, int capability, cudaStream_t stream) {
  if constexpr (kHasSm90)
    if (capability == 90)
      if (const auto done = attention_backward_sm90(a, stream)) return *done;
  return dispatch(a, [&](auto type, auto size, auto dropout) {
    using T = decltype(type);
    constexpr int D = decltype(size)::value;
    using Shape = Backward<T, D>;
    const auto launch = [&](auto kernel, int T_of_rows) {
      const int blocks = (T_of_rows + Shape::kRows - 1) / Shape::kRows;
      const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Shape::kBytes);
      if (error != cudaSuccess) return error;
      LLMFAST_LAUNCH(kernel, unsigned(int64_t(blocks) * a.B * a.H), Shape::kThreads, Shape::kBytes, stream, a, blocks);
      return cudaGetLastError();
    };
    const cudaError_t error = launch(queries_kernel<T, D, decltype(dropout)::value>, a.Tq);
    return error == cudaSuccess ? launch(keys_kernel<T, D, decltype(dropout)::value>, a.Tk) : error;
  });
}

}  // namespace llmfast::cuda
