// How a product is cut into blocks for the caches and the threads. Two ways:
//   - A is read in place: a task packs some columns of B for itself and meets a chunk of rows of A with them.
//   - A must be packed (transposed, converted): B is packed once for all, a task packs some rows of A.
// Any element of C is the same sum over the same blocks of K, whatever task it falls into.
#include "cpu/gemm.h"

#include <algorithm>

#include "cpu/blocks.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"

namespace llmfast::cpu {
namespace {

constexpr int64_t kColumns = 64;                    // of a task that packs its own B, or one panel
constexpr int64_t kRows = 1020;                     // of A, in the third cache while the columns go by
constexpr int64_t kPackedRows = 96;                 // of A, packed for the second cache
constexpr int64_t kPackedUnits = int64_t(1) << 22;  // of B at once: 16 MB

struct Plan {
  const Product& p;
  const GemmKernels& kernels;
  int64_t deep;      // of a block of K, a multiple of 16 units; all blocks but the last
  int64_t k_blocks;  // at least one, so that K = 0 writes the sum of the other terms
  int64_t threads;

  Plan(const Product& product, const GemmKernels& kind) : p(product), kernels(kind) {
    deep = block_depth(kernels, p.M, p.N, p.K);
    k_blocks = std::max<int64_t>(ceil_div(p.K, deep), 1);
    threads = std::clamp<int64_t>(p.M * p.N * p.K / kMacsPerThread, 1, torch::stable::get_num_threads());
  }

  int64_t units(int64_t k) const { return ceil_div(k, kernels.depth); }

  // A bfloat16 C is summed in float over the blocks of K and rounded once.
  bool needs_sums() const { return p.c_dtype == Dtype::bf16 && k_blocks > 1; }

  BlockStore store(int64_t m, int64_t n, int64_t k_block, float* sums, int64_t sums_stride) const {
    BlockStore out{};
    if (sums && k_block + 1 < k_blocks) {
      out = {sums, sums_stride, Dtype::f32, k_block > 0, nullptr, nullptr, 0};
    } else {
      const int64_t size = p.c_dtype == Dtype::f32 ? 4 : 2;
      char* c = static_cast<char*>(p.c) + (m * p.c_stride + n) * size;
      out = {c, p.c_stride, p.c_dtype, sums ? false : p.accumulate || k_block > 0, nullptr, nullptr, 0};
    }
    if (k_block == 0) {
      out.bias = p.bias ? p.bias + n : nullptr;
      out.residual = p.residual ? p.residual + m * p.residual_stride + n : nullptr;
      out.residual_stride = p.residual_stride;
    } else if (sums && k_block + 1 == k_blocks) {
      out.residual = sums;
      out.residual_stride = sums_stride;
    }
    return out;
  }
};

void multiply_in_place(const Plan& plan) {
  const Product& p = plan.p;
  const GemmKernels& kernels = plan.kernels;
  const int64_t columns = round_up(kColumns, kernels.panel), column_blocks = ceil_div(p.N, columns);
  int64_t chunks = ceil_div(p.M, kRows);
  // A few tasks a thread are only well spread if they divide evenly.
  if (const int64_t tasks = chunks * column_blocks; tasks < 4 * plan.threads && tasks % plan.threads)
    chunks = std::max(chunks, std::min(ceil_div(4 * plan.threads, column_blocks), ceil_div(p.M, kPackedRows)));
  const int64_t rows = round_up(ceil_div(p.M, chunks), kernels.tile_rows);
  each(ceil_div(p.M, rows) * column_blocks, plan.threads, [&](int64_t task) {
    thread_local Scratch panels, partial;
    const int64_t m = task / column_blocks * rows, n = task % column_blocks * columns;
    const int64_t m_count = std::min(rows, p.M - m), n_count = std::min(columns, p.N - n);
    auto* b = panels.get<uint32_t>(columns * plan.units(plan.deep));
    float* sums = plan.needs_sums() ? partial.get<float>(rows * columns) : nullptr;
    for (int64_t block = 0; block < plan.k_blocks; ++block) {
      const int64_t k0 = block * plan.deep, kc = std::min(plan.deep, p.K - k0);
      kernels.pack_b(p.b, n, n_count, k0, kc, b);
      kernels.multiply(p.a, nullptr, b, m, m_count, n_count, k0, kc, plan.store(m, n, block, sums, columns));
    }
  });
}

void multiply_packed(const Plan& plan) {
  const Product& p = plan.p;
  const GemmKernels& kernels = plan.kernels;
  const int64_t units = plan.units(plan.deep);
  // All of K for as many columns as fit, in equal parts.
  const int64_t panels = ceil_div(p.N, kernels.panel);
  const int64_t fitting = std::max<int64_t>(kPackedUnits / (plan.k_blocks * units * kernels.panel), 1);
  const int64_t columns = ceil_div(panels, ceil_div(panels, fitting)) * kernels.panel;
  const int64_t rows = std::min(kPackedRows, round_up(ceil_div(p.M, 4 * plan.threads), kernels.tile_rows));
  thread_local Scratch shared;
  auto* b = shared.get<uint32_t>(plan.k_blocks * units * columns);

  for (int64_t n = 0; n < p.N; n += columns) {
    const int64_t n_count = std::min(columns, p.N - n), n_panels = ceil_div(n_count, kernels.panel);
    each(n_panels * plan.k_blocks, plan.threads, [&](int64_t task) {
      const int64_t block = task / n_panels, k0 = block * plan.deep, kc = std::min(plan.deep, p.K - k0);
      const int64_t j = task % n_panels * kernels.panel;
      kernels.pack_b(p.b, n + j, std::min(kernels.panel, n_count - j), k0, kc,
                     b + block * units * columns + j * plan.units(kc));
    });
    each(ceil_div(p.M, rows), plan.threads, [&](int64_t task) {
      thread_local Scratch packed, partial;
      const int64_t m = task * rows, m_count = std::min(rows, p.M - m);
      auto* a = packed.get<uint32_t>(rows * units);
      float* sums = plan.needs_sums() ? partial.get<float>(rows * columns) : nullptr;
      for (int64_t block = 0; block < plan.k_blocks; ++block) {
        const int64_t k0 = block * plan.deep, kc = std::min(plan.deep, p.K - k0);
        kernels.pack_a(p.a, p.M, m, m_count, k0, kc, a);
        kernels.multiply(p.a, a, b + block * units * columns, m, m_count, n_count, k0, kc,
                         plan.store(m, n, block, sums, columns));
      }
    });
  }
}

}  // namespace

void gemm(const Product& p) {
  if (p.M <= 0 || p.N <= 0) return;
  const GemmTable& table = LLMFAST_SIMD(gemm_kernels);
  const Plan plan(p, p.compute == Dtype::f32 ? table.f32 : table.bf16);
  if (plan.kernels.in_place(p.a, p.K))
    multiply_in_place(plan);
  else
    multiply_packed(plan);
}

}  // namespace llmfast::cpu
