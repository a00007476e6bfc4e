#include "cpu/dropout.h"

#include <algorithm>

#include "stable.h"

namespace llmfast::cpu {
namespace {

// Elements that are worth a thread.
constexpr int64_t kGrain = 16384;

Tensor dropout(const Tensor& x_in, const Tensor& seed, double p) {
  STD_TORCH_CHECK(p >= 0 && p < 1, "p must lie in [0, 1), got ", p);
  STD_TORCH_CHECK(seed.scalar_type() == ScalarType::Long && seed.numel() == 1, "seed must be one int64");
  const bool is_bf16 = x_in.scalar_type() == ScalarType::BFloat16;
  STD_TORCH_CHECK(is_bf16 || x_in.scalar_type() == ScalarType::Float, "x must be float32 or bfloat16 on a CPU, got ",
                  torch::headeronly::toString(x_in.scalar_type()));
  const Tensor x = torch::stable::contiguous(x_in);
  Tensor y = torch::stable::new_empty(x, x.sizes());
  const int64_t n = x.dim() ? x.size(x.dim() - 1) : 1, rows = n ? x.numel() / n : 0;
  const Dropout d = make_dropout(*static_cast<const int64_t*>(seed.const_data_ptr()), p);
  dropout_rows(d, is_bf16 ? Dtype::bf16 : Dtype::f32, x.const_data_ptr(), y.mutable_data_ptr(), rows, n);
  return y;
}

}  // namespace

void dropout_rows(const Dropout& d, Dtype dtype, const void* x, void* y, int64_t rows, int64_t n) {
  const auto& kernels = LLMFAST_SIMD(dropout);
  torch::stable::parallel_for(0, rows, std::max<int64_t>(1, kGrain / std::max<int64_t>(n, 1)),
                              [&](int64_t row0, int64_t row1) {
    if (dtype == Dtype::bf16)
      kernels.bf16(static_cast<const uint16_t*>(x), static_cast<uint16_t*>(y), d, row0, row1, n);
    else
      kernels.f32(static_cast<const float*>(x), static_cast<float*>(y), d, row0, row1, n);
  });
}

}  // namespace llmfast::cpu

STABLE_TORCH_LIBRARY_IMPL(llmfast, CPU, m) { m.impl("dropout", TORCH_BOX(&llmfast::cpu::dropout)); }
