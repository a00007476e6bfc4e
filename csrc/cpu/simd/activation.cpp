// Activations:
//   gelu_tanh(h) = h / 2 (1 + tanh(u)) = h s(2u),  u = sqrt(2 / pi) (h + 0.044715 h^3),  s(x) = 1 / (1 + exp(-x))
//   gelu(h)      = h cdf(h), the standard normal distribution's
//   relu(h)      = max(h, 0)
#include "cpu/activation.h"

#include "cpu/simd/math.h"

namespace llmfast::cpu {
namespace {

template <typename F>
struct ValueAndSlope {
  F value, slope;
};

// Beyond the bounds of the GELUs s and cdf are 0 or 1 to float32, and inside them no exponential overflows.
struct GeluTanh {
  template <typename F>
  static ValueAndSlope<F> at(F h) {
    constexpr float k = 1.5957691216f, c = 0.044715f, log2e = 1.4426950409f;  // 2u = k (h + c h^3)
    const F low = at_least(h, -10.f), z = at_most(low, 10.f), zz = z * z;
    const F e = exp2_bounded(z * (zz * (-k * c * log2e) - k * log2e)), s = 1.f / (e + 1.f);
    return {low * s, s + z * s * (e * s) * (zz * (3 * k * c) + k)};  // e s = 1 - s, without its cancellation
  }
};

struct Gelu {
  template <typename F>
  static ValueAndSlope<F> at(F h) {
    const F low = at_least(h, -13.f), z = at_most(low, 13.f);
    const NormalTail<F> normal(magnitude(z));
    const F cdf = z < 0.f ? normal.tail : 1.f - normal.tail;
    return {low * cdf, cdf + z * normal.density * 0.3989422804f};
  }
};

struct Relu {
  template <typename F>
  static ValueAndSlope<F> at(F h) {
    return {h <= 0.f ? F{} : h, h <= 0.f ? F{} : F{} + 1.f};
  }
};

template <typename Act, typename T>
void forward(const T* h, T* a, int64_t begin, int64_t end) {
  for_row<2>(begin, end, [&](auto lanes, int64_t i, int) { lanes.store(a + i, Act::at(lanes.load(h + i)).value); });
}

// R rows at once, so that the sums are touched once for all of them.
template <typename Act, int R, bool HasA, bool HasSums, typename T>
void backward_rows(const T* h, const T* da, T* dh, T* a, float* sums, int64_t n) {
  for_row<1>(0, n, [&](auto lanes, int64_t i, int) {
    typename decltype(lanes)::F sum{};
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const auto y = Act::at(lanes.load(h + r * n + i));
      const auto d = lanes.load(da + r * n + i) * y.slope;
      lanes.store(dh + r * n + i, d);
      if constexpr (HasA) lanes.store(a + r * n + i, y.value);
      if constexpr (HasSums) sum = sum + d;
    }
    if constexpr (HasSums) lanes.store(sums + i, lanes.load(sums + i) + sum);
  });
}

template <typename Act, bool HasA, bool HasSums, typename T>
void backward_range(const T* h, const T* da, T* dh, T* a, float* sums, int64_t row0, int64_t row1, int64_t n) {
  constexpr int R = 4;
  const auto rows = [&](auto run, int64_t r) { run(h + r * n, da + r * n, dh + r * n, HasA ? a + r * n : a, sums, n); };
  int64_t r = row0;
  for (; r + R <= row1; r += R) rows(backward_rows<Act, R, HasA, HasSums, T>, r);
  for (; r < row1; ++r) rows(backward_rows<Act, 1, HasA, HasSums, T>, r);
}

template <typename Act, typename T>
void backward(const T* h, const T* da, T* dh, T* a, float* sums, int64_t row0, int64_t row1, int64_t n) {
  const auto range = a ? (sums ? backward_range<Act, true, true, T> : backward_range<Act, true, false, T>)
                       : (sums ? backward_range<Act, false, true, T> : backward_range<Act, false, false, T>);
  range(h, da, dh, a, sums, row0, row1, n);
}

template <int R, typename T>
void add_rows(const T* x, int64_t stride, float* sums, int64_t n) {
  for_row<2>(0, n, [&](auto lanes, int64_t i, int) {
    auto sum = lanes.load(x + i);
#pragma GCC unroll 8
    for (int r = 1; r < R; ++r) sum = sum + lanes.load(x + r * stride + i);
    lanes.store(sums + i, lanes.load(sums + i) + sum);
  });
}

template <typename T>
void column_sums(const T* x, int64_t stride, float* sums, int64_t row0, int64_t row1, int64_t n) {
  constexpr int R = 8;
  int64_t r = row0;
  for (; r + R <= row1; r += R) add_rows<R>(x + r * stride, stride, sums, n);
  for (; r < row1; ++r) add_rows<1>(x + r * stride, stride, sums, n);
}

}  // namespace

namespace LLMFAST_ISA {
#define LLMFAST_ACTIVATION_ROWS                                                        \
  {                                                                                    \
    {forward<GeluTanh>, forward<Gelu>, forward<Relu>}, /* as enum Activation */        \
        {backward<GeluTanh>, backward<Gelu>, backward<Relu>}, column_sums              \
  }
extern const ActivationTable activation = {LLMFAST_ACTIVATION_ROWS, LLMFAST_ACTIVATION_ROWS};
}  // namespace LLMFAST_ISA

}  // namespace llmfast::cpu
