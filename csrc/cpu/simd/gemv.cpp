// Matrix-vector products at the speed of memory. One row of weights at a time, which reads memory as one stream: several
// rows side by side measured half as fast, software prefetch no faster. Four chains hide the latency of the sums.
#include "cpu/gemv.h"

#include "cpu/simd/vec.h"
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace llmfast::cpu {
namespace {

constexpr int kChains = 4;
#if defined(__AVX512F__)
constexpr int kBlock = 4;  // rows of x that share a load of weights: kBlock * kChains sums in registers
#else
constexpr int kBlock = 2;
#endif

// What a kernel needs of its element types: vectors of `step` elements, their product added to a sum, and its total.
template <typename W>
struct Floats {  // weights float or bfloat16
  using X = float;
  using Sum = Vec;
  using Weights = Vec;
  static constexpr int64_t step = kLanes, flush = INT64_MAX;
  static Weights load(const W* w) { return Wide::load(w); }
  static Sum add(Sum sum, Weights w, const X* x) { return sum + w * Wide::load(x); }
  static Vec widen(Sum sum) { return sum; }
  static float one(const W* w, const X* x) { return One::load(w) * *x; }
};

typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));

struct Integers {  // pairs of int16 products, summed in int32
  using X = int16_t;
  using Sum = Ints;
#if defined(__AVX512BW__)
  using Weights = __m512i;
  static Weights load(const int8_t* w) { return _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)w)); }
  static Sum add(Sum sum, Weights w, const X* x) { return sum + (Ints)_mm512_madd_epi16(w, _mm512_loadu_si512(x)); }
#elif defined(__AVX2__)
  using Weights = __m256i;
  static Weights load(const int8_t* w) { return _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)w)); }
  static Sum add(Sum sum, Weights w, const X* x) {
    return sum + (Ints)_mm256_madd_epi16(w, _mm256_loadu_si256((const __m256i*)x));
  }
#else
  struct Weights {
    Ints low, high;
  };
  template <typename T>
  static Ints widen_from(const T* p) {
    typedef T Narrow __attribute__((vector_size(sizeof(T) * kLanes)));
    Narrow v;
    memcpy(&v, p, sizeof v);
    return __builtin_convertvector(v, Ints);
  }
  static Weights load(const int8_t* w) { return {widen_from(w), widen_from(w + kLanes)}; }
  static Sum add(Sum sum, Weights w, const X* x) {
    return sum + w.low * widen_from(x) + w.high * widen_from(x + kLanes);
  }
#endif
  // A lane takes 2 products of at most 127 * 32767 for each `step` elements: below 2^31 up to 258 steps a chain.
  static constexpr int64_t step = 2 * kLanes, flush = 240 * kChains * step;
  static Vec widen(Sum sum) { return __builtin_convertvector(sum, Vec); }
  static float one(const int8_t* w, const X* x) { return float(int32_t(*w) * *x); }
};

template <typename E, int M, typename W>
inline __attribute__((always_inline)) void row(const W* w, int64_t K, const typename E::X* x, float* y,
                                               int64_t y_stride) {
  Sum<1> total[M];
  int64_t k = 0;
  while (k + E::step <= K) {
    typename E::Sum sum[M][kChains] = {};
    const int64_t end = K - k > E::flush ? k + E::flush : K;
    for (; k + kChains * E::step <= end; k += kChains * E::step)
#pragma GCC unroll 4
      for (int c = 0; c < kChains; ++c) {
        const auto weights = E::load(w + k + c * E::step);
#pragma GCC unroll 4
        for (int m = 0; m < M; ++m) sum[m][c] = E::add(sum[m][c], weights, x + m * K + k + c * E::step);
      }
    for (; k + E::step <= end; k += E::step) {
      const auto weights = E::load(w + k);
      for (int m = 0; m < M; ++m) sum[m][0] = E::add(sum[m][0], weights, x + m * K + k);
    }
    for (int m = 0; m < M; ++m)
      total[m].add(0, (E::widen(sum[m][0]) + E::widen(sum[m][1])) + (E::widen(sum[m][2]) + E::widen(sum[m][3])));
  }
  for (; k < K; ++k)
    for (int m = 0; m < M; ++m) total[m].add(0, E::one(w + k, x + m * K + k));
  for (int m = 0; m < M; ++m) y[m * y_stride] = total[m].total();
}

template <typename E, typename W>
void gemv(const W* w, int64_t rows, int64_t K, const typename E::X* x, int64_t M, float* y) {
  for (int64_t n = 0; n < rows; ++n, w += K) {
    int64_t m = 0;
    for (; m + kBlock <= M; m += kBlock) row<E, kBlock>(w, K, x + m * K, y + m * rows + n, rows);
    if constexpr (kBlock > 2)
      for (; m + 2 <= M; m += 2) row<E, 2>(w, K, x + m * K, y + m * rows + n, rows);
    for (; m < M; ++m) row<E, 1>(w, K, x + m * K, y + m * rows + n, rows);
  }
}

float quantize(const float* x, int64_t K, int16_t* q) {
  Vec top = {};
  float one_top = 0.f;
  llmfast::cpu::Sum<1> invalid;  // NaN where any x is not finite
  for_row<1>(0, K, [&](auto lanes, int64_t k, int) {
    const auto v = lanes.load(x + k), size = v < 0.f ? -v : v;
    invalid.add(0, v * 0.f);
    if constexpr (decltype(lanes)::width > 1)
      top = size > top ? size : top;
    else
      one_top = size > one_top ? size : one_top;
  });
  for (int l = 0; l < kLanes; ++l) one_top = top[l] > one_top ? top[l] : one_top;
  const float scale = one_top / 32767.f + invalid.total(), inverse = one_top > 0.f ? 32767.f / one_top : 0.f;
  // Adding 1.5 2^23 rounds to the nearest integer and leaves it in the lower bits.
  for_row<1>(0, K, [&](auto lanes, int64_t k, int) {
    const auto shifted = lanes.load(x + k) * inverse + 12582912.f;
    if constexpr (decltype(lanes)::width > 1) {
      Bits bits;
      memcpy(&bits, &shifted, sizeof bits);
      const Halves low = __builtin_convertvector(bits, Halves);
      memcpy(q + k, &low, sizeof low);
    } else {
      uint32_t bits;
      memcpy(&bits, &shifted, sizeof bits);
      q[k] = int16_t(uint16_t(bits));
    }
  });
  return scale;
}

}  // namespace

namespace LLMFAST_ISA {
extern const GemvTable gemv = {::llmfast::cpu::gemv<Floats<float>, float>, ::llmfast::cpu::gemv<Floats<uint16_t>, uint16_t>,
                               ::llmfast::cpu::gemv<Integers, int8_t>, quantize};
}  // namespace LLMFAST_ISA

}  // namespace llmfast::cpu
