#pragma once
// Causal attention over raw pointers, for the op and for the fused decoder layer.
//   out[i] = sum_j dropout(P[i, j]) v[j],  P[i, j] = exp(scale q[i] . k[j] - lse[i]),  over the keys j that query i sees
// Query i sees key j where j <= i + Tk - Tq, and j < kv_lens[b], and doc_ids[b, j] == doc_ids[b, i + Tk - Tq] (each where
// given). A query that sees no key gives zeros. B batch, H heads, Tq queries, Tk keys, D head size.
#include <cstdint>

#include "cpu/gemm.h"

namespace llmfast::cpu {

// A (B, H, T, D) array: element (b, h, t, d) is data[b * batch + h * head + t * row + d], of the call's dtype. q, k and v may
// so be the thirds of one packed (B, T, 3, H, D), and out a (B, T, H, D).
template <typename Void>
struct HeadsOf {
  Void* data;
  int64_t batch, head, row;
};
using Heads = HeadsOf<const void>;
using MutableHeads = HeadsOf<void>;

struct Attention {
  int64_t B, H, Tq, Tk, D;
  Dtype dtype;  // of q, k, v, out and all gradients; sums and the softmax are float32
  float scale;
  float dropout_p = 0.f;  // on P; its mask depends on (seed, head, row, column) alone
  uint64_t seed = 0;
  const int64_t* kv_lens = nullptr;  // (B,)
  const int64_t* doc_ids = nullptr;  // (B, Tk)
};

// Both run on PyTorch's threads (inside a parallel_for on the calling thread alone) and write every element of their results.
// The bits do not depend on the number of threads. lse: (B, H, Tq), +inf for a query that sees no key.
void attention_forward(const Attention& a, Heads q, Heads k, Heads v, MutableHeads out, float* lse);
void attention_backward(const Attention& a, Heads q, Heads k, Heads v, Heads out, Heads dout, const float* lse,
                        MutableHeads dq, MutableHeads dk, MutableHeads dv);

}  // namespace llmfast::cpu
