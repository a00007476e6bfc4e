#pragma once
// Dropout masks by counter (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", 2011: Philox4x32-10): the mask
// of an element depends on its place and a seed alone, never on the instruction set, the threads or the tiles, so that a
// backward pass makes it again instead of keeping it, and a kernel on another device can make the same bits:
//
//   key     = (low half of seed, high half of seed)                                 seed: 64 bits, one a call of an op
//   counter = (low half of column / 4, low half of row, high half of row, high half of column / 4)
//   word    = output word number column % 4; the element is dropped where word < drop = round(p 2^32)
//   kept elements are multiplied by 2^32 / (2^32 - drop)
//
// A tensor (..., N): column = index in the last dimension, row = index over the others, flattened.
// Attention probabilities: column = key, row = (batch * heads + head) * 2^32 + query.
// In Triton: tl.philox(seed, c0, c1, c2, c3), whose four results are the words of four neighbouring columns.
#include <stdint.h>

namespace llmfast::cpu {

// drop == 0: nothing is dropped, and the scale is 1.
struct Dropout {
  uint64_t seed;
  uint32_t drop;
  float scale;
};

namespace {

// p in [0, 1), rounded to a multiple of 2^-32.
inline Dropout make_dropout(int64_t seed, double p) {
  const double two32 = 4294967296.0, drop = p * two32 + 0.5;
  const uint32_t limit = drop >= two32 ? 0xFFFFFFFFu : uint32_t(drop);
  return {uint64_t(seed), limit, float(two32 / (two32 - limit))};
}

inline int64_t attention_row(int64_t batch_and_head, int64_t query) { return batch_and_head * (int64_t(1) << 32) + query; }

struct Philox {
  static constexpr uint32_t multiplier0 = 0xD2511F53, multiplier1 = 0xCD9E8D57;
  static constexpr uint32_t weyl0 = 0x9E3779B9, weyl1 = 0xBB67AE85;
  static constexpr int rounds = 10;
};

}  // namespace
}  // namespace llmfast::cpu
