#pragma once
// Matrix products of the CPU kernels, sums in float32:  C (M, N) = op(A) (M, K) op(B) (K, N) [+ C] [+ bias] [+ residual]
#include <cstdint>

namespace llmfast::cpu {

enum class Dtype : uint8_t { f32, bf16, i8 };

// A matrix stored row by row, `stride` elements from row to row, neighbours in a row one element apart.
struct Operand {
  const void* data;
  int64_t stride;
  Dtype dtype;
  bool transposed = false;        // the product takes its transpose
  const float* scales = nullptr;  // i8: of every row as stored; only as a transposed B
};

struct Product {
  int64_t M, N, K;
  Operand a, b;  // op(A) is (M, K), op(B) is (K, N)
  void* c;       // (M, N)
  int64_t c_stride;
  Dtype c_dtype;
  Dtype compute;                    // f32: as it says; bf16: operands are rounded to bfloat16 where they are float
  bool accumulate = false;          // add to what C holds (C must be f32)
  const float* bias = nullptr;      // (N,), added to every row
  const float* residual = nullptr;  // (M, N), added
  int64_t residual_stride = 0;
};

// Runs on PyTorch's threads; inside a parallel_for, on the calling thread alone. C may not overlap the operands, but may be
// the residual. M or N of 0 does nothing; K of 0 gives the sum of the other terms. The bits of C do not depend on the number
// of threads.
void gemm(const Product& product);

}  // namespace llmfast::cpu
