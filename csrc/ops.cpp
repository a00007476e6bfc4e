// Schemas of the native ops; fakes, autograd and dispatch are in llmfast/ops.
#include "stable.h"

#include <string>

#ifdef LLMFAST_EMULATE  // beside csrc/cuda/*.cpp alone, cuda/glue.h
#define LLMFAST_NAMESPACE llmfast_emulated
#else
#define LLMFAST_NAMESPACE llmfast
#endif
#define LLMFAST_LIBRARY(name, m) STABLE_TORCH_LIBRARY(name, m)

LLMFAST_LIBRARY(LLMFAST_NAMESPACE, m) {
  // x (..., N); weight, bias (N,); y as x, contiguous; mean, rstd float32 (rows,).
  m.def("layer_norm_fwd(Tensor x, Tensor? weight, Tensor? bias, float eps) -> (Tensor y, Tensor mean, Tensor rstd)");
  // dweight, dbias have weight's dtype (x's without weight) and are empty where the parameter is absent.
  m.def(
      "layer_norm_bwd(Tensor dy, Tensor x, Tensor? weight, Tensor mean, Tensor rstd, bool has_bias)"
      " -> (Tensor dx, Tensor dweight, Tensor dbias)");
  // s = residual + dropout(x), y = layer_norm(s), both of residual's dtype; x of that dtype, or bfloat16 beside a float32
  // residual; seed one int64, needed with dropout (csrc/cpu/philox.h).
  m.def(
      "add_layer_norm_fwd(Tensor x, Tensor residual, Tensor? weight, Tensor? bias, float eps, float dropout_p,"
      " Tensor? seed) -> (Tensor y, Tensor s, Tensor mean, Tensor rstd)");
  // ds: the gradient that reaches s beside y's. dx is empty where it would equal dresidual: without dropout, in one dtype.
  m.def(
      "add_layer_norm_bwd(Tensor dy, Tensor? ds, Tensor s, Tensor? weight, Tensor mean, Tensor rstd, bool has_bias,"
      " ScalarType x_dtype, float dropout_p, Tensor? seed)"
      " -> (Tensor dx, Tensor dresidual, Tensor dweight, Tensor dbias)");
  // q (B, H, Tq, D), k, v (B, H, Tk, D); out and the gradients as (B, T, H, D) in memory; lse float32 (B, H, Tq); seed int64,
  // needed with dropout; kv_lens (B,), doc_ids (B, Tk).
  m.def(
      "causal_attention_fwd(Tensor q, Tensor k, Tensor v, float scale, float dropout_p, Tensor? seed, Tensor? kv_lens,"
      " Tensor? doc_ids) -> (Tensor out, Tensor lse)");
  m.def(
      "causal_attention_bwd(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, float scale,"
      " float dropout_p, Tensor? seed, Tensor? kv_lens, Tensor? doc_ids) -> (Tensor dq, Tensor dk, Tensor dv)");
  // a (M, K) b (K, N) + bias in float32 or bfloat16; a, b float32 or bfloat16, views with contiguous rows or columns are read
  // as they are. bf16: operands rounded to bfloat16, sums in float32.
  m.def("mm(Tensor a, Tensor b, Tensor? bias, bool bf16, bool bf16_out) -> Tensor");
  // a (M, K) W^T + bias in float32, W (N, K) = weight (int8) times scales (N,), row by row.
  m.def("mm_int8(Tensor a, Tensor weight, Tensor scales, Tensor? bias) -> Tensor");
  m.def("column_sums(Tensor x) -> Tensor");  // (M, N) -> float32 (N,)
  m.def("add_mm_(Tensor(a!) c, Tensor a, Tensor b, bool bf16) -> ()");
  // x with elements set to 0 with probability p, the others times 1 / (1 - p); seed one int64 (csrc/cpu/philox.h).
  m.def("dropout(Tensor x, Tensor seed, float p) -> Tensor");
  // x (N, C), weight (V, C), bias (V,); target int64 (N,) in [0, V); row_weight float32 (N,); bf16: round the operands of the
  // products. Losses float32 (N,), without the row weights, and the gradients of sum(row_weight * losses) as what they belong
  // to; those that are not wanted are empty.
  m.def(
      "linear_cross_entropy(Tensor x, Tensor weight, Tensor? bias, Tensor target, Tensor row_weight, float label_smoothing,"
      " bool bf16, bool want_dx, bool want_dweight, bool want_dbias)"
      " -> (Tensor losses, Tensor dx, Tensor dweight, Tensor dbias)");
  // z (rows, V) with contiguous rows: logits, without bias (V,), become scale (rows,) times their gradient where it is given.
  // target int64 (rows,) in [0, V). Losses float32 (rows,), without scale. CUDA.
  m.def(
      "softmax_gradient_(Tensor(a!) z, Tensor? bias, Tensor target, Tensor? scale, float label_smoothing) -> Tensor");
  // One AdamW update from grads / divisor, all float32, all but grads contiguous.
  m.def(
      "adamw_(Tensor(a!)[] parameters, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, float step,"
      " float lr, float beta1, float beta2, float weight_decay, float eps, float divisor) -> ()");
  // The 2-norm of all elements of float32 tensors, float32 ().
  m.def("total_norm(Tensor[] tensors) -> Tensor");
  // y = act(h) proj_weight^T + proj_bias, h = x fc_weight^T + fc_bias in one row per row of x, empty unless kept; products,
  // h and y in dtype, whatever the dtypes of the arguments are. activation: gelu_tanh, gelu or relu.
  m.def(
      "mlp_fwd(Tensor x, Tensor fc_weight, Tensor? fc_bias, Tensor proj_weight, Tensor? proj_bias, str activation,"
      " ScalarType dtype, bool keep) -> (Tensor y, Tensor h)");
  m.def("mlp_products() -> str");  // whose products they are on CUDA
  // wanted: bit i set for the gradient number i; the others are empty. A bias's gradient has its weight's dtype.
  m.def(
      "mlp_bwd(Tensor dy, Tensor x, Tensor h, Tensor fc_weight, Tensor proj_weight, str activation, int wanted)"
      " -> (Tensor dx, Tensor dfc_weight, Tensor dfc_bias, Tensor dproj_weight, Tensor dproj_bias)");
  // y = x weight^T + bias + low lora_B^T, low = scaling dropout(x) lora_A^T, in float32, one row per row of x; products and
  // y in dtype; seed one int64, needed with dropout.
  m.def(
      "lora_linear_fwd(Tensor x, Tensor weight, Tensor? bias, Tensor lora_A, Tensor lora_B, float scaling,"
      " float dropout_p, Tensor? seed, ScalarType dtype) -> (Tensor y, Tensor low)");
  // dtype, scaling, dropout_p, seed as they were; wanted as above, in the order of the results.
  m.def(
      "lora_linear_bwd(Tensor dy, Tensor x, Tensor low, Tensor weight, Tensor lora_A, Tensor lora_B, float scaling,"
      " float dropout_p, Tensor? seed, ScalarType dtype, int wanted)"
      " -> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dlora_A, Tensor dlora_B)");
  // A model for decode_step, known by the number that this returns, until decode_release.
  // weights: wte, its scales, wpe, ln_f weight, bias, head weight, scales, bias; then for each layer ln_1 weight, bias,
  // c_attn weight, scales, bias, attn.c_proj likewise, ln_2 weight, bias, c_fc and mlp.c_proj likewise. An absent one is empty.
  // Matrices are all float32, bfloat16 or int8 (with a float32 scale for each row), the others float32, but wpe bfloat16
  // beside bfloat16 matrices. activation: 0 gelu_tanh, 1 gelu, 2 relu.
  m.def("decode_prepare(Tensor[] weights, int n_head, float scale, float eps, int activation) -> int");
  m.def("decode_release(int plan) -> ()");
  // One more token in each of B rows, which hold lengths (B,): its keys and values are added to cache (L, 2, B, H, S, D).
  // Returns float32 logits (B, V).
  m.def("decode_step(int plan, int[] tokens, int[] lengths, Tensor(a!) cache) -> Tensor logits");
  // One decoder layer, csrc/cpu/block.cpp. x float32 (B, T, C), branch (B, T, C) float32 or bfloat16; parameters float32: norm,
  // qkv, out, norm, fc, proj, each weight (out, in) and bias, and of the products also an adapter's A (r, in) and B (out, r);
  // scalings and adapter_ps: of the adapters of qkv, out, fc, proj; activation as in csrc/cpu/activation.h; seeds int64 (7,),
  // needed with dropout: branch, attention weights, attention's branch, the adapters. stream float32, branch of the products' dtype, kept: bytes for the backward pass, empty without `keep`.
  m.def(
      "decoder_layer_fwd(Tensor x, Tensor? branch, Tensor?[] parameters, int heads, int activation, float scale, float eps,"
      " float attention_p, float residual_p, float[] scalings, float[] adapter_ps, Tensor? seeds, bool bf16, bool keep)"
      " -> (Tensor stream, Tensor new_branch, Tensor kept)");
  // wants: x, branch, parameters. What is not wanted is empty, and dbranch too where it would equal dx.
  m.def(
      "decoder_layer_bwd(Tensor dstream, Tensor dnew_branch, Tensor x, ScalarType? branch_dtype, Tensor stream, Tensor kept,"
      " Tensor?[] parameters, int heads, int activation, float scale, float eps, float attention_p, float residual_p,"
      " float[] scalings, float[] adapter_ps, Tensor? seeds, bool bf16, bool[] wants)"
      " -> (Tensor dx, Tensor dbranch, Tensor[] dparameters)");
  m.def("build_config() -> str");
  m.def("cpu_isa() -> str");
}

#ifndef LLMFAST_EMULATE
namespace {

std::string build_config() {
  return "version=" LLMFAST_VERSION " torch_target=" LLMFAST_TORCH_TARGET " cuda_archs=" LLMFAST_CUDA_ARCHS;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(llmfast, CompositeExplicitAutograd, m) {
  m.impl("build_config", TORCH_BOX(&build_config));
}
#endif
