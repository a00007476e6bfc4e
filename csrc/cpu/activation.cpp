#include "cpu/activation.h"

#include <algorithm>
#include <vector>

#include "stable.h"

namespace llmfast::cpu {
namespace {

using torch::stable::parallel_for;

// Elements that are worth a thread.
constexpr int64_t kGrain = 16384;

template <typename F>
void by_dtype(Dtype dtype, F f) {
  const auto& kernels = LLMFAST_SIMD(activation);
  if (dtype == Dtype::f32)
    f(float(), kernels.f32);
  else
    f(uint16_t(), kernels.bf16);
}

// add(part, row0, row1) adds the rows to part (n,). The chunks depend on the shape alone, so that the sums do not depend on
// the number of threads; the fewer columns, the shorter the sums of a chunk may be.
template <typename F>
void sum_chunks(float* sums, int64_t rows, int64_t n, F add) {
  const int64_t chunks = std::clamp<int64_t>(rows / 32, 1, std::clamp<int64_t>(4096 / std::max<int64_t>(n, 1), 64, 512));
  std::fill(sums, sums + n, 0.f);
  if (chunks == 1) return add(sums, int64_t(0), rows);
  std::vector<float> parts(chunks * n);
  parallel_for(0, chunks, std::max<int64_t>(1, kGrain * chunks / std::max<int64_t>(1, rows * n)),
               [&](int64_t c0, int64_t c1) {
    for (int64_t c = c0; c < c1; ++c) add(parts.data() + c * n, rows * c / chunks, rows * (c + 1) / chunks);
  });
  std::vector<double> total(n);
  for (int64_t c = 0; c < chunks; ++c)
    for (int64_t j = 0; j < n; ++j) total[j] += double(parts[c * n + j]);
  for (int64_t j = 0; j < n; ++j) sums[j] = float(total[j]);
}

}  // namespace

void activation_forward(Activation act, Dtype dtype, const void* h, void* a, int64_t count) {
  by_dtype(dtype, [&](auto zero, const auto& kernels) {
    using T = decltype(zero);
    parallel_for(0, count, kGrain, [&](int64_t begin, int64_t end) {
      kernels.forward[int(act)](static_cast<const T*>(h), static_cast<T*>(a), begin, end);
    });
  });
}

void activation_backward(Activation act, Dtype dtype, const void* h, const void* da, void* dh, void* a, float* sums,
                         int64_t rows, int64_t n) {
  by_dtype(dtype, [&](auto zero, const auto& kernels) {
    using T = decltype(zero);
    const auto run = [&](float* part, int64_t row0, int64_t row1) {
      kernels.backward[int(act)](static_cast<const T*>(h), static_cast<const T*>(da), static_cast<T*>(dh),
                                 static_cast<T*>(a), part, row0, row1, n);
    };
    if (sums) return sum_chunks(sums, rows, n, run);
    parallel_for(0, rows, std::max<int64_t>(1, kGrain / std::max<int64_t>(n, 1)),
                 [&](int64_t row0, int64_t row1) { run(nullptr, row0, row1); });
  });
}

void column_sums(Dtype dtype, const void* x, int64_t stride, float* sums, int64_t rows, int64_t n) {
  by_dtype(dtype, [&](auto zero, const auto& kernels) {
    sum_chunks(sums, rows, n, [&](float* part, int64_t row0, int64_t row1) {
      kernels.column_sums(static_cast<const decltype(zero)*>(x), stride, part, row0, row1, n);
    });
  });
}

}  // namespace llmfast::cpu
