// A pre-norm decoder layer in one call each way, composed of the CPU kernels: nothing but its products is worth a trip
// through Python, and what lies between two products is still in the cache.
//
//   s1 = x + dropout(branch)     n1 = norm(s1)      qkv = n1 Wqkv^T + b     a = attention(qkv)     p = a Wout^T + b
//   s2 = s1 + dropout(p)         n2 = norm(s2)      h = n2 Wfc^T + b        g = act(h)             m = g Wproj^T + b
//
// (s2, m) is the stream and the open branch of the next layer. The stream, the parameters and their gradients are float32;
// with bf16 everything between two products is bfloat16. Kept for backward: s1 (or x), s2, qkv, a, h and the statistics of
// the norms and of the softmax; n1, n2 and g are cheaper to make again than to keep.
//
// B batch, T sequence, C width, H heads, N = B T rows, F width of the hidden layer of the MLP.
#include <algorithm>
#include <array>
#include <optional>
#include <tuple>
#include <vector>

#include "cpu/activation.h"
#include "cpu/attention.h"
#include "cpu/gemm.h"
#include "cpu/layer_norm.h"
#include "cpu/operand.h"
#include "stable.h"

namespace llmfast::cpu {
namespace {

using torch::stable::contiguous;
using torch::stable::new_empty;
using MaybeTensor = std::optional<Tensor>;

// The order of `parameters` and of their gradients; weights are (out, in).
enum Parameter { ln1_w, ln1_b, qkv_w, qkv_b, out_w, out_b, ln2_w, ln2_b, fc_w, fc_b, proj_w, proj_b, kParameters };
constexpr const char* kNames[kParameters] = {"ln1_w", "ln1_b", "qkv_w", "qkv_b", "out_w",  "out_b",
                                             "ln2_w", "ln2_b", "fc_w",  "fc_b",  "proj_w", "proj_b"};

const float* floats(const Tensor& t) { return static_cast<const float*>(t.const_data_ptr()); }
float* mutable_floats(const Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }

// Cuts one allocation into arrays, the float32 ones first; without a base it only counts.
struct Cursor {
  char* base;
  int64_t used = 0;

  void* take(int64_t bytes) {
    void* array = base ? base + used : nullptr;
    used += bytes;
    return array;
  }
  float* take_floats(int64_t count) { return static_cast<float*>(take(4 * count)); }
};

// What a layer is, apart from its input.
struct Layer {
  int64_t B, T, C, H, F, N;
  Dtype dtype;  // of the products and of what lies between them
  Activation activation;
  float scale, eps;
  Dropout branch_dropout, attention_dropout, out_dropout;
  std::vector<MaybeTensor> parameters;
  std::array<bool, kParameters> flipped;  // a weight that lies as (in, out), and so does its gradient

  const float* parameter(Parameter i) const { return parameters[i] ? floats(*parameters[i]) : nullptr; }
  int64_t bytes(int64_t columns) const { return N * columns * (dtype == Dtype::bf16 ? 2 : 4); }

  Attention attention() const {
    Attention a{B, H, T, T, C / H, dtype, scale};
    a.dropout = attention_dropout;
    return a;
  }
  // q, k or v (0, 1, 2) in a packed (B, T, 3, H, D), or the whole of a (B, T, H, D).
  template <typename Void>
  HeadsOf<Void> heads(Void* data, int64_t packed = 1, int64_t part = 0) const {
    using Char = std::conditional_t<std::is_const_v<Void>, const char, char>;
    auto* first = static_cast<Char*>(data) + part * C * (dtype == Dtype::bf16 ? 2 : 4);
    return {first, T * packed * C, C / H, packed * C};
  }

  // w (out, in), or its transpose.
  Operand weight(Parameter w, int64_t out, int64_t in, bool transposed = false) const {
    return {parameter(w), flipped[w] ? out : in, Dtype::f32, transposed != flipped[w]};
  }
  // y (N, out) = x (N, in) w^T + b [+ residual]
  void linear(const void* x, int64_t in, Parameter w, Parameter b, int64_t out, void* y, Dtype y_dtype,
              const float* residual = nullptr) const {
    Product p{N, out, in, {x, in, dtype}, weight(w, out, in, true), y, out, y_dtype, dtype};
    p.bias = parameter(b);
    p.residual = residual;
    p.residual_stride = out;
    gemm(p);
  }
  // dx (N, in) = dy (N, out) w
  void linear_dx(const void* dy, int64_t out, Parameter w, int64_t in, void* dx) const {
    gemm({N, in, out, {dy, out, dtype}, weight(w, out, in), dx, in, dtype, dtype});
  }
  // dw (out, in) = dy^T x, laid out as w
  void linear_dw(const void* dy, int64_t out, const void* x, int64_t in, Parameter w, float* dw) const {
    if (flipped[w])
      gemm({in, out, N, {x, in, dtype, true}, {dy, out, dtype}, dw, out, Dtype::f32, dtype});
    else
      gemm({out, in, N, {dy, out, dtype, true}, {x, in, dtype}, dw, in, Dtype::f32, dtype});
  }

  // y = norm(s), s = residual + dropout(branch), or the residual alone.
  void norm(Parameter w, const float* residual, const void* branch, Dtype branch_dtype, Dropout dropout, float* s, void* y,
            float* mean, float* rstd) const {
    layer_norm_forward({C, eps, parameter(w), parameter(Parameter(w + 1)), residual, branch, dropout, s, y, mean, rstd,
                        Dtype::f32, branch_dtype, dtype},
                       N);
  }
  void norm(Parameter w, const float* s, void* y, float* mean, float* rstd) const {
    norm(w, s, nullptr, Dtype::f32, {}, nullptr, y, mean, rstd);
  }
};

// What the forward pass keeps for the backward pass, in one tensor of bytes.
struct Kept {
  float *mean1, *rstd1, *mean2, *rstd2, *lse, *s1;
  void *qkv, *a, *h;

  // s1 is x itself where there is no branch.
  Kept(Cursor& cursor, const Layer& l, bool has_branch) {
    for (float** statistic : {&mean1, &rstd1, &mean2, &rstd2}) *statistic = cursor.take_floats(l.N);
    lse = cursor.take_floats(l.N * l.H);
    s1 = has_branch ? cursor.take_floats(l.N * l.C) : nullptr;
    qkv = cursor.take(l.bytes(3 * l.C));
    a = cursor.take(l.bytes(l.C));
    h = cursor.take(l.bytes(l.F));
  }
};

// Allocates what `make(cursor)` lays out.
template <typename Make>
auto allocate(const Tensor& like, Tensor& memory, Make make) {
  Cursor count{nullptr};
  make(count);
  memory = new_empty(like, {count.used}, ScalarType::Byte);
  Cursor cursor{static_cast<char*>(memory.mutable_data_ptr())};
  return make(cursor);
}

void check_stream(const char* name, const Tensor& t, ScalarType dtype, const Tensor& x) {
  STD_TORCH_CHECK(t.dim() == 3 && t.size(0) == x.size(0) && t.size(1) == x.size(1) && t.size(2) == x.size(2) && t.is_cpu(),
                  name, " must have x's shape and device");
  STD_TORCH_CHECK(t.scalar_type() == dtype, name, " must be ", torch::headeronly::toString(dtype));
}

Dtype dtype_of(const char* name, const Tensor& t) {
  if (t.scalar_type() == ScalarType::BFloat16) return Dtype::bf16;
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float, name, " must be float32 or bfloat16, got ",
                  torch::headeronly::toString(t.scalar_type()));
  return Dtype::f32;
}

Layer make_layer(const Tensor& x, const std::vector<MaybeTensor>& parameters, int64_t heads, int64_t activation,
                 double scale, double eps, double attention_p, double residual_p, const MaybeTensor& seeds, bool bf16) {
  STD_TORCH_CHECK(x.dim() == 3 && x.scalar_type() == ScalarType::Float && x.is_cpu(),
                  "x must be a float32 (B, T, C) on the CPU");
  STD_TORCH_CHECK(parameters.size() == kParameters, "parameters must be ", int(kParameters), " tensors or None");
  STD_TORCH_CHECK(activation >= 0 && activation < kActivations, "activation must be below ", kActivations);
  STD_TORCH_CHECK(heads > 0 && x.size(2) % heads == 0, "heads must divide x's width");
  STD_TORCH_CHECK(parameters[fc_w] && parameters[fc_w]->dim() == 2, "fc_w must be (F, C)");
  Layer l{};
  l.B = x.size(0), l.T = x.size(1), l.C = x.size(2), l.H = heads, l.F = parameters[fc_w]->size(0), l.N = l.B * l.T;
  l.dtype = bf16 ? Dtype::bf16 : Dtype::f32;
  l.activation = Activation(activation);
  l.scale = float(scale);
  l.eps = float(eps);
  const int64_t sizes[kParameters][2] = {{1, l.C}, {1, l.C}, {3 * l.C, l.C}, {1, 3 * l.C}, {l.C, l.C}, {1, l.C},
                                         {1, l.C}, {1, l.C}, {l.F, l.C},     {1, l.F},     {l.C, l.F}, {1, l.C}};
  l.parameters.resize(kParameters);
  for (int i = 0; i < kParameters; ++i) {
    const MaybeTensor& p = parameters[i];
    const bool weight = i % 2 == 0;
    STD_TORCH_CHECK(p || !weight || i == out_w, kNames[i], " must be given");
    STD_TORCH_CHECK(!p || i != out_b || parameters[out_w], "out_b needs out_w");
    if (!p) continue;
    STD_TORCH_CHECK(p->scalar_type() == ScalarType::Float && p->is_cpu() && p->numel() == sizes[i][0] * sizes[i][1] &&
                        p->size(p->dim() - 1) == sizes[i][1],
                    kNames[i], " must be a float32 (", sizes[i][0], ", ", sizes[i][1], ") on the CPU");
    l.flipped[i] = weight && lies_transposed(*p);
    l.parameters[i] = l.flipped[i] ? torch::stable::transpose(*p, 0, 1) : contiguous(*p);
  }
  STD_TORCH_CHECK(attention_p >= 0 && attention_p < 1 && residual_p >= 0 && residual_p < 1, "dropout must lie in [0, 1)");
  int64_t seed[3] = {0, 0, 0};
  if (attention_p > 0 || residual_p > 0) {
    STD_TORCH_CHECK(seeds && seeds->scalar_type() == ScalarType::Long && seeds->numel() == 3 && seeds->is_cpu() &&
                        seeds->is_contiguous(),
                    "dropout needs seeds: three int64 on the CPU");
    std::copy_n(static_cast<const int64_t*>(seeds->const_data_ptr()), 3, seed);
  }
  l.branch_dropout = make_dropout(seed[0], residual_p);
  l.attention_dropout = make_dropout(seed[1], attention_p);
  l.out_dropout = make_dropout(seed[2], residual_p);
  return l;
}

std::tuple<Tensor, Tensor, Tensor> decoder_layer_fwd(const Tensor& x_in, const MaybeTensor& branch_in,
                                                     const std::vector<MaybeTensor>& parameters, int64_t heads,
                                                     int64_t activation, double scale, double eps, double attention_p,
                                                     double residual_p, const MaybeTensor& seeds, bool bf16, bool keep) {
  const Layer l =
      make_layer(x_in, parameters, heads, activation, scale, eps, attention_p, residual_p, seeds, bf16);
  const Tensor x = contiguous(x_in);
  if (branch_in) check_stream("branch", *branch_in, branch_in->scalar_type(), x);
  const int64_t C = l.C;
  Tensor kept_memory, scratch;
  const Kept kept = allocate(x, kept_memory, [&](Cursor& c) { return Kept(c, l, branch_in.has_value()); });
  // The norms n1 and n2, p where it is not added to s1 in the product's store, and g.
  const bool projects = l.parameters[out_w].has_value(), p_drops = projects && l.out_dropout.drop;
  const auto [n, p, g] = allocate(x, scratch, [&](Cursor& c) {
    return std::array{c.take(l.bytes(C)), c.take(p_drops ? l.bytes(C) : 0), c.take(l.bytes(l.F))};
  });
  Tensor stream = new_empty(x, x.sizes());
  Tensor branch = new_empty(x, x.sizes(), bf16 ? ScalarType::BFloat16 : ScalarType::Float);
  float* s2 = mutable_floats(stream);

  const float* s1 = floats(x);
  if (branch_in) {
    const Tensor open = contiguous(*branch_in);
    l.norm(ln1_w, s1, open.const_data_ptr(), dtype_of("branch", open), l.branch_dropout, kept.s1, n, kept.mean1,
           kept.rstd1);
    s1 = kept.s1;
  } else {
    l.norm(ln1_w, s1, n, kept.mean1, kept.rstd1);
  }
  l.linear(n, C, qkv_w, qkv_b, 3 * C, kept.qkv, l.dtype);
  attention_forward(l.attention(), l.heads<const void>(kept.qkv, 3, 0), l.heads<const void>(kept.qkv, 3, 1),
                    l.heads<const void>(kept.qkv, 3, 2), l.heads(kept.a), kept.lse);
  if (projects && !p_drops) {
    l.linear(kept.a, C, out_w, out_b, C, s2, Dtype::f32, s1);
    l.norm(ln2_w, s2, n, kept.mean2, kept.rstd2);
  } else {
    if (projects) l.linear(kept.a, C, out_w, out_b, C, p, l.dtype);
    l.norm(ln2_w, s1, projects ? p : kept.a, l.dtype, l.out_dropout, s2, n, kept.mean2, kept.rstd2);
  }
  l.linear(n, C, fc_w, fc_b, l.F, kept.h, l.dtype);
  activation_forward(l.activation, l.dtype, kept.h, g, l.N * l.F);
  l.linear(g, l.F, proj_w, proj_b, C, branch.mutable_data_ptr(), l.dtype);
  if (!keep) kept_memory = new_empty(x, {0}, ScalarType::Byte);
  return {stream, branch, kept_memory};
}

// The gradients of a layer in the order of the argument `wants`: x, branch, parameters.
struct Gradients {
  const Layer& l;
  const std::vector<bool>& wants;
  std::vector<Tensor> parameters;

  Gradients(const Layer& layer, const std::vector<bool>& wants_, const Tensor& x) : l(layer), wants(wants_) {
    for (int i = 0; i < kParameters; ++i)
      parameters.push_back(wanted(Parameter(i)) ? new_empty(*l.parameters[i], l.parameters[i]->sizes())
                                                : new_empty(x, {0}));
  }
  bool wanted(Parameter i) const { return wants[2 + i] && l.parameters[i]; }
  // Whether x, the branch or one of the parameters before `end` wants its gradient.
  bool any_before(int end) const {
    for (int i = 0; i < 2 + end; ++i)
      if (wants[i]) return true;
    return false;
  }
  // With every weight (out, in), whichever way it lies.
  std::vector<Tensor> laid_out() const {
    std::vector<Tensor> views = parameters;
    for (int i = 0; i < kParameters; ++i)
      if (wanted(Parameter(i)) && l.flipped[i]) views[i] = torch::stable::transpose(parameters[i], 0, 1);
    return views;
  }
  float* of(Parameter i) { return wanted(i) ? mutable_floats(parameters[i]) : nullptr; }

  // Those of w and of the bias beside it, for y (N, out) = x (N, in) w^T + b.
  void linear(const void* dy, int64_t out, const void* x, int64_t in, Parameter w) {
    if (wanted(w)) l.linear_dw(dy, out, x, in, w, of(w));
    if (wanted(Parameter(w + 1))) column_sums(l.dtype, dy, out, of(Parameter(w + 1)), l.N, out);
  }
  // Of a norm, see LayerNormBackward; dw is made beside db, wanted or not.
  void norm(Parameter w, const void* dy, const float* s, const float* mean, const float* rstd, const float* ds_in, float* ds,
            void* dbranch, Dtype branch_dtype, Dropout dropout) {
    float *dw = of(w), *db = of(Parameter(w + 1));
    std::vector<float> unwanted(db && !dw ? l.C : 0);
    layer_norm_backward({l.C, l.parameter(w), dy, s, mean, rstd, ds_in, ds, dbranch, dropout, db && !dw ? unwanted.data() : dw,
                         db, Dtype::f32, branch_dtype, l.dtype},
                        l.N);
  }
};

// x, stream (s2) and kept are those of the forward pass; dstream and dbranch the gradients of its results.
std::tuple<Tensor, Tensor, std::vector<Tensor>> decoder_layer_bwd(
    const Tensor& dstream_in, const Tensor& dbranch_in, const Tensor& x_in, std::optional<ScalarType> branch_dtype,
    const Tensor& stream, const Tensor& kept_memory, const std::vector<MaybeTensor>& parameters, int64_t heads,
    int64_t activation, double scale, double eps, double attention_p, double residual_p, const MaybeTensor& seeds, bool bf16,
    const std::vector<bool>& wants) {
  const Layer l =
      make_layer(x_in, parameters, heads, activation, scale, eps, attention_p, residual_p, seeds, bf16);
  const int64_t C = l.C, F = l.F;
  const Tensor x = contiguous(x_in), dstream = contiguous(dstream_in), dm_tensor = contiguous(dbranch_in);
  check_stream("dstream", dstream, ScalarType::Float, x);
  check_stream("dbranch", dm_tensor, bf16 ? ScalarType::BFloat16 : ScalarType::Float, x);
  check_stream("stream", stream, ScalarType::Float, x);
  Cursor cursor{static_cast<char*>(kept_memory.mutable_data_ptr())};
  const Kept kept(cursor, l, branch_dtype.has_value());
  STD_TORCH_CHECK(kept_memory.scalar_type() == ScalarType::Byte && kept_memory.numel() == cursor.used && stream.is_contiguous(),
                  "kept and stream must come from the forward pass");
  STD_TORCH_CHECK(wants.size() == 2 + kParameters, "wants must be ", 2 + kParameters, " bools");
  const float *s1 = branch_dtype ? kept.s1 : floats(x), *s2 = floats(stream);

  Gradients grads(l, wants, x);
  Tensor scratch, ds, dopen = new_empty(x, {0});
  const bool own_dp = bf16 || l.out_dropout.drop;
  const auto [n, dn, dp_memory, g, dh, dqkv] = allocate(x, scratch, [&](Cursor& c) {
    return std::array{c.take(l.bytes(C)), c.take(l.bytes(C)), c.take(own_dp ? l.bytes(C) : 0),
                      c.take(l.bytes(F)), c.take(l.bytes(F)), c.take(l.bytes(3 * C))};
  });
  ds = new_empty(x, grads.any_before(fc_w) ? x.sizes() : torch::headeronly::IntHeaderOnlyArrayRef{0});
  const auto result = [&] { return std::make_tuple(ds, dopen, grads.laid_out()); };

  // The MLP; g = act(h) is made on the way from dg to dh.
  const void* dm = dm_tensor.const_data_ptr();
  if (grads.any_before(proj_w)) {
    l.linear_dx(dm, C, proj_w, F, dh);
    activation_backward(l.activation, l.dtype, kept.h, dh, dh, g, grads.of(fc_b), l.N, F);
  } else if (grads.wanted(proj_w)) {
    activation_forward(l.activation, l.dtype, kept.h, g, l.N * F);
  }
  grads.linear(dm, C, g, F, proj_w);
  if (grads.wanted(fc_w)) {
    l.norm(ln2_w, s2, n, kept.mean2, kept.rstd2);
    l.linear_dw(dh, F, n, C, fc_w, grads.of(fc_w));
  }
  if (!grads.any_before(fc_w)) return result();
  l.linear_dx(dh, F, fc_w, C, dn);
  void* dp = own_dp ? dp_memory : ds.mutable_data_ptr();
  grads.norm(ln2_w, dn, s2, kept.mean2, kept.rstd2, floats(dstream), mutable_floats(ds), own_dp ? dp : nullptr, l.dtype,
             l.out_dropout);

  // Attention.
  if (!grads.any_before(ln2_w)) return result();
  const void* da = dp;
  if (l.parameters[out_w]) {
    grads.linear(dp, C, kept.a, C, out_w);
    if (!grads.any_before(out_w)) return result();
    l.linear_dx(dp, C, out_w, C, dn);
    da = dn;
  }
  if (!grads.any_before(out_w)) return result();
  const auto part = [&](const void* packed, int i) { return l.heads<const void>(packed, 3, i); };
  attention_backward(l.attention(), part(kept.qkv, 0), part(kept.qkv, 1), part(kept.qkv, 2), l.heads<const void>(kept.a),
                     l.heads<const void>(da), kept.lse, l.heads(dqkv, 3, 0), l.heads(dqkv, 3, 1), l.heads(dqkv, 3, 2));
  if (grads.wanted(qkv_w)) l.norm(ln1_w, s1, n, kept.mean1, kept.rstd1);
  grads.linear(dqkv, 3 * C, n, C, qkv_w);
  if (!grads.any_before(qkv_w)) return result();
  l.linear_dx(dqkv, 3 * C, qkv_w, C, dn);
  const bool own_dbranch = branch_dtype && (*branch_dtype != ScalarType::Float || l.branch_dropout.drop);
  if (own_dbranch) dopen = new_empty(x, x.sizes(), *branch_dtype);
  grads.norm(ln1_w, dn, s1, kept.mean1, kept.rstd1, floats(ds), mutable_floats(ds),
             own_dbranch ? dopen.mutable_data_ptr() : nullptr, own_dbranch ? dtype_of("branch", dopen) : Dtype::f32,
             l.branch_dropout);
  return result();
}

}  // namespace
}  // namespace llmfast::cpu

STABLE_TORCH_LIBRARY_IMPL(llmfast, CPU, m) {
  m.impl("decoder_layer_fwd", TORCH_BOX(&llmfast::cpu::decoder_layer_fwd));
  m.impl("decoder_layer_bwd", TORCH_BOX(&llmfast::cpu::decoder_layer_bwd));
}
