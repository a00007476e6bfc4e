#pragma once
#include <cstdint>

#include "cpu/isa.h"

namespace llmfast::cpu {

struct AdamW {
  float divisor;         // of the gradients
  float beta1, beta2, eps;
  float keep;            // 1 - lr weight_decay
  float step_size;       // lr / (1 - beta1^step)
  float root_factor;     // 1 / sqrt(1 - beta2^step)
};

struct AdamWTable {
  // One update of n neighbouring float32 elements: parameters p, gradients g, averages m of g and v of g^2.
  void (*update)(const AdamW& a, float* p, const float* g, float* m, float* v, int64_t n);
  float (*sum_of_squares)(const float* g, int64_t n);
};

}  // namespace llmfast::cpu

LLMFAST_DECLARE_SIMD(AdamWTable, adamw)
