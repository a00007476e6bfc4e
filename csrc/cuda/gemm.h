#pragma once
#include "cuda/activation.h"
#include "cuda/philox.h"

namespace llmfast::cuda {

// A matrix of 16-bit elements whose rows or columns are contiguous, `stride` elements apart.
struct GemmOperand {
  const void* data = nullptr;
  int64_t stride = 0;
  bool along_k = true;  // contiguous along the dimension that a product sums over
};

enum class Dropped { nothing, a, b, low };

// out (M, N) = factor (low low_b + a b) + bias, where a is (M, K), b (K, N), low (M, rank), low_b (rank, N).
struct Gemm {
  DType dtype;  // f16 or bf16: of everything but sums, and of out unless out_float
  int M, N, K;
  // a lies along k, or both along M and N; with an activation b lies along k, with `backward` along N
  GemmOperand a, b;
  const void* low = nullptr;    // contiguous, as is low_b,
  const void* low_b = nullptr;  // which lies as b does
  int rank = 0;
  Dropout dropout = {};  // elements are numbered as in the tensor dropped; the scale is the caller's (`factor`, `low`)
  Dropped dropped = Dropped::nothing;
  float factor = 1.f;
  const void* bias = nullptr;  // (N,)
  Activation activation = Activation::none;
  // Without an activation, out is the product. With one, and `sums` and `backward` not set: out = act(product), and the
  // product goes to h where that is given. With `backward`: out = product * act'(h), and act(h) goes to act where given.
  bool backward = false;
  void* h = nullptr;
  void* act = nullptr;
  float* sums = nullptr;  // (gemm_row_tiles(M), N): column sums of a tile's rows of out, with `backward`
  void* out = nullptr;
  bool out_float = false;
  int splits = 1;  // above 1: of K; out is float (splits, M, N), to be added up by the caller
};

inline constexpr int kGemmTile = 128;
inline int gemm_row_tiles(int M) { return (M + kGemmTile - 1) / kGemmTile; }

// capability: of the GPU, 10 major + minor.
cudaError_t gemm(const Gemm& g, int capability, cudaStream_t stream);

// On compute capability 9.0 (csrc/cuda/gemm_sm90.cu); *taken tells whether it takes these operands.
cudaError_t gemm_sm90(const Gemm& g, cudaStream_t stream, bool* taken);

}  // namespace llmfast::cuda
