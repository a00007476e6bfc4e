// Causal attention, forward, for sm_80 and newer:
//   s = scale q k^T, masked    p = exp(s - lse)    out = (mask * p) v      lse: log-sum-exp of a row of s
// A block owns kQueries queries of one head, a warp kTiles x 16 of them, with their running maximum, sum and weighted values
// in registers. It walks over the keys in tiles of kKeys, which cp.async brings in while the tile before is in work.
// Bytes moved: q and out once, k and v once for each block of queries, mostly from L2. FLOPs: 4 D a visible pair.
// Source: Dao, "FlashAttention-2", 2023.
#include "cuda/attention_tile.h"

namespace llmfast::cuda {
namespace {

template <typename T, int D, bool kDropout>
struct Forward {
  static constexpr bool kNarrow = sizeof(T) == 2;
  static constexpr int kTiles = kNarrow && D == 64 && !kDropout ? 2 : 1;  // Philox wants registers too
  static constexpr int kWarps = kNarrow && kTiles == 1 ? 8 : 4;
  static constexpr bool kKeepQ = kNarrow && kTiles == 1;  // in registers
  static constexpr int kQueries = kWarps * kTiles * 16, kKeys = kNarrow ? 64 : 32 / (D / 64), kThreads = kWarps * 32;
  static constexpr int kBytes = (kQueries + 4 * kKeys) * D * int(sizeof(T));
  static_assert(kBytes <= kMaxSharedBytes);
};

template <typename T, int D, bool kDropout>
__global__ void __launch_bounds__(Forward<T, D, kDropout>::kThreads) forward_kernel(const AttentionForward a, int blocks) {
  using Shape = Forward<T, D, kDropout>;
  using Fragment = typename Mma<T>::A;
  constexpr int kTiles = Shape::kTiles, kKeys = Shape::kKeys, kSteps = D / Mma<T>::kStep;
  LLMFAST_DYN_SHARED(T, q_tile, 128);
  T* k_tiles = q_tile + Shape::kQueries * D;
  T* v_tiles = k_tiles + 2 * kKeys * D;

  const int which = blockIdx.x / blocks, batch = which / a.H, head = which % a.H;
  const int query0 = (blocks - 1 - int(blockIdx.x % blocks)) * Shape::kQueries;  // those that see most keys first
  const int warp_row = int(threadIdx.x / 32) * kTiles * 16;
  const Mask mask(a, batch);
  const T *q = head_of<T>(a.q, batch, head), *k = head_of<T>(a.k, batch, head), *v = head_of<T>(a.v, batch, head);
  const int tiles = (mask.end_of_keys(query0 + Shape::kQueries) + kKeys - 1) / kKeys;
  const auto load_keys = [&](int tile) {
    const int at = tile % 2 * kKeys * D;
    load_rows<kKeys, D, Shape::kThreads>(k_tiles + at, k, a.k.row, tile * kKeys, mask.keys, a.D);
    load_rows<kKeys, D, Shape::kThreads>(v_tiles + at, v, a.v.row, tile * kKeys, mask.keys, a.D);
  };
  // The maximum is taken before the scale is applied: a negative one changes the sign of q.
  const float size = fmaxf(fabsf(a.scale), 1e-30f), scale = size * kLog2E;
  const auto load_q = [&](Fragment& f, int m, int step) {
    load_a<D>(f, q_tile, warp_row + m * 16, step);
    if (a.scale < 0.f) Mma<T>::negate(f);
  };

  load_rows<Shape::kQueries, D, Shape::kThreads>(q_tile, q, a.q.row, query0, a.Tq, a.D);
  if (tiles) load_keys(0);
  cp_async_commit();
  Fragment kept_q[Shape::kKeepQ ? kSteps : 1];
  float sum[kTiles][D / 8][4] = {}, top[kTiles][2], total[kTiles][2] = {};
#pragma unroll
  for (int m = 0; m < kTiles; ++m) top[m][0] = top[m][1] = -INFINITY;

  for (int tile = 0; tile < tiles; ++tile) {
    if (tile + 1 < tiles) load_keys(tile + 1);
    cp_async_commit();
    cp_async_wait<1>();
    __syncthreads();
    if (Shape::kKeepQ && tile == 0)
#pragma unroll
      for (int step = 0; step < kSteps; ++step) load_q(kept_q[step], 0, step);
    const int at = tile % 2 * kKeys * D, key0 = tile * kKeys;
    float s[kTiles][kKeys / 8][4];
    const auto fragment = [&](int m, int step) {
      if constexpr (Shape::kKeepQ) return kept_q[step];
      Fragment f;
      load_q(f, m, step);
      return f;
    };
    multiply_rows<D, kTiles, kKeys>(s, fragment, k_tiles + at);
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
      const int query = query0 + warp_row + m * 16;
      mask_scores<kKeys>(s[m], mask, query, key0);
      float shrink[2];
      softmax_step(s[m], top[m], total[m], shrink, scale);
      scale_rows(sum[m], shrink);
      if constexpr (kDropout) drop_weights<kKeys>(s[m], a.dropout, (int64_t(which) << 32) + query, key0);
    }
    add_product<D, kTiles, kKeys>(sum, s, v_tiles + at);
    __syncthreads();  // before the next tile but one is written over this one
  }
  cp_async_wait<0>();
  if (!tiles) __syncthreads();  // nobody's copy of q may land on what store_rows puts there

  T* out = head_of<T>(a.out, batch, head);
#pragma unroll
  for (int m = 0; m < kTiles; ++m) {
    const int query = query0 + warp_row + m * 16;
    float factor[2];
    finish_rows(top[m], total[m], size, a.dropout.scale, a.lse + int64_t(which) * a.Tq, query, a.Tq, factor);
    store_rows<D>(sum[m], factor, q_tile + (warp_row + m * 16) * D, out, a.out.row, query, a.Tq, a.D);
  }
}

}  // namespace

cudaError_t attention_forward(const AttentionForward& a, int capability, cudaStream_t stream) {
  if constexpr (kHasSm90)
    if (capability == 90)
      if (const auto done = attention_forward_sm90(a, stream)) return *done;
  return dispatch(a, [&](auto type, auto size, auto dropout) {
    using T = decltype(type);
    constexpr int D = decltype(size)::value;
    constexpr bool kDropout = decltype(dropout)::value;
    using Shape = Forward<T, D, kDropout>;
    constexpr auto kernel = forward_kernel<T, D, kDropout>;
    const int blocks = (a.Tq + Shape::kQueries - 1) / Shape::kQueries;
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Shape::kBytes);
    if (error != cudaSuccess) return error;
    LLMFAST_LAUNCH(kernel, unsigned(int64_t(blocks) * a.B * a.H), Shape::kThreads, Shape::kBytes, stream, a, blocks);
    return cudaGetLastError();
  });
}

}  // namespace llmfast::cuda
