#pragma once
// What the attention kernels of sm_80 share: tiles of rows in shared memory, products of them on tensor cores, the mask, and
// dropout. T is __half, __nv_bfloat16, or float, whose products take three of TF32 (a = high + low, all but low low): as
// exact as float32's own.
#include "cuda/attention.h"
#include "cuda/mma.h"

namespace llmfast::cuda {
namespace {

constexpr float kLog2E = 1.4426950408889634f;
constexpr int kMaxSharedBytes = 99 << 10;  // of a block on every GPU from sm_80 on

__device__ inline int lane_of_warp() { return threadIdx.x & 31; }
__device__ inline int smaller(int a, int b) { return a < b ? a : b; }
__device__ inline int larger(int a, int b) { return a > b ? a : b; }

__device__ inline float float_of(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

// ---- tiles -----------------------------------------------------------------------------------------------------------

// 16-byte chunk number `chunk` of a row of a (rows, D) tile in shared memory. Equal chunks of eight rows lie in different
// banks.
template <int D, typename T>
__device__ inline T* chunk_of(T* tile, int row, int chunk) {
  static_assert(D * sizeof(T) % 128 == 0);
  return tile + row * D + (chunk ^ (row & 7)) * int(16 / sizeof(T));
}

// Begins to copy rows first .. first + kRows - 1 of a head into a tile; zeros from row `limit` and column `columns` on.
template <int kRows, int D, int kThreads, typename T>
__device__ inline void load_rows(T* tile, const T* head, int64_t step, int first, int limit, int columns) {
  constexpr int kWidth = 16 / sizeof(T), kChunks = D / kWidth;
  static_assert(kRows * kChunks % kThreads == 0);
#pragma unroll
  for (int n = 0; n < kRows * kChunks / kThreads; ++n) {
    const int i = n * kThreads + threadIdx.x, row = i / kChunks, chunk = i % kChunks;
    const bool there = first + row < limit && chunk * kWidth < columns;
    cp_async16(chunk_of<D>(tile, row, chunk), there ? head + (first + row) * step + chunk * kWidth : head, there);
  }
}

// ---- products --------------------------------------------------------------------------------------------------------

template <typename T>
struct Mma {
  static constexpr int kStep = 16;  // columns of A, or rows of B, a product
  template <int N>
  struct Fragment {
    uint32_t r[N];
  };
  using A = Fragment<4>;
  using B = Fragment<2>;
  template <int N>
  static __device__ void set(Fragment<N>& f, const uint32_t* r) {
#pragma unroll
    for (int i = 0; i < N; ++i) f.r[i] = r[i];
  }
  // From kStep / 8 neighbouring fragments of a result.
  static __device__ void set(A& f, const float (*d)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) f.r[i] = pack2<T>(d[i / 2][i % 2 * 2], d[i / 2][i % 2 * 2 + 1]);
  }
  static __device__ void negate(A& f) {
#pragma unroll
    for (int i = 0; i < 4; ++i) f.r[i] ^= 0x80008000u;
  }
  static __device__ void add(float (&d)[4], const A& a, const B& b) { mma_m16n8k16<T>(d, a.r, b.r); }
};

template <>
struct Mma<float> {
  static constexpr int kStep = 8;
  template <int N>
  struct Fragment {
    uint32_t high[N], low[N];
    __device__ void set(int i, float x) {
      high[i] = to_tf32(x);
      low[i] = to_tf32(x - float_of(high[i]));
    }
  };
  using A = Fragment<4>;
  using B = Fragment<2>;
  template <int N>
  static __device__ void set(Fragment<N>& f, const uint32_t* r) {
#pragma unroll
    for (int i = 0; i < N; ++i) f.set(i, float_of(r[i]));
  }
  // Columns 0 .. 7 of A are columns 0, 2, 4, 6, 1, 3, 5, 7 of the result; load_columns gives B's rows in that order too.
  static __device__ void set(A& f, const float (*d)[4]) {
    f.set(0, d[0][0]);
    f.set(1, d[0][2]);
    f.set(2, d[0][1]);
    f.set(3, d[0][3]);
  }
  static __device__ void negate(A& f) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      f.high[i] ^= 0x80000000u;
      f.low[i] ^= 0x80000000u;
    }
  }
  static __device__ void add(float (&d)[4], const A& a, const B& b) {
    mma_m16n8k8_tf32(d, a.low, b.high);
    mma_m16n8k8_tf32(d, a.high, b.low);
    mma_m16n8k8_tf32(d, a.high, b.high);
  }
};

// Rows row .. row + 15 of a tile as A; `step` counts kStep columns.
template <int D, typename T>
__device__ inline void load_a(typename Mma<T>::A& a, T* tile, int row, int step) {
  const int lane = lane_of_warp();
  uint32_t r[4];
  ldmatrix<4>(r, chunk_of<D>(tile, row + (lane & 15), step * 2 + (lane >> 4)));
  Mma<T>::set(a, r);
}

// Rows row .. row + 15 of a tile as the columns of two B.
template <int D, typename T>
__device__ inline void load_rows_as_columns(typename Mma<T>::B (&b)[2], T* tile, int row, int step) {
  const int lane = lane_of_warp();
  uint32_t r[4];
  ldmatrix<4>(r, chunk_of<D>(tile, row + (lane & 7) + (lane >> 4) * 8, step * 2 + (lane >> 3 & 1)));
  Mma<T>::set(b[0], r);
  Mma<T>::set(b[1], r + 2);
}

// Rows row .. row + kStep - 1 of a tile, columns column .. column + 15, as two B.
template <int D, typename T>
__device__ inline void load_columns(typename Mma<T>::B (&b)[2], T* tile, int row, int column) {
  const int lane = lane_of_warp();
  if constexpr (sizeof(T) == 2) {
    uint32_t r[4];
    ldmatrix<4, true>(r, chunk_of<D>(tile, row + (lane & 15), column / 8 + (lane >> 4)));
    Mma<T>::set(b[0], r);
    Mma<T>::set(b[1], r + 2);
  } else {
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int x = column + n * 8 + lane / 4;
        b[n].set(i, chunk_of<D>(tile, row + lane % 4 * 2 + i, x / 4)[x % 4]);
      }
  }
}

// s (kTiles x 16, kColumns) = A tile^T, tile: (kColumns, D); fragment(m, step) gives A.
template <int D, int kTiles, int kColumns, typename T, typename F>
__device__ inline void multiply_rows(float (&s)[kTiles][kColumns / 8][4], F fragment, T* tile) {
#pragma unroll
  for (int m = 0; m < kTiles; ++m)
#pragma unroll
    for (int n = 0; n < kColumns / 8; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) s[m][n][e] = 0.f;
#pragma unroll(sizeof(T) == 4 ? 1 : 8)  // all steps of float32 at once would spill
  for (int step = 0; step < D / Mma<T>::kStep; ++step) {
    typename Mma<T>::A a[kTiles];
#pragma unroll
    for (int m = 0; m < kTiles; ++m) a[m] = fragment(m, step);
#pragma unroll
    for (int n = 0; n < kColumns / 8; n += 2) {
      typename Mma<T>::B b[2];
      load_rows_as_columns<D>(b, tile, n * 8, step);
#pragma unroll
      for (int m = 0; m < kTiles; ++m) {
        Mma<T>::add(s[m][n], a[m], b[0]);
        Mma<T>::add(s[m][n + 1], a[m], b[1]);
      }
    }
  }
}

// sum (kTiles x 16, D) += p tile, p: (kTiles x 16, kRows), rounded to T, tile: (kRows, D).
template <int D, int kTiles, int kRows, typename T>
__device__ inline void add_product(float (&sum)[kTiles][D / 8][4], const float (&p)[kTiles][kRows / 8][4], T* tile) {
  constexpr int kStep = Mma<T>::kStep;
#pragma unroll
  for (int step = 0; step < kRows / kStep; ++step) {
    typename Mma<T>::A a[kTiles];
#pragma unroll
    for (int m = 0; m < kTiles; ++m) Mma<T>::set(a[m], p[m] + step * (kStep / 8));
#pragma unroll
    for (int n = 0; n < D / 8; n += 2) {
      typename Mma<T>::B b[2];
      load_columns<D>(b, tile, step * kStep, n * 8);
#pragma unroll
      for (int m = 0; m < kTiles; ++m) {
        Mma<T>::add(sum[m][n], a[m], b[0]);
        Mma<T>::add(sum[m][n + 1], a[m], b[1]);
      }
    }
  }
}

// Rows first .. first + 15 of a head from a warp's (16, D), times a factor for each of the thread's two rows, by way of the
// warp's 16 rows of shared memory, which nobody has read or filled since the block, or the warpgroup, last met.
template <int D, typename T>
__device__ inline void store_rows(const float (&sum)[D / 8][4], const float (&factor)[2], T* rows, T* head, int64_t step,
                                  int first, int limit, int columns) {
  constexpr int kWidth = 16 / sizeof(T), kChunks = D / kWidth;
  const int lane = lane_of_warp(), g = lane / 4, t = lane % 4;
#pragma unroll
  for (int n = 0; n < D / 8; ++n)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int column = n * 8 + t * 2;
      Pack<T, 2> pair;
      pair.v[0] = T(sum[n][2 * h] * factor[h]);
      pair.v[1] = T(sum[n][2 * h + 1] * factor[h]);
      *reinterpret_cast<Pack<T, 2>*>(chunk_of<D>(rows, g + 8 * h, column / kWidth) + column % kWidth) = pair;
    }
  __syncwarp();
#pragma unroll
  for (int n = 0; n < 16 * kChunks / 32; ++n) {
    const int i = n * 32 + lane, row = i / kChunks, chunk = i % kChunks;
    if (first + row < limit && chunk * kWidth < columns)
      *reinterpret_cast<Pack<T, kWidth>*>(head + (first + row) * step + chunk * kWidth) =
          *reinterpret_cast<const Pack<T, kWidth>*>(chunk_of<D>(rows, row, chunk));
  }
}

// ---- which key a query sees ------------------------------------------------------------------------------------------

struct Mask {
  int Tq, offset, keys;  // a query's own key lies at query + offset; keys of this batch row
  const int64_t* docs;   // of this batch row, or null

  __device__ Mask(const Attention& a, int batch)
      : Tq(a.Tq), offset(a.Tk - a.Tq), keys(a.Tk), docs(a.doc_ids ? a.doc_ids + int64_t(batch) * a.Tk : nullptr) {
    if (!a.kv_lens) return;
    const int64_t length = a.kv_lens[batch];
    keys = length < 0 ? 0 : length < a.Tk ? int(length) : a.Tk;
  }
  __device__ bool sees(int query, int key) const {
    return query < Tq && key <= query + offset && key < keys && (!docs || docs[key] == docs[query + offset]);
  }
  // Whether every query from `query` on sees all of the keys up to `end`.
  __device__ bool sees_all(int query, int end) const { return end <= query + offset + 1 && end <= keys && !docs; }
  // The keys that a query before `end` may see lie before this.
  __device__ int end_of_keys(int end) const { return larger(smaller(smaller(end, Tq) + offset, keys), 0); }
};

// ---- dropout ---------------------------------------------------------------------------------------------------------

// Which elements of a fragment stay, rows queries and columns keys: bit e for element e. `row` is the Philox row of the
// fragment's first query, `key` its first key, a multiple of 8. Two lanes share a group of four keys: each makes the bits
// of one of their two queries.
__device__ inline unsigned kept_of_queries(uint64_t seed, uint32_t drop, int64_t row, int key) {
  const int lane = lane_of_warp(), t = lane % 4, odd = t & 1;
  const unsigned mine = kept<4>(seed, drop, row + lane / 4 + 8 * odd, key + (t >> 1) * 4);
  const unsigned other = __shfl_xor_sync(~0u, mine, 1);
  const unsigned first = odd ? other : mine, second = odd ? mine : other;  // of the queries g and g + 8
  return (first >> 2 * odd & 3) | (second >> 2 * odd & 3) << 2;
}

// The same, rows keys and columns queries: `key` is a multiple of 16. Four lanes share two groups of four keys and two
// queries.
__device__ inline unsigned kept_of_keys(uint64_t seed, uint32_t drop, int64_t row, int key) {
  const int lane = lane_of_warp(), g = lane / 4, t = lane % 4, part = g & 3;
  unsigned bits = kept<4>(seed, drop, row + 2 * t + (part & 1), key + (g & ~3) + 8 * (part >> 1)) << 4 * part;
  bits |= __shfl_xor_sync(~0u, bits, 4);
  bits |= __shfl_xor_sync(~0u, bits, 8);
  bits >>= part;
  return (bits & 1) | (bits >> 4 & 1) << 1 | (bits >> 8 & 1) << 2 | (bits >> 12 & 1) << 3;
}

// ---- the softmax of a warp's 16 queries, fragments (kKeys / 8, 4) ------------------------------------------------------

template <int kKeys>
__device__ inline void mask_scores(float (&s)[kKeys / 8][4], const Mask& mask, int query, int key0) {
  if (mask.sees_all(query, key0 + kKeys)) return;
  const int lane = lane_of_warp(), g = lane / 4, t = lane % 4;
#pragma unroll
  for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
    for (int e = 0; e < 4; ++e)
      if (!mask.sees(query + g + e / 2 * 8, key0 + n * 8 + t * 2 + e % 2)) s[n][e] = -INFINITY;
}

// One tile of keys: scores become weights. What was summed before is to be multiplied with `shrink`. scale is in base 2 and
// positive.
template <int kKeys8>
__device__ inline void softmax_step(float (&s)[kKeys8][4], float (&top)[2], float (&total)[2], float (&shrink)[2],
                                    float scale) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    float most = top[h];
#pragma unroll
    for (int n = 0; n < kKeys8; ++n) most = fmaxf(most, fmaxf(s[n][2 * h], s[n][2 * h + 1]));
    most = fmaxf(most, __shfl_xor_sync(~0u, most, 1));
    most = fmaxf(most, __shfl_xor_sync(~0u, most, 2));
    const float base = most == -INFINITY ? 0.f : most * scale;
    shrink[h] = fast_exp2(top[h] * scale - base);
    top[h] = most;
    total[h] *= shrink[h];
#pragma unroll
    for (int n = 0; n < kKeys8; ++n)
#pragma unroll
      for (int e = 2 * h; e < 2 * h + 2; ++e) {
        s[n][e] = fast_exp2(s[n][e] * scale - base);
        total[h] += s[n][e];
      }
  }
}

template <int D8>
__device__ inline void scale_rows(float (&sum)[D8][4], const float (&factor)[2]) {
#pragma unroll
  for (int n = 0; n < D8; ++n)
#pragma unroll
    for (int e = 0; e < 4; ++e) sum[n][e] *= factor[e / 2];
}

template <int kKeys>
__device__ inline void drop_weights(float (&p)[kKeys / 8][4], const Dropout& dropout, int64_t row, int key0) {
  const uint64_t seed = uint64_t(*dropout.seed);
#pragma unroll
  for (int n = 0; n < kKeys / 8; ++n) {
    const unsigned stays = kept_of_queries(seed, dropout.drop, row, key0 + n * 8);
#pragma unroll
    for (int e = 0; e < 4; ++e)
      if (!(stays >> e & 1)) p[n][e] = 0.f;
  }
}

// What the values that a warp's queries have summed are to be multiplied with; writes their lse.
__device__ inline void finish_rows(const float (&top)[2], const float (&total)[2], float size, float gain, float* lse,
                                   int query, int Tq, float (&factor)[2]) {
  const int lane = lane_of_warp();
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    float all = total[h];
    all += __shfl_xor_sync(~0u, all, 1);
    all += __shfl_xor_sync(~0u, all, 2);
    factor[h] = all == 0.f ? 0.f : gain / all;
    const int row = query + lane / 4 + 8 * h;
    if (lane % 4 == 0 && row < Tq) lse[row] = all == 0.f ? INFINITY : top[h] * size + logf(all);
  }
}

// ---- launches --------------------------------------------------------------------------------------------------------

template <typename T, typename H>
__device__ inline auto* head_of(const H& array, int batch, int head) {
  return static_cast<std::conditional_t<std::is_same_v<H, Heads>, const T, T>*>(array.data) + batch * array.batch +
         head * array.head;
}

// Calls f(T(), D, dropout) for the types, the head size that the tiles have, and whether there is dropout.
template <typename F>
cudaError_t dispatch(const Attention& a, F f) {
  const auto with_size = [&](auto t, auto size) {
    return a.dropout.seed ? f(t, size, std::true_type()) : f(t, size, std::false_type());
  };
  const auto with_type = [&](auto t) {
    return a.D <= 64 ? with_size(t, std::integral_constant<int, 64>()) : with_size(t, std::integral_constant<int, 128>());
  };
  if (a.D > kAttentionMaxHeadSize) return cudaErrorInvalidValue;
  switch (a.dtype) {
    case DType::f32: return with_type(float());
    case DType::f16: return with_type(__half());
    case DType::bf16: return with_type(__nv_bfloat16());
  }
  return cudaErrorInvalidValue;
}

}  // namespace
}  // namespace llmfast::cuda
