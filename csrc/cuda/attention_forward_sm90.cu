// Causal attention, forward, for Hopper: the formulas of csrc/cuda/attention_forward.cu in float16 and bfloat16.
// A block owns 128 queries of one head. One thread of its first warpgroup copies q once, and k and v in tiles of kKeys by
// tensor map (TMA), to two stages of shared memory; the two other warpgroups own 64 queries each and multiply with wgmma:
// scores out of shared memory into registers, weights out of registers with v into registers. The weights of a tile are
// multiplied with v while the next tile's softmax is taken. Barriers in shared memory tell the ones that a stage is full and the other that it is empty.
// Bytes moved and FLOPs are those of attention_forward.cu. Source: Shah et al., "FlashAttention-3", 2024.
#include "cuda/attention_tile.h"
#include "cuda/hopper_attention.h"

namespace llmfast::cuda {
namespace {

constexpr int kGroups = 2, kGroupQueries = 64, kQueries = kGroups * kGroupQueries, kKeys = 128, kStages = 2;
constexpr int kThreads = (1 + kGroups) * 128;
[[maybe_unused]] constexpr int kRowBytes = kTileRow * 2;  // of use on sm_90a alone

template <int D>
struct Layout {  // of shared memory, in bytes; a tile of D columns is kBoxes tiles of 64
  static constexpr int kGroupQ = kGroupQueries * D * 2, kTile = kKeys * D * 2;
  static constexpr int kK = kGroups * kGroupQ, kV = kK + kStages * kTile, kBarriers = kV + kStages * kTile;
  static constexpr int kBytes = kBarriers + (1 + 4 * kStages) * 8;
};

struct Maps {
  HeadsMap q, k, v;
};

template <typename T, int D, bool kDropout>
__global__ void __launch_bounds__(kThreads, 1)
    forward_sm90_kernel(const __grid_constant__ AttentionForward a, const __grid_constant__ Maps maps, int blocks) {
#if LLMFAST_SM90_CODE
  using In = Layout<D>;
  constexpr int kBoxes = D / kTileRow;
  LLMFAST_DYN_SHARED(unsigned char, shared, 1024);
  uint64_t* full_q = reinterpret_cast<uint64_t*>(shared + In::kBarriers);
  uint64_t *full_k = full_q + 1, *full_v = full_k + kStages, *empty_k = full_v + kStages, *empty_v = empty_k + kStages;

  const int which = blockIdx.x / blocks, batch = which / a.H, head = which % a.H;
  const int query0 = (blocks - 1 - int(blockIdx.x % blocks)) * kQueries;  // those that see most keys first
  const Mask mask(a, batch);
  const int tiles = (mask.end_of_keys(query0 + kQueries) + kKeys - 1) / kKeys;
  if (threadIdx.x == 0) {
    barrier_init(full_q, 1);
    for (int s = 0; s < kStages; ++s) {
      barrier_init(full_k + s, 1);
      barrier_init(full_v + s, 1);
      barrier_init(empty_k + s, kGroups * 128);
      barrier_init(empty_v + s, kGroups * 128);
    }
    barrier_init_fence();
  }
  __syncthreads();

  if (threadIdx.x < 128) {
    fewer_registers<40>();
    if (threadIdx.x > 0 || tiles == 0) return;
    barrier_arrive_expect(full_q, kGroups * In::kGroupQ);
    for (int i = 0; i < kGroups * kBoxes; ++i) {
      const int group = i / kBoxes, box = i % kBoxes;
      tma_load_head(shared + i * kGroupQueries * kRowBytes, &maps.q, batch, head, query0 + group * kGroupQueries,
                    box * kTileRow, full_q);
    }
    for (int tile = 0; tile < tiles; ++tile) {
      const int s = tile % kStages, parity = (tile / kStages & 1) ^ 1;
      barrier_wait(empty_k + s, parity);
      barrier_arrive_expect(full_k + s, In::kTile);
      for (int box = 0; box < kBoxes; ++box)
        tma_load_head(shared + In::kK + s * In::kTile + box * kKeys * kRowBytes, &maps.k, batch, head, tile * kKeys,
                      box * kTileRow, full_k + s);
      barrier_wait(empty_v + s, parity);
      barrier_arrive_expect(full_v + s, In::kTile);
      for (int box = 0; box < kBoxes; ++box)
        tma_load_head(shared + In::kV + s * In::kTile + box * kKeys * kRowBytes, &maps.v, batch, head, tile * kKeys,
                      box * kTileRow, full_v + s);
    }
    return;
  }

  more_registers<232>();
  const int group = threadIdx.x / 128 - 1, warp_row = group * kGroupQueries + int(threadIdx.x / 32 % 4) * 16;
  const int query = query0 + warp_row;  // the warp's first
  // The maximum is taken before the scale is applied: a negative one changes the sign of the scores.
  const float size = fmaxf(fabsf(a.scale), 1e-30f), scale = size * kLog2E;
  const uint32_t base = shared_address(shared);
  float p[kKeys / 8][4], sum[D / 8][4] = {}, top[2] = {-INFINITY, -INFINITY}, total[2] = {}, shrink[2];
  typename Mma<T>::A weights[kKeys / 16];

  // The scores of a tile; of its softmax, what does not touch `weights` and `sum`; and `weights` times its values.
  const auto add_scores = [&](int tile) {
#pragma unroll
    for (int box = 0; box < kBoxes; ++box) {
      uint64_t left = descriptor_along_k(base + group * In::kGroupQ + box * kGroupQueries * kRowBytes);
      uint64_t right = descriptor_along_k(base + In::kK + tile % kStages * In::kTile + box * kKeys * kRowBytes);
#pragma unroll
      for (int k = 0; k < kTileRow; k += 16) {
        wgmma<T, kKeys, false>(reinterpret_cast<float(&)[kKeys / 2]>(p), left, right, box + k > 0);
        left = step_along_k(left);
        right = step_along_k(right);
      }
    }
    wgmma_commit();
  };
  const auto softmax = [&](int tile) {
    if (a.scale < 0.f)
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) p[n][e] = -p[n][e];
    mask_scores<kKeys>(p, mask, query, tile * kKeys);
    softmax_step(p, top, total, shrink, scale);
    if constexpr (kDropout) drop_weights<kKeys>(p, a.dropout, (int64_t(which) << 32) + query, tile * kKeys);
  };
  const auto round_weights = [&] {
#pragma unroll
    for (int step = 0; step < kKeys / 16; ++step) Mma<T>::set(weights[step], p + 2 * step);
  };
  const auto add_values = [&](int tile) {
    uint64_t right = descriptor_across_k(base + In::kV + tile % kStages * In::kTile, kKeys * kRowBytes);
#pragma unroll
    for (int step = 0; step < kKeys / 16; ++step) {
      wgmma_from_registers<T, D>(reinterpret_cast<float(&)[D / 2]>(sum), weights[step].r, right);
      right = step_across_k(right);
    }
    wgmma_commit();
  };

  if (tiles) {
    barrier_wait(full_q, 0);
    barrier_wait(full_k, 0);
    wgmma_fence();
    add_scores(0);
    wgmma_wait<0>();
    barrier_arrive(empty_k);
    softmax(0);
    round_weights();
    for (int tile = 1; tile < tiles; ++tile) {
      const int s = tile % kStages, before = (tile - 1) % kStages;
      barrier_wait(full_k + s, tile / kStages & 1);
      wgmma_fence();
      add_scores(tile);
      barrier_wait(full_v + before, (tile - 1) / kStages & 1);
      wgmma_fence();
      add_values(tile - 1);
      wgmma_wait<1>();  // the scores are there
      barrier_arrive(empty_k + s);
      softmax(tile);
      wgmma_wait<0>();  // the values are
      barrier_arrive(empty_v + before);
      scale_rows(sum, shrink);
      round_weights();
    }
    barrier_wait(full_v + (tiles - 1) % kStages, (tiles - 1) / kStages & 1);
    wgmma_fence();
    add_values(tiles - 1);
    wgmma_wait<0>();
  }

  float factor[2];
  finish_rows(top, total, size, a.dropout.scale, a.lse + int64_t(which) * a.Tq, query, a.Tq, factor);
  named_barrier(1 + group, 128);  // the warpgroup is done with its q
  store_rows<D>(sum, factor, reinterpret_cast<T*>(shared) + warp_row * D, head_of<T>(a.out, batch, head), a.out.row, query,
                a.Tq, a.D);
#endif
}

}  // namespace

std::optional<cudaError_t> attention_forward_sm90(const AttentionForward& a, cudaStream_t stream) {
  // What lies beyond a row's length may be no number, and a tensor map does not know the length.
  Maps maps{};
  if (a.dtype == DType::f32 || a.kv_lens || !make_heads_map(&maps.q, a.q, a.B, a.H, a.Tq, a.D, kGroupQueries) ||
      !make_heads_map(&maps.k, a.k, a.B, a.H, a.Tk, a.D, kKeys) || !make_heads_map(&maps.v, a.v, a.B, a.H, a.Tk, a.D, kKeys))
    return std::nullopt;
  return dispatch(a, [&](auto type, auto size, auto dropout) {
    using T = decltype(type);
    if constexpr (sizeof(T) == 4) {
      return cudaErrorInvalidValue;
    } else {
      constexpr int D = decltype(size)::value, kBytes = Layout<D>::kBytes;
      constexpr auto sm90_kernel = forward_sm90_kernel<T, D, decltype(dropout)::value>;
      const int blocks = (a.Tq + kQueries - 1) / kQueries;
      const cudaError_t error = cudaFuncSetAttribute(sm90_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
      if (error != cudaSuccess) return error;
      LLMFAST_LAUNCH(sm90_kernel, unsigned(int64_t(blocks) * a.B * a.H), kThreads, kBytes, stream, a, maps, blocks);
      return cudaGetLastError();
    }
  });
}

}  // namespace llmfast::cuda
