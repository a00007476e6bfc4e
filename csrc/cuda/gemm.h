#pragma once
#include <optional>

#include "cuda/activation.h"
#include "cuda/philox.h"

namespace llmfast::cuda {

// A matrix of 16-bit elements whose rows or columns are contiguous, `stride` elements apart.
struct GemmOperand {
  const void* data = nullptr;
  int64_t stride = 0;
  bool along_k = true;  // contiguous along the dimension that a product sums over
};

// out (M, N) = d(low low_b) + a b + bias, where a is (M, K), b (K, N), low (M, rank), low_b (rank, N), d: dropout.
struct Gemm {
  DType dtype;  // f16 or bf16: of everything but sums
  int M, N, K;
  GemmOperand a, b;  // a lies along k; with an activation b lies along k as well, with `backward` along N
  const void* low = nullptr;    // contiguous, as is low_b,
  const void* low_b = nullptr;  // which lies as b does
  int rank = 0;
  Dropout dropout = {};  // elements are numbered as those of out; the scale is the caller's, in `low`
  const void* bias = nullptr;  // (N,)
  Activation activation = Activation::none;
  // Without an activation, out is the product. With one, and `sums` and `backward` not set: out = act(product), and the
  // product goes to h where that is given. With `backward`: out = product * act'(h), and act(h) goes to act where given.
  bool backward = false;
  void* h = nullptr;
  void* act = nullptr;
  float* sums = nullptr;  // (gemm_row_tiles(M), N): column sums of a tile's rows of out, with `backward`
  void* out = nullptr;
};

inline constexpr int kGemmTile = 128;
inline int gemm_row_tiles(int M) { return (M + kGemmTile - 1) / kGemmTile; }

// capability: of the GPU, 10 major + minor.
cudaError_t gemm(const Gemm& g, int capability, cudaStream_t stream);

// On compute capability 9.0 (csrc/cuda/gemm_sm90.cu); nothing where it does not take these operands.
std::optional<cudaError_t> gemm_sm90(const Gemm& g, cudaStream_t stream);

}  // namespace llmfast::cuda
