#pragma once
#include "cpu/gemm.h"
#include "cpu/isa.h"

namespace llmfast::cpu {

// Where the sums of a block go, all pointers of the block's first element. Null where there is nothing to add.
struct BlockStore {
  void* c;
  int64_t c_stride;
  Dtype c_dtype;
  bool accumulate;
  const float* bias;
  const float* residual;
  int64_t residual_stride;
};

// The parts of gemm() that are compiled once per instruction set, for one kind of products; see simd/gemm.cpp.
// What is packed are units of 32 bits, `depth` elements along K; elements [k0, k0 + kc) of K.
struct GemmKernels {
  int64_t panel;      // columns of a packed panel of B
  int64_t tile_rows;
  int64_t depth;
  int64_t short_units;  // of a block of K where C is small
  bool (*in_place)(const Operand& a, int64_t K);  // A needs no packing
  // op(A) rows [m0, m0 + rows) of M, into room for `rows` rounded up to whole tiles.
  void (*pack_a)(const Operand& a, int64_t M, int64_t m0, int64_t rows, int64_t k0, int64_t kc, uint32_t* to);
  // op(B) columns [n0, n0 + columns): panels, the last one filled up with zeros as far as it is used.
  void (*pack_b)(const Operand& b, int64_t n0, int64_t columns, int64_t k0, int64_t kc, uint32_t* to);
  // A block of `rows` x `columns`. a: in place, from row m0 on; packed_a: as pack_a left it, or null.
  void (*multiply)(const Operand& a, const uint32_t* packed_a, const uint32_t* panels, int64_t m0, int64_t rows,
                   int64_t columns, int64_t k0, int64_t kc, const BlockStore& out);
};

struct GemmTable {
  GemmKernels f32, bf16;
};

}  // namespace llmfast::cpu

LLMFAST_DECLARE_SIMD(GemmTable, gemm_kernels)
