// Schemas of the native ops; fakes, autograd and dispatch are in llmfast/ops.
#include "stable.h"

#include <string>

STABLE_TORCH_LIBRARY(llmfast, m) {
  // x (..., N); weight, bias (N,); y as x, contiguous; mean, rstd float32 (rows,).
  m.def("layer_norm_fwd(Tensor x, Tensor? weight, Tensor? bias, float eps) -> (Tensor y, Tensor mean, Tensor rstd)");
  // dweight, dbias have weight's dtype (x's without weight) and are empty where the parameter is absent.
  m.def(
      "layer_norm_bwd(Tensor dy, Tensor x, Tensor? weight, Tensor mean, Tensor rstd, bool has_bias)"
      " -> (Tensor dx, Tensor dweight, Tensor dbias)");
  m.def("build_config() -> str");
  m.def("cpu_isa() -> str");
}

namespace {

std::string build_config() {
  return "version=" LLMFAST_VERSION " torch_target=" LLMFAST_TORCH_TARGET " cuda_archs=" LLMFAST_CUDA_ARCHS;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(llmfast, CompositeExplicitAutograd, m) {
  m.impl("build_config", TORCH_BOX(&build_config));
}
