#pragma once
#include <algorithm>
#include <atomic>
#include <cstdint>

#include "stable.h"

namespace llmfast::cpu {

// f(i) for i < count on `threads` of PyTorch's threads; each takes the next i when it is free, so that all of the lesser i
// are done or under way.
template <typename F>
void each(int64_t count, int64_t threads, F f) {
  threads = std::min(threads, count);
  if (threads <= 1) {
    for (int64_t i = 0; i < count; ++i) f(i);
    return;
  }
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) f(i);
  });
}

}  // namespace llmfast::cpu
