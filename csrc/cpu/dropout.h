#pragma once
#include "cpu/gemm.h"
#include "cpu/isa.h"
#include "cpu/philox.h"

namespace llmfast::cpu {

// y = x, dropped out, for contiguous (rows, n) arrays of `dtype`, which may be the same. Runs on PyTorch's threads.
void dropout_rows(const Dropout& d, Dtype dtype, const void* x, void* y, int64_t rows, int64_t n);

// What it is made of, for rows [row0, row1) of contiguous (rows, n) arrays; y may be x.
struct DropoutTable {
  void (*f32)(const float* x, float* y, const Dropout& d, int64_t row0, int64_t row1, int64_t n);
  void (*bf16)(const uint16_t* x, uint16_t* y, const Dropout& d, int64_t row0, int64_t row1, int64_t n);
};

}  // namespace llmfast::cpu

LLMFAST_DECLARE_SIMD(DropoutTable, dropout)
