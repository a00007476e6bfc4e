// The raw ops causal_attention_fwd and causal_attention_bwd: tensors in, checks, tensors out.
#include <optional>
#include <tuple>

#include "cpu/attention.h"
#include "stable.h"

namespace llmfast::cpu {
namespace {

using torch::stable::new_empty;
using torch::stable::transpose;

void check_like(const char* name, const Tensor& t, const Tensor& like, const char* like_name) {
  STD_TORCH_CHECK(t.dim() == 4, name, " must be (B, H, T, D)");
  for (int d = 0; d < 4; ++d)
    STD_TORCH_CHECK(t.size(d) == like.size(d), name, " must have ", like_name, "'s shape");
}

void check_dtype(const char* name, const Tensor& t, const Tensor& q) {
  STD_TORCH_CHECK(t.scalar_type() == q.scalar_type(), name, " must have q's dtype ",
                  torch::headeronly::toString(q.scalar_type()), ", got ",
                  torch::headeronly::toString(t.scalar_type()));
  STD_TORCH_CHECK(t.device() == q.device(), name, " must be on q's device");
}

// An int64 copy of kv_lens or doc_ids, where given.
std::optional<Tensor> integers(const char* name, const std::optional<Tensor>& t, const Tensor& q, int64_t numel) {
  if (!t) return t;
  const bool integer = t->scalar_type() == ScalarType::Long || t->scalar_type() == ScalarType::Int;
  STD_TORCH_CHECK(integer && t->numel() == numel && t->device() == q.device(), name,
                  " must be an int64 or int32 tensor of ", numel, " elements on q's device");
  return torch::stable::contiguous(t->scalar_type() == ScalarType::Long ? *t : torch::stable::to(*t, ScalarType::Long));
}

const int64_t* data(const std::optional<Tensor>& t) {
  return t ? static_cast<const int64_t*>(t->const_data_ptr()) : nullptr;
}

// The arguments that both ops share, checked; keeps what `attention` points to.
struct Arguments {
  Tensor q, k, v;
  std::optional<Tensor> kv_lens, doc_ids;
  Attention attention{};

  Arguments(const Tensor& q_in, const Tensor& k_in, const Tensor& v_in, double scale, double dropout_p,
            const std::optional<Tensor>& seed, const std::optional<Tensor>& kv_lens_in,
            const std::optional<Tensor>& doc_ids_in)
      : q(dense_rows(q_in)), k(dense_rows(k_in)), v(dense_rows(v_in)) {
    STD_TORCH_CHECK(q.dim() == 4, "q must be (B, H, T, D)");
    STD_TORCH_CHECK(q.size(3) > 0, "q must have heads of at least one element");
    STD_TORCH_CHECK(q.scalar_type() == ScalarType::Float || q.scalar_type() == ScalarType::BFloat16,
                    "q must be float32 or bfloat16 on a CPU, got ", torch::headeronly::toString(q.scalar_type()));
    STD_TORCH_CHECK(k.dim() == 4 && k.size(0) == q.size(0) && k.size(1) == q.size(1) && k.size(3) == q.size(3),
                    "k must be (B, H, Tk, D) with q's B, H and D");
    check_like("v", v, k, "k");
    check_dtype("k", k, q);
    check_dtype("v", v, q);
    STD_TORCH_CHECK(dropout_p >= 0 && dropout_p < 1, "dropout_p must lie in [0, 1), got ", dropout_p);
    STD_TORCH_CHECK(dropout_p == 0 || (seed && seed->scalar_type() == ScalarType::Long && seed->numel() == 1 &&
                                       seed->device() == q.device()),
                    "dropout needs a seed of one int64 on q's device");
    Attention& a = attention;
    a.B = q.size(0), a.H = q.size(1), a.Tq = q.size(2), a.Tk = k.size(2), a.D = q.size(3);
    a.dtype = q.scalar_type() == ScalarType::Float ? Dtype::f32 : Dtype::bf16;
    a.scale = float(scale);
    if (dropout_p > 0) a.dropout = make_dropout(*data(seed), dropout_p);
    kv_lens = integers("kv_lens", kv_lens_in, q, a.B);
    doc_ids = integers("doc_ids", doc_ids_in, q, a.B * a.Tk);
    a.kv_lens = data(kv_lens);
    a.doc_ids = data(doc_ids);
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

// (B, H, T, D) in the memory of a (B, T, H, D): what the projections before and after attention want.
Tensor empty_heads(const Tensor& q, int64_t T) {
  return transpose(new_empty(q, {q.size(0), T, q.size(1), q.size(3)}), 1, 2);
}

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
  check_like("out", out, in.q, "q");
  check_like("dout", dout, in.q, "q");
  check_dtype("out", out, in.q);
  check_dtype("dout", dout, in.q);
  STD_TORCH_CHECK(lse.scalar_type() == ScalarType::Float && lse.is_contiguous() && lse.numel() == a.B * a.H * a.Tq &&
                      lse.device() == q.device(),
                  "lse must be a contiguous float32 (B, H, Tq) on q's device");
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
