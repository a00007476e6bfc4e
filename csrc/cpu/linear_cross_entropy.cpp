// Linear cross-entropy in chunks of rows: the logits of a chunk live in one scratch buffer, where they turn into their own
// gradient dz, and then  dx = dz W,  dW += dz^T x,  db += column sums of dz.  N rows, C width, V vocabulary.
#include <algorithm>
#include <optional>
#include <tuple>

#include "cpu/cross_entropy.h"
#include "cpu/gemm.h"
#include "stable.h"

namespace llmfast::cpu {
namespace {

using torch::stable::contiguous;
using torch::stable::new_empty;
using torch::stable::new_zeros;
using torch::stable::parallel_for;
using torch::stable::to;

// Scratch for the logits. At N = 1024, V = 50257 it and the packed operands are a twelfth of what eager PyTorch needs beside
// the gradients.
constexpr int64_t kScratchBytes = int64_t(38) << 20;
constexpr int64_t kMinRows = 64;   // fewer would stream the weight too often, whatever V is
constexpr int64_t kMaxRows = 512;  // more gain nothing
// Rows of dW that are made at a time: the product packs its left operand, which all at once would be a second scratch.
constexpr int64_t kSlab = 4608;
// Logits that are worth a thread.
constexpr int64_t kGrain = 16384;

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
  void* dx;  // (N, C) of x's dtype; each may be null
  void* dweight;  // (V, C)
  Dtype dweight_dtype;  // bf16 only if there is one chunk
  float* dbias;
};

template <typename T>
void run(const Tensor& x, const Tensor& weight, const float* bias, const int64_t* target, const float* row_weight,
         double smoothing, int64_t rows, const CrossEntropyRows<T>& kernels, float* losses, const Gradients& grads) {
  const int64_t N = x.size(0), C = x.size(1), V = weight.size(0);
  const Dtype compute = sizeof(T) == 2 ? Dtype::bf16 : Dtype::f32, x_dtype = dtype_of("x", x);
  const int64_t x_bytes = C * (x_dtype == Dtype::bf16 ? 2 : 4);
  const int64_t stride = (V + 31) / 32 * 32;  // rows begin at multiples of 64 bytes
  const bool wants = grads.dx || grads.dweight || grads.dbias;
  const Tensor scratch = new_empty(x, {rows, stride}, compute == Dtype::bf16 ? ScalarType::BFloat16 : ScalarType::Float);
  T* z = static_cast<T*>(scratch.mutable_data_ptr());
  const Operand w = {weight.const_data_ptr(), C, dtype_of("weight", weight)};
  Operand w_transposed = w;
  w_transposed.transposed = true;

  for (int64_t start = 0; start < N; start += rows) {
    const int64_t n = std::min(rows, N - start);
    const Operand xs = {static_cast<const char*>(x.const_data_ptr()) + start * x_bytes, C, x_dtype};
    Product logits = {n, V, C, xs, w_transposed, z, stride, compute, compute};
    logits.bias = bias;
    gemm(logits);
    parallel_for(0, n, std::max<int64_t>(1, kGrain / V), [&](int64_t row0, int64_t row1) {
      kernels.losses(z, stride, V, target + start, wants ? row_weight + start : nullptr, smoothing, losses + start, row0,
                     row1);
    });
    if (grads.dx)
      gemm({n, C, V, {z, stride, compute}, w, static_cast<char*>(grads.dx) + start * x_bytes, C, x_dtype, compute});
    if (grads.dweight)
      for (int64_t first = 0; first < V; first += kSlab)
        gemm({std::min(kSlab, V - first), C, n, {z + first, stride, compute, true}, xs,
              static_cast<char*>(grads.dweight) + first * C * (grads.dweight_dtype == Dtype::bf16 ? 2 : 4), C,
              grads.dweight_dtype, compute, start > 0});
    if (grads.dbias)
      parallel_for(0, V, std::max<int64_t>(1, kGrain / n), [&](int64_t column0, int64_t column1) {
        kernels.add_columns(z, stride, n, grads.dbias, column0, column1);
      });
  }
}

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
  Tensor dx = want_dx ? new_empty(x, {N, C}) : new_empty(x, {0});
  Tensor dweight = !want_dweight ? new_empty(weight, {0})
                   : N           ? new_empty(weight, {V, C}, sum_dtype)
                                 : new_zeros(weight, {V, C});
  Tensor dbias = new_zeros(x, {want_dbias ? V : 0}, ScalarType::Float);
  if (N) {
    std::optional<Tensor> b = bias;
    if (b) b = contiguous(to(*b, ScalarType::Float));
    const Gradients grads = {want_dx ? dx.mutable_data_ptr() : nullptr, want_dweight ? dweight.mutable_data_ptr() : nullptr,
                             dtype_of("weight", dweight),
                             want_dbias ? static_cast<float*>(dbias.mutable_data_ptr()) : nullptr};
    const auto with = [&](const auto& kernels) {
      run(x, weight, b ? static_cast<const float*>(b->const_data_ptr()) : nullptr,
          static_cast<const int64_t*>(target.const_data_ptr()), static_cast<const float*>(row_weight.const_data_ptr()),
          label_smoothing, rows, kernels, static_cast<float*>(losses.mutable_data_ptr()), grads);
    };
    const auto& table = LLMFAST_SIMD(cross_entropy);
    bf16 ? with(table.bf16) : with(table.f32);
  }
  if (want_dweight && rows < N && weight.scalar_type() != ScalarType::Float) dweight = to(dweight, weight.scalar_type());
  if (want_dbias && bias->scalar_type() != ScalarType::Float) dbias = to(dbias, bias->scalar_type());
  return {losses, dx, dweight, dbias};
}

}  // namespace
}  // namespace llmfast::cpu

STABLE_TORCH_LIBRARY_IMPL(llmfast, CPU, m) {
  m.impl("linear_cross_entropy", TORCH_BOX(&llmfast::cpu::linear_cross_entropy));
}
