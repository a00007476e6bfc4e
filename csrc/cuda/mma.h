#pragma once
// Tensor-core products and asynchronous copies of sm_80: PTX under nvcc, csrc/emulation/mma.h on a CPU. Nothing else in a
// kernel says asm. tests/emulation/conformance.cu holds the two to the same results.
//
// Fragments, for lane = 4 g + t (PTX ISA, "Matrix fragments"): a product adds A (16, K) B (K, 8) to D (16, 8), where
//   D:  d[0..3] = (g, 2t), (g, 2t+1), (g+8, 2t), (g+8, 2t+1)
//   K = 16, two elements a register (the lower column or row in the lower half):
//       a[0..3] = (g, 2t), (g+8, 2t), (g, 2t+8), (g+8, 2t+8)      b[0..1] = (2t, g), (2t+8, g)
//   K = 8, TF32: a[0..3] = (g, t), (g+8, t), (g, t+4), (g+8, t+4)  b[0..1] = (t, g), (t+4, g)
#include <type_traits>

#include "cuda/dialect.h"
#ifdef LLMFAST_EMULATE
#include "emulation/mma.h"
#endif

namespace llmfast::cuda {

// Two floats, rounded to T (__half or __nv_bfloat16), in one register; `low` in its lower half.
template <typename T>
__device__ inline uint32_t pack2(float low, float high) {
#ifdef LLMFAST_EMULATE
  return T(low).bits | uint32_t(T(high).bits) << 16;
#else
  uint32_t r;
  if constexpr (std::is_same_v<T, __half>)
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  else
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
#endif
}

#ifndef LLMFAST_EMULATE
__device__ inline uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// N 8x8 matrices of 16-bit elements from shared memory: lane 8 i + j gives the address of row j of matrix i (16 bytes,
// aligned to 16), the addresses of lanes from 8 N on are ignored. r[i]: elements (g, 2t), (g, 2t+1) of matrix i, or with
// kTransposed (2t, g), (2t+1, g).
template <int N, bool kTransposed = false>
__device__ inline void ldmatrix(uint32_t (&r)[N], const void* row) {
  static_assert(N == 1 || N == 2 || N == 4);
  const uint32_t at = shared_address(row);
  if constexpr (N == 4 && !kTransposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(at) : "memory");
  if constexpr (N == 4 && kTransposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(at) : "memory");
  if constexpr (N == 2 && !kTransposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];" : "=r"(r[0]), "=r"(r[1]) : "r"(at) : "memory");
  if constexpr (N == 2 && kTransposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1]) : "r"(at) : "memory");
  if constexpr (N == 1 && !kTransposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];" : "=r"(r[0]) : "r"(at) : "memory");
  if constexpr (N == 1 && kTransposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];" : "=r"(r[0]) : "r"(at) : "memory");
}

// d += a b, K = 16, of T (__half or __nv_bfloat16), sums in float32.
template <typename T>
__device__ inline void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (std::is_same_v<T, __half>)
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  else
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// float32 rounded to TF32's 10 bits of fraction, halves away from zero.
__device__ inline uint32_t to_tf32(float x) {
  uint32_t r;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(r) : "f"(x));
  return r;
}

// d += a b, K = 8, of TF32, sums in float32.
__device__ inline void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// 16 bytes from global to shared memory, both aligned to 16; zeros where not `there` (the source is then not read). They
// are to be seen by this thread after the wait for their group, by others after a barrier behind that.
__device__ inline void cp_async16(void* to, const void* from, bool there = true) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(there ? 16 : 0)
               : "memory");
}
// The same with 4 bytes, aligned to 4.
__device__ inline void cp_async4(void* to, const void* from, bool there = true) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(to)), "l"(from), "r"(there ? 4 : 0)
               : "memory");
}
__device__ inline void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most N of this thread's groups are under way.
template <int N>
__device__ inline void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// 2^x to two units in the last place, subnormal results as zero; 2^-inf = 0.
__device__ inline float fast_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
#endif

}  // namespace llmfast::cuda
