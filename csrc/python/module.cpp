// llmfast._C: what Python needs from C++ that is not an op on tensors. Neither includes nor links torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <string>

#include "bpe.h"

namespace {

// The instruction sets that the kernels could use, by the names of /proc/cpuinfo.
std::map<std::string, bool> cpu_features() {
#if defined(__x86_64__)
  __builtin_cpu_init();
#define FEATURE(name) {name, __builtin_cpu_supports(name) != 0}
  return {FEATURE("avx"),      FEATURE("avx2"),     FEATURE("fma"),        FEATURE("avx512f"),   FEATURE("avx512bw"),
          FEATURE("avx512vl"), FEATURE("avx512dq"), FEATURE("avx512vnni"), FEATURE("avx512bf16")};
#undef FEATURE
#else
  return {};
#endif
}

}  // namespace

PYBIND11_MODULE(_C, m, pybind11::mod_gil_not_used()) {
  m.attr("version") = LLMFAST_VERSION;
  m.attr("compiler") = __VERSION__;
  m.attr("cuda_archs") = LLMFAST_CUDA_ARCHS;
  m.def("cpu_features", &cpu_features, "Instruction sets of this CPU that kernels may use: name -> present.");
  register_bpe(m);
}
