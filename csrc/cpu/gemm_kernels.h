#pragma once
#include "cpu/gemm.h"
#include "cpu/isa.h"

namespace llmfast::cpu {

// The parts of gemm() that are compiled once per instruction set, for one kind of products; see simd/gemm.cpp.
struct GemmKernels {
  int panel;     // columns of a packed panel of B
  int depth;     // elements along K of a 32-bit unit
  int tile_rows;
  bool (*in_place)(const Operand& a, int64_t K);  // A needs no packing
  // op(A) rows [m0, m1), elements [k0, k0 + kc): row by row, `units` units each, into `to`.
  void (*pack_a)(const Operand& a, int64_t m0, int64_t m1, int64_t k0, int64_t kc, uint32_t* to);
  // op(B) columns [n0, n0 + n), n <= panel, elements [k0, k0 + kc).
  void (*pack_b)(const Operand& b, int64_t n0, int64_t n, int64_t k0, int64_t kc, uint32_t* to);
  // C rows [m0, m1), columns [n0, n0 + n) of one panel. packed_a: rows m0 ... as pack_a left them, or null: A in place.
  void (*multiply)(const Product& p, const uint32_t* packed_a, const uint32_t* panel, int64_t m0, int64_t m1, int64_t n0,
                   int64_t n, int64_t k0, int64_t kc);
};

struct GemmTable {
  GemmKernels f32, bf16;
};

}  // namespace llmfast::cpu

LLMFAST_DECLARE_SIMD(GemmTable, gemm_kernels)
