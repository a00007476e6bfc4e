#pragma once
// Which of the builds of csrc/cpu/simd/ runs on this CPU.
//
// A kernel family is a struct of function pointers, defined in a file of simd/ as `extern const Table LLMFAST_ISA::name`,
// declared with LLMFAST_DECLARE_SIMD(Table, name) and used as LLMFAST_SIMD(name).->...

namespace llmfast::cpu {

enum class Isa { portable, avx2, avx512, avx512_bf16 };

// The best that the CPU has, or what LLMFAST_CPU_ISA (portable, avx2, avx512, avx512_bf16) names if that is less. Chosen once.
Isa isa();

}  // namespace llmfast::cpu

#define LLMFAST_DECLARE_ONE(isa, Table, name) \
  namespace llmfast::cpu::isa {               \
  extern const Table name;                    \
  }
#if defined(__x86_64__)
#define LLMFAST_DECLARE_SIMD(Table, name)   \
  LLMFAST_DECLARE_ONE(portable, Table, name) \
  LLMFAST_DECLARE_ONE(avx2, Table, name)     \
  LLMFAST_DECLARE_ONE(avx512, Table, name)   \
  LLMFAST_DECLARE_ONE(avx512_bf16, Table, name)
#define LLMFAST_SIMD(name)                                                          \
  (::llmfast::cpu::isa() == ::llmfast::cpu::Isa::avx512_bf16                        \
       ? ::llmfast::cpu::avx512_bf16::name                                          \
       : ::llmfast::cpu::isa() == ::llmfast::cpu::Isa::avx512                       \
             ? ::llmfast::cpu::avx512::name                                         \
             : ::llmfast::cpu::isa() == ::llmfast::cpu::Isa::avx2 ? ::llmfast::cpu::avx2::name \
                                                                  : ::llmfast::cpu::portable::name)
#else
#define LLMFAST_DECLARE_SIMD(Table, name) LLMFAST_DECLARE_ONE(portable, Table, name)
#define LLMFAST_SIMD(name) (::llmfast::cpu::portable::name)
#endif
