// The parts of gemm() that know the instruction set: packing and register tiles (tile.h) behind run-time types.
#include "cpu/gemm_kernels.h"
#include "cpu/simd/tile.h"

namespace llmfast::cpu {
namespace {

template <typename T>
const T* at(const Operand& o, int64_t row, int64_t column) {
  return static_cast<const T*>(o.data) + (o.transposed ? column * o.stride + row : row * o.stride + column);
}

template <typename Unit>
bool in_place(const Operand& a, int64_t K) {
  const bool same = a.dtype == Dtype::f32 ? Unit::template in_place<float> : Unit::template in_place<uint16_t>;
  return same && !a.transposed && K % Unit::depth == 0;
}

// A transposed A is packed like B, kLanes columns at a time, whose units are then dealt out to their rows.
template <typename Unit, typename T>
void pack_a(const Operand& a, int64_t m0, int64_t m1, int64_t k0, int64_t kc, uint32_t* to) {
  const int64_t units = ceil_div(kc, Unit::depth);
  for (int64_t m = m0; m < m1; m += a.transposed ? kLanes : 1) {
    uint32_t* row = to + (m - m0) * units;
    const T* p = at<T>(a, m, k0);
    if (!a.transposed) {
      for (int64_t u = 0; u < units; u += kLanes) {
        const Bits b = Unit::along_k(p + u * Unit::depth, kc - u * Unit::depth);
        if (units - u >= kLanes)
          memcpy(row + u, &b, sizeof b);
        else
          for (int64_t i = 0; i < units - u; ++i) row[u + i] = b[i];
      }
      continue;
    }
    const int64_t rows = smaller(kLanes, m1 - m);
    for (int64_t u = 0; u < units; u += kLanes) {
      Bits block[kLanes];
      const int64_t count = smaller(kLanes, units - u);
      for (int64_t i = 0; i < kLanes; ++i) {
        const int64_t k = (u + i) * Unit::depth;
        block[i] = i < count ? Unit::across(p + k * a.stride, a.stride, kc - k, rows) : Bits{};
      }
      transpose(block);
      for (int64_t r = 0; r < rows; ++r)
        if (count == kLanes)
          memcpy(row + r * units + u, &block[r], sizeof block[r]);
        else
          for (int64_t i = 0; i < count; ++i) row[r * units + u + i] = block[r][i];
    }
  }
}

template <typename Unit, typename T>
void pack_b(const Operand& b, int64_t n0, int64_t n, int64_t k0, int64_t kc, uint32_t* to) {
  const int64_t width = ceil_div(n, kLanes) * kLanes;
  const auto pack = b.transposed ? pack_transposed<Unit, T> : pack_rows<Unit, T>;
  pack(at<T>(b, k0, n0), b.stride, n, kc, width, to);
}

template <typename Unit, typename C>
void multiply(const Product& p, const uint32_t* packed_a, const uint32_t* panel, int64_t m0, int64_t m1, int64_t n0,
              int64_t n, int64_t k0, int64_t kc) {
  const int64_t units = ceil_div(kc, Unit::depth), width = ceil_div(n, kLanes) * kLanes;
  const int64_t size = p.a.dtype == Dtype::f32 ? 4 : 2;
  Rows a;
  if (packed_a)
    a = {reinterpret_cast<const char*>(packed_a), 4 * units, 4};
  else
    a = {static_cast<const char*>(p.a.data) + (m0 * p.a.stride + k0) * size, p.a.stride * size, 4};
  const Store out = {static_cast<C*>(p.c) + m0 * p.c_stride + n0, p.c_stride, p.accumulate,
                     p.bias ? p.bias + n0 : nullptr,
                     p.residual ? p.residual + m0 * p.residual_stride + n0 : nullptr, p.residual_stride};
  for (int64_t m = 0; m < m1 - m0; m += kTileRows) {
    const Rows rows = {a.base + m * a.row, a.row, a.unit};
    const Store store = {static_cast<C*>(out.c) + m * out.c_stride, out.c_stride, out.accumulate, out.bias,
                         out.residual ? out.residual + m * out.residual_stride : nullptr, out.residual_stride};
    multiply_tile<Unit, C>(smaller(kTileRows, m1 - m0 - m), n, width, rows, panel, units, store);
  }
}

template <typename Unit>
constexpr GemmKernels kernels() {
  return {kPanel,
          Unit::depth,
          kTileRows,
          in_place<Unit>,
          [](const Operand& a, int64_t m0, int64_t m1, int64_t k0, int64_t kc, uint32_t* to) {
            (a.dtype == Dtype::f32 ? pack_a<Unit, float> : pack_a<Unit, uint16_t>)(a, m0, m1, k0, kc, to);
          },
          [](const Operand& b, int64_t n0, int64_t n, int64_t k0, int64_t kc, uint32_t* to) {
            (b.dtype == Dtype::f32 ? pack_b<Unit, float> : pack_b<Unit, uint16_t>)(b, n0, n, k0, kc, to);
          },
          [](const Product& p, const uint32_t* packed_a, const uint32_t* panel, int64_t m0, int64_t m1, int64_t n0,
             int64_t n, int64_t k0, int64_t kc) {
            (p.c_dtype == Dtype::f32 ? multiply<Unit, float> : multiply<Unit, uint16_t>)(p, packed_a, panel, m0, m1, n0,
                                                                                         n, k0, kc);
          }};
}

}  // namespace

namespace LLMFAST_ISA {
extern const GemmTable gemm_kernels = {kernels<FloatUnit>(), kernels<BfloatUnit>()};
}  // namespace LLMFAST_ISA

}  // namespace llmfast::cpu
