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
    return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni") ? Isa::avx512_bf16 : Isa::avx512;
  if (avx2) return Isa::avx2;
#endif
  return Isa::portable;
}

constexpr const char* kNames[] = {"portable", "avx2", "avx512", "avx512_bf16"};

Isa wanted() {
  const char* value = std::getenv("LLMFAST_CPU_ISA");
  const std::string name = value ? value : "";
  if (name.empty()) return Isa::avx512_bf16;
  for (int i = 0; i < 4; ++i)
    if (name == kNames[i]) return static_cast<Isa>(i);
  STD_TORCH_CHECK(false, "LLMFAST_CPU_ISA must be portable, avx2, avx512 or avx512_bf16, got ", name);
}

std::string cpu_isa() { return kNames[static_cast<int>(isa())]; }

}  // namespace

Isa isa() {
  static const Isa chosen = std::min(best(), wanted());
  return chosen;
}

}  // namespace llmfast::cpu

STABLE_TORCH_LIBRARY_IMPL(llmfast, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&llmfast::cpu::cpu_isa));
}
