#pragma once
// Activations and their derivatives, in float32.
#include "cuda/activation.h"
#include "cuda/mma.h"

namespace llmfast::cuda {

constexpr float kLog2e = 1.4426950408889634f;

// 1 - 2 / (e^2x + 1): exact at both ends; its absolute error of 1e-7 is what an activation that multiplies it by x needs.
__device__ inline float fast_tanh(float x) { return 1.f - 2.f / (fast_exp2(2.f * kLog2e * x) + 1.f); }

__device__ inline float activate(Activation activation, float h) {
  switch (activation) {
    case Activation::gelu_tanh: return 0.5f * h * (1.f + fast_tanh(0.7978845608028654f * h * (1.f + 0.044715f * h * h)));
    case Activation::gelu: return 0.5f * h * (1.f + erff(0.7071067811865476f * h));
    case Activation::relu: return h > 0.f ? h : 0.f;
    default: return h;
  }
}

__device__ inline float activate_backward(Activation activation, float h) {
  switch (activation) {
    case Activation::gelu_tanh: {
      const float t = fast_tanh(0.7978845608028654f * h * (1.f + 0.044715f * h * h));
      return 0.5f * (1.f + t) + 0.5f * h * (1.f - t * t) * 0.7978845608028654f * (1.f + 0.134145f * h * h);
    }
    case Activation::gelu:
      return 0.5f * (1.f + erff(0.7071067811865476f * h)) + h * 0.3989422804014327f * fast_exp2(-0.5f * kLog2e * h * h);
    case Activation::relu: return h > 0.f ? 1.f : 0.f;
    default: return 1.f;
  }
}

}  // namespace llmfast::cuda
