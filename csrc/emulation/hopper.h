#pragma once
// The wrappers of csrc/cuda/hopper.h on a CPU. Copies land and products are made at once, or as late as they may
// (emu::config.late_copies). Each warp makes its 16 rows of a product. Not modelled: the order and rounding of sums, the
// fences between the generic and the asynchronous proxy, registers of a warpgroup.
#include <cstdint>
#include <cstring>

#include "emulation/mma.h"

namespace llmfast::cuda {

struct TensorMap {
  const char* data;
  int64_t rows, columns, stride;  // of 16-bit elements
  int box_rows;
};

inline bool make_tensor_map(TensorMap* map, const void* p, int64_t rows, int64_t columns, int64_t stride, int box_rows) {
  if (!p || uintptr_t(p) % 16 || stride * 2 % 16 || stride < columns || box_rows < 1 || box_rows > 256 || rows < 1 || columns < 1)
    return false;
  *map = {static_cast<const char*>(p), rows, columns, stride, box_rows};
  return true;
}

// What the 8 bytes of a barrier hold here.
struct BarrierState {
  uint16_t count, pending : 15, phase : 1;
  int32_t bytes;
};
static_assert(sizeof(BarrierState) == 8);

inline BarrierState& barrier_state(uint64_t* barrier) {
  auto& state = *reinterpret_cast<BarrierState*>(barrier);
  if (state.count == 0xFFFF) emu::fail("a barrier was used before its init");
  return state;
}
inline void barrier_turn(BarrierState& state) {
  if (state.pending || state.bytes) return;
  state.phase ^= 1;
  state.pending = state.count;
}

inline void barrier_init(uint64_t* barrier, int count) {
  emu::Quiet quiet;
  const BarrierState state{uint16_t(count), uint16_t(count & 0x7FFF), 0, 0};
  memcpy(static_cast<void*>(barrier), &state, sizeof state);
}
inline void barrier_init_fence() {}
inline void barrier_arrive_expect(uint64_t* barrier, int bytes) {
  emu::Quiet quiet;
  BarrierState& state = barrier_state(barrier);
  if (!state.pending) emu::fail("more arrivals at a barrier than its count in one phase");
  if (emu::hooks.release) emu::hooks.release(barrier);
  state.bytes += bytes;
  --state.pending;
  barrier_turn(state);
}
inline void barrier_arrive(uint64_t* barrier) { barrier_arrive_expect(barrier, 0); }

LLMFAST_MEETS inline void barrier_wait(uint64_t* barrier, int parity, LLMFAST_HERE) {
  emu::Quiet quiet;
  struct Wait {
    BarrierState* state;
    int parity;
  } wait{&barrier_state(barrier), parity};
  emu::wait_until("barrier_wait", [](void* p) { auto* w = static_cast<Wait*>(p); return w->state->phase != w->parity; },
                  &wait, LLMFAST_SITE);
  if (emu::hooks.acquire) emu::hooks.acquire(barrier);
}

LLMFAST_MEETS inline void named_barrier(int id, int threads, LLMFAST_HERE) { emu::named_barrier(id, threads, LLMFAST_SITE); }

// Where the byte `offset` of a tile at a multiple of 1024 really lies.
inline uint32_t swizzled(uint32_t offset) { return offset ^ (offset >> 7 & 7) << 4; }

inline void tma_load_from(const TensorMap& map, void* tile, int row, int column, uint64_t* barrier, const emu::Site& site) {
  const uint32_t to = shared_address(tile);
  const size_t bytes = size_t(map.box_rows) * kTileRow * 2;
  if (to % 1024) emu::fail("tma_load " + site.str() + ": the tile does not begin at a multiple of 1024 bytes");
  if (to + bytes > emu::machine.dynamic_bytes) emu::fail("tma_load " + site.str() + ": the box is larger than shared memory");
  emu::note(tile, bytes, true, site);
  if (emu::hooks.release) emu::hooks.release(barrier);  // who waits for the bytes sees them
  const auto land = [=] {
    for (int r = 0; r < map.box_rows; ++r)
      for (int c = 0; c < kTileRow; ++c) {
        uint16_t v = 0;
        const int64_t y = int64_t(row) + r, x = int64_t(column) + c;
        if (y >= 0 && y < map.rows && x >= 0 && x < map.columns) memcpy(&v, map.data + (y * map.stride + x) * 2, 2);
        memcpy(emu::machine.dynamic + swizzled(to + (r * kTileRow + c) * 2), &v, 2);
      }
    BarrierState& state = barrier_state(barrier);
    state.bytes -= int32_t(bytes);
    barrier_turn(state);
  };
  if (emu::config.late_copies)
    emu::machine.landings.push_back(land);
  else
    land();
}

LLMFAST_MEETS inline void tma_load(void* tile, const TensorMap* map, int row, int column, uint64_t* barrier, LLMFAST_HERE) {
  emu::Quiet quiet;
  tma_load_from(*map, tile, row, column, barrier, LLMFAST_SITE);
}

template <int kRegisters>
void fewer_registers() {}
template <int kRegisters>
void more_registers() {}

// ---- products -------------------------------------------------------------------------------------------------------

struct WarpProduct {
  float* d[32];
  uint64_t a, b;
  bool accumulate;
  void (*run)(const WarpProduct&, int warp);
};
struct WarpProducts {
  int64_t launch = -1, block = -1;
  bool fenced = false;
  std::vector<WarpProduct> open;
  std::vector<std::vector<WarpProduct>> groups;
};
inline WarpProducts& warp_products() {
  static WarpProducts of_warp[32];
  WarpProducts& products = of_warp[emu::machine.current->linear / 32];
  const int64_t block = blockIdx.x + (int64_t(blockIdx.y) + int64_t(blockIdx.z) * gridDim.y) * gridDim.x;
  if (products.launch != emu::machine.launches || products.block != block) {
    products = {};
    products.launch = emu::machine.launches;
    products.block = block;
  }
  return products;
}

// Element k of row r (of the 64 or N) of an operand.
template <typename T>
float operand_element(uint64_t descriptor, bool across_k, int r, int k) {
  if (descriptor >> 62 != 1) emu::fail("wgmma: the descriptor has another swizzle than the 128-byte one");
  const uint32_t start = uint32_t(descriptor & 0x3FFF) * 16, leading = uint32_t(descriptor >> 16 & 0x3FFF) * 16,
                 stride = uint32_t(descriptor >> 32 & 0x3FFF) * 16;
  const uint32_t offset = across_k ? r / 64 * leading + r % 64 * 2 + k / 8 * stride + k % 8 * 128
                                   : r / 8 * stride + r % 8 * 128 + k * 2;
  const uint32_t at = swizzled(start + offset);
  if (at + 2 > emu::machine.dynamic_bytes) emu::fail("wgmma: the descriptor points outside of shared memory");
  emu::note(emu::machine.dynamic + at, 2, false, {nullptr, "wgmma operand", 0});
  T v;
  memcpy(static_cast<void*>(&v), emu::machine.dynamic + at, 2);
  return float(v);
}

template <typename T, int N, bool kBAcrossK>
void run_warp_product(const WarpProduct& product, int warp) {
  static float A[16][16], B[N][16];
  for (int k = 0; k < 16; ++k) {
    for (int m = 0; m < 16; ++m) A[m][k] = operand_element<T>(product.a, false, warp % 4 * 16 + m, k);
    for (int n = 0; n < N; ++n) B[n][k] = operand_element<T>(product.b, kBAcrossK, n, k);
  }
  for (int l = 0; l < 32; ++l)
    for (int i = 0; i < N / 2; ++i) {
      const int m = l / 4 + 8 * (i >> 1 & 1), n = i / 4 * 8 + l % 4 * 2 + (i & 1);
      double sum = product.accumulate ? product.d[l][i] : 0;
      for (int k = 0; k < 16; ++k) sum += double(A[m][k]) * B[n][k];
      product.d[l][i] = float(sum);
    }
}

LLMFAST_MEETS inline void wgmma_fence(LLMFAST_HERE) {
  const auto op = [](void**, unsigned) { warp_products().fenced = true; };
  emu::warp_collective("wgmma_fence", ~0u, nullptr, op, LLMFAST_SITE, false);
}

template <typename T, int N, bool kBAcrossK>
LLMFAST_MEETS void wgmma(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate, LLMFAST_HERE) {
  emu::Quiet quiet;
  WarpProduct mine{{d}, a, b, accumulate, run_warp_product<T, N, kBAcrossK>};
  const auto op = [](void** lanes, unsigned) {
    WarpProduct product = *static_cast<WarpProduct*>(lanes[0]);
    for (int l = 0; l < 32; ++l) {
      const auto* lane = static_cast<WarpProduct*>(lanes[l]);
      if (lane->a != product.a || lane->b != product.b || lane->accumulate != product.accumulate)
        emu::fail("wgmma: the lanes of a warp give different arguments");
      product.d[l] = lane->d[0];
    }
    WarpProducts& products = warp_products();
    if (!products.fenced) emu::fail("wgmma without a wgmma_fence before it");
    products.open.push_back(product);
    if (!emu::config.late_copies) product.run(product, emu::machine.current->linear / 32);
  };
  emu::warp_collective("wgmma", ~0u, &mine, op, LLMFAST_SITE, false);
}

LLMFAST_MEETS inline void wgmma_commit(LLMFAST_HERE) {
  const auto op = [](void**, unsigned) {
    WarpProducts& products = warp_products();
    products.groups.push_back(std::move(products.open));
    products.open.clear();
  };
  emu::warp_collective("wgmma_commit", ~0u, nullptr, op, LLMFAST_SITE, false);
}

template <int N>
LLMFAST_MEETS void wgmma_wait(LLMFAST_HERE) {
  const auto op = [](void**, unsigned) {
    WarpProducts& products = warp_products();
    while (products.groups.size() > N) {
      if (emu::config.late_copies)
        for (const WarpProduct& product : products.groups[0]) product.run(product, emu::machine.current->linear / 32);
      products.groups.erase(products.groups.begin());
    }
    products.fenced = false;  // the registers may be touched now
  };
  emu::warp_collective("wgmma_wait", ~0u, nullptr, op, LLMFAST_SITE, false);
}

}  // namespace llmfast::cuda
