#pragma once
// LibTorch's stable ABI: the only torch headers in csrc/, so that one binary loads in every torch from
// LLMFAST_TORCH_TARGET on.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/device.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

namespace llmfast {
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
}  // namespace llmfast
