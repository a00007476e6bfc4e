// AdamW (Loshchilov and Hutter 2019), with the gradient's scale folded in:
//   g = g / divisor,  m += (1 - beta1) (g - m),  v = beta2 v + (1 - beta2) g^2
//   p = p (1 - lr weight_decay) - lr / (1 - beta1^step) m / (sqrt(v / (1 - beta2^step)) + eps)
#include "cpu/adamw.h"

#include "cpu/simd/vec.h"

namespace llmfast::cpu {
namespace {

inline float root(float x) { return sqrtf(x); }
inline Vec root(Vec x) {
  float lanes[kLanes];
  memcpy(lanes, &x, sizeof x);
  for (int l = 0; l < kLanes; ++l) lanes[l] = sqrtf(lanes[l]);
  memcpy(&x, lanes, sizeof x);
  return x;
}

void update(const AdamW& a_in, float* p, const float* g, float* m, float* v, int64_t n) {
  const AdamW a = a_in;  // no store below can change it
  const float scale = 1.f / a.divisor;
  for_row<2>(0, n, [&](auto lanes, int64_t i, int) {
    const auto gradient = lanes.load(g + i) * scale;
    const auto average = lanes.load(m + i);
    const auto mean = average + (gradient - average) * (1.f - a.beta1);
    const auto square = lanes.load(v + i) * a.beta2 + gradient * gradient * (1.f - a.beta2);
    lanes.store(m + i, mean);
    lanes.store(v + i, square);
    lanes.store(p + i, lanes.load(p + i) * a.keep - mean * a.step_size / (root(square) * a.root_factor + a.eps));
  });
}

float sum_of_squares(const float* g, int64_t n) {
  Sum<8> sum;
  for_row<8>(0, n, [&](auto lanes, int64_t i, int slot) {
    const auto x = lanes.load(g + i);
    sum.add(slot, x * x);
  });
  return sum.total();
}

}  // namespace

namespace LLMFAST_ISA {
extern const AdamWTable adamw = {update, sum_of_squares};
}  // namespace LLMFAST_ISA

}  // namespace llmfast::cpu
