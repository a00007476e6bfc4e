#pragma once
// The activations and their derivatives in float64.
#include <algorithm>
#include <cmath>

#include "cuda/activation.h"

namespace {

using llmfast::cuda::Activation;

double act(Activation activation, double h) {
  if (activation == Activation::relu) return std::max(h, 0.0);
  if (activation == Activation::gelu) return 0.5 * h * (1 + std::erf(h / std::sqrt(2.0)));
  return 0.5 * h * (1 + std::tanh(std::sqrt(2 / M_PI) * (h + 0.044715 * h * h * h)));
}

double act_slope(Activation activation, double h) {
  if (activation == Activation::relu) return h > 0;
  if (activation == Activation::gelu)
    return 0.5 * (1 + std::erf(h / std::sqrt(2.0))) + h * std::exp(-h * h / 2) / std::sqrt(2 * M_PI);
  const double c = std::sqrt(2 / M_PI), t = std::tanh(c * (h + 0.044715 * h * h * h));
  return 0.5 * (1 + t) + 0.5 * h * (1 - t * t) * c * (1 + 3 * 0.044715 * h * h);
}

}  // namespace
