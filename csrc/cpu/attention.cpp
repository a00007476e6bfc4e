#include "cpu/attention.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "stable.h"

namespace llmfast::cpu {
namespace {

float load(const float* p) { return *p; }
float load(const uint16_t* p) {
  const uint32_t bits = uint32_t(*p) << 16;
  float f;
  std::memcpy(&f, &bits, sizeof f);
  return f;
}
void store(float* p, float v) { *p = v; }
void store(uint16_t* p, float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, sizeof v);
  *p = v != v ? 0x7FC0 : uint16_t((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

template <typename T, typename Void>
auto* row(const HeadsOf<Void>& x, int64_t b, int64_t h, int64_t t) {
  using Element = std::conditional_t<std::is_const_v<Void>, const T, T>;
  return static_cast<Element*>(x.data) + b * x.batch + h * x.head + t * x.row;
}

template <typename A, typename B>
float dot(const A* x, const B* y, int64_t n) {
  float s = 0.f;
  for (int64_t i = 0; i < n; ++i) s += load(x + i) * load(y + i);
  return s;
}

// Keys [0, end) may be seen by query i of row b, where the document is the same.
int64_t key_end(const Attention& a, int64_t b, int64_t i) {
  const int64_t end = std::min(a.Tk, i + 1 + a.Tk - a.Tq);
  return std::max<int64_t>(0, a.kv_lens ? std::min(end, a.kv_lens[b]) : end);
}

bool same_document(const Attention& a, int64_t b, int64_t i, int64_t j) {
  return !a.doc_ids || a.doc_ids[b * a.Tk + j] == a.doc_ids[b * a.Tk + i + a.Tk - a.Tq];
}

template <typename T>
void forward(const Attention& a, Heads q, Heads k, Heads v, MutableHeads out, float* lse, int64_t bh) {
  const int64_t b = bh / a.H, h = bh % a.H;
  std::vector<float> p(a.Tk), y(a.D);
  for (int64_t i = 0; i < a.Tq; ++i) {
    const int64_t end = key_end(a, b, i);
    float top = -std::numeric_limits<float>::infinity(), sum = 0.f;
    for (int64_t j = 0; j < end; ++j)
      if (same_document(a, b, i, j)) top = std::max(top, p[j] = a.scale * dot(row<T>(q, b, h, i), row<T>(k, b, h, j), a.D));
    std::fill(y.begin(), y.end(), 0.f);
    for (int64_t j = 0; j < end; ++j) {
      if (!same_document(a, b, i, j)) continue;
      const float e = std::exp(p[j] - top);
      sum += e;
      for (int64_t d = 0; d < a.D; ++d) y[d] += e * load(row<T>(v, b, h, j) + d);
    }
    lse[bh * a.Tq + i] = sum > 0.f ? top + std::log(sum) : std::numeric_limits<float>::infinity();
    for (int64_t d = 0; d < a.D; ++d) store(row<T>(out, b, h, i) + d, sum > 0.f ? y[d] / sum : 0.f);
  }
}

template <typename T>
void backward(const Attention& a, Heads q, Heads k, Heads v, Heads out, Heads dout, const float* lse, MutableHeads dq,
              MutableHeads dk, MutableHeads dv, int64_t bh) {
  const int64_t b = bh / a.H, h = bh % a.H;
  std::vector<float> sums(2 * a.Tk * a.D), dq_row(a.D);
  float *dk_sum = sums.data(), *dv_sum = dk_sum + a.Tk * a.D;
  for (int64_t i = 0; i < a.Tq; ++i) {
    const float delta = dot(row<T>(out, b, h, i), row<T>(dout, b, h, i), a.D);
    std::fill(dq_row.begin(), dq_row.end(), 0.f);
    for (int64_t j = 0; j < key_end(a, b, i); ++j) {
      if (!same_document(a, b, i, j)) continue;
      const float p = std::exp(a.scale * dot(row<T>(q, b, h, i), row<T>(k, b, h, j), a.D) - lse[bh * a.Tq + i]);
      const float ds = a.scale * p * (dot(row<T>(dout, b, h, i), row<T>(v, b, h, j), a.D) - delta);
      for (int64_t d = 0; d < a.D; ++d) {
        dq_row[d] += ds * load(row<T>(k, b, h, j) + d);
        dk_sum[j * a.D + d] += ds * load(row<T>(q, b, h, i) + d);
        dv_sum[j * a.D + d] += p * load(row<T>(dout, b, h, i) + d);
      }
    }
    for (int64_t d = 0; d < a.D; ++d) store(row<T>(dq, b, h, i) + d, dq_row[d]);
  }
  for (int64_t j = 0; j < a.Tk; ++j)
    for (int64_t d = 0; d < a.D; ++d) {
      store(row<T>(dk, b, h, j) + d, dk_sum[j * a.D + d]);
      store(row<T>(dv, b, h, j) + d, dv_sum[j * a.D + d]);
    }
}

}  // namespace

void attention_forward(const Attention& a, Heads q, Heads k, Heads v, MutableHeads out, float* lse) {
  torch::stable::parallel_for(0, a.B * a.H, 1, [&](int64_t begin, int64_t end) {
    for (int64_t bh = begin; bh < end; ++bh)
      (a.dtype == Dtype::bf16 ? forward<uint16_t> : forward<float>)(a, q, k, v, out, lse, bh);
  });
}

void attention_backward(const Attention& a, Heads q, Heads k, Heads v, Heads out, Heads dout, const float* lse,
                        MutableHeads dq, MutableHeads dk, MutableHeads dv) {
  torch::stable::parallel_for(0, a.B * a.H, 1, [&](int64_t begin, int64_t end) {
    for (int64_t bh = begin; bh < end; ++bh)
      (a.dtype == Dtype::bf16 ? backward<uint16_t> : backward<float>)(a, q, k, v, out, dout, lse, dq, dk, dv, bh);
  });
}

}  // namespace llmfast::cpu
