// Splits attention over heads and, where these are few, over blocks of queries or keys.
#include "cpu/attention.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>

#include "stable.h"

namespace llmfast::cpu {
namespace {

// Parts per thread, so that none waits long for the last one: the later queries see more keys.
constexpr int64_t kPartsPerThread = 4;

// Memory of one thread, which grows only.
void* scratch(int64_t words) {
  constexpr int64_t alignment = 64 / 4;
  static thread_local std::unique_ptr<uint32_t[]> memory;
  static thread_local int64_t size = 0;
  if (size < words + alignment) {
    memory.reset();
    memory.reset(new uint32_t[words + alignment]);
    size = words + alignment;
  }
  return reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(memory.get()) + 63) / 64 * 64);
}

// f(i) for i in [0, n), each by the first thread that is free.
template <typename F>
void for_parts(int64_t n, F f) {
  std::atomic<int64_t> next{0};
  const int64_t threads = std::min<int64_t>(n, torch::stable::get_num_threads());
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (int64_t i = next++; i < n; i = next++) f(i);
  });
}

// How many parts a head's T rows are cut into, in multiples of `block`; whatever it is, the bits stay the same.
int64_t parts_of_head(const Attention& a, int64_t T, int64_t block) {
  const int64_t threads = torch::stable::get_num_threads(), heads = a.B * a.H;
  if (threads == 1 || heads >= kPartsPerThread * threads) return 1;
  return std::min((T + block - 1) / block, (kPartsPerThread * threads + heads - 1) / heads);
}

}  // namespace

void attention_forward(const Attention& a, Heads q, Heads k, Heads v, MutableHeads out, float* lse) {
  if (a.B * a.H * a.Tq == 0) return;
  const auto& kernels = a.dtype == Dtype::bf16 ? LLMFAST_SIMD(attention).bf16 : LLMFAST_SIMD(attention).f32;
  const int64_t parts = parts_of_head(a, a.Tq, kQueryBlock);
  const int64_t step = (a.Tq + parts * kQueryBlock - 1) / (parts * kQueryBlock) * kQueryBlock;
  for_parts(a.B * a.H * parts, [&](int64_t i) {
    const int64_t bh = i % (a.B * a.H), q0 = (parts - 1 - i / (a.B * a.H)) * step;  // the long ones first
    if (q0 >= a.Tq) return;
    const AttentionPart part{bh / a.H, bh % a.H, q0, std::min(q0 + step, a.Tq), 0, a.Tk};
    kernels.forward(a, part, q, k, v, out, lse, scratch(kernels.forward_words(a, a.Tk)));
  });
}

void attention_backward(const Attention& a, Heads q, Heads k, Heads v, Heads out, Heads dout, const float* lse,
                        MutableHeads dq, MutableHeads dk, MutableHeads dv) {
  const auto& kernels = a.dtype == Dtype::bf16 ? LLMFAST_SIMD(attention).bf16 : LLMFAST_SIMD(attention).f32;
  for_parts(a.B * a.H, [&](int64_t bh) {
    const AttentionPart part{bh / a.H, bh % a.H, 0, a.Tq, 0, a.Tk};
    kernels.backward(a, part, q, k, v, out, dout, lse, dq, dk, dv, scratch(kernels.backward_words(a, a.Tq)));
  });
}

}  // namespace llmfast::cpu
