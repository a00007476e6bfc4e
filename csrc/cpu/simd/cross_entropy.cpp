// Softmax cross-entropy over rows of logits, which turn into their gradient in place.
//   loss = lse(z) - (1 - s) z[t] - s mean(z),   dz = w (exp(z - max) / sum - (1 - s) onehot(t) - s / V)
// Two passes with an exponential each: the first keeps a running maximum, block by block, so that a row is read once for
// maximum and sum. Sums of blocks are added in double, where V = 50,257 terms lose nothing.
#include "cpu/cross_entropy.h"

#include <float.h>

#include "cpu/simd/math.h"
#include "cpu/simd/vec.h"

namespace llmfast::cpu {
namespace {

constexpr int64_t kBlock = 1024;

// exp(x) for x <= 0, and 0 where a row weight times it could be denormal, which many CPUs are slow with.
template <typename F>
F exp_or_zero(F x) {
  return x < -64.f ? F{} : exp_bounded(x);
}

// The maximum of some elements; a NaN among them may get lost.
struct Max {
  Vec wide[4];
  float one = -FLT_MAX;
  Max() {
    for (Vec& v : wide) v = Vec{} - FLT_MAX;
  }
  void add(int slot, Vec v) { wide[slot] = v > wide[slot] ? v : wide[slot]; }
  void add(int, float v) { one = v > one ? v : one; }
  float total() const {
    float lanes[4 * kLanes], top = one;
    memcpy(lanes, wide, sizeof lanes);
    for (float v : lanes) top = v > top ? v : top;
    return top;
  }
};

struct Statistics {
  float top;     // max(z), finite
  double sum;    // of exp(z - top)
  double total;  // of z, where asked for
};

template <bool Total, typename T>
Statistics statistics(const T* z, int64_t V) {
  Statistics s = {-FLT_MAX, 0.0, 0.0};
  for (int64_t begin = 0; begin < V; begin += kBlock) {
    const int64_t end = begin + kBlock < V ? begin + kBlock : V;
    Max max;
    for_row<4>(begin, end, [&](auto lanes, int64_t i, int slot) { max.add(slot, lanes.load(z + i)); });
    const float top = max.total();
    if (top > s.top) {
      s.sum *= exp(double(s.top) - double(top));
      s.top = top;
    }
    Sum<4> sum, total;
    for_row<4>(begin, end, [&](auto lanes, int64_t i, int slot) {
      const auto v = lanes.load(z + i);
      sum.add(slot, exp_or_zero(v - s.top));
      if constexpr (Total) total.add(slot, v);
    });
    s.sum += sum.total();
    s.total += total.total();
  }
  return s;
}

template <bool Smooth, typename T>
void losses(T* z, int64_t stride, int64_t V, const int64_t* target, const float* weights, double s, float* losses,
            int64_t row0, int64_t row1) {
  for (int64_t r = row0; r < row1; ++r) {
    T *row = z + r * stride, *chosen = row + target[r];
    const double z_target = One::load(chosen);
    const Statistics found = statistics<Smooth>(row, V);
    losses[r] = float(double(found.top) + log(found.sum) - (1.0 - s) * z_target - s * found.total / double(V));
    if (!weights) continue;
    const double weight = weights[r];
    const float scale = float(weight / found.sum), shift = float(weight * s / double(V));
    for_row<4>(0, V, [&](auto lanes, int64_t i, int) {
      auto d = exp_or_zero(lanes.load(row + i) - found.top) * scale;
      if constexpr (Smooth) d = d - shift;
      lanes.store(row + i, d);
    });
    One::store(chosen, float(weight * (exp(z_target - double(found.top)) / found.sum - (1.0 - s) - s / double(V))));
    memset(row + V, 0, (stride - V) * sizeof(T));
  }
}

template <typename T>
void choose_losses(T* z, int64_t stride, int64_t V, const int64_t* target, const float* weights, double s, float* out,
                   int64_t row0, int64_t row1) {
  (s == 0.0 ? losses<false, T> : losses<true, T>)(z, stride, V, target, weights, s, out, row0, row1);
}

template <typename T>
void add_columns(const T* z, int64_t stride, int64_t rows, float* sums, int64_t column0, int64_t column1) {
  constexpr int64_t kRows = 64;  // a longer running sum would lose bits
  float part[kBlock];
  for (int64_t begin = column0; begin < column1; begin += kBlock) {
    const int64_t n = begin + kBlock < column1 ? kBlock : column1 - begin;
    for (int64_t first = 0; first < rows; first += kRows) {
      memset(part, 0, sizeof part);
      for (int64_t r = first; r < rows && r < first + kRows; ++r)
        for_row<4>(0, n, [&](auto lanes, int64_t i, int) {
          lanes.store(part + i, lanes.load(part + i) + lanes.load(z + r * stride + begin + i));
        });
      for_row<4>(0, n, [&](auto lanes, int64_t i, int) {
        lanes.store(sums + begin + i, lanes.load(sums + begin + i) + lanes.load(part + i));
      });
    }
  }
}

template <typename T>
constexpr CrossEntropyRows<T> kernels = {choose_losses<T>, add_columns<T>};

}  // namespace

namespace LLMFAST_ISA {
extern const CrossEntropyTable cross_entropy = {kernels<float>, kernels<uint16_t>};
}  // namespace LLMFAST_ISA

}  // namespace llmfast::cpu
