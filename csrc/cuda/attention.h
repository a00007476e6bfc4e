#pragma once
#include <optional>

#include "cuda/dialect.h"
#include "cuda/philox.h"

namespace llmfast::cuda {

inline constexpr int kAttentionMaxHeadSize = 128;

// A (B, H, T, D) array: element (b, h, t, d) is data[b * batch + h * head + t * row + d]. Data and steps are multiples of 16 bytes.
struct Heads {
  const void* data;
  int64_t batch, head, row;
};

struct MutableHeads {
  void* data;
  int64_t batch, head, row;
};

struct Attention {
  DType dtype;
  int B, H, Tq, Tk, D;     // none is 0; D <= 128 is a multiple of 8
  float scale;             // of the scores
  Dropout dropout;
  const int64_t* kv_lens;  // (B,) or null
  const int64_t* doc_ids;  // (B, Tk) or null
  Heads q, k, v;
};

// lse (B, H, Tq): natural log-sum-exp of a query's scaled scores, +inf where it sees no key.
struct AttentionForward : Attention {
  MutableHeads out;
  float* lse;
};

// delta (B, H, Tq): scratch.
struct AttentionBackward : Attention {
  Heads out, dout;
  const float* lse;
  float* delta;
  MutableHeads dq, dk, dv;
};

// capability: 10 major + minor of the GPU.
cudaError_t attention_forward(const AttentionForward& a, int capability, cudaStream_t stream);
cudaError_t attention_backward(const AttentionBackward& a, int capability, cudaStream_t stream);
// The kernels of Hopper; nothing where they do not take these arguments.
std::optional<cudaError_t> attention_forward_sm90(const AttentionForward& a, cudaStream_t stream);
std::optional<cudaError_t> attention_backward_sm90(const AttentionBackward& a, cudaStream_t stream);

}  // namespace llmfast::cuda
