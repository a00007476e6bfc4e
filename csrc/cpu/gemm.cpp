#include "cpu/gemm.h"

#include <algorithm>
#include <atomic>

#include "cpu/gemm_kernels.h"
#include "cpu/scratch.h"
#include "stable.h"

namespace llmfast::cpu {
namespace {

constexpr int64_t kUnits = 1024;          // of a K block: a panel of it stays in the second cache
constexpr int64_t kSerialMacs = 1 << 18;  // below, a second thread costs more than it brings

// f(i) for i < count on PyTorch's threads; each takes the next i when it is free.
template <typename F>
void each(int64_t count, bool serial, F f) {
  const int64_t threads = serial ? 1 : std::min<int64_t>(torch::stable::get_num_threads(), count);
  if (threads <= 1) {
    for (int64_t i = 0; i < count; ++i) f(i);
    return;
  }
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) f(i);
  });
}

Scratch& panel_scratch() {
  thread_local Scratch scratch;
  return scratch;
}

Scratch& rows_scratch() {
  thread_local Scratch scratch;
  return scratch;
}

// One K block, from k0 on, kc deep. Either every thread packs a panel of B and meets all of A with it, or all of B is
// packed first and every thread takes blocks of rows: the latter where there are too few panels to share out.
void block(const Product& p, const GemmKernels& kernels, int64_t k0, int64_t kc) {
  const int64_t units = (kc + kernels.depth - 1) / kernels.depth;
  const int64_t panels = (p.N + kernels.panel - 1) / kernels.panel, panel_units = units * kernels.panel;
  const bool serial = p.M * p.N * std::max<int64_t>(kc, 1) < kSerialMacs;
  const int64_t threads = serial ? 1 : torch::stable::get_num_threads();
  const bool in_place = kernels.in_place(p.a, p.K);
  const auto width = [&](int64_t panel) { return std::min<int64_t>(kernels.panel, p.N - panel * kernels.panel); };

  if (panels >= 4 * threads || (panels % threads == 0 && in_place)) {
    uint32_t* packed = nullptr;
    if (!in_place) {
      packed = rows_scratch().get<uint32_t>(p.M * units);
      const int64_t rows = std::max<int64_t>(16, (p.M / (4 * threads) + 15) / 16 * 16);
      each((p.M + rows - 1) / rows, serial, [&](int64_t i) {
        kernels.pack_a(p.a, i * rows, std::min(p.M, (i + 1) * rows), k0, kc, packed + i * rows * units);
      });
    }
    each(panels, serial, [&](int64_t i) {
      uint32_t* panel = panel_scratch().get<uint32_t>(panel_units);
      kernels.pack_b(p.b, i * kernels.panel, width(i), k0, kc, panel);
      kernels.multiply(p, packed, panel, 0, p.M, i * kernels.panel, width(i), k0, kc);
    });
    return;
  }
  uint32_t* b = panel_scratch().get<uint32_t>(panels * panel_units);
  each(panels, serial, [&](int64_t i) {
    kernels.pack_b(p.b, i * kernels.panel, width(i), k0, kc, b + i * panel_units);
  });
  const int64_t tiles = (p.M + kernels.tile_rows - 1) / kernels.tile_rows;
  const int64_t rows = kernels.tile_rows * std::clamp<int64_t>(tiles / (4 * threads), 1, 16);
  each((p.M + rows - 1) / rows, serial, [&](int64_t i) {
    const int64_t m0 = i * rows, m1 = std::min(p.M, m0 + rows);
    uint32_t* packed = nullptr;
    if (!in_place) {
      packed = rows_scratch().get<uint32_t>(rows * units);
      kernels.pack_a(p.a, m0, m1, k0, kc, packed);
    }
    for (int64_t panel = 0; panel < panels; ++panel)
      kernels.multiply(p, packed, b + panel * panel_units, m0, m1, panel * kernels.panel, width(panel), k0, kc);
  });
}

}  // namespace

void gemm(const Product& product) {
  if (product.M <= 0 || product.N <= 0) return;
  const GemmTable& table = LLMFAST_SIMD(gemm_kernels);
  const GemmKernels& kernels = product.compute == Dtype::f32 ? table.f32 : table.bf16;
  Product p = product;
  const int64_t longest = kUnits * kernels.depth;
  if (p.K <= longest) return block(p, kernels, 0, p.K);
  if (p.c_dtype == Dtype::bf16) {  // summed in float, rounded once
    thread_local Scratch scratch;
    Product sums = p;
    sums.c = scratch.get<float>(p.M * p.N);
    sums.c_stride = p.N;
    sums.c_dtype = Dtype::f32;
    gemm(sums);
    p.K = 0;
    p.bias = nullptr;
    p.residual = static_cast<const float*>(sums.c);
    p.residual_stride = p.N;
    return block(p, kernels, 0, 0);
  }
  // Blocks of equal depth, whole vectors of units each.
  const int64_t step = 16 * kernels.depth, blocks = (p.K + longest - 1) / longest;
  const int64_t deep = ((p.K + blocks - 1) / blocks + step - 1) / step * step;
  for (int64_t k0 = 0; k0 < p.K; k0 += deep) {
    block(p, kernels, k0, std::min(deep, p.K - k0));
    p.accumulate = true;
    p.bias = p.residual = nullptr;
  }
}

}  // namespace llmfast::cpu
