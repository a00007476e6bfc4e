// LayerNorm over contiguous rows of N elements, statistics and sums in float32.
//   forward:  mean = sum(x) / N, rstd = 1 / sqrt(sum((x - mean)^2) / N + eps), y = (x - mean) rstd w + b
//   backward: with g = dy w and h = (x - mean) rstd:  dx = rstd (g - sum(g) / N - h sum(g h) / N),
//             dw += dy h, db += dy
// Both read memory once: a row stays in the nearest cache between the passes over it.
#include "cpu/layer_norm.h"

#include "cpu/simd/vec.h"

namespace llmfast::cpu {
namespace {

template <bool HasWeight, bool HasBias, typename T>
void forward_row(const T* x, const float* w, const float* b, T* y, float* mean, float* rstd, int64_t n, float eps) {
  Sum<4> sum, squares;
  for_row<4>(0, n, [&](auto lanes, int64_t i, int slot) { sum.add(slot, lanes.load(x + i)); });
  const float mu = sum.total() / float(n);
  for_row<4>(0, n, [&](auto lanes, int64_t i, int slot) {
    const auto d = lanes.load(x + i) - mu;
    squares.add(slot, d * d);
  });
  const float rs = 1.f / sqrtf(squares.total() / float(n) + eps);
  for_row<4>(0, n, [&](auto lanes, int64_t i, int) {
    auto h = (lanes.load(x + i) - mu) * rs;
    if constexpr (HasWeight) h = h * lanes.load(w + i);
    if constexpr (HasBias) h = h + lanes.load(b + i);
    lanes.store(y + i, h);
  });
  *mean = mu;
  *rstd = rs;
}

template <typename T>
void forward(const T* x, const float* w, const float* b, T* y, float* mean, float* rstd, int64_t row0, int64_t row1,
             int64_t n, float eps) {
  const auto row = b ? forward_row<true, true, T> : w ? forward_row<true, false, T> : forward_row<false, false, T>;
  for (int64_t r = row0; r < row1; ++r) row(x + r * n, w, b, y + r * n, mean + r, rstd + r, n, eps);
}

// R rows at once, so that w, dw and db are touched once for all of them.
template <int R, bool HasWeight, bool HasBias, typename T>
void backward_rows(const T* dy, const T* x, const float* w, const float* mean, const float* rstd, T* dx, float* dw,
                   float* db, int64_t n) {
  Sum<1> sum_g[R], sum_gh[R];
  for_row<1>(0, n, [&](auto lanes, int64_t i, int) {
    using F = typename decltype(lanes)::F;
    F weight = F{} + 1.f, add_w = F{}, add_b = F{};
    if constexpr (HasWeight) weight = lanes.load(w + i);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const F d = lanes.load(dy + r * n + i), h = (lanes.load(x + r * n + i) - mean[r]) * rstd[r];
      const F g = HasWeight ? d * weight : d;
      sum_g[r].add(0, g);
      sum_gh[r].add(0, g * h);
      add_w = add_w + d * h;
      add_b = add_b + d;
    }
    if constexpr (HasWeight) lanes.store(dw + i, lanes.load(dw + i) + add_w);
    if constexpr (HasBias) lanes.store(db + i, lanes.load(db + i) + add_b);
  });
  for (int r = 0; r < R; ++r) {
    // dx = rstd (g - a - h c) with a = sum(g) / N, c = sum(g h) / N
    const float rs = rstd[r], mu = mean[r], a = sum_g[r].total() / float(n), c = sum_gh[r].total() / float(n);
    for_row<2>(r * n, (r + 1) * n, [&](auto lanes, int64_t i, int) {
      auto g = lanes.load(dy + i);
      if constexpr (HasWeight) g = g * lanes.load(w + i - r * n);
      lanes.store(dx + i, (g - a - (lanes.load(x + i) - mu) * rs * c) * rs);
    });
  }
}

template <bool HasWeight, bool HasBias, typename T>
void backward_range(const T* dy, const T* x, const float* w, const float* mean, const float* rstd, T* dx, float* dw,
                    float* db, int64_t row0, int64_t row1, int64_t n) {
  constexpr int R = 4;
  int64_t r = row0;
  for (; r + R <= row1; r += R)
    backward_rows<R, HasWeight, HasBias>(dy + r * n, x + r * n, w, mean + r, rstd + r, dx + r * n, dw, db, n);
  for (; r < row1; ++r)
    backward_rows<1, HasWeight, HasBias>(dy + r * n, x + r * n, w, mean + r, rstd + r, dx + r * n, dw, db, n);
}

template <typename T>
void backward(const T* dy, const T* x, const float* w, const float* mean, const float* rstd, T* dx, float* dw, float* db,
              int64_t row0, int64_t row1, int64_t n) {
  const auto range = db  ? backward_range<true, true, T>
                     : w ? backward_range<true, false, T>
                         : backward_range<false, false, T>;
  range(dy, x, w, mean, rstd, dx, dw, db, row0, row1, n);
}

void sum_rows(const float* part, int64_t count, int64_t stride, int64_t begin, int64_t end, float* out) {
  for_row<4>(begin, end, [&](auto lanes, int64_t i, int) {
    auto s = lanes.load(part + i);
    for (int64_t c = 1; c < count; ++c) s = s + lanes.load(part + c * stride + i);
    lanes.store(out + i, s);
  });
}

}  // namespace

namespace LLMFAST_ISA {
extern const LayerNormTable layer_norm = {{forward, backward}, {forward, backward}, sum_rows};
}  // namespace LLMFAST_ISA

}  // namespace llmfast::cpu
