#pragma once
// What sm_90a has beyond csrc/cuda/mma.h: copies by tensor map (TMA), barriers in shared memory that count them, and
// products of a warpgroup that read shared memory (wgmma). PTX under nvcc, csrc/emulation/hopper.h on a CPU;
// tests/emulation/conformance_sm90.h holds the two to the same results.
//
// Tiles of 16-bit elements lie as TMA's 128-byte swizzle puts them: rows of 64 elements (128 bytes), the 16-byte chunks of
// row r exchanged by xor with r % 8; a tile begins at a multiple of 1024 bytes.
// D of a product (64, N): in lane 4 g + t of warp w, d[4 j + 2 h + e] = (16 w + g + 8 h, 8 j + 2 t + e).
#include <type_traits>

#include "cuda/mma.h"

#ifdef LLMFAST_EMULATE
#define LLMFAST_SM90_CODE 1
#elif defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define LLMFAST_SM90_CODE 1
#else
#define LLMFAST_SM90_CODE 0  // elsewhere, kernels of this kind have no body and are never launched
#endif

namespace llmfast::cuda {

constexpr int kTileRow = 64;  // elements of a row of a tile

// What wgmma reads as an operand: a tile of rows along k (64 elements of k each), from `at` on, ...
__device__ inline uint64_t descriptor_along_k(uint32_t at) {
  return uint64_t(at >> 4 & 0x3FFF) | uint64_t(1) << 16 | uint64_t(1024 >> 4) << 32 | uint64_t(1) << 62;
}
// ... or tiles whose rows are 64 elements of the other dimension, one row a k; the next 64 elements are `apart` bytes on.
__device__ inline uint64_t descriptor_across_k(uint32_t at, uint32_t apart) {
  return uint64_t(at >> 4 & 0x3FFF) | uint64_t(apart >> 4) << 16 | uint64_t(1024 >> 4) << 32 | uint64_t(1) << 62;
}
// The same 16 k further on.
__device__ inline uint64_t step_along_k(uint64_t descriptor) { return descriptor + (32 >> 4); }
__device__ inline uint64_t step_across_k(uint64_t descriptor) { return descriptor + (2048 >> 4); }

}  // namespace llmfast::cuda

#ifdef LLMFAST_EMULATE
#include "emulation/hopper.h"
#else
#include <cuda.h>
#include <dlfcn.h>

namespace llmfast::cuda {

using TensorMap = CUtensorMap;

// The driver's function that makes them; null on a machine without it.
inline decltype(&cuTensorMapEncodeTiled) tensor_map_encoder() {
  static const auto encode = [] {
    void* driver = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);  // not linked: absent on machines without a GPU
    return driver ? reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(dlsym(driver, "cuTensorMapEncodeTiled")) : nullptr;
  }();
  return encode;
}

// The (rows, columns) matrix of 16-bit elements at p, rows `stride` elements apart, to be copied in boxes of box_rows times
// 64; what lies outside of it reads as zeros. p and the stride are multiples of 16 bytes. False where the driver refuses.
inline bool make_tensor_map(TensorMap* map, const void* p, int64_t rows, int64_t columns, int64_t stride, int box_rows) {
  const auto encode = tensor_map_encoder();
  if (!encode) return false;
  const cuuint64_t sizes[2] = {cuuint64_t(columns), cuuint64_t(rows)}, strides[1] = {cuuint64_t(stride) * 2};
  const cuuint32_t box[2] = {kTileRow, cuuint32_t(box_rows)}, steps[2] = {1, 1};
  return encode(map, CU_TENSOR_MAP_DATA_TYPE_UINT16, 2, const_cast<void*>(p), sizes, strides, box, steps,
                CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
                CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

#if LLMFAST_SM90_CODE
// A barrier in shared memory. A phase ends when `count` arrivals and the bytes that they announced have come.
__device__ inline void barrier_init(uint64_t* barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count) : "memory");
}
// Makes the inits seen by the copies; by one thread, before the __syncthreads that shows them to the other threads.
__device__ inline void barrier_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
__device__ inline void barrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
__device__ inline void barrier_arrive_expect(uint64_t* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes) : "memory");
}
// Waits until the phase of this parity (0 for the first) has ended.
__device__ inline void barrier_wait(uint64_t* barrier, int parity) {
  uint32_t done = 0;
  while (!done)
    asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                 : "=r"(done) : "r"(shared_address(barrier)), "r"(parity) : "memory");
}
// Barrier `id` (1 to 15) of `threads` threads of the block.
__device__ inline void named_barrier(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Copies the map's box from (row, column) on to a tile; its bytes count on the barrier. By one thread.
__device__ inline void tma_load(void* tile, const TensorMap* map, int row, int column, uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(
          shared_address(tile)), "l"(map), "r"(shared_address(barrier)), "r"(column), "r"(row) : "memory");
}

// Registers of every thread of the warpgroup from here on.
template <int kRegisters>
__device__ inline void fewer_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ inline void more_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// Before the first product, and wherever its registers were touched since the last.
__device__ inline void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Until at most N groups are under way; what the others have written to registers may then be read, and their operands
// overwritten.
template <int N>
__device__ inline void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}

// The registers d[0 .. 31] and d[0 .. 63] of a product, as operands of asm and as its text names them.
#define LLMFAST_D4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define LLMFAST_D16(i) LLMFAST_D4(i), LLMFAST_D4(i + 4), LLMFAST_D4(i + 8), LLMFAST_D4(i + 12)
#define LLMFAST_D32 LLMFAST_D16(0), LLMFAST_D16(16)
#define LLMFAST_D64 LLMFAST_D32, LLMFAST_D16(32), LLMFAST_D16(48)
#define LLMFAST_NAMES32                            \
  "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15," \
  "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define LLMFAST_NAMES64                                                  \
  LLMFAST_NAMES32                                                        \
  ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,"    \
  "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define LLMFAST_WGMMA(n, type, d, names, a_, b_, accumulate_, across_)                                             \
  asm volatile("{ .reg .pred p; setp.ne.b32 p, " accumulate_ ", 0;\n"                                              \
               "wgmma.mma_async.sync.aligned.m64n" n "k16.f32." type "." type " {" names "}, " a_ ", " b_           \
               ", p, 1, 1, 0, " across_ "; }"                                                                       \
               : d : "l"(a), "l"(b), "r"(int(accumulate)), "n"(int(kBAcrossK)))
// d (64, N) = a (64, 16) b (16, N), added to d if `accumulate`; T is __half or __nv_bfloat16, a along k. By a warpgroup.
template <typename T, int N, bool kBAcrossK>
__device__ inline void wgmma(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate) {
  static_assert(N == 64 || N == 128);
  constexpr bool kHalf = std::is_same_v<T, __half>;
  if constexpr (N == 64 && kHalf) LLMFAST_WGMMA("64", "f16", LLMFAST_D32, LLMFAST_NAMES32, "%32", "%33", "%34", "%35");
  if constexpr (N == 64 && !kHalf) LLMFAST_WGMMA("64", "bf16", LLMFAST_D32, LLMFAST_NAMES32, "%32", "%33", "%34", "%35");
  if constexpr (N == 128 && kHalf) LLMFAST_WGMMA("128", "f16", LLMFAST_D64, LLMFAST_NAMES64, "%64", "%65", "%66", "%67");
  if constexpr (N == 128 && !kHalf) LLMFAST_WGMMA("128", "bf16", LLMFAST_D64, LLMFAST_NAMES64, "%64", "%65", "%66", "%67");
}
#undef LLMFAST_WGMMA
#endif

}  // namespace llmfast::cuda
#endif
