#include "cpu/adamw.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "stable.h"

namespace llmfast::cpu {
namespace {

using Tensors = std::vector<Tensor>;

// Tensors are cut into blocks, the last of each shorter, whatever the number of threads is.
constexpr int64_t kBlock = 8192;
// Elements that are worth a thread.
constexpr int64_t kGrain = 65536;

// Where the tensors lie when they are laid end to end, in blocks: tensor t owns [first[t], first[t + 1]).
std::vector<int64_t> first_blocks(const Tensors& tensors) {
  std::vector<int64_t> first(1, 0);
  for (const Tensor& t : tensors) first.push_back(first.back() + (t.numel() + kBlock - 1) / kBlock);
  return first;
}

// f(tensor, begin, end, block) for every block of the tensors, on PyTorch's threads.
template <typename F>
void for_blocks(const Tensors& tensors, F f) {
  const std::vector<int64_t> first = first_blocks(tensors);
  torch::stable::parallel_for(0, first.back(), kGrain / kBlock, [&](int64_t block, int64_t last) {
    size_t t = std::upper_bound(first.begin(), first.end(), block) - first.begin() - 1;
    for (; block < last; ++block) {
      while (block >= first[t + 1]) ++t;
      const int64_t begin = (block - first[t]) * kBlock;
      f(t, begin, std::min(begin + kBlock, tensors[t].numel()), block);
    }
  });
}

void check(const char* name, const Tensors& tensors, const Tensors& parameters) {
  STD_TORCH_CHECK(tensors.size() == parameters.size(), name, " must have as many tensors as parameters");
  for (size_t t = 0; t < tensors.size(); ++t) {
    const Tensor& x = tensors[t];
    STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float && x.is_cpu() && x.is_contiguous(), name,
                    " must be contiguous float32 tensors on the CPU");
    STD_TORCH_CHECK(x.numel() == parameters[t].numel(), name, " must have the sizes of the parameters");
  }
}

Tensors contiguous(Tensors tensors) {
  for (Tensor& t : tensors)
    if (!t.is_contiguous()) t = torch::stable::contiguous(t);
  return tensors;
}

void adamw(const Tensors& parameters, const Tensors& grads_in, const Tensors& averages, const Tensors& squares, double step,
           double lr, double beta1, double beta2, double weight_decay, double eps, double divisor) {
  const Tensors grads = contiguous(grads_in);
  check("parameters", parameters, parameters);
  check("grads", grads, parameters);
  check("exp_avgs", averages, parameters);
  check("exp_avg_sqs", squares, parameters);
  STD_TORCH_CHECK(step >= 1, "step must be at least 1, got ", step);
  const AdamW a{float(divisor),
                float(beta1),
                float(beta2),
                float(eps),
                float(1 - lr * weight_decay),
                float(lr / (1 - std::pow(beta1, step))),
                float(1 / std::sqrt(1 - std::pow(beta2, step)))};
  const auto& kernels = LLMFAST_SIMD(adamw);
  for_blocks(parameters, [&](size_t t, int64_t begin, int64_t end, int64_t) {
    kernels.update(a, static_cast<float*>(parameters[t].mutable_data_ptr()) + begin,
                   static_cast<const float*>(grads[t].const_data_ptr()) + begin,
                   static_cast<float*>(averages[t].mutable_data_ptr()) + begin,
                   static_cast<float*>(squares[t].mutable_data_ptr()) + begin, end - begin);
  });
}

Tensor total_norm(const Tensors& tensors_in) {
  const Tensors tensors = contiguous(tensors_in);
  check("tensors", tensors, tensors);
  std::vector<float> sums(first_blocks(tensors).back());
  const auto& kernels = LLMFAST_SIMD(adamw);
  for_blocks(tensors, [&](size_t t, int64_t begin, int64_t end, int64_t block) {
    sums[block] = kernels.sum_of_squares(static_cast<const float*>(tensors[t].const_data_ptr()) + begin, end - begin);
  });
  double sum = 0;
  for (const float s : sums) sum += s;
  Tensor norm = torch::stable::new_empty(tensors[0], {});
  *static_cast<float*>(norm.mutable_data_ptr()) = float(std::sqrt(sum));
  return norm;
}

}  // namespace
}  // namespace llmfast::cpu

STABLE_TORCH_LIBRARY_IMPL(llmfast, CPU, m) {
  m.impl("adamw_", TORCH_BOX(&llmfast::cpu::adamw));
  m.impl("total_norm", TORCH_BOX(&llmfast::cpu::total_norm));
}
