#include "cuda/attention.h"

#include <tuple>

#include "attention_checks.h"
#include "cuda/glue.h"

namespace llmfast::cuda {
namespace {

using torch::stable::new_empty;

// A thread block holds 64 or more rows of one head; there are at most 2^31 - 1 blocks.
constexpr int64_t kMostRows = (int64_t(1) << 31) - 256;

int64_t padded(int64_t D) { return (D + 7) / 8 * 8; }

// t as the kernels read it: rows of whole 16 bytes at whole 16 bytes. A copy where it does not lie so.
Tensor readable(const Tensor& t) {
  const int64_t D = t.size(3), width = 16 / t.element_size();
  if (D % 8) return torch::stable::contiguous(torch::stable::pad(t, {0, padded(D) - D}));
  bool fits = t.stride(3) == 1 && reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0;
  for (int d = 0; d < 3; ++d) fits = fits && (t.size(d) <= 1 || t.stride(d) % width == 0);
  if (fits) return t;
  Tensor copy = new_empty(t, t.sizes());
  torch::stable::copy_(copy, t);
  return copy;
}

// (B, H, T, D) for a kernel to write, its rows padded as `readable` pads them.
class Written {
 public:
  Written(const Tensor& q, int64_t T) : result_(empty_heads(q, T)), padded_(result_) {
    const int64_t D = q.size(3);
    if (D % 8)
      padded_ = torch::stable::transpose(new_empty(q, {q.size(0), T, q.size(1), padded(D)}), 1, 2);
  }
  MutableHeads heads() { return {padded_.mutable_data_ptr(), padded_.stride(0), padded_.stride(1), padded_.stride(2)}; }
  Tensor done() {
    if (padded_.size(3) != result_.size(3))
      torch::stable::copy_(result_, torch::stable::narrow(padded_, 3, 0, result_.size(3)));
    return result_;
  }
  Tensor zeros() { return torch::stable::zero_(result_); }

 private:
  Tensor result_, padded_;
};

Heads heads(const Tensor& t) { return {t.const_data_ptr(), t.stride(0), t.stride(1), t.stride(2)}; }

// The arguments that both ops share, checked; keeps what `attention` points to.
struct Arguments {
  Tensor q, k, v;
  MaybeTensor kv_lens, doc_ids;
  Attention attention{};
  bool empty;

  Arguments(const Tensor& q_in, const Tensor& k_in, const Tensor& v_in, double scale, double dropout_p,
            const MaybeTensor& seed, const MaybeTensor& kv_lens_in, const MaybeTensor& doc_ids_in)
      : q(q_in), k(k_in), v(v_in) {
    check_heads(q, k, v);
    check_dropout(dropout_p, seed, q);
    const int64_t B = q.size(0), H = q.size(1), Tq = q.size(2), Tk = k.size(2), D = q.size(3);
    const DType dtype = dtype_of("q", q.scalar_type());
    STD_TORCH_CHECK(D <= kAttentionMaxHeadSize, "q must have heads of at most ", kAttentionMaxHeadSize,
                    " elements on CUDA, got ", D);
    STD_TORCH_CHECK(B * H < (1 << 24) && B * H * (Tq / 64 + 1) <= kMostRows && B * H * (Tk / 64 + 1) <= kMostRows &&
                        Tq <= kMostRows && Tk <= kMostRows,
                    "q and k have more rows than a launch has blocks");
    kv_lens = integers("kv_lens", kv_lens_in, q, B);
    doc_ids = integers("doc_ids", doc_ids_in, q, B * Tk);
    empty = B * H * Tq * Tk == 0;
    if (empty) return;
    q = readable(q), k = readable(k), v = readable(v);
    attention = {dtype, int(B), int(H), int(Tq), int(Tk), int(q.size(3)), float(scale), dropout_of(dropout_p, seed, q),
                 numbers(kv_lens), numbers(doc_ids), heads(q), heads(k), heads(v)};
  }
};

std::tuple<Tensor, Tensor> causal_attention_fwd(const Tensor& q, const Tensor& k, const Tensor& v, double scale,
                                                double dropout_p, const MaybeTensor& seed, const MaybeTensor& kv_lens,
                                                const MaybeTensor& doc_ids) {
  const OnDeviceOf device(q);
  const Arguments in(q, k, v, scale, dropout_p, seed, kv_lens, doc_ids);
  Written out(q, q.size(2));
  Tensor lse = new_empty(q, {q.size(0), q.size(1), q.size(2)}, ScalarType::Float);
  if (in.empty) return {out.zeros(), torch::stable::fill_(lse, INFINITY)};
  LLMFAST_CUDA_CHECK(attention_forward({in.attention, out.heads(), floats(lse)}, device.capability(), device.stream()));
  return {out.done(), lse};
}

std::tuple<Tensor, Tensor, Tensor> causal_attention_bwd(const Tensor& dout_in, const Tensor& q, const Tensor& k,
                                                        const Tensor& v, const Tensor& out_in, const Tensor& lse,
                                                        double scale, double dropout_p, const MaybeTensor& seed,
                                                        const MaybeTensor& kv_lens, const MaybeTensor& doc_ids) {
  const OnDeviceOf device(q);
  const Arguments in(q, k, v, scale, dropout_p, seed, kv_lens, doc_ids);
  check_backward(q, out_in, dout_in, lse);
  Written dq(q, q.size(2)), dk(q, k.size(2)), dv(q, k.size(2));
  if (in.empty) return {dq.zeros(), dk.zeros(), dv.zeros()};
  const Tensor out = readable(out_in), dout = readable(dout_in);
  Tensor delta = torch::stable::empty_like(lse);
  LLMFAST_CUDA_CHECK(attention_backward({in.attention, heads(out), heads(dout), floats(lse), floats(delta), dq.heads(),
                                         dk.heads(), dv.heads()},
                                        device.capability(), device.stream()));
  return {dq.done(), dk.done(), dv.done()};
}

}  // namespace
}  // namespace llmfast::cuda

LLMFAST_CUDA_OPS(m) {
  m.impl("causal_attention_fwd", TORCH_BOX(&llmfast::cuda::causal_attention_fwd));
  m.impl("causal_attention_bwd", TORCH_BOX(&llmfast::cuda::causal_attention_bwd));
}
