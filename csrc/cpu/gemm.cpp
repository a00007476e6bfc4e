#include "cpu/gemm.h"

#include <cstring>

#include "stable.h"

namespace llmfast::cpu {
namespace {

float bf16_to_float(uint16_t h) {
  const uint32_t bits = uint32_t(h) << 16;
  float f;
  std::memcpy(&f, &bits, sizeof f);
  return f;
}

uint16_t float_to_bf16(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, sizeof f);
  return f != f ? 0x7FC0 : uint16_t((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

float at(const Operand& o, int64_t row, int64_t column, Dtype compute) {
  const int64_t i = o.transposed ? column * o.stride + row : row * o.stride + column;
  if (o.dtype == Dtype::bf16) return bf16_to_float(static_cast<const uint16_t*>(o.data)[i]);
  const float f = static_cast<const float*>(o.data)[i];
  return compute == Dtype::bf16 ? bf16_to_float(float_to_bf16(f)) : f;
}

}  // namespace

void gemm(const Product& p) {
  torch::stable::parallel_for(0, p.M, 1, [&](int64_t m0, int64_t m1) {
    for (int64_t m = m0; m < m1; ++m)
      for (int64_t n = 0; n < p.N; ++n) {
        float sum = 0.f;
        for (int64_t k = 0; k < p.K; ++k) sum += at(p.a, m, k, p.compute) * at(p.b, k, n, p.compute);
        if (p.bias) sum += p.bias[n];
        if (p.residual) sum += p.residual[m * p.residual_stride + n];
        const int64_t i = m * p.c_stride + n;
        if (p.c_dtype == Dtype::f32) {
          auto* c = static_cast<float*>(p.c);
          c[i] = p.accumulate ? c[i] + sum : sum;
        } else {
          static_cast<uint16_t*>(p.c)[i] = float_to_bf16(sum);
        }
      }
  });
}

}  // namespace llmfast::cpu
