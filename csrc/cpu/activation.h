#pragma once
// Activations of an MLP and sums of columns, on contiguous (rows, n) arrays of float or of bfloat16 (as uint16_t).
#include <cstdint>

#include "cpu/gemm.h"
#include "cpu/isa.h"

namespace llmfast::cpu {

enum class Activation : uint8_t { gelu_tanh, gelu, relu };
constexpr int kActivations = 3;

// The functions that other kernels call. They run on PyTorch's threads; inside a parallel_for, on the calling thread
// alone. Sums are split by shape, so that their bits do not depend on the number of threads.

// a = act(h) for `count` elements; a may be h.
void activation_forward(Activation act, Dtype dtype, const void* h, void* a, int64_t count);

// dh = da act'(h); dh may be da. a, if not null: act(h), made on the way. sums (n,), if not null: the column sums of dh
// (the gradient of a bias added to h), before dh is rounded.
void activation_backward(Activation act, Dtype dtype, const void* h, const void* da, void* dh, void* a, float* sums,
                         int64_t rows, int64_t n);

// sums (n,): the column sums of x, whose rows are `stride` elements apart.
void column_sums(Dtype dtype, const void* x, int64_t stride, float* sums, int64_t rows, int64_t n);

// What they are made of, for one thread; T is float or uint16_t. Arrays by Activation.
template <typename T>
struct ActivationRows {
  void (*forward[kActivations])(const T* h, T* a, int64_t begin, int64_t end);
  // Rows [row0, row1); adds to sums.
  void (*backward[kActivations])(const T* h, const T* da, T* dh, T* a, float* sums, int64_t row0, int64_t row1,
                                 int64_t n);
  void (*column_sums)(const T* x, int64_t stride, float* sums, int64_t row0, int64_t row1, int64_t n);
};

struct ActivationTable {
  ActivationRows<float> f32;
  ActivationRows<uint16_t> bf16;
};

}  // namespace llmfast::cpu

LLMFAST_DECLARE_SIMD(ActivationTable, activation)
