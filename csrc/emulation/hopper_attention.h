#pragma once
// The wrappers of csrc/cuda/hopper_attention.h on a CPU.
#include <memory>

#include "emulation/hopper.h"

namespace llmfast::cuda {

struct HeadsMap {
  Heads x;
  int B, H, T, D, box_rows;
};

inline bool make_heads_map(HeadsMap* map, const Heads& x, int B, int H, int T, int D, int box_rows) {
  const auto fits = [](int64_t step, int n) { return n == 1 || step % 8 == 0; };
  if (uintptr_t(x.data) % 16 || !fits(x.row, T) || !fits(x.head, H) || !fits(x.batch, B) || box_rows > 256) return false;
  *map = {x, B, H, T, D, box_rows};
  return true;
}

LLMFAST_MEETS inline void tma_load_head(void* tile, const HeadsMap* map, int batch, int head, int row, int column,
                                        uint64_t* barrier, LLMFAST_HERE) {
  emu::Quiet quiet;
  // A head is a matrix; its rows end where the array's do.
  const Heads& x = map->x;
  const auto* data = static_cast<const char*>(x.data) + (batch * x.batch + head * x.head) * 2;
  if (batch < 0 || batch >= map->B || head < 0 || head >= map->H) emu::fail("tma_load_head: no such head");
  const TensorMap matrix{data, map->T, map->D, x.row, map->box_rows};
  tma_load_from(matrix, tile, row, column, barrier, LLMFAST_SITE);
}

template <typename T, int N>
void run_register_product(const WarpProduct& product, int) {
  const std::unique_ptr<uint32_t[]> registers(reinterpret_cast<uint32_t*>(product.a));
  for (int n = 0; n < N; n += 8) {
    // b (16, 8) as a fragment of mma: the product of one warp is N / 8 of its.
    uint32_t b[32][2] = {};
    MmaLane lanes[32];
    void* pointers[32];
    for (int l = 0; l < 32; ++l) {
      for (int r = 0; r < 2; ++r)
        for (int e = 0; e < 2; ++e)
          b[l][r] |= uint32_t(T(operand_element<T>(product.b, true, n + l / 4, l % 4 * 2 + 8 * r + e)).bits) << 16 * e;
      lanes[l] = {product.d[l] + n / 2, registers.get() + 4 * l, b[l]};
      pointers[l] = &lanes[l];
    }
    mma_of_type<T>(pointers);
  }
}

template <typename T, int N>
LLMFAST_MEETS void wgmma_from_registers(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, LLMFAST_HERE) {
  emu::Quiet quiet;
  WarpProduct mine{{d}, reinterpret_cast<uint64_t>(&a), b, true, run_register_product<T, N>};
  const auto op = [](void** lanes, unsigned) {
    WarpProduct product = *static_cast<WarpProduct*>(lanes[0]);
    auto* registers = new uint32_t[32 * 4];  // as they are now; nvcc keeps them until the product has read them
    for (int l = 0; l < 32; ++l) {
      const auto* lane = static_cast<WarpProduct*>(lanes[l]);
      if (lane->b != product.b) emu::fail("wgmma: the lanes of a warp give different arguments");
      memcpy(registers + 4 * l, reinterpret_cast<const void*>(lane->a), 16);
      product.d[l] = lane->d[0];
    }
    product.a = reinterpret_cast<uint64_t>(registers);
    WarpProducts& products = warp_products();
    if (!products.fenced) emu::fail("wgmma without a wgmma_fence before it");
    products.open.push_back(product);
    if (!emu::config.late_copies) product.run(product, emu::machine.current->linear / 32);
  };
  emu::warp_collective("wgmma", ~0u, &mine, op, LLMFAST_SITE, false);
}

}  // namespace llmfast::cuda
