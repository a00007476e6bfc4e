// Attention of one query over the cached keys and values of its head, which are read once each.
#include "cpu/decode.h"

#include "cpu/simd/math.h"
#include "cpu/simd/vec.h"

namespace llmfast::cpu {
namespace {

// Lane l of the result: the sum of the lanes of v[l]. Each step halves the vectors and doubles the sums that one holds.
inline __attribute__((always_inline)) Vec sums_of(Vec* v) {
#pragma GCC unroll 4
  for (int half = kLanes / 2; half; half /= 2) {
    Bits own, other;
    for (int l = 0; l < kLanes; ++l) {
      own[l] = uint32_t(l & half ? kLanes + l : l);
      other[l] = own[l] ^ uint32_t(half);
    }
#pragma GCC unroll 8
    for (int i = 0; i < half; ++i)
      v[i] = shuffle(v[i], v[i + half], own) + shuffle(v[i], v[i + half], other);
  }
  return v[0];
}

template <typename T>
float dot(const float* q, const T* k, int64_t D) {
  Sum<1> sum;
  for_row<1>(0, D, [&](auto lanes, int64_t d, int) { sum.add(0, lanes.load(q + d) * lanes.load(k + d)); });
  return sum.total();
}

// scores[j] = scale keys[j] . q; returns the largest.
template <typename T>
float score(const float* q, const T* keys, int64_t count, int64_t D, float scale, float* scores) {
  int64_t j = 0;
  for (; j + kLanes <= count; j += kLanes) {
    Vec sums[kLanes];
    int64_t d = 0;
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) sums[i] = Vec{};
    for (; d + kLanes <= D; d += kLanes) {
      const Vec query = Wide::load(q + d);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) sums[i] += query * Wide::load(keys + (j + i) * D + d);
    }
    Vec sum = sums_of(sums);
    for (; d < D; ++d)
      for (int i = 0; i < kLanes; ++i) sum[i] += q[d] * One::load(keys + (j + i) * D + d);
    Wide::store(scores + j, sum * scale);
  }
  for (; j < count; ++j) scores[j] = scale * dot(q, keys + j * D, D);
  float top = scores[0];
  for (j = 1; j < count; ++j) top = scores[j] > top ? scores[j] : top;
  return top;
}

// out[d ...] = factor sum_j weights[j] values[j, d ...], N vectors of them at once.
template <int N, typename Lanes, typename T>
inline __attribute__((always_inline)) void mix(Lanes lanes, const float* weights, const T* values, int64_t count, int64_t D,
                                               float factor, float* out) {
  typename Lanes::F sum[N] = {};
  for (int64_t j = 0; j < count; ++j)
#pragma GCC unroll 4
    for (int i = 0; i < N; ++i) sum[i] += weights[j] * lanes.load(values + j * D + i * Lanes::width);
  for (int i = 0; i < N; ++i) lanes.store(out + i * Lanes::width, sum[i] * factor);
}

template <typename T>
void decode_head(const float* q, const float* k, const float* v, T* keys, T* values, int64_t length, int64_t D, float scale,
                 float* scores, float* out) {
  for_row<1>(0, D, [&](auto lanes, int64_t d, int) {
    lanes.store(keys + length * D + d, lanes.load(k + d));
    lanes.store(values + length * D + d, lanes.load(v + d));
  });
  const int64_t count = length + 1;
  const float top = score(q, keys, count, D, scale, scores);
  Sum<2> total;
  for_row<2>(0, count, [&](auto lanes, int64_t j, int slot) {
    const auto p = exp_any(lanes.load(scores + j) - top);
    lanes.store(scores + j, p);
    total.add(slot, p);
  });
  const float factor = 1.f / total.total();
  int64_t d = 0;
  for (; d + 4 * kLanes <= D; d += 4 * kLanes) mix<4>(Wide(), scores, values + d, count, D, factor, out + d);
  for (; d + kLanes <= D; d += kLanes) mix<1>(Wide(), scores, values + d, count, D, factor, out + d);
  for (; d < D; ++d) mix<1>(One(), scores, values + d, count, D, factor, out + d);
}

}  // namespace

namespace LLMFAST_ISA {
extern const DecodeTable decode_head = {::llmfast::cpu::decode_head<float>, ::llmfast::cpu::decode_head<uint16_t>};
}  // namespace LLMFAST_ISA

}  // namespace llmfast::cpu
