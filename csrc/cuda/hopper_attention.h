#pragma once
// What attention wants of Hopper beside csrc/cuda/hopper.h: copies out of (B, H, T, D) arrays of any strides, and products
// whose left factor lies in registers. PTX under nvcc, csrc/emulation/hopper_attention.h on a CPU.
#include "cuda/attention.h"
#include "cuda/hopper.h"

#ifdef LLMFAST_EMULATE
#include "emulation/hopper_attention.h"
#else

namespace llmfast::cuda {

using HeadsMap = CUtensorMap;

// A (B, H, T, D) array of 16-bit elements, to be copied in boxes of `box_rows` rows times 64 columns of one head; what lies
// outside of the head reads as zeros. False where the driver refuses.
inline bool make_heads_map(HeadsMap* map, const Heads& x, int B, int H, int T, int D, int box_rows) {
  const auto encode = tensor_map_encoder();
  if (!encode) return false;
  const auto bytes = [](int64_t step, int n) { return cuuint64_t(n == 1 ? 16 : step * 2); };  // of one, any step will do
  const cuuint64_t sizes[4] = {cuuint64_t(D), cuuint64_t(T), cuuint64_t(H), cuuint64_t(B)};
  const cuuint64_t strides[3] = {bytes(x.row, T), bytes(x.head, H), bytes(x.batch, B)};
  const cuuint32_t box[4] = {kTileRow, cuuint32_t(box_rows), 1, 1}, steps[4] = {1, 1, 1, 1};
  return encode(map, CU_TENSOR_MAP_DATA_TYPE_UINT16, 4, const_cast<void*>(x.data), sizes, strides, box, steps,
                CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
                CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

#if LLMFAST_SM90_CODE
// Copies the box from (row, column) of a head on to a tile; its bytes count on the barrier. By one thread.
__device__ inline void tma_load_head(void* tile, const HeadsMap* map, int batch, int head, int row, int column,
                                     uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], [%2];" ::
          "r"(shared_address(tile)), "l"(map), "r"(shared_address(barrier)), "r"(column), "r"(row), "r"(head), "r"(batch)
      : "memory");
}

#define LLMFAST_WGMMA(n, type, d, names, a_, b_)                                                                       \
  asm volatile("wgmma.mma_async.sync.aligned.m64n" n "k16.f32." type "." type " {" names "}, {" a_ "}, " b_ ", 1, 1, 1, 1;" \
               : d : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))
// d (64, N) += a (64, 16) b (16, N): a in registers, each warp's 16 rows as a fragment of mma_m16n8k16; b across k.
template <typename T, int N>
__device__ inline void wgmma_from_registers(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b) {
  static_assert(N == 64 || N == 128);
  constexpr bool kHalf = std::is_same_v<T, __half>;
  if constexpr (N == 64 && kHalf) LLMFAST_WGMMA("64", "f16", LLMFAST_D32, LLMFAST_NAMES32, "%32,%33,%34,%35", "%36");
  if constexpr (N == 64 && !kHalf) LLMFAST_WGMMA("64", "bf16", LLMFAST_D32, LLMFAST_NAMES32, "%32,%33,%34,%35", "%36");
  if constexpr (N == 128 && kHalf) LLMFAST_WGMMA("128", "f16", LLMFAST_D64, LLMFAST_NAMES64, "%64,%65,%66,%67", "%68");
  if constexpr (N == 128 && !kHalf) LLMFAST_WGMMA("128", "bf16", LLMFAST_D64, LLMFAST_NAMES64, "%64,%65,%66,%67", "%68");
}
#undef LLMFAST_WGMMA
#endif

}  // namespace llmfast::cuda
#endif
