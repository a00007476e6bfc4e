// Softmax cross-entropy over a block of logits while it is in the cache, see cpu/cross_entropy.h. One exponential a logit:
// it is kept relative to its block's maximum, and what is missing to the softmax is one factor a row and block.
#include "cpu/cross_entropy.h"

#include <float.h>

#include "cpu/simd/math.h"
#include "cpu/simd/vec.h"

namespace llmfast::cpu {
namespace {

// exp(x) for x <= 0, and 0 where the product of two of them and a row weight could be denormal, which many CPUs are slow
// with.
template <typename F>
F exp_or_zero(F x) {
  return x < -40.f ? F{} : exp_bounded(x);
}

// f(lanes, i, count) over i in [0, n): `Vecs` full vectors at a time, then one, then single floats. count is a constant.
template <int Count>
struct Times {
  static constexpr int value = Count;
};
template <int Vecs, typename F>
void for_columns(int64_t n, F f) {
  int64_t i = 0;
  for (; i + Vecs * kLanes <= n; i += Vecs * kLanes) f(Wide(), i, Times<Vecs>());
  for (; i + kLanes <= n; i += kLanes) f(Wide(), i, Times<1>());
  for (; i < n; ++i) f(One(), i, Times<1>());
}

template <typename Lanes, int Vecs, bool Bias, bool Total, typename T>
void columns(float* z, int64_t stride, int64_t words, const float* bias, T* e, float* top_out, float* sum_out,
             float* total_out) {
  using F = typename Lanes::F;
  F top[Vecs], sum[Vecs], total[Vecs];
  for (int j = 0; j < Vecs; ++j) top[j] = F{} - FLT_MAX, sum[j] = total[j] = F{};
  for (int64_t w = 0; w < words; ++w)
#pragma GCC unroll 4
    for (int j = 0; j < Vecs; ++j) {
      float* at = z + w * stride + j * Lanes::width;
      F v = Lanes::load(at);
      if constexpr (Bias) Lanes::store(at, v = v + bias[w]);
      if constexpr (Total) total[j] += v;
      top[j] = v > top[j] ? v : top[j];
    }
  for (int64_t w = 0; w < words; ++w)
#pragma GCC unroll 4
    for (int j = 0; j < Vecs; ++j) {
      const int64_t at = w * stride + j * Lanes::width;
      const F v = exp_or_zero(Lanes::load(z + at) - top[j]);
      sum[j] += v;
      if (e) Lanes::store(e + at, v);
    }
  for (int j = 0; j < Vecs; ++j) {
    Lanes::store(top_out + j * Lanes::width, top[j]);
    Lanes::store(sum_out + j * Lanes::width, sum[j]);
    if constexpr (Total) Lanes::store(total_out + j * Lanes::width, total[j]);
  }
}

template <bool Bias, bool Total, typename T>
void block(float* z, int64_t stride, int64_t words, int64_t n, const float* bias, T* e, float* top, float* sum,
           float* total) {
  for_columns<2>(n, [&](auto lanes, int64_t i, auto count) {
    columns<decltype(lanes), decltype(count)::value, Bias, Total>(z + i, stride, words, bias, e ? e + i : e, top + i, sum + i,
                                                                  Total ? total + i : total);
  });
}

template <typename T>
void exponentials(float* z, int64_t stride, int64_t words, int64_t n, const float* bias, T* e, float* top, float* sum,
                  float* total) {
  const auto run = bias ? total ? block<true, true, T> : block<true, false, T>
                        : total ? block<false, true, T> : block<false, false, T>;
  run(z, stride, words, n, bias, e, top, sum, total);
}

template <typename T>
void scale(T* e, int64_t stride, int64_t words, int64_t n, const float* factor, const float* shift) {
  for (int64_t w = 0; w < words; ++w)
    for_row<4>(0, n, [&](auto lanes, int64_t i, int) {
      T* at = e + w * stride + i;
      auto v = lanes.load(at) * lanes.load(factor + i);
      if (shift) v = v - lanes.load(shift + i);
      lanes.store(at, v);
    });
}

template <typename T>
void add_rows(const T* e, int64_t stride, int64_t words, int64_t n, float* sums) {
  for (int64_t w = 0; w < words; ++w) {
    Sum<4> sum;
    for_row<4>(0, n, [&](auto lanes, int64_t i, int slot) { sum.add(slot, lanes.load(e + w * stride + i)); });
    sums[w] += sum.total();
  }
}

void combine(float* tops, const float* sums, int64_t stride, int64_t blocks, int64_t n, float* top_out, float* sum_out) {
  for_row<1>(0, n, [&](auto lanes, int64_t i, int) {
    auto top = lanes.load(tops + i);
    for (int64_t b = 1; b < blocks; ++b) {
      const auto v = lanes.load(tops + b * stride + i);
      top = v > top ? v : top;
    }
    auto sum = top - top, lost = sum;  // Kahan's compensated sum
    for (int64_t b = 0; b < blocks; ++b) {
      const auto factor = exp_or_zero(lanes.load(tops + b * stride + i) - top);
      const auto term = lanes.load(sums + b * stride + i) * factor - lost, next = sum + term;
      lost = (next - sum) - term;
      sum = next;
      lanes.store(tops + b * stride + i, factor);
    }
    lanes.store(top_out + i, top);
    lanes.store(sum_out + i, sum);
  });
}

template <typename T>
constexpr CrossEntropyBlock<T> kernels = {exponentials<T>, scale<T>, add_rows<T>,
                                          [](T* e, float value) { One::store(e, value); }};

}  // namespace

namespace LLMFAST_ISA {
extern const CrossEntropyTable cross_entropy = {kernels<float>, kernels<uint16_t>, combine};
}  // namespace LLMFAST_ISA

}  // namespace llmfast::cpu
