#include "cpu/isa.h"

#include <algorithm>
#include <cstdlib>
#include <string>

#include "stable.h"

namespace llmfast::cpu {
namespace {

Isa best() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
    return Isa::avx512;
  if (avx2) return Isa::avx2;
#endif
  return Isa::portable;
}

Isa wanted() {
  const char* value = std::getenv("LLMFAST_CPU_ISA");
  const std::string name = value ? value : "";
  if (name.empty() || name == "avx512") return Isa::avx512;
  if (name == "avx2") return Isa::avx2;
  STD_TORCH_CHECK(name == "portable", "LLMFAST_CPU_ISA must be portable, avx2 or avx512, got ", name);
  return Isa::portable;
}

std::string cpu_isa() {
  static const char* const names[] = {"portable", "avx2", "avx512"};
  return names[static_cast<int>(isa())];
}

}  // namespace

Isa isa() {
  static const Isa chosen = std::min(best(), wanted());
  return chosen;
}

}  // namespace llmfast::cpu

STABLE_TORCH_LIBRARY_IMPL(llmfast, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&llmfast::cpu::cpu_isa));
}
