#pragma once
// What the CPU and the CUDA causal attention ask of their arguments, and how they lay out their results.
#include <cstdint>
#include <optional>

#include "stable.h"

namespace llmfast {

inline void check_dtype(const char* name, const Tensor& t, const Tensor& q) {
  STD_TORCH_CHECK(t.scalar_type() == q.scalar_type(), name, " must have q's dtype ",
                  torch::headeronly::toString(q.scalar_type()), ", got ",
                  torch::headeronly::toString(t.scalar_type()));
  STD_TORCH_CHECK(t.device() == q.device(), name, " must be on q's device");
}

// t (B, H, T, D) has the shape and dtype of `like`.
inline void check_like(const char* name, const Tensor& t, const Tensor& like, const char* like_name) {
  STD_TORCH_CHECK(t.dim() == 4, name, " must be (B, H, T, D)");
  for (int d = 0; d < 4; ++d)
    STD_TORCH_CHECK(t.size(d) == like.size(d), name, " must have ", like_name, "'s shape");
  check_dtype(name, t, like);
}

inline void check_heads(const Tensor& q, const Tensor& k, const Tensor& v) {
  STD_TORCH_CHECK(q.dim() == 4, "q must be (B, H, T, D)");
  STD_TORCH_CHECK(q.size(3) > 0, "q must have heads of at least one element");
  STD_TORCH_CHECK(k.dim() == 4 && k.size(0) == q.size(0) && k.size(1) == q.size(1) && k.size(3) == q.size(3),
                  "k must be (B, H, Tk, D) with q's B, H and D");
  check_dtype("k", k, q);
  check_like("v", v, k, "k");
}

inline void check_dropout(double p, const std::optional<Tensor>& seed, const Tensor& q) {
  STD_TORCH_CHECK(p >= 0 && p < 1, "dropout_p must lie in [0, 1), got ", p);
  STD_TORCH_CHECK(p == 0 || (seed && seed->scalar_type() == ScalarType::Long && seed->numel() == 1 &&
                             seed->device() == q.device()),
                  "dropout needs a seed of one int64 on q's device");
}

inline void check_backward(const Tensor& q, const Tensor& out, const Tensor& dout, const Tensor& lse) {
  check_like("out", out, q, "q");
  check_like("dout", dout, q, "q");
  STD_TORCH_CHECK(lse.scalar_type() == ScalarType::Float && lse.is_contiguous() &&
                      lse.numel() == q.size(0) * q.size(1) * q.size(2) && lse.device() == q.device(),
                  "lse must be a contiguous float32 (B, H, Tq) on q's device");
}

// An int64 copy of kv_lens or doc_ids, where given.
inline std::optional<Tensor> integers(const char* name, const std::optional<Tensor>& t, const Tensor& q, int64_t numel) {
  if (!t) return t;
  const bool integer = t->scalar_type() == ScalarType::Long || t->scalar_type() == ScalarType::Int;
  STD_TORCH_CHECK(integer && t->numel() == numel && t->device() == q.device(), name,
                  " must be an int64 or int32 tensor of ", numel, " elements on q's device");
  return torch::stable::contiguous(t->scalar_type() == ScalarType::Long ? *t : torch::stable::to(*t, ScalarType::Long));
}

inline const int64_t* numbers(const std::optional<Tensor>& t) {
  return t ? static_cast<const int64_t*>(t->const_data_ptr()) : nullptr;
}

// (B, H, T, D) in the memory of a (B, T, H, D): what the projections before and after attention want.
inline Tensor empty_heads(const Tensor& q, int64_t T) {
  return torch::stable::transpose(torch::stable::new_empty(q, {q.size(0), T, q.size(1), q.size(3)}), 1, 2);
}

}  // namespace llmfast
