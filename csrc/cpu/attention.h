#pragma once
// Causal attention over raw pointers, for the op and for the fused decoder layer.
//   out[i] = sum_j dropout(P[i, j]) v[j],  P[i, j] = exp(scale q[i] . k[j] - lse[i]),  over the keys j that query i sees
// Query i sees key j where j <= i + Tk - Tq, and j < kv_lens[b], and doc_ids[b, j] == doc_ids[b, i + Tk - Tq] (each where
// given). A query that sees no key gives zeros. B batch, H heads, Tq queries, Tk keys, D head size.
#include <cstdint>

#include "cpu/gemm.h"
#include "cpu/isa.h"
#include "cpu/philox.h"

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
  Dropout dropout = {0, 0, 1.f};     // on P
  const int64_t* kv_lens = nullptr;  // (B,)
  const int64_t* doc_ids = nullptr;  // (B, Tk)
};

// Both run on PyTorch's threads (inside a parallel_for on the calling thread alone) and write every element of their results.
// The bits do not depend on the number of threads. lse: (B, H, Tq), +inf for a query that sees no key.
void attention_forward(const Attention& a, Heads q, Heads k, Heads v, MutableHeads out, float* lse);
void attention_backward(const Attention& a, Heads q, Heads k, Heads v, Heads out, Heads dout, const float* lse,
                        MutableHeads dq, MutableHeads dk, MutableHeads dv);

// One call of a kernel computes a part of one head (b, h): queries [q0, q1), keys [k0, k1).
struct AttentionPart {
  int64_t b, h, q0, q1, k0, k1;
};

struct AttentionKernels {
  // 32-bit words of 64-byte aligned scratch: a forward call that reads `keys` keys, a backward call of `queries` queries.
  int64_t (*forward_words)(const Attention& a, int64_t keys);
  int64_t (*backward_words)(const Attention& a, int64_t queries);
  // k0 = 0 and k1 = Tk.
  void (*forward)(const Attention& a, const AttentionPart& part, Heads q, Heads k, Heads v, MutableHeads out, float* lse,
                  void* scratch);
  // Writes dq (null data: not wanted), which needs all keys, and dk and dv (null data of dk: neither), which need all queries.
  void (*backward)(const Attention& a, const AttentionPart& part, Heads q, Heads k, Heads v, Heads out, Heads dout,
                   const float* lse, MutableHeads dq, MutableHeads dk, MutableHeads dv, void* scratch);
};

// Where a call may be cut into parts: q0 and k0 are multiples of these.
constexpr int64_t kQueryBlock = 48, kKeyBlock = 256;

struct AttentionTable {
  AttentionKernels f32, bf16;
};

}  // namespace llmfast::cpu

LLMFAST_DECLARE_SIMD(AttentionTable, attention)
