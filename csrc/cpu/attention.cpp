// Splits attention over heads and, where these are few, over blocks of queries or keys.
#include "cpu/attention.h"

#include <algorithm>
#include <atomic>

#include "cpu/scratch.h"
#include "stable.h"

namespace llmfast::cpu {
namespace {

// Parts of the heads per thread: so none waits long for the last one, since the later queries see more keys.
constexpr int64_t kPartsPerThread = 4;

uint32_t* scratch(int64_t words) {
  thread_local Scratch memory;
  return memory.get<uint32_t>(words);
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

struct Range {
  int64_t begin, end;
};

// T rows of a head in `parts` parts of `step` rows.
struct Cut {
  int64_t T, step, parts;
  Range range(int64_t i) const { return {i * step, std::min((i + 1) * step, T)}; }
};

// Cuts the T rows of a head where heads are few, between blocks: so the bits stay the same.
Cut cut(const Attention& a, int64_t T, int64_t block) {
  const int64_t threads = torch::stable::get_num_threads(), heads = a.B * a.H;
  const int64_t wanted = threads == 1 ? 1 : std::max<int64_t>(1, kPartsPerThread * threads / heads);
  const int64_t blocks = (T + block - 1) / block, step = std::max<int64_t>(1, (blocks + wanted - 1) / wanted) * block;
  return {T, step, (T + step - 1) / step};
}

}  // namespace

void attention_forward(const Attention& a, Heads q, Heads k, Heads v, MutableHeads out, float* lse) {
  if (a.B * a.H * a.Tq == 0) return;
  const auto& kernels = a.dtype == Dtype::bf16 ? LLMFAST_SIMD(attention).bf16 : LLMFAST_SIMD(attention).f32;
  const int64_t heads = a.B * a.H, words = kernels.forward_words(a, a.Tk);
  const Cut queries = cut(a, a.Tq, kQueryBlock);
  for_parts(heads * queries.parts, [&](int64_t i) {
    const int64_t bh = i % heads;
    const Range rows = queries.range(queries.parts - 1 - i / heads);  // the long ones first
    const AttentionPart part{bh / a.H, bh % a.H, rows.begin, rows.end, 0, a.Tk};
    kernels.forward(a, part, q, k, v, out, lse, scratch(words));
  });
}

void attention_backward(const Attention& a, Heads q, Heads k, Heads v, Heads out, Heads dout, const float* lse,
                        MutableHeads dq, MutableHeads dk, MutableHeads dv) {
  if (a.B * a.H == 0) return;
  const auto& kernels = a.dtype == Dtype::bf16 ? LLMFAST_SIMD(attention).bf16 : LLMFAST_SIMD(attention).f32;
  const int64_t heads = a.B * a.H, words = kernels.backward_words(a, a.Tq);
  const auto part = [&](int64_t bh, Range queries, Range keys, bool want_dq, bool want_dkv) {
    const AttentionPart p{bh / a.H, bh % a.H, queries.begin, queries.end, keys.begin, keys.end};
    const MutableHeads none{nullptr, 0, 0, 0};
    kernels.backward(a, p, q, k, v, out, dout, lse, want_dq ? dq : none, want_dkv ? dk : none, want_dkv ? dv : none,
                     scratch(words));
  };
  const Range all_queries{0, a.Tq}, all_keys{0, a.Tk};
  if (heads >= int64_t(torch::stable::get_num_threads())) {
    for_parts(heads, [&](int64_t bh) { part(bh, all_queries, all_keys, true, true); });
    return;
  }
  // Too few heads to go round: dq by blocks of queries and dk, dv by blocks of keys, though both need P and dS.
  const Cut queries = cut(a, a.Tq, kQueryBlock), keys = cut(a, a.Tk, kKeyBlock);
  for_parts(heads * (queries.parts + keys.parts), [&](int64_t i) {
    const int64_t bh = i % heads, n = i / heads;
    if (n < queries.parts)
      part(bh, queries.range(queries.parts - 1 - n), all_keys, true, false);
    else
      part(bh, all_queries, keys.range(n - queries.parts), false, true);
  });
}

}  // namespace llmfast::cpu
