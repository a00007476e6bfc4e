#pragma once
// The wrappers of csrc/cuda/mma.h on a CPU. Not modelled: the order and rounding of the sums inside of one tensor-core
// product (here: float64, rounded once).
#include <cmath>
#include <cstdint>
#include <cstring>

#include "emulation/cuda_on_cpu.h"

namespace llmfast::cuda {

inline uint32_t shared_address(const void* p) {
  return uint32_t(static_cast<const unsigned char*>(p) - emu::machine.dynamic);
}

template <int N>
struct LdmatrixLane {
  uint16_t row[8];
  uint32_t out[N];
};

template <int N, bool kTransposed = false>
LLMFAST_MEETS void ldmatrix(uint32_t (&r)[N], const void* row, LLMFAST_HERE) {
  emu::Quiet quiet;
  const emu::Site site = LLMFAST_SITE;
  LdmatrixLane<N> mine{};
  if (emu::lane() < 8 * N) {
    if (uintptr_t(row) % 16) emu::fail("ldmatrix " + site.str() + ": the address of a row is not aligned to 16 bytes");
    emu::note(row, 16, false, site);
    memcpy(mine.row, row, 16);
  }
  const auto op = [](void** lanes, unsigned) {
    const auto lane = [&](int l) { return static_cast<LdmatrixLane<N>*>(lanes[l]); };
    for (int i = 0; i < N; ++i)
      for (int l = 0; l < 32; ++l) {
        const int g = l / 4, c = l % 4 * 2;
        const auto element = [&](int y, int x) { return uint32_t(lane(8 * i + y)->row[x]); };
        lane(l)->out[i] = kTransposed ? element(c, g) | element(c + 1, g) << 16 : element(g, c) | element(g, c + 1) << 16;
      }
  };
  emu::warp_collective("ldmatrix", ~0u, &mine, op, site, false);
  memcpy(r, mine.out, sizeof r);
}

struct MmaLane {
  float* d;
  const uint32_t *a, *b;
};

// Most of an emulated kernel's time: without the sanitizers' instructions (in what it calls neither: all is inlined), eight
// columns at a time.
#define LLMFAST_BARE __attribute__((noinline, no_sanitize("address", "undefined", "thread")))
typedef double Columns __attribute__((vector_size(64)));

// decode(register, element): a float; kWidth elements a register, K columns of A.
template <int K, typename F>
LLMFAST_BARE void mma_of_warp(void** lanes, F decode) {
  constexpr int kWidth = K / 8;
  double A[16][K];
  Columns B[K];
  for (int l = 0; l < 32; ++l) {
    const auto* lane = static_cast<MmaLane*>(lanes[l]);
    const int g = l / 4, t = l % 4 * kWidth;
    for (int e = 0; e < kWidth; ++e) {
      for (int r = 0; r < 4; ++r) A[g + 8 * (r & 1)][t + K / 2 * (r >> 1) + e] = decode(lane->a[r], e);
      for (int r = 0; r < 2; ++r) B[t + K / 2 * r + e][g] = decode(lane->b[r], e);
    }
  }
  for (int m = 0; m < 16; ++m) {
    Columns sum;
    const auto d = [&](int n) __attribute__((always_inline))->float& {
      return static_cast<MmaLane*>(lanes[m % 8 * 4 + n / 2])->d[m / 8 * 2 + n % 2];
    };
    for (int n = 0; n < 8; ++n) sum[n] = d(n);
    for (int k = 0; k < K; ++k) sum += A[m][k] * B[k];
    for (int n = 0; n < 8; ++n) d(n) = float(sum[n]);
  }
}

inline __attribute__((always_inline)) float float_of_bits(uint32_t bits) {
  float v;
  memcpy(&v, &bits, 4);
  return v;
}

template <typename T>
void mma_of_type(void** lanes) {
  mma_of_warp<16>(lanes, [](uint32_t r, int half) __attribute__((always_inline)) {
    const uint16_t bits = uint16_t(r >> 16 * half);
    if constexpr (std::is_same_v<T, __nv_bfloat16>) return float_of_bits(uint32_t(bits) << 16);
    _Float16 h;
    memcpy(&h, &bits, 2);
    return float(h);
  });
}

template <typename T>
LLMFAST_MEETS void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], LLMFAST_HERE) {
  emu::Quiet quiet;
  MmaLane mine{d, a, b};
  emu::warp_collective("mma", ~0u, &mine, [](void** lanes, unsigned) { mma_of_type<T>(lanes); }, LLMFAST_SITE, false);
}

inline uint32_t to_tf32(float x) {
  uint32_t r;
  memcpy(&r, &x, 4);
  return std::isfinite(x) ? (r + 0x1000) & ~0x1FFFu : x != x ? 0x7FFFFFFF : r;
}

LLMFAST_MEETS inline void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], LLMFAST_HERE) {
  emu::Quiet quiet;
  MmaLane mine{d, a, b};
  const auto op = [](void** lanes, unsigned) {
    mma_of_warp<8>(lanes, [](uint32_t r, int) __attribute__((always_inline)) {
      return float_of_bits(r & ~0x1FFFu);  // what the tensor core reads
    });
  };
  emu::warp_collective("mma", ~0u, &mine, op, LLMFAST_SITE, false);
}

inline void cp_async(void* to, const void* from, int bytes, bool there, const emu::Site& site) {
  if (uintptr_t(to) % bytes || (there && uintptr_t(from) % bytes))
    emu::fail("cp.async " + site.str() + ": an address is not aligned to " + std::to_string(bytes) + " bytes");
  emu::note(to, bytes, true, site);
  if (there) {
    emu::note(from, bytes, false, site);
    [[maybe_unused]] volatile char seen = static_cast<const char*>(from)[0];  // ASan looks now, not at the landing
    seen = static_cast<const char*>(from)[bytes - 1];
  }
  const emu::Copy copy{to, there ? from : nullptr, bytes, site};
  if (emu::config.late_copies)
    emu::machine.current->copies.push_back(copy);
  else
    emu::land(copy);
}
LLMFAST_MEETS inline void cp_async16(void* to, const void* from, bool there = true, LLMFAST_HERE) {
  emu::Quiet quiet;
  cp_async(to, from, 16, there, LLMFAST_SITE);
}
LLMFAST_MEETS inline void cp_async4(void* to, const void* from, bool there = true, LLMFAST_HERE) {
  emu::Quiet quiet;
  cp_async(to, from, 4, there, LLMFAST_SITE);
}

inline void cp_async_commit() {
  emu::Quiet quiet;
  auto& thread = *emu::machine.current;
  thread.groups.push_back(std::move(thread.copies));
  thread.copies.clear();
}

template <int N>
void cp_async_wait() {
  emu::Quiet quiet;
  auto& groups = emu::machine.current->groups;
  while (groups.size() > N) {
    for (const emu::Copy& copy : groups.front()) emu::land(copy);
    groups.erase(groups.begin());
  }
}

inline float fast_exp2(float x) { return std::exp2(x) < 0x1p-126f ? 0.f : std::exp2(x); }

}  // namespace llmfast::cuda
