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

template <typename Unit, typename T>
void pack_a(const Operand& a, int64_t M, int64_t m0, int64_t rows, int64_t k0, int64_t kc, uint32_t* to) {
  const int64_t units = ceil_div(kc, Unit::depth);
  if (!a.transposed) {
    for (int64_t i = 0; i < smaller(rows, M - m0); ++i) pack_row<Unit>(at<T>(a, m0 + i, k0), kc, to + i * units);
    return;
  }
  // A few rows of storage at a time: where they lie a multiple of 4096 bytes apart, the nearest cache holds no more.
  constexpr int64_t step = 8;
  for (int64_t u = 0; u < units; u += step)
    for (int64_t i = 0; i < rows; i += kTileRows) {
      const int64_t k = u * Unit::depth;
      pack_tile<Unit>(at<T>(a, m0 + i, k0 + k), a.stride, M - m0 - i, smaller(step * Unit::depth, kc - k),
                      to + i * units + u * kTileRows);
    }
}

template <typename Unit, typename T>
void pack_b(const Operand& b, int64_t n0, int64_t columns, int64_t k0, int64_t kc, uint32_t* to) {
  const auto pack = b.transposed ? pack_transposed<Unit, T> : pack_rows<Unit, T>;
  for (int64_t j = 0; j < columns; j += kPanel, to += kPanel * ceil_div(kc, Unit::depth)) {
    const int64_t n = smaller(kPanel, columns - j);
    pack(at<T>(b, k0, n0 + j), b.stride, n, kc, ceil_div(n, kLanes) * kLanes, to);
  }
}

// Of int8 rows, each with its scale: some of a panel's elements at a time are made float first.
template <typename Unit>
void pack_b_int8(const Operand& b, int64_t n0, int64_t columns, int64_t k0, int64_t kc, uint32_t* to) {
  constexpr int64_t step = 4 * kLanes * Unit::depth;
  float floats[kPanel * step];
  for (int64_t j = 0; j < columns; j += kPanel, to += kPanel * ceil_div(kc, Unit::depth)) {
    const int64_t n = smaller(kPanel, columns - j), width = ceil_div(n, kLanes) * kLanes;
    for (int64_t k = 0; k < kc; k += step) {
      const int64_t count = smaller(step, kc - k);
      for (int64_t i = 0; i < n; ++i) {
        const int8_t* from = at<int8_t>(b, k0 + k, n0 + j + i);
        const float scale = b.scales[n0 + j + i];
        for (int64_t c = 0; c < count; ++c) floats[i * step + c] = float(from[c]) * scale;
      }
      pack_transposed<Unit>(floats, step, n, count, width, to + k / Unit::depth * width);
    }
  }
}

template <typename Unit, typename C>
void multiply(const Operand& a, const uint32_t* packed_a, const uint32_t* panels, int64_t m0, int64_t rows,
              int64_t columns, int64_t k0, int64_t kc, const BlockStore& out) {
  const int64_t units = ceil_div(kc, Unit::depth), size = a.dtype == Dtype::f32 ? 4 : 2;
  const char* first = packed_a ? reinterpret_cast<const char*>(packed_a)
                               : static_cast<const char*>(a.data) + (m0 * a.stride + k0) * size;
  const bool tiles = packed_a && a.transposed;  // unit by unit, not row by row
  const int64_t row = tiles ? 4 : packed_a ? 4 * units : a.stride * size, unit = tiles ? 4 * kTileRows : 4;
  const int64_t tile = packed_a ? 4 * kTileRows * units : kTileRows * row;
  for (int64_t n = 0; n < columns; n += kPanel, panels += kPanel * units) {
    const int64_t width = smaller(kPanel, columns - n);
    Rows from = {first, row, unit};
    for (int64_t m = 0; m < rows; m += kTileRows, from.base += tile) {
      const Store store = {static_cast<C*>(out.c) + m * out.c_stride + n, out.c_stride, out.accumulate,
                           out.bias ? out.bias + n : nullptr,
                           out.residual ? out.residual + m * out.residual_stride + n : nullptr, out.residual_stride};
      multiply_tile<Unit, C>(smaller(kTileRows, rows - m), width, ceil_div(width, kLanes) * kLanes, from, panels, units,
                             store);
    }
  }
}

#if defined(__FMA__) || defined(__aarch64__)
constexpr int64_t kShortUnits = 128;
#else
constexpr int64_t kShortUnits = 32;  // every term is rounded twice
#endif

template <typename Unit>
constexpr GemmKernels kernels() {
  return {kPanel,
          kTileRows,
          Unit::depth,
          kShortUnits,
          in_place<Unit>,
          [](const Operand& a, int64_t M, int64_t m0, int64_t rows, int64_t k0, int64_t kc, uint32_t* to) {
            (a.dtype == Dtype::f32 ? pack_a<Unit, float> : pack_a<Unit, uint16_t>)(a, M, m0, rows, k0, kc, to);
          },
          [](const Operand& b, int64_t n0, int64_t columns, int64_t k0, int64_t kc, uint32_t* to) {
            const auto pack = b.dtype == Dtype::i8    ? pack_b_int8<Unit>
                              : b.dtype == Dtype::f32 ? pack_b<Unit, float>
                                                      : pack_b<Unit, uint16_t>;
            pack(b, n0, columns, k0, kc, to);
          },
          [](const Operand& a, const uint32_t* packed_a, const uint32_t* panels, int64_t m0, int64_t rows,
             int64_t columns, int64_t k0, int64_t kc, const BlockStore& out) {
            (out.c_dtype == Dtype::f32 ? multiply<Unit, float> : multiply<Unit, uint16_t>)(a, packed_a, panels, m0, rows,
                                                                                           columns, k0, kc, out);
          }};
}

}  // namespace

namespace LLMFAST_ISA {
extern const GemmTable gemm_kernels = {kernels<FloatUnit>(), kernels<BfloatUnit>()};
}  // namespace LLMFAST_ISA

}  // namespace llmfast::cpu
