// The raw ops causal_attention_fwd and causal_attention_bwd: tensors in, checks, tensors out.
#include <optional>
#include <tuple>

#include "attention_checks.h"
#include "cpu/attention.h"

namespace llmfast::cpu {
namespace {

using torch::stable::new_empty;

// The arguments that both ops share, checked; keeps what `attention` points to.
struct Arguments {
  Tensor q, k, v;
  std::optional<Tensor> kv_lens, doc_ids;
  Attention attention{};

  Arguments(const Tensor& q_in, const Tensor& k_in, const Tensor& v_in, double scale, double dropout_p,
            const std::optional<Tensor>& seed, const std::optional<Tensor>& kv_lens_in,
            const std::optional<Tensor>& doc_ids_in)
      : q(dense_rows(q_in)), k(dense_rows(k_in)), v(dense_rows(v_in)) {
    check_heads(q, k, v);
    STD_TORCH_CHECK(q.scalar_type() == ScalarType::Float || q.scalar_type() == ScalarType::BFloat16,
                    "q must be float32 or bfloat16 on a CPU, got ", torch::headeronly::toString(q.scalar_type()));
    check_dropout(dropout_p, seed, q);
    Attention& a = attention;
    a.B = q.size(0), a.H = q.size(1), a.Tq = q.size(2), a.Tk = k.size(2), a.D = q.size(3);
    a.dtype = q.scalar_type() == ScalarType::Float ? Dtype::f32 : Dtype::bf16;
    a.scale = float(scale);
    if (dropout_p > 0) a.dropout = make_dropout(*numbers(seed), dropout_p);
    kv_lens = integers("kv_lens", kv_lens_in, q, a.B);
    doc_ids = integers("doc_ids", doc_ids_in, q, a.B * a.Tk);
    a.kv_lens = numbers(kv_lens);
    a.doc_ids = numbers(doc_ids);
  }

  static Tensor dense_rows(const Tensor& t) {
    return t.dim() == 4 && t.stride(3) != 1 && t.size(3) > 1 ? torch::stable::contiguous(t) : t;
  }
};

template <typename Void, typename Pointer>
HeadsOf<Void> heads(const Tensor& t, Pointer* data) {
  return {data, t.stride(0), t.stride(1), t.stride(2)};
}
Heads read(const Tensor& t) { return heads<const void>(t, t.const_data_ptr()); }
MutableHeads write(Tensor& t) { return heads<void>(t, t.mutable_data_ptr()); }

std::tuple<Tensor, Tensor> causal_attention_fwd(const Tensor& q, const Tensor& k, const Tensor& v, double scale,
                                                double dropout_p, const std::optional<Tensor>& seed,
                                                const std::optional<Tensor>& kv_lens,
                                                const std::optional<Tensor>& doc_ids) {
  const Arguments in(q, k, v, scale, dropout_p, seed, kv_lens, doc_ids);
  const Attention& a = in.attention;
  Tensor out = empty_heads(in.q, a.Tq);
  Tensor lse = new_empty(in.q, {a.B, a.H, a.Tq}, ScalarType::Float);
  attention_forward(a, read(in.q), read(in.k), read(in.v), write(out), static_cast<float*>(lse.mutable_data_ptr()));
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> causal_attention_bwd(const Tensor& dout_in, const Tensor& q, const Tensor& k,
                                                        const Tensor& v, const Tensor& out_in, const Tensor& lse,
                                                        double scale, double dropout_p,
                                                        const std::optional<Tensor>& seed,
                                                        const std::optional<Tensor>& kv_lens,
                                                        const std::optional<Tensor>& doc_ids) {
  const Arguments in(q, k, v, scale, dropout_p, seed, kv_lens, doc_ids);
  const Attention& a = in.attention;
  const Tensor out = Arguments::dense_rows(out_in), dout = Arguments::dense_rows(dout_in);
  check_backward(in.q, out, dout, lse);
  Tensor dq = empty_heads(in.q, a.Tq), dk = empty_heads(in.q, a.Tk), dv = empty_heads(in.q, a.Tk);
  attention_backward(a, read(in.q), read(in.k), read(in.v), read(out), read(dout),
                     static_cast<const float*>(lse.const_data_ptr()), write(dq), write(dk), write(dv));
  return {dq, dk, dv};
}

}  // namespace
}  // namespace llmfast::cpu

STABLE_TORCH_LIBRARY_IMPL(llmfast, CPU, m) {
  m.impl("causal_attention_fwd", TORCH_BOX(&llmfast::cpu::causal_attention_fwd));
  m.impl("causal_attention_bwd", TORCH_BOX(&llmfast::cpu::causal_attention_bwd));
}
