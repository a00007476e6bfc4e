#include "cpu/dropout.h"

#include "cpu/simd/philox.h"

namespace llmfast::cpu {
namespace {

template <typename T>
void rows(const T* x, T* y, const Dropout& d, int64_t row0, int64_t row1, int64_t n) {
  for (int64_t r = row0; r < row1; ++r)
    for_dropout(d, r, 0, n, [&](auto lanes, int64_t i, auto factor) {
      lanes.store(y + r * n + i, lanes.load(x + r * n + i) * factor);
    });
}

}  // namespace

namespace LLMFAST_ISA {
extern const DropoutTable dropout = {rows, rows};
}  // namespace LLMFAST_ISA

}  // namespace llmfast::cpu
