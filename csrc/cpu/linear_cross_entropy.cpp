// Linear cross-entropy in chunks of rows. N rows, C width, V vocabulary, n rows of a chunk.
//
// A chunk's logits are kept transposed, z^T = W x^T (V, n): the weight is read row by row as it lies, beside x, which stays
// in the cache. Two passes over blocks of the vocabulary, each block in the cache from its first product to its last:
//   1. e = exp(W_b x^T - top_b); the maximum top_b and the sum of e, for each row
//   2. dz_b = e factor_b - onehot(target);  dW_b += dz_b x,  dx += dz_b^T W_b,  db_b += row sums of dz_b
// Between them the rows' statistics are put together. Sums run over the same blocks in the same order on any number of
// threads.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <optional>
#include <thread>
#include <tuple>
#include <utility>
#include <vector>

#include "cpu/blocks.h"
#include "cpu/cross_entropy.h"
#include "cpu/gemm.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"
#include "stable.h"

namespace llmfast::cpu {
namespace {

using torch::stable::contiguous;
using torch::stable::new_empty;
using torch::stable::new_zeros;
using torch::stable::parallel_for;
using torch::stable::to;

// Scratch for the logits. At N = 1024, V = 50257 it and the packed operands are less than a tenth of what eager PyTorch
// needs beside the gradients.
constexpr int64_t kScratchBytes = int64_t(38) << 20;
constexpr int64_t kMinRows = 64;   // fewer would stream the weight too often, whatever V is
constexpr int64_t kMaxRows = 512;  // more gain nothing
constexpr int64_t kBlockElements = 1 << 16;  // of the weight in a block: with x and the logits they fill the second cache
constexpr int64_t kMinWords = 24, kMaxWords = 192;
constexpr int64_t kSlabs = 48;      // tasks; each sums its part of dx by itself

Dtype dtype_of(const char* name, const Tensor& t) {
  if (t.scalar_type() == ScalarType::BFloat16) return Dtype::bf16;
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float, name, " must be float32 or bfloat16 on a CPU, got ",
                  torch::headeronly::toString(t.scalar_type()));
  return Dtype::f32;
}

void check(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& target,
           const Tensor& row_weight) {
  STD_TORCH_CHECK(x.dim() == 2, "x must be (N, C)");
  const int64_t N = x.size(0);
  STD_TORCH_CHECK(weight.dim() == 2 && weight.size(1) == x.size(1), "weight must be (V, C) beside x (N, C)");
  STD_TORCH_CHECK(!bias || (bias->dim() == 1 && bias->size(0) == weight.size(0)), "bias must be (V,)");
  STD_TORCH_CHECK(target.dim() == 1 && target.size(0) == N && target.scalar_type() == ScalarType::Long,
                  "target must be int64 (N,)");
  STD_TORCH_CHECK(row_weight.dim() == 1 && row_weight.size(0) == N && row_weight.scalar_type() == ScalarType::Float,
                  "row_weight must be float32 (N,)");
  const auto* ids = static_cast<const int64_t*>(target.const_data_ptr());
  for (int64_t n = 0; n < N; ++n)
    STD_TORCH_CHECK(0 <= ids[n] && ids[n] < weight.size(0), "target must lie in [0, ", weight.size(0), "), got ", ids[n]);
}

struct Gradients {
  float* dx;      // (N, C); each may be null
  void* dweight;  // (V, C)
  Dtype dweight_dtype;  // bf16 only if there is one chunk
  float* dbias;
  bool any() const { return dx || dweight || dbias; }
};

// The right operand of products on one thread each, packed: op(B) (K, N). Together the products have M rows; their sums are
// not cut into blocks where `whole`.
struct PackedB {
  const GemmKernels& kernels;
  int64_t K, N, deep, width;
  uint32_t* data = nullptr;

  PackedB(const GemmKernels& kind, int64_t m, int64_t n, int64_t k, bool whole = false)
      : kernels(kind), K(k), N(n), deep(whole ? round_up(k, 16 * kind.depth) : block_depth(kind, m, n, k)),
        width(round_up(n, kind.panel)) {}
  int64_t units(int64_t k) const { return ceil_div(k, kernels.depth); }
  int64_t size() const { return ceil_div(K, deep) * units(deep) * width; }
  int64_t panels() const { return width / kernels.panel; }
  void pack_panel(const Operand& b, int64_t k_from, int64_t i) const {
    const int64_t j = i * kernels.panel;
    for (int64_t k = 0; k < K; k += deep) {
      const int64_t kc = std::min(deep, K - k);
      kernels.pack_b(b, j, std::min(kernels.panel, N - j), k_from + k, kc, block(k) + j * units(kc));
    }
  }
  // C (rows, N) [+]= op(A) rows [m, m + rows) of M; room: for `rows` packed rows of A.
  void multiply(const Operand& a, int64_t M, int64_t m, int64_t rows, uint32_t* room, void* c, int64_t c_stride,
                Dtype c_dtype, bool accumulate) const {
    const bool in_place = kernels.in_place(a, K);
    for (int64_t k = 0; k < K; k += deep) {
      const int64_t kc = std::min(deep, K - k);
      if (!in_place) kernels.pack_a(a, M, m, rows, k, kc, room);
      kernels.multiply(a, in_place ? nullptr : room, block(k), m, rows, N, k, kc,
                       {c, c_stride, c_dtype, accumulate || k > 0, nullptr, nullptr, 0});
    }
  }

 private:
  uint32_t* block(int64_t k) const { return data + k / deep * units(deep) * width; }
};

template <typename T>
class Loss {
 public:
  Loss(const Tensor& x, const Tensor& weight, const float* bias, const int64_t* target, const float* row_weight,
       double smoothing, int64_t rows, float* losses, const Gradients& grads)
      : N_(x.size(0)), C_(x.size(1)), V_(weight.size(0)), rows_(rows), bias_(bias), target_(target),
        row_weight_(row_weight), smoothing_(smoothing), losses_(losses), grads_(grads),
        gemm_(kCompute == Dtype::bf16 ? LLMFAST_SIMD(gemm_kernels).bf16 : LLMFAST_SIMD(gemm_kernels).f32),
        x_{x.const_data_ptr(), C_, dtype_of("x", x)}, w_{weight.const_data_ptr(), C_, dtype_of("weight", weight)} {
    stride_ = round_up(rows, 32);  // columns begin at multiples of 64 bytes
    const int64_t fitting = std::clamp(kBlockElements / std::max<int64_t>(C_, 1), kMinWords, kMaxWords);
    words_ = round_up(std::clamp(ceil_div(V_, 16), kMinWords, fitting), 6);
    blocks_ = ceil_div(V_, words_);
    slab_ = ceil_div(blocks_, kSlabs);
    threads_ = std::clamp<int64_t>(rows * V_ * C_ / kMacsPerThread, 1, torch::stable::get_num_threads());
    const ScalarType floats = ScalarType::Float;
    if (grads.any()) scratch_ = new_empty(x, {V_, stride_}, sizeof(T) == 2 ? ScalarType::BFloat16 : floats);
    const bool smooth = smoothing != 0.0;
    statistics_ = new_empty(x, {2 + smooth, blocks_, stride_}, floats);
    tops_ = static_cast<float*>(statistics_.mutable_data_ptr());
    sums_ = tops_ + blocks_ * stride_;
    totals_ = smooth ? sums_ + blocks_ * stride_ : nullptr;
    e_ = grads.any() ? static_cast<T*>(scratch_->mutable_data_ptr()) : nullptr;
  }

  void run() {
    for (int64_t start = 0; start < N_; start += rows_) chunk(start, std::min(rows_, N_ - start));
  }

 private:
  static constexpr Dtype kCompute = sizeof(T) == 2 ? Dtype::bf16 : Dtype::f32;

  static const CrossEntropyBlock<T>& kernels() {
    const CrossEntropyTable& table = LLMFAST_SIMD(cross_entropy);
    if constexpr (sizeof(T) == 2)
      return table.bf16;
    else
      return table.f32;
  }

  // f(block, first word, words) for the blocks of a slab.
  template <typename F>
  void blocks_of(int64_t slab, F f) const {
    for (int64_t b = slab * slab_; b < std::min((slab + 1) * slab_, blocks_); ++b)
      f(b, b * words_, std::min(words_, V_ - b * words_));
  }

  // f(row, place of its target in the block) for the rows whose target is among these words.
  template <typename F>
  void targets_in(int64_t word, int64_t words, F f) const {
    for (auto t = std::lower_bound(by_target_.begin(), by_target_.end(), std::pair(word, int64_t(0)));
         t != by_target_.end() && t->first < word + words; ++t)
      f(t->second, (t->first - word) * stride_ + t->second);
  }

  void pack(PackedB& b, const Operand& from, Scratch& room) const {
    b.data = room.get<uint32_t>(b.size());
    each(b.panels(), threads_, [&](int64_t panel) { b.pack_panel(from, 0, panel); });
  }

  void chunk(int64_t start, int64_t n) {
    thread_local Scratch columns_room, rows_room;
    by_target_.clear();
    for (int64_t r = 0; r < n; ++r) by_target_.emplace_back(target_[start + r], r);
    std::sort(by_target_.begin(), by_target_.end());
    const Operand x = {static_cast<const char*>(x_.data) + start * C_ * (x_.dtype == Dtype::bf16 ? 2 : 4), C_, x_.dtype};
    Operand x_transposed = x;
    x_transposed.transposed = true;
    PackedB columns(gemm_, V_, n, C_);
    pack(columns, x_transposed, columns_room);
    z_target_.resize(n), top_.resize(n), sum_.resize(n), factor_.resize(n), shift_.resize(n);

    const int64_t slabs = ceil_div(blocks_, slab_);
    each(slabs, threads_, [&](int64_t slab) {
      blocks_of(slab, [&](int64_t b, int64_t word, int64_t words) { logits(columns, n, b, word, words); });
    });
    statistics(start, n);
    if (!grads_.any()) return;
    PackedB rows(gemm_, V_, C_, n, grads_.dweight_dtype == Dtype::bf16);  // rounded once
    pack(rows, x, rows_room);
    // Backwards: what pass 1 left in the cache is met first.
    std::atomic<int64_t> added{0};
    each(slabs, threads_, [&](int64_t i) {
      thread_local Scratch part_room;
      float* part = grads_.dx ? part_room.get<float>(n * C_) : nullptr;
      bool first = true;
      blocks_of(slabs - 1 - i, [&](int64_t b, int64_t word, int64_t words) {
        gradients(rows, start, n, b, word, words, part, first);
        first = false;
      });
      if (!part) return;
      while (added.load(std::memory_order_acquire) != i) std::this_thread::yield();
      float* dx = grads_.dx + start * C_;
      if (i == 0)
        std::copy_n(part, n * C_, dx);
      else
        for (int64_t j = 0; j < n * C_; ++j) dx[j] += part[j];
      added.store(i + 1, std::memory_order_release);
    });
  }

  // Pass 1 over one block.
  void logits(const PackedB& columns, int64_t n, int64_t b, int64_t word, int64_t words) {
    thread_local Scratch room, block;
    float* z = nullptr;
    if constexpr (sizeof(T) == 4)
      if (e_) z = e_ + word * stride_;
    if (!z) z = block.get<float>(words * stride_);
    columns.multiply(w_, V_, word, words, room.get<uint32_t>((words_ + 8) * columns.units(columns.deep)), z, stride_, Dtype::f32,
                     false);
    targets_in(word, words, [&](int64_t row, int64_t at) {
      z_target_[row] = bias_ ? z[at] + bias_[word + at / stride_] : z[at];  // rounded as in `exponentials`
    });
    kernels().exponentials(z, stride_, words, n, bias_ ? bias_ + word : nullptr, e_ ? e_ + word * stride_ : nullptr,
                           tops_ + b * stride_, sums_ + b * stride_, totals_ ? totals_ + b * stride_ : nullptr);
  }

  // The losses of all rows, and what turns exponentials into gradients.
  void statistics(int64_t start, int64_t n) {
    const CrossEntropyTable& table = LLMFAST_SIMD(cross_entropy);
    parallel_for(0, ceil_div(n, 16), std::max<int64_t>(1, 1024 / blocks_), [&](int64_t from, int64_t end) {
      const int64_t first = 16 * from, last = std::min(n, 16 * end);
      table.combine(tops_ + first, sums_ + first, stride_, blocks_, last - first, &top_[first], &sum_[first]);
      for (int64_t r = first; r < last; ++r) {
        double mean = 0.0;
        for (int64_t b = 0; totals_ && b < blocks_; ++b) mean += totals_[b * stride_ + r];
        mean /= double(V_);
        const double weight = row_weight_[start + r], s = smoothing_;
        const double top = top_[r];  // every term relative to it: with a vocabulary of one they are exactly 0
        losses_[start + r] = float(std::log(double(sum_[r])) + (1.0 - s) * (top - z_target_[r]) + s * (top - mean));
        factor_[r] = float(weight / sum_[r]);
        shift_[r] = float(weight * s / double(V_));
      }
    });
  }

  // Pass 2 over one block; part (n, C) takes its share of dx.
  void gradients(const PackedB& rows, int64_t start, int64_t n, int64_t b, int64_t word, int64_t words, float* part,
                 bool first) {
    thread_local Scratch room_a, room_b, factors;
    T* dz = e_ + word * stride_;
    float* factor = factors.get<float>(n);
    for (int64_t r = 0; r < n; ++r) {
      const float f = tops_[b * stride_ + r] * factor_[r];
      factor[r] = std::abs(f) < 1e-18f ? 0.f : f;  // see exp_or_zero
    }
    kernels().scale(dz, stride_, words, n, factor, totals_ ? shift_.data() : nullptr);
    targets_in(word, words, [&](int64_t row, int64_t at) {
      const double p = std::exp(z_target_[row] - double(top_[row])) / double(sum_[row]);
      const double weight = row_weight_[start + row];
      kernels().store(dz + at, float(weight * (p - (1.0 - smoothing_) - smoothing_ / double(V_))));
    });
    if (grads_.dbias) kernels().add_rows(dz, stride_, words, n, grads_.dbias + word);
    PackedB weight(gemm_, n, C_, words);
    uint32_t* a = room_a.get<uint32_t>((std::max(n, words_) + 8) * rows.units(std::max(n, words)));
    if (grads_.dweight)
      rows.multiply({dz, stride_, kCompute}, words, 0, words, a,
                    static_cast<char*>(grads_.dweight) + word * C_ * (grads_.dweight_dtype == Dtype::bf16 ? 2 : 4), C_,
                    grads_.dweight_dtype, start > 0);
    if (!part) return;
    weight.data = room_b.get<uint32_t>(weight.size());
    for (int64_t i = 0; i < weight.panels(); ++i) weight.pack_panel(w_, word, i);
    weight.multiply({dz, stride_, kCompute, true}, n, 0, n, a, part, C_, Dtype::f32, !first);
  }

  const int64_t N_, C_, V_, rows_;
  const float* bias_;
  const int64_t* target_;
  const float* row_weight_;
  const double smoothing_;
  float* losses_;
  const Gradients& grads_;
  const GemmKernels& gemm_;
  const Operand x_, w_;
  int64_t stride_, words_, blocks_, slab_, threads_;  // words of a block, blocks of a slab
  std::optional<Tensor> scratch_;
  Tensor statistics_;
  T* e_;
  float *tops_, *sums_, *totals_;  // (blocks, stride)
  std::vector<std::pair<int64_t, int64_t>> by_target_;  // (target, row), sorted
  std::vector<double> z_target_;
  std::vector<float> top_, sum_, factor_, shift_;
};

// Rows of a chunk, by shape alone: as even a split as 16 rows allow.
int64_t chunk_rows(int64_t N, int64_t V, int64_t bytes) {
  const int64_t most = std::clamp(kScratchBytes / (V * bytes), kMinRows, kMaxRows);
  const int64_t chunks = (N + most - 1) / most, even = (N + chunks - 1) / chunks;
  return std::min(N, (even + 15) / 16 * 16);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> linear_cross_entropy(const Tensor& x_in, const Tensor& weight_in,
                                                                const std::optional<Tensor>& bias,
                                                                const Tensor& target_in, const Tensor& row_weight_in,
                                                                double label_smoothing, bool bf16, bool want_dx,
                                                                bool want_dweight, bool want_dbias) {
  const Tensor x = contiguous(x_in), weight = contiguous(weight_in);
  const Tensor target = contiguous(target_in), row_weight = contiguous(row_weight_in);
  check(x, weight, bias, target, row_weight);
  want_dbias = want_dbias && bias;
  const int64_t N = x.size(0), C = x.size(1), V = weight.size(0);
  const int64_t rows = N ? chunk_rows(N, V, bf16 ? 2 : 4) : 0;

  // The float32 sums of several chunks; where there is one chunk, it can have the weight's own dtype.
  const ScalarType sum_dtype = rows < N ? ScalarType::Float : weight.scalar_type();
  Tensor losses = new_empty(x, {N}, ScalarType::Float);
  Tensor dx = want_dx ? new_empty(x, {N, C}, ScalarType::Float) : new_empty(x, {0}, ScalarType::Float);
  Tensor dweight = !want_dweight ? new_empty(weight, {0})
                   : N           ? new_empty(weight, {V, C}, sum_dtype)
                                 : new_zeros(weight, {V, C});
  Tensor dbias = new_zeros(x, {want_dbias ? V : 0}, ScalarType::Float);
  if (N) {
    std::optional<Tensor> b = bias;
    if (b) b = contiguous(to(*b, ScalarType::Float));
    const Gradients grads = {want_dx ? static_cast<float*>(dx.mutable_data_ptr()) : nullptr,
                             want_dweight ? dweight.mutable_data_ptr() : nullptr, dtype_of("weight", dweight),
                             want_dbias ? static_cast<float*>(dbias.mutable_data_ptr()) : nullptr};
    const auto run = [&](auto type) {
      Loss<decltype(type)>(x, weight, b ? static_cast<const float*>(b->const_data_ptr()) : nullptr,
                           static_cast<const int64_t*>(target.const_data_ptr()),
                           static_cast<const float*>(row_weight.const_data_ptr()), label_smoothing, rows,
                           static_cast<float*>(losses.mutable_data_ptr()), grads)
          .run();
    };
    bf16 ? run(uint16_t()) : run(float());
  }
  if (x.scalar_type() != ScalarType::Float) dx = to(dx, x.scalar_type());
  if (want_dweight && rows < N && weight.scalar_type() != ScalarType::Float) dweight = to(dweight, weight.scalar_type());
  if (want_dbias && bias->scalar_type() != ScalarType::Float) dbias = to(dbias, bias->scalar_type());
  return {losses, dx, dweight, dbias};
}

}  // namespace
}  // namespace llmfast::cpu

STABLE_TORCH_LIBRARY_IMPL(llmfast, CPU, m) {
  m.impl("linear_cross_entropy", TORCH_BOX(&llmfast::cpu::linear_cross_entropy));
}
