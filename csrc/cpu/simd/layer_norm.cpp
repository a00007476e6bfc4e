// LayerNorm over contiguous rows of N elements, statistics and sums in float32, with the residual sum before it:
//   forward:  s = residual + dropout(branch), mean = sum(s) / N, rstd = 1 / sqrt(sum((s - mean)^2) / N + eps),
//             y = (s - mean) rstd w + b
//   backward: with g = dy w and h = (s - mean) rstd:  ds = ds_in + rstd (g - sum(g) / N - h sum(g h) / N),
//             dbranch = dropout(ds), dw += dy h, db += dy
// Both read memory once: a row stays in the nearest cache between the passes over it.
#include "cpu/layer_norm.h"

#include "cpu/simd/philox.h"
#include "cpu/simd/vec.h"

namespace llmfast::cpu {
namespace {

// f(T()) with T the type behind a Dtype.
template <typename F>
inline __attribute__((always_inline)) void with_type(Dtype dtype, F f) {
  dtype == Dtype::f32 ? f(float()) : f(uint16_t());
}

// for_row, with the factor of dropout where there is some.
template <typename F>
inline __attribute__((always_inline)) void for_masked_row(const Dropout& d, int64_t row, int64_t n, F f) {
  if (d.drop)
    for_dropout(d, row, 0, n, f);
  else
    for_row<2>(0, n, [&](auto lanes, int64_t i, int) { f(lanes, i, 1.f); });
}

template <bool HasWeight, bool HasBias, typename S, typename Y>
void normalize_row(const S* s, const float* w, const float* b, Y* y, float* mean, float* rstd, int64_t n, float eps) {
  Sum<4> sum, squares;
  for_row<4>(0, n, [&](auto lanes, int64_t i, int slot) { sum.add(slot, lanes.load(s + i)); });
  const float mu = sum.total() / float(n);
  for_row<4>(0, n, [&](auto lanes, int64_t i, int slot) {
    const auto d = lanes.load(s + i) - mu;
    squares.add(slot, d * d);
  });
  const float rs = 1.f / sqrtf(squares.total() / float(n) + eps);
  for_row<4>(0, n, [&](auto lanes, int64_t i, int) {
    auto h = (lanes.load(s + i) - mu) * rs;
    if constexpr (HasWeight) h = h * lanes.load(w + i);
    if constexpr (HasBias) h = h + lanes.load(b + i);
    lanes.store(y + i, h);
  });
  *mean = mu;
  *rstd = rs;
}

template <typename S, typename Y>
void forward_rows(const LayerNormForward& a, int64_t row0, int64_t row1) {
  const auto normalize = a.b   ? normalize_row<true, true, S, Y>
                         : a.w ? normalize_row<true, false, S, Y>
                               : normalize_row<false, false, S, Y>;
  for (int64_t r = row0; r < row1; ++r) {
    const S* s = static_cast<const S*>(a.residual) + r * a.n;
    if (a.branch) {
      S* sum = static_cast<S*>(a.s) + r * a.n;
      with_type(a.branch_dtype, [&](auto zero) {
        const auto* branch = static_cast<const decltype(zero)*>(a.branch) + r * a.n;
        for_masked_row(a.dropout, r, a.n, [&](auto lanes, int64_t i, auto factor) {
          lanes.store(sum + i, lanes.load(s + i) + lanes.load(branch + i) * factor);
        });
      });
      s = sum;
    }
    normalize(s, a.w, a.b, static_cast<Y*>(a.y) + r * a.n, a.mean + r, a.rstd + r, a.n, a.eps);
  }
}

void forward(const LayerNormForward& a, int64_t row0, int64_t row1) {
  with_type(a.s_dtype, [&](auto s) {
    with_type(a.y_dtype, [&](auto y) { forward_rows<decltype(s), decltype(y)>(a, row0, row1); });
  });
}

// R rows at once, so that w, dw and db are touched once for all of them.
template <int R, bool HasWeight, bool HasBias, typename S, typename Y>
void backward_rows(const LayerNormBackward& a, int64_t row) {
  const int64_t n = a.n;
  const Y* dy = static_cast<const Y*>(a.dy) + row * n;
  const S* s = static_cast<const S*>(a.s) + row * n;
  const float *mean = a.mean + row, *rstd = a.rstd + row;
  Sum<1> sum_g[R], sum_gh[R];
  for_row<1>(0, n, [&](auto lanes, int64_t i, int) {
    using F = typename decltype(lanes)::F;
    F weight = F{} + 1.f, add_w = F{}, add_b = F{};
    if constexpr (HasWeight) weight = lanes.load(a.w + i);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const F d = lanes.load(dy + r * n + i), h = (lanes.load(s + r * n + i) - mean[r]) * rstd[r];
      const F g = HasWeight ? d * weight : d;
      sum_g[r].add(0, g);
      sum_gh[r].add(0, g * h);
      add_w = add_w + d * h;
      add_b = add_b + d;
    }
    if constexpr (HasWeight) lanes.store(a.dw + i, lanes.load(a.dw + i) + add_w);
    if constexpr (HasBias) lanes.store(a.db + i, lanes.load(a.db + i) + add_b);
  });
  for (int r = 0; r < R; ++r) {
    // ds = ds_in + rstd (g - m - h c) with m = sum(g) / N, c = sum(g h) / N
    const float rs = rstd[r], mu = mean[r], m = sum_g[r].total() / float(n), c = sum_gh[r].total() / float(n);
    const int64_t start = (row + r) * n;
    const S* ds_in = static_cast<const S*>(a.ds_in) + (a.ds_in ? start : 0);
    S* ds = static_cast<S*>(a.ds) + start;
    const auto gradient = [&](auto lanes, int64_t i) {
      auto g = lanes.load(dy + r * n + i);
      if constexpr (HasWeight) g = g * lanes.load(a.w + i);
      return (g - m - (lanes.load(s + r * n + i) - mu) * rs * c) * rs;
    };
    if (a.ds_in)
      for_row<2>(0, n, [&](auto lanes, int64_t i, int) { lanes.store(ds + i, lanes.load(ds_in + i) + gradient(lanes, i)); });
    else
      for_row<2>(0, n, [&](auto lanes, int64_t i, int) { lanes.store(ds + i, gradient(lanes, i)); });
    if (a.dbranch)
      with_type(a.branch_dtype, [&](auto zero) {
        auto* dbranch = static_cast<decltype(zero)*>(a.dbranch) + start;
        for_masked_row(a.dropout, row + r, n, [&](auto lanes, int64_t i, auto factor) {
          lanes.store(dbranch + i, lanes.load(ds + i) * factor);
        });
      });
  }
}

template <bool HasWeight, bool HasBias, typename S, typename Y>
void backward_range(const LayerNormBackward& a, int64_t row0, int64_t row1) {
  constexpr int R = 4;
  int64_t r = row0;
  for (; r + R <= row1; r += R) backward_rows<R, HasWeight, HasBias, S, Y>(a, r);
  for (; r < row1; ++r) backward_rows<1, HasWeight, HasBias, S, Y>(a, r);
}

void backward(const LayerNormBackward& a, int64_t row0, int64_t row1) {
  with_type(a.s_dtype, [&](auto s) {
    with_type(a.y_dtype, [&](auto y) {
      using S = decltype(s);
      using Y = decltype(y);
      const auto range = a.db  ? backward_range<true, true, S, Y>
                         : a.w ? backward_range<true, false, S, Y>
                               : backward_range<false, false, S, Y>;
      range(a, row0, row1);
    });
  });
}

void sum_rows(const float* part, int64_t count, int64_t stride, int64_t begin, int64_t end, float* out) {
  for_row<4>(begin, end, [&](auto lanes, int64_t i, int) {  // Kahan's compensated sum
    auto s = lanes.load(part + i);
    decltype(s) lost{};
    for (int64_t c = 1; c < count; ++c) {
      const auto term = lanes.load(part + c * stride + i) - lost, sum = s + term;
      lost = (sum - s) - term;
      s = sum;
    }
    lanes.store(out + i, s);
  });
}

}  // namespace

namespace LLMFAST_ISA {
extern const LayerNormTable layer_norm = {forward, backward, sum_rows};
}  // namespace LLMFAST_ISA

}  // namespace llmfast::cpu
