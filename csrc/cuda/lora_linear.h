#pragma once
#include "cuda/philox.h"

namespace llmfast::cuda {

// What lora_linear asks of a large matrix x (rows, columns), in one pass over it; d is dropout without its scale:
//   p = factor d(x) v,  v (columns, rank)        q = d(x)^T u,  u (rows, rank)
// All are contiguous; v and q lie as the parameter to which they belong: (columns, rank), or (rank, columns).
struct LowRank {
  DType dtype;  // f16 or bf16: of x, u and v
  const void* x;
  int rows, columns, rank;
  bool rank_first = false;  // v and q are (rank, columns)
  Dropout dropout = {};
  float factor = 1.f;
  const void* v = nullptr;
  const void* u = nullptr;
  // Shares of the results, to be added up by the caller: (column_shares, rows, rank) and (row_shares, columns, rank).
  float* p = nullptr;
  float* q = nullptr;
  // By share_out:
  int row_shares = 0, column_shares = 0, row_tiles = 0, column_tiles = 0;  // tiles: of a share
};

inline constexpr int kOnePassRank = 16;  // up to it, p and q come of one pass; above, their shares are larger than x

// Sets the shares of a pass that makes p, q or both, for a GPU of so many multiprocessors.
void share_out(LowRank& a, bool makes_p, bool makes_q, int multiprocessors);

cudaError_t low_rank(const LowRank& a, cudaStream_t stream);

}  // namespace llmfast::cuda
