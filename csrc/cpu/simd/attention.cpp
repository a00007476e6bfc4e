// Causal attention of one head, blockwise with an online softmax (Rabe, Staats, 2021; Dao et al., "FlashAttention", 2022).
//   forward:  S = scale Q K^T over a block of queries and one of keys, P = exp(S - max), out = sum P V / sum P,
//             lse = max + log(sum P); a later block of keys rescales what the earlier ones gave
//   backward: P = exp(S - lse), dP = dO V^T, dS = scale P (dP - rowsum(P dP)), dV = P^T dO, dQ = dS K, dK = dS^T Q
//             where rowsum(P dP) = rowsum(dO out) for rows of more than one block of keys
// Products take operands in the units of tile.h. A tile of kTileRows queries computes no more keys than its last query sees.
#include "cpu/attention.h"

#include <float.h>

#include "cpu/simd/attention_tile.h"
#include "cpu/simd/philox.h"
#include "cpu/simd/vec.h"

namespace llmfast::cpu {
namespace {

template <typename T>
const T* row(const Heads& x, const AttentionPart& p, int64_t t) {
  return static_cast<const T*>(x.data) + p.b * x.batch + p.h * x.head + t * x.row;
}
template <typename T>
T* row(const MutableHeads& x, const AttentionPart& p, int64_t t) {
  return static_cast<T*>(x.data) + p.b * x.batch + p.h * x.head + t * x.row;
}

int64_t clamp(int64_t x, int64_t low, int64_t high) { return x < low ? low : x > high ? high : x; }

// Keys [0, end) may be seen by query i, where the document is the same.
int64_t key_end(const Attention& a, int64_t b, int64_t i) {
  const int64_t valid = a.kv_lens ? clamp(a.kv_lens[b], 0, a.Tk) : a.Tk;
  return clamp(i + 1 + a.Tk - a.Tq, 0, valid);
}

// Scratch, handed out from the front; every piece is a multiple of 64 bytes.
struct Arena {
  uint32_t* next;
  uint32_t* words(int64_t n) {
    uint32_t* p = next;
    next += round_up(n, 16);
    return p;
  }
  float* floats(int64_t n) { return reinterpret_cast<float*>(words(n)); }
};

// The words that a block of rows takes, in units of Unit.
template <typename Unit>
struct Sizes {
  int64_t depth;  // words of a row of D elements along a sum
  int64_t width;  // words of a row of D elements across the sum: whole vectors
  explicit Sizes(const Attention& a) : depth(ceil_div(a.D, Unit::depth)), width(round_up(a.D, kLanes)) {}
  int64_t transposed(int64_t rows) const { return round_up(rows, kPanel) * depth; }
  int64_t natural(int64_t rows) const { return ceil_div(rows, Unit::depth) * width; }
};

// A row of scores: a block of keys and the zeros behind them.
constexpr int64_t kScores = kKeyBlock + kPanel;
constexpr int64_t kScoreBlock = kQueryBlock * kScores;

// The transpose of rows of D elements, in panels of kPanel of them.
template <typename Unit, typename T>
void pack_panels(const T* from, int64_t stride, int64_t rows, int64_t D, uint32_t* to) {
  for (int64_t r = 0; r < rows; r += kPanel, to += kPanel * ceil_div(D, Unit::depth))
    pack_transposed<Unit>(from + r * stride, stride, rows - r, D, kPanel, to);
}

// Scores of other documents become -inf, the others are scaled.
void hide_documents(float* s, int64_t n, const int64_t* keys, int64_t own, float scale) {
  for (int64_t j = 0; j < n; ++j) s[j] = keys[j] == own ? s[j] * scale : -INFINITY;
}

// S (rows, columns) = A B^T for the causal part alone: tile of rows m computes `seen(last row of it)` columns.
template <typename Unit, typename Seen>
void score_tiles(int64_t rows, int64_t columns, int64_t depth, const uint32_t* a, const uint32_t* panels, float* s,
                 Seen seen) {
  for (int64_t p = 0; p < columns; p += kPanel)
    for (int64_t m = 0; m < rows; m += kTileRows) {
      const int64_t mr = smaller(kTileRows, rows - m), n = seen(m + mr - 1) - p;
      if (n <= 0) continue;
      FloatTiles<Unit>::of(mr, smaller(kTileVecs, ceil_div(n, kLanes)))(
          depth, a + m * depth, depth, 1, panels + p * depth, kPanel, s + m * kScores + p, kScores, false);
    }
}

// C (mr, width) (+)= A B of one tile of rows, A[i][k] at a[i * row_step + k * k_step].
template <typename Unit>
void row_tile(int64_t mr, int64_t width, int64_t k, const uint32_t* a, int64_t row_step, int64_t k_step,
              const uint32_t* b, float* c, bool add) {
  for (int64_t p = 0; p < width; p += kPanel)
    FloatTiles<Unit>::of(mr, smaller(kTileVecs, (width - p) / kLanes))(k, a, row_step, k_step, b + p, width, c + p, width,
                                                                       add);
}

template <typename T>
void convert_row(const float* x, float factor, T* y, int64_t n) {
  for_row<2>(0, n, [&](auto lanes, int64_t i, int) { lanes.store(y + i, lanes.load(x + i) * factor); });
}

// ---- Forward ----

// One row of scores s[0, n) becomes its part of P, as elements of E's type, followed by zeros; top and sum go on. Returns the
// factor of what earlier blocks of keys gave.
template <typename Unit>
float softmax_row(float* s, int64_t n, float scale, float* top, float* sum, const Dropout& dropout, int64_t mask_row,
                  int64_t key0) {
  auto* p = reinterpret_cast<ElementOf<Unit>*>(s);
  const float before = *top;
  float rescale = 1.f;
  if (n > 0) {
    const int64_t full = n / kLanes * kLanes;
    Vec most = Vec{} + before;
    for (int64_t j = 0; j < full; j += kLanes) most = larger(Wide::load(s + j) * scale, most);
    if (full < n) most = larger(first_lanes(Wide::load(s + full) * scale, n - full, before), most);
    const float now = largest(most);
    Vec total = {};
    for (int64_t j = 0; j < full; j += kLanes) {
      const Vec e = exp_any(rounded(Wide::load(s + j) * scale) - now);
      total += e;
      Wide::store(p + j, e);
    }
    if (full < n) {
      const Vec e = first_lanes(exp_any(rounded(Wide::load(s + full) * scale) - now), n - full);
      total += e;
      Wide::store(p + full, e);
    }
    if (before != now) rescale = before == -FLT_MAX ? 0.f : exp_any(before - now);
    *sum = *sum * rescale + across(total);
    *top = now;
    if (dropout.drop)
      for_dropout(dropout, mask_row, key0, key0 + n, [&](auto lanes, int64_t i, auto factor) {
        lanes.store(p + i - key0, lanes.load(p + i - key0) * factor);
      });
  }
  for (int64_t j = round_up(n, kLanes); j < n + kTileRows; j += kLanes) Wide::store(p + j, Vec{});
  return rescale;
}

template <typename T>
void forward(const Attention& a, const AttentionPart& part, Heads q, Heads k, Heads v, MutableHeads out, float* lse,
             void* scratch) {
  using Unit = typename UnitFor<T>::type;
  const Sizes<Unit> size(a);
  Arena memory{static_cast<uint32_t*>(scratch)};
  const int64_t b = part.b, all = key_end(a, b, part.q1 - 1);
  uint32_t* keys = memory.words(size.transposed(all));
  uint32_t* values = memory.words(size.natural(all));
  uint32_t* queries = memory.words(kQueryBlock * size.depth);
  float* scores = memory.floats(kScoreBlock);
  float* y = memory.floats(kQueryBlock * size.width);
  float top[kQueryBlock], sum[kQueryBlock];
  if (all) {
    pack_panels<Unit>(row<T>(k, part, 0), k.row, all, a.D, keys);
    pack_rows<Unit>(row<T>(v, part, 0), v.row, a.D, all, size.width, values);
  }
  const int64_t bh = b * a.H + part.h;

  for (int64_t i0 = part.q0; i0 < part.q1; i0 += kQueryBlock) {
    const int64_t rows = smaller(kQueryBlock, part.q1 - i0), end = key_end(a, b, i0 + rows - 1);
    copy_rows<Unit>(row<T>(q, part, i0), q.row, rows, a.D, queries);
    for (int64_t r = 0; r < rows; ++r) top[r] = -FLT_MAX, sum[r] = 0.f;
    for (int64_t i = 0; i < rows * size.width; ++i) y[i] = 0.f;
    for (int64_t j0 = 0; j0 < end; j0 += kKeyBlock) {
      const int64_t columns = smaller(kKeyBlock, end - j0);
      const auto seen = [&](int64_t r) { return clamp(key_end(a, b, i0 + r) - j0, 0, columns); };
      score_tiles<Unit>(rows, columns, size.depth, queries, keys + j0 * size.depth, scores, seen);
      for (int64_t r = 0; r < rows; ++r) {
        float* s = scores + r * kScores;
        float scale = a.scale;
        if (a.doc_ids) {
          const int64_t* ids = a.doc_ids + b * a.Tk;
          hide_documents(s, seen(r), ids + j0, ids[i0 + r + a.Tk - a.Tq], scale);
          scale = 1.f;
        }
        const float rescale =
            softmax_row<Unit>(s, seen(r), scale, top + r, sum + r, a.dropout, attention_row(bh, i0 + r), j0);
        if (j0 && rescale != 1.f) convert_row(y + r * size.width, rescale, y + r * size.width, size.width);
      }
      for (int64_t m = 0; m < rows; m += kTileRows) {
        const int64_t mr = smaller(kTileRows, rows - m);
        const int64_t depth = ceil_div(seen(m + mr - 1), Unit::depth);
        row_tile<Unit>(mr, size.width, depth, reinterpret_cast<uint32_t*>(scores) + m * kScores, kScores, 1,
                    values + j0 / Unit::depth * size.width, y + m * size.width, true);
      }
    }
    for (int64_t r = 0; r < rows; ++r) {
      convert_row(y + r * size.width, sum[r] > 0.f ? 1.f / sum[r] : 0.f, row<T>(out, part, i0 + r), a.D);
      lse[bh * a.Tq + i0 + r] = sum[r] > 0.f ? top[r] + logf(sum[r]) : INFINITY;
    }
  }
}

// ---- Backward ----

// What the block of queries and the block of keys at hand have in common.
struct Block {
  const Attention& a;
  const AttentionPart& part;
  int64_t i0, rows, j0, columns;
  int64_t seen(int64_t r) const { return clamp(key_end(a, part.b, i0 + r) - j0, 0, columns); }
};

// One row of scores s[0, n) becomes P, followed by zeros up to whole vectors. Returns rowsum(dP P) / rowsum(P), of what
// dropout leaves of dP.
inline float probabilities(float* s, const float* dp, const float* factors, int64_t n, float scale, float lse) {
  Vec total = {}, sum = {};
  for (int64_t j = 0; j < n; j += kLanes) {
    // The product is rounded as lse was: P is 1, not nearly so, where a query sees one key.
    const Vec e = first_lanes(exp_any(rounded(Wide::load(s + j) * scale) - lse), n - j);
    Vec g = first_lanes(Wide::load(dp + j), n - j);
    if (factors) g *= Wide::load(factors + j);
    total += e;
    sum += e * g;
    Wide::store(s + j, e);
  }
  const float all = across(total);
  return all > 0.f ? across(sum) / all : 0.f;
}

// Rows r and r + 1 of S and dP become P and dS: as pairs of the two rows, or each in its own (see Unit::depth); and dS once more,
// row by row, in `by_row`. Zeros follow. delta: rowsum(dO out), for rows that see more than the first block of keys.
template <typename Unit>
void gradient_rows(const Block& block, int64_t r, float* s, float* dp, ElementOf<Unit>* by_row, const float* lse,
                   const float* delta) {
  const Attention& a = block.a;
  int64_t n[Unit::depth];
  float factors[Unit::depth][kScores], mean[Unit::depth];
  const int64_t* ids = a.doc_ids ? a.doc_ids + block.part.b * a.Tk : nullptr;
  for (int u = 0; u < Unit::depth; ++u) {
    float* scores = s + u * kScores;
    n[u] = r + u < block.rows ? block.seen(r + u) : 0;
    if (ids && n[u]) hide_documents(scores, n[u], ids + block.j0, ids[block.i0 + r + u + a.Tk - a.Tq], a.scale);
    const int64_t mask_row = attention_row(block.part.b * a.H + block.part.h, block.i0 + r + u);
    if (a.dropout.drop) {
      for_dropout(a.dropout, mask_row, block.j0, block.j0 + n[u], [&](auto lanes, int64_t i, auto factor) {
        lanes.store(factors[u] + i - block.j0, factor);
      });
      for (int64_t j = n[u]; j % kLanes; ++j) factors[u][j] = 0.f;
    }
    mean[u] = probabilities(scores, dp + u * kScores, a.dropout.drop ? factors[u] : nullptr, n[u], ids ? 1.f : a.scale,
                            n[u] ? lse[r + u] : 0.f);
    // With all its keys at hand, dP and its mean carry the same rounding errors, which cancel where one key has all the weight.
    if (n[u] && key_end(a, block.part.b, block.i0 + r + u) > kKeyBlock) mean[u] = delta[r + u];
  }
  const int64_t last = n[Unit::depth - 1] > n[0] ? n[Unit::depth - 1] : n[0];
  for (int64_t j = 0; j < last + kTileRows; j += kLanes) {
    Vec p[Unit::depth], ds[Unit::depth];
    for (int u = 0; u < Unit::depth; ++u) {
      p[u] = ds[u] = Vec{};
      if (j >= n[u]) continue;
      p[u] = Wide::load(s + u * kScores + j);
      Vec g = first_lanes(Wide::load(dp + u * kScores + j), n[u] - j), dropped = p[u];
      if (a.dropout.drop) {
        const Vec factor = Wide::load(factors[u] + j);
        g *= factor;
        dropped *= factor;
      }
      ds[u] = p[u] * (g - mean[u]) * a.scale;
      p[u] = dropped;
    }
    store_unit<Unit>(s + j, p);
    store_unit<Unit>(dp + j, ds);
    for (int u = 0; u < Unit::depth; ++u) Wide::store(by_row + u * kScores + j, ds[u]);
  }
}

template <typename T>
void backward(const Attention& a, const AttentionPart& part, Heads q, Heads k, Heads v, Heads out, Heads dout,
              const float* lse, MutableHeads dq, MutableHeads dk, MutableHeads dv, void* scratch) {
  using Unit = typename UnitFor<T>::type;
  const Sizes<Unit> size(a);
  Arena memory{static_cast<uint32_t*>(scratch)};
  uint32_t *keys_t = memory.words(size.transposed(kKeyBlock)), *values_t = memory.words(size.transposed(kKeyBlock));
  uint32_t* keys = memory.words(size.natural(kKeyBlock));
  uint32_t *queries = memory.words(kQueryBlock * size.depth), *douts = memory.words(kQueryBlock * size.depth);
  uint32_t *queries_n = memory.words(size.natural(kQueryBlock)), *douts_n = memory.words(size.natural(kQueryBlock));
  float *s = memory.floats(kScoreBlock), *dp = memory.floats(kScoreBlock);
  auto* ds = reinterpret_cast<ElementOf<Unit>*>(memory.words(kScoreBlock));
  float *dk_sum = memory.floats((kKeyBlock + kTileRows) * size.width);
  float *dv_sum = memory.floats((kKeyBlock + kTileRows) * size.width);
  const int64_t all = part.q1 - part.q0;
  float* delta = memory.floats(all);
  float* dq_sum = memory.floats(dq.data ? all * size.width : 0);
  const float* lse_rows = lse + (part.b * a.H + part.h) * a.Tq;
  for (int64_t r = clamp(kKeyBlock - (a.Tk - a.Tq) - part.q0, 0, all) / kLanes * kLanes; r < all; r += kLanes) {
    const int64_t n = smaller(kLanes, all - r);
    pack_transposed<FloatUnit>(row<T>(out, part, part.q0 + r), out.row, n, a.D, kLanes, keys_t);
    pack_transposed<FloatUnit>(row<T>(dout, part, part.q0 + r), dout.row, n, a.D, kLanes, values_t);
    Vec sum = {};
    for (int64_t d = 0; d < a.D; ++d) {
      Bits y, dy;
      memcpy(&y, keys_t + d * kLanes, sizeof y);
      memcpy(&dy, values_t + d * kLanes, sizeof dy);
      sum = FloatUnit::multiply_add(sum, y, dy);
    }
    Wide::store(delta + r, sum);
  }
  if (dq.data)
    for (int64_t i = 0; i < all * size.width; ++i) dq_sum[i] = 0.f;

  for (int64_t j0 = part.k0; j0 < part.k1; j0 += kKeyBlock) {
    const int64_t columns = smaller(kKeyBlock, part.k1 - j0);
    pack_panels<Unit>(row<T>(k, part, j0), k.row, columns, a.D, keys_t);
    pack_panels<Unit>(row<T>(v, part, j0), v.row, columns, a.D, values_t);
    if (dq.data) pack_rows<Unit>(row<T>(k, part, j0), k.row, a.D, columns, size.width, keys);
    for (int64_t i = 0; i < columns * size.width; ++i) dk_sum[i] = dv_sum[i] = 0.f;
    for (int64_t i0 = part.q0; i0 < part.q1; i0 += kQueryBlock) {
      const Block block{a, part, i0, smaller(kQueryBlock, part.q1 - i0), j0, columns};
      const int64_t rows = block.rows, most = block.seen(rows - 1);
      if (!most) continue;
      copy_rows<Unit>(row<T>(q, part, i0), q.row, rows, a.D, queries);
      copy_rows<Unit>(row<T>(dout, part, i0), dout.row, rows, a.D, douts);
      const auto seen = [&](int64_t r) { return block.seen(r); };
      score_tiles<Unit>(rows, most, size.depth, queries, keys_t, s, seen);
      score_tiles<Unit>(rows, most, size.depth, douts, values_t, dp, seen);
      for (int64_t r = 0; r < rows; r += Unit::depth)
        gradient_rows<Unit>(block, r, s + r * kScores, dp + r * kScores, ds + r * kScores, lse_rows + i0,
                         delta + i0 - part.q0);
      if (dq.data)
        for (int64_t m = 0; m < rows; m += kTileRows) {
          const int64_t mr = smaller(kTileRows, rows - m);
          row_tile<Unit>(mr, size.width, ceil_div(seen(m + mr - 1), Unit::depth),
                      reinterpret_cast<uint32_t*>(ds) + m * kScores / Unit::depth, kScores / Unit::depth, 1, keys,
                      dq_sum + (i0 - part.q0 + m) * size.width, true);
        }
      if (!dk.data) continue;
      pack_rows<Unit>(row<T>(q, part, i0), q.row, a.D, rows, size.width, queries_n);
      pack_rows<Unit>(row<T>(dout, part, i0), dout.row, a.D, rows, size.width, douts_n);
      for (int64_t c = 0; c < most; c += kTileRows) {
        const int64_t mr = smaller(kTileRows, columns - c);
        // Only the queries from the first on that sees key c, pair by pair.
        const int64_t first = clamp(j0 + c - (a.Tk - a.Tq) - i0, 0, rows) / Unit::depth, step = kScores * Unit::depth;
        const int64_t depth = ceil_div(rows, Unit::depth) - first;
        const auto transposed = [&](const float* x) { return reinterpret_cast<const uint32_t*>(x) + first * step + c; };
        row_tile<Unit>(mr, size.width, depth, transposed(s), 1, step, douts_n + first * size.width,
                    dv_sum + c * size.width, true);
        row_tile<Unit>(mr, size.width, depth, transposed(dp), 1, step, queries_n + first * size.width,
                    dk_sum + c * size.width, true);
      }
    }
    if (!dk.data) continue;
    for (int64_t c = 0; c < columns; ++c) {
      convert_row(dk_sum + c * size.width, 1.f, row<T>(dk, part, j0 + c), a.D);
      convert_row(dv_sum + c * size.width, 1.f, row<T>(dv, part, j0 + c), a.D);
    }
  }
  if (dq.data)
    for (int64_t r = 0; r < all; ++r) convert_row(dq_sum + r * size.width, 1.f, row<T>(dq, part, part.q0 + r), a.D);
}

// ---- Table ----

template <typename T>
int64_t forward_words(const Attention& a, int64_t keys) {
  const Sizes<typename UnitFor<T>::type> size(a);
  return size.transposed(keys) + size.natural(keys) + kQueryBlock * (size.depth + size.width) + kScoreBlock + 5 * 16;
}

template <typename T>
int64_t backward_words(const Attention& a, int64_t queries) {
  const Sizes<typename UnitFor<T>::type> size(a);
  return 2 * size.transposed(kKeyBlock) + size.natural(kKeyBlock) + 2 * kQueryBlock * size.depth +
         2 * size.natural(kQueryBlock) + 3 * kScoreBlock + 2 * (kKeyBlock + kTileRows) * size.width +
         queries * (size.width + 1) + 14 * 16;
}

}  // namespace

namespace LLMFAST_ISA {
extern const AttentionTable attention = {{forward_words<float>, backward_words<float>, forward<float>, backward<float>},
                                         {forward_words<uint16_t>, backward_words<uint16_t>, forward<uint16_t>,
                                          backward<uint16_t>}};
}  // namespace LLMFAST_ISA

}  // namespace llmfast::cpu
