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

// element(a register, half) as float; K columns of A in kWidth elements a register.
template <int K, typename F>
void mma_of_warp(void** lanes, F element) {
  constexpr int kWidth = K / 8;
  float A[16][K], B[8][K];
  for (int l = 0; l < 32; ++l) {
    const auto* lane = static_cast<MmaLane*>(lanes[l]);
    const int g = l / 4, t = l % 4 * kWidth;
    for (int e = 0; e < kWidth; ++e) {
      for (int r = 0; r < 4; ++r) A[g + 8 * (r & 1)][t + K / 2 * (r >> 1) + e] = element(lane->a[r], e);
      for (int r = 0; r < 2; ++r) B[g][t + K / 2 * r + e] = element(lane->b[r], e);
    }
  }
  for (int l = 0; l < 32; ++l)
    for (int i = 0; i < 4; ++i) {
      const int m = l / 4 + 8 * (i >> 1), n = l % 4 * 2 + (i & 1);
      float& d = static_cast<MmaLane*>(lanes[l])->d[i];
      double sum = d;
      for (int k = 0; k < K; ++k) sum += double(A[m][k]) * B[n][k];
      d = float(sum);
    }
}

template <typename T>
LLMFAST_MEETS void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], LLMFAST_HERE) {
  emu::Quiet quiet;
  MmaLane mine{d, a, b};
  const auto op = [](void** lanes, unsigned) {
    mma_of_warp<16>(lanes, [](uint32_t r, int half) {
      T v;
      v.bits = uint16_t(r >> 16 * half);
      return float(v);
    });
  };
  emu::warp_collective("mma", ~0u, &mine, op, LLMFAST_SITE, false);
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
    mma_of_warp<8>(lanes, [](uint32_t r, int) {
      r &= ~0x1FFFu;  // what the tensor core reads
      float v;
      memcpy(&v, &r, 4);
      return v;
    });
  };
  emu::warp_collective("mma", ~0u, &mine, op, LLMFAST_SITE, false);
}

LLMFAST_MEETS inline void cp_async16(void* to, const void* from, bool there = true, LLMFAST_HERE) {
  emu::Quiet quiet;
  const emu::Site site = LLMFAST_SITE;
  if (uintptr_t(to) % 16 || (there && uintptr_t(from) % 16))
    emu::fail("cp.async " + site.str() + ": an address is not aligned to 16 bytes");
  emu::note(to, 16, true, site);
  if (there) {
    emu::note(from, 16, false, site);
    [[maybe_unused]] volatile char seen = static_cast<const char*>(from)[0];  // ASan looks now, not at the landing
    seen = static_cast<const char*>(from)[15];
  }
  const emu::Copy copy{to, there ? from : nullptr, site};
  if (emu::config.late_copies)
    emu::machine.current->copies.push_back(copy);
  else
    emu::land(copy);
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
