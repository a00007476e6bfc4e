// Causal attention, backward, for Hopper: the formulas of csrc/cuda/attention_backward.cu in float16 and bfloat16.
// One kernel in two forms: a block owns 128 queries and makes dq (and delta), or 128 keys and makes dk and dv, so that no
// sum is shared: no atomics, the same bits in every run. One thread of the first warpgroup copies the own rows once and the
// others in tiles of 64 by tensor map (TMA) to two stages of shared memory. The two other warpgroups own 64 rows each: with
// wgmma they make scores and dp, own rows times others, in registers, and out of these, rounded, times the others again what
// they sum up. With keys as rows, p^T and ds^T so come out of one product as what goes into the next.
// Bytes moved and FLOPs are those of attention_backward.cu. Source: Shah et al., "FlashAttention-3", 2024.
#include "cuda/attention_tile.h"
#include "cuda/hopper_attention.h"

namespace llmfast::cuda {
namespace {

constexpr int kGroups = 2, kRows = 64, kOwn = kGroups * kRows, kStages = 2;  // kRows: of a warpgroup, and of a tile
constexpr int kThreads = (1 + kGroups) * 128;
[[maybe_unused]] constexpr int kRowBytes = kTileRow * 2;  // of use on sm_90a alone

template <int D>
struct Layout {  // of shared memory, in bytes: two arrays of own rows, then each stage's two of others
  static constexpr int kTile = kRows * D * 2;
  static constexpr int kOthers = 2 * kGroups * kTile, kBarriers = kOthers + kStages * 2 * kTile;
  static constexpr int kBytes = kBarriers + (1 + 2 * kStages) * 8;
};

struct Maps {
  HeadsMap own[2], others[2];  // q and dout beside k and v, or the other way round
};

#if LLMFAST_SM90_CODE
// The (kRows, D) rows from `row` on, as tiles of 64 columns.
template <int D>
__device__ inline void copy_rows(unsigned char* to, const HeadsMap* map, int batch, int head, int row, uint64_t* full) {
#pragma unroll
  for (int box = 0; box < D / kTileRow; ++box)
    tma_load_head(to + box * kRows * kRowBytes, map, batch, head, row, box * kTileRow, full);
}

// d (64, 64) = left right^T, both (64, D) in shared memory.
template <typename T, int D>
__device__ inline void multiply_tiles(float (&d)[kRows / 8][4], uint32_t left, uint32_t right) {
#pragma unroll
  for (int box = 0; box < D / kTileRow; ++box) {
    uint64_t a = descriptor_along_k(left + box * kRows * kRowBytes), b = descriptor_along_k(right + box * kRows * kRowBytes);
#pragma unroll
    for (int k = 0; k < kTileRow; k += 16) {
      wgmma<T, kRows, false>(reinterpret_cast<float(&)[kRows / 2]>(d), a, b, box + k > 0);
      a = step_along_k(a);
      b = step_along_k(b);
    }
  }
  wgmma_commit();
}

// sum (64, D) += weights (64, 64) tile (64, D).
template <typename T, int D>
__device__ inline void add_tile(float (&sum)[D / 8][4], const typename Mma<T>::A (&weights)[kRows / 16], uint32_t tile) {
  uint64_t b = descriptor_across_k(tile, kRows * kRowBytes);
#pragma unroll
  for (int step = 0; step < kRows / 16; ++step) {
    wgmma_from_registers<T, D>(reinterpret_cast<float(&)[D / 2]>(sum), weights[step].r, b);
    b = step_across_k(b);
  }
}

// delta of the warp's row lane / 2, where it is there: two lanes share a row.
template <typename T>
__device__ inline float delta_of_row(const AttentionBackward& a, int batch, int head, int query) {
  constexpr int kWidth = 16 / sizeof(T);
  const int row = query + lane_of_warp() / 2;
  const T *out = head_of<T>(a.out, batch, head) + row * a.out.row, *dout = head_of<T>(a.dout, batch, head) + row * a.dout.row;
  float all = 0.f;
  for (int column = lane_of_warp() % 2 * kWidth; row < a.Tq && column < a.D; column += 2 * kWidth) {
    const auto left = *reinterpret_cast<const Pack<T, kWidth>*>(out + column);
    const auto right = *reinterpret_cast<const Pack<T, kWidth>*>(dout + column);
#pragma unroll
    for (int e = 0; e < kWidth; ++e) all += float(left.v[e]) * float(right.v[e]);
  }
  return all + __shfl_xor_sync(~0u, all, 1);
}
#endif

template <typename T, int D, bool kOwnsKeys, bool kDropout>
__global__ void __launch_bounds__(kThreads, 1)
    backward_sm90_kernel(const __grid_constant__ AttentionBackward a, const __grid_constant__ Maps maps, int blocks) {
#if LLMFAST_SM90_CODE
  using In = Layout<D>;
  LLMFAST_DYN_SHARED(unsigned char, shared, 1024);
  uint64_t* full_own = reinterpret_cast<uint64_t*>(shared + In::kBarriers);
  uint64_t *full = full_own + 1, *empty = full + kStages;

  const int which = blockIdx.x / blocks, batch = which / a.H, head = which % a.H, block = blockIdx.x % blocks;
  const int own0 = (kOwnsKeys ? block : blocks - 1 - block) * kOwn;  // those that make most pairs first
  const Mask mask(a, batch);
  const int first = kOwnsKeys ? larger(own0 - mask.offset, 0) / kRows : 0;  // earlier queries see none of these keys
  const int end = ((kOwnsKeys ? a.Tq : mask.end_of_keys(own0 + kOwn)) + kRows - 1) / kRows;
  if (threadIdx.x == 0) {
    barrier_init(full_own, 1);
    for (int s = 0; s < kStages; ++s) {
      barrier_init(full + s, 1);
      barrier_init(empty + s, kGroups * 128);
    }
    barrier_init_fence();
  }
  __syncthreads();

  if (threadIdx.x < 128) {
    fewer_registers<24>();
    if (threadIdx.x > 0 || first >= end) return;
    barrier_arrive_expect(full_own, 2 * kGroups * In::kTile);
    for (int i = 0; i < 2 * kGroups; ++i)
      copy_rows<D>(shared + i * In::kTile, &maps.own[i / kGroups], batch, head, own0 + i % kGroups * kRows, full_own);
    for (int tile = first; tile < end; ++tile) {
      const int s = (tile - first) % kStages;
      unsigned char* to = shared + In::kOthers + s * 2 * In::kTile;
      barrier_wait(empty + s, ((tile - first) / kStages & 1) ^ 1);
      barrier_arrive_expect(full + s, 2 * In::kTile);
      copy_rows<D>(to, &maps.others[0], batch, head, tile * kRows, full + s);
      copy_rows<D>(to + In::kTile, &maps.others[1], batch, head, tile * kRows, full + s);
    }
    return;
  }

  more_registers<240>();
  const int group = threadIdx.x / 128 - 1, warp_row = group * kRows + int(threadIdx.x / 32 % 4) * 16, own = own0 + warp_row;
  const int lane = lane_of_warp(), g = lane / 4, t = lane % 4;
  const uint32_t base = shared_address(shared);
  const int64_t head_row = int64_t(which) * a.Tq;
  const float scale = a.scale * kLog2E;
  float lse[2] = {}, delta[2] = {};
  if constexpr (!kOwnsKeys) {
    const float mine = delta_of_row<T>(a, batch, head, own);
    if (lane % 2 == 0 && own + lane / 2 < a.Tq) a.delta[head_row + own + lane / 2] = mine;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      delta[h] = __shfl_sync(~0u, mine, 2 * (g + 8 * h));
      lse[h] = own + g + 8 * h < a.Tq ? a.lse[head_row + own + g + 8 * h] * kLog2E : INFINITY;
    }
  }

  float sum[D / 8][4] = {}, sum_v[kOwnsKeys ? D / 8 : 1][4] = {};
  if (first < end) barrier_wait(full_own, 0);
  for (int tile = first; tile < end; ++tile) {
    const int s = (tile - first) % kStages, other0 = tile * kRows;
    const uint32_t others = base + In::kOthers + s * 2 * In::kTile;
    float p[kRows / 8][4], dp[kRows / 8][4];
    barrier_wait(full + s, (tile - first) / kStages & 1);
    wgmma_fence();
    multiply_tiles<T, D>(p, base + group * In::kTile, others);
    multiply_tiles<T, D>(dp, base + (kGroups + group) * In::kTile, others + In::kTile);
    wgmma_wait<0>();
    const bool all_seen = kOwnsKeys ? mask.sees_all(other0, own + 16) : mask.sees_all(own, other0 + kRows);
#pragma unroll
    for (int n = 0; n < kRows / 8; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) p[n][e] *= scale;
    if (!all_seen)
#pragma unroll
      for (int n = 0; n < kRows / 8; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int row = own + g + e / 2 * 8, column = other0 + n * 8 + t * 2 + e % 2;
          if (!(kOwnsKeys ? mask.sees(column, row) : mask.sees(row, column))) p[n][e] = -INFINITY;
        }
#pragma unroll
    for (int n = 0; n < kRows / 8; ++n) {
      const int other = other0 + n * 8;
      if constexpr (kOwnsKeys) {
        __syncwarp();  // all of the loop's loads at once would take more registers than there are
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int query = other + t * 2 + e;
          lse[e] = query < a.Tq ? a.lse[head_row + query] * kLog2E : INFINITY;
          delta[e] = query < a.Tq ? a.delta[head_row + query] : 0.f;
        }
      }
      unsigned stays = 15;
      if constexpr (kDropout) {
        const uint64_t seed = uint64_t(*a.dropout.seed);
        const int64_t row = (int64_t(which) << 32) + (kOwnsKeys ? other : own);
        stays = kOwnsKeys ? kept_of_keys(seed, a.dropout.drop, row, own) : kept_of_queries(seed, a.dropout.drop, row, other);
      }
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int i = kOwnsKeys ? e % 2 : e / 2;
        const float weight = fast_exp2(p[n][e] - lse[i]);
        const float gain = !kDropout ? 1.f : stays >> e & 1 ? a.dropout.scale : 0.f;
        p[n][e] = weight * gain;
        dp[n][e] = weight * (dp[n][e] * gain - delta[i]);
      }
    }
    typename Mma<T>::A weights[kRows / 16], ds[kRows / 16];
#pragma unroll
    for (int step = 0; step < kRows / 16; ++step) {
      if constexpr (kOwnsKeys) Mma<T>::set(weights[step], p + 2 * step);
      Mma<T>::set(ds[step], dp + 2 * step);
    }
    wgmma_fence();
    if constexpr (kOwnsKeys) add_tile<T, D>(sum_v, weights, others + In::kTile);
    add_tile<T, D>(sum, ds, others);
    wgmma_commit();
    wgmma_wait<0>();
    barrier_arrive(empty + s);
  }

  const float factor[2] = {a.scale, a.scale}, one[2] = {1.f, 1.f};
  named_barrier(1 + group, 128);  // the warpgroup is done with its own rows
  const auto store = [&](const float(&rows)[D / 8][4], const float(&by)[2], const MutableHeads& to, int array) {
    store_rows<D>(rows, by, reinterpret_cast<T*>(shared) + (array * kOwn + warp_row) * D, head_of<T>(to, batch, head), to.row,
                  own, kOwnsKeys ? a.Tk : a.Tq, a.D);
  };
  store(sum, factor, kOwnsKeys ? a.dk : a.dq, 0);
  if constexpr (kOwnsKeys) store(sum_v, one, a.dv, 1);
#endif
}

template <typename T, int D, bool kOwnsKeys, bool kDropout>
cudaError_t launch(const AttentionBackward& a, const Maps& maps, cudaStream_t stream) {
  constexpr auto sm90_kernel = backward_sm90_kernel<T, D, kOwnsKeys, kDropout>;
  constexpr int kBytes = Layout<D>::kBytes;
  const int blocks = ((kOwnsKeys ? a.Tk : a.Tq) + kOwn - 1) / kOwn;
  const cudaError_t error = cudaFuncSetAttribute(sm90_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (error != cudaSuccess) return error;
  LLMFAST_LAUNCH(sm90_kernel, unsigned(int64_t(blocks) * a.B * a.H), kThreads, kBytes, stream, a, maps, blocks);
  return cudaGetLastError();
}

}  // namespace

std::optional<cudaError_t> attention_backward_sm90(const AttentionBackward& a, cudaStream_t stream) {
  // What lies beyond a row's length may be no number, and a tensor map does not know the length.
  Maps queries{};
  if (a.dtype == DType::f32 || a.kv_lens || !make_heads_map(&queries.own[0], a.q, a.B, a.H, a.Tq, a.D, kRows) ||
      !make_heads_map(&queries.own[1], a.dout, a.B, a.H, a.Tq, a.D, kRows) ||
      !make_heads_map(&queries.others[0], a.k, a.B, a.H, a.Tk, a.D, kRows) ||
      !make_heads_map(&queries.others[1], a.v, a.B, a.H, a.Tk, a.D, kRows))
    return std::nullopt;
  const Maps keys{{queries.others[0], queries.others[1]}, {queries.own[0], queries.own[1]}};
  return dispatch(a, [&](auto type, auto size, auto dropout) {
    using T = decltype(type);
    if constexpr (sizeof(T) == 4) {
      return cudaErrorInvalidValue;
    } else {
      constexpr int D = decltype(size)::value;
      constexpr bool kDropout = decltype(dropout)::value;
      const cudaError_t error = launch<T, D, false, kDropout>(a, queries, stream);
      return error == cudaSuccess ? launch<T, D, true, kDropout>(a, keys, stream) : error;
    }
  });
}

}  // namespace llmfast::cuda
