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
// A product may have a low-rank adapter: y = x W^T + b + low B^T with low = scaling d(x) A^T, d: a dropout of its own, as
// cpu/lora.cpp has it alone. low is kept, d(x) is made again.
//
// B batch, T sequence, C width, H heads, N = B T rows, F width of the hidden layer of the MLP.
#include <algorithm>
#include <array>
#include <optional>
#include <tuple>
#include <vector>

#include "cpu/activation.h"
#include "cpu/attention.h"
#include "cpu/dropout.h"
#include "cpu/gemm.h"
#include "cpu/layer_norm.h"
#include "cpu/operand.h"
#include "cpu/scratch.h"
#include "stable.h"

namespace llmfast::cpu {
namespace {

using torch::stable::contiguous;
using torch::stable::new_empty;
using MaybeTensor = std::optional<Tensor>;

// The order of `parameters` and of their gradients; weights are (out, in), A (r, in), B (out, r).
enum Parameter {
  ln1_w, ln1_b, qkv_w, qkv_b, qkv_A, qkv_B, out_w, out_b, out_A, out_B,
  ln2_w, ln2_b, fc_w, fc_b, fc_A, fc_B, proj_w, proj_b, proj_A, proj_B, kParameters
};
constexpr const char* kNames[kParameters] = {"ln1_w", "ln1_b", "qkv_w", "qkv_b", "qkv_A",  "qkv_B",  "out_w",
                                             "out_b", "out_A", "out_B", "ln2_w", "ln2_b",  "fc_w",   "fc_b",
                                             "fc_A",  "fc_B",  "proj_w", "proj_b", "proj_A", "proj_B"};
constexpr int kProducts = 4;
constexpr Parameter kWeights[kProducts] = {qkv_w, out_w, fc_w, proj_w};
constexpr Parameter bias_of(Parameter w) { return Parameter(w + 1); }
constexpr Parameter A_of(Parameter w) { return Parameter(w + 2); }
constexpr Parameter B_of(Parameter w) { return Parameter(w + 3); }

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

// What a product's adapter is besides A and B; a rank of 0: there is none.
struct Adapter {
  int64_t in = 0, out = 0, r = 0;
  float scaling = 0;
  Dropout mask{};
};

// Memory that the products with adapters need for as long as they run.
struct Spare {
  float *start, *dlow;  // what a product starts from where it is not its own result; (N, r)
  void* dropped;        // d(x)
};

// What a layer is, apart from its input.
struct Layer {
  int64_t B, T, C, H, F, N;
  Dtype dtype;  // of the products and of what lies between them
  Activation activation;
  float scale, eps;
  Dropout branch_dropout, attention_dropout, out_dropout;
  std::vector<MaybeTensor> parameters;
  std::array<bool, kParameters> flipped;      // a weight that lies as (in, out), and so does its gradient
  std::array<Adapter, kParameters> adapters;  // by the product's weight

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
  // y (N, out) = x (N, in) w^T + b + low B^T [+ residual]; low (N, r) is filled.
  void linear(const void* x, int64_t in, Parameter w, int64_t out, void* y, Dtype y_dtype, float* low, const Spare& spare,
              const float* residual = nullptr) const {
    Product p{N, out, in, {x, in, dtype}, weight(w, out, in, true), y, out, y_dtype, dtype};
    p.bias = parameter(bias_of(w));
    p.residual = residual;
    p.residual_stride = out;
    if (const int64_t r = adapters[w].r) {
      gemm({N, r, in, {dropped(w, x, spare), in, dtype}, {parameter(A_of(w)), in, Dtype::f32, true}, low, r, Dtype::f32, dtype});
      scale_low(w, low);
      float* start = y_dtype == Dtype::f32 ? static_cast<float*>(y) : spare.start;
      Product update{N, out, r, {low, r, Dtype::f32}, {parameter(B_of(w)), r, Dtype::f32, true}, start, out, Dtype::f32, dtype};
      update.residual = residual;
      update.residual_stride = out;
      gemm(update);
      p.residual = start;
    }
    gemm(p);
  }
  // dlow (N, r) = scaling dy (N, out) B
  void linear_dlow(const void* dy, Parameter w, float* dlow) const {
    const Adapter& a = adapters[w];
    if (!a.r) return;
    gemm({N, a.r, a.out, {dy, a.out, dtype}, {parameter(B_of(w)), a.r, Dtype::f32}, dlow, a.r, Dtype::f32, dtype});
    scale_low(w, dlow);
  }
  // dx (N, in) = dy (N, out) w + d(dlow A), with dlow from linear_dlow
  void linear_dx(const void* dy, int64_t out, Parameter w, int64_t in, void* dx, const Spare& spare) const {
    Product p{N, in, out, {dy, out, dtype}, weight(w, out, in), dx, in, dtype, dtype};
    if (const int64_t r = adapters[w].r) {
      float* start = dtype == Dtype::f32 ? static_cast<float*>(dx) : spare.start;
      gemm({N, in, r, {spare.dlow, r, Dtype::f32}, {parameter(A_of(w)), in, Dtype::f32}, start, in, Dtype::f32, dtype});
      if (adapters[w].mask.drop) dropout_rows(adapters[w].mask, Dtype::f32, start, start, N, in);
      p.residual = start;
      p.residual_stride = in;
    }
    gemm(p);
  }
  // dw (out, in) = dy^T x, laid out as w
  void linear_dw(const void* dy, int64_t out, const void* x, int64_t in, Parameter w, float* dw) const {
    if (flipped[w])
      gemm({in, out, N, {x, in, dtype, true}, {dy, out, dtype}, dw, out, Dtype::f32, dtype});
    else
      gemm({out, in, N, {dy, out, dtype, true}, {x, in, dtype}, dw, in, Dtype::f32, dtype});
  }

  // d(x) of an adapter: x itself where nothing is dropped.
  const void* dropped(Parameter w, const void* x, const Spare& spare) const {
    if (!adapters[w].mask.drop) return x;
    dropout_rows(adapters[w].mask, dtype, x, spare.dropped, N, adapters[w].in);
    return spare.dropped;
  }
  void scale_low(Parameter w, float* low) const {
    for (int64_t i = 0; i < N * adapters[w].r; ++i) low[i] *= adapters[w].scaling;
  }
  Spare spare(Cursor& cursor) const {
    int64_t widest = 0, rank = 0, dropped = 0;
    for (const Adapter& a : adapters) {
      if (!a.r) continue;
      widest = std::max({widest, a.in, a.out});
      rank = std::max(rank, a.r);
      if (a.mask.drop) dropped = std::max(dropped, a.in);
    }
    float* start = cursor.take_floats(dtype == Dtype::f32 ? 0 : N * widest);
    float* dlow = cursor.take_floats(N * rank);
    return {start, dlow, cursor.take(bytes(dropped))};
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
  std::array<float*, kParameters> low;  // by the product's weight
  void *qkv, *a, *h;

  // s1 is x itself where there is no branch.
  Kept(Cursor& cursor, const Layer& l, bool has_branch) {
    for (float** statistic : {&mean1, &rstd1, &mean2, &rstd2}) *statistic = cursor.take_floats(l.N);
    lse = cursor.take_floats(l.N * l.H);
    s1 = has_branch ? cursor.take_floats(l.N * l.C) : nullptr;
    for (Parameter w : kWeights) low[w] = cursor.take_floats(l.N * l.adapters[w].r);
    qkv = cursor.take(l.bytes(3 * l.C));
    a = cursor.take(l.bytes(l.C));
    h = cursor.take(l.bytes(l.F));
  }
};

// Lays out what `make(cursor)` asks for in the memory that `allocate(bytes)` returns.
template <typename Allocate, typename Make>
auto lay_out(Allocate allocate, Make make) {
  Cursor count{nullptr};
  make(count);
  Cursor cursor{static_cast<char*>(allocate(count.used))};
  return make(cursor);
}

// New memory, which `tensor` holds.
auto in_tensor(const Tensor& like, Tensor& tensor) {
  return [&](int64_t bytes) {
    tensor = new_empty(like, {bytes}, ScalarType::Byte);
    return tensor.mutable_data_ptr();
  };
}

// What a training step needs in every layer stays for the next: such large blocks, come and gone between those that are
// kept, leave the allocator holes that it cannot use again.
auto in_scratch() {
  thread_local Scratch scratch;
  return [](int64_t bytes) { return scratch.get<char>(bytes); };
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
                 double scale, double eps, double attention_p, double residual_p, const std::vector<double>& scalings,
                 const std::vector<double>& adapter_ps, const MaybeTensor& seeds, bool bf16) {
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
  int64_t sizes[kParameters][2];  // of a bias: (1, its size)
  for (Parameter norm : {ln1_w, ln1_b, ln2_w, ln2_b}) sizes[norm][0] = 1, sizes[norm][1] = l.C;
  const int64_t ends[kProducts][2] = {{3 * l.C, l.C}, {l.C, l.C}, {l.F, l.C}, {l.C, l.F}};  // out, in
  for (int i = 0; i < kProducts; ++i) {
    const Parameter w = kWeights[i];
    const auto [out, in] = ends[i];
    const bool given = parameters[A_of(w)] && parameters[A_of(w)]->dim() == 2;
    l.adapters[w] = {in, out, given ? parameters[A_of(w)]->size(0) : 0};
    const int64_t r = l.adapters[w].r;
    const int64_t of_product[4][2] = {{out, in}, {1, out}, {r, in}, {out, r}};
    for (int j = 0; j < 4; ++j) std::copy_n(of_product[j], 2, sizes[w + j]);
    STD_TORCH_CHECK(parameters[A_of(w)].has_value() == parameters[B_of(w)].has_value(), kNames[A_of(w)], " and ",
                    kNames[B_of(w)], " go together");
  }
  l.parameters.resize(kParameters);
  for (int i = 0; i < kParameters; ++i) {
    const MaybeTensor& p = parameters[i];
    const bool needed = i == ln1_w || i == qkv_w || i == ln2_w || i == fc_w || i == proj_w;
    STD_TORCH_CHECK(p || !needed, kNames[i], " must be given");
    STD_TORCH_CHECK(!p || (i != out_b && i != out_A) || parameters[out_w], kNames[i], " needs out_w");
    if (!p) continue;
    STD_TORCH_CHECK(p->scalar_type() == ScalarType::Float && p->is_cpu() && p->numel() == sizes[i][0] * sizes[i][1] &&
                        p->size(p->dim() - 1) == sizes[i][1],
                    kNames[i], " must be a float32 (", sizes[i][0], ", ", sizes[i][1], ") on the CPU");
    l.flipped[i] = std::count(kWeights, kWeights + kProducts, i) && lies_transposed(*p);
    l.parameters[i] = l.flipped[i] ? torch::stable::transpose(*p, 0, 1) : contiguous(*p);
  }
  STD_TORCH_CHECK(scalings.size() == kProducts && adapter_ps.size() == kProducts, "scalings and adapter_ps must be ",
                  kProducts, " numbers");
  bool drops = attention_p > 0 || residual_p > 0;
  STD_TORCH_CHECK(attention_p >= 0 && attention_p < 1 && residual_p >= 0 && residual_p < 1, "dropout must lie in [0, 1)");
  for (double p : adapter_ps) {
    STD_TORCH_CHECK(p >= 0 && p < 1, "dropout must lie in [0, 1)");
    drops |= p > 0;
  }
  constexpr int64_t kSeeds = 3 + kProducts;
  int64_t seed[kSeeds] = {};
  if (drops) {
    STD_TORCH_CHECK(seeds && seeds->scalar_type() == ScalarType::Long && seeds->numel() == kSeeds &&
                        seeds->is_cpu() && seeds->is_contiguous(),
                    "dropout needs seeds: ", kSeeds, " int64 on the CPU");
    std::copy_n(static_cast<const int64_t*>(seeds->const_data_ptr()), kSeeds, seed);
  }
  l.branch_dropout = make_dropout(seed[0], residual_p);
  l.attention_dropout = make_dropout(seed[1], attention_p);
  l.out_dropout = make_dropout(seed[2], residual_p);
  for (int i = 0; i < kProducts; ++i) {
    Adapter& adapter = l.adapters[kWeights[i]];
    adapter.scaling = float(scalings[i]);
    adapter.mask = make_dropout(seed[3 + i], adapter.r ? adapter_ps[i] : 0.0);
  }
  return l;
}

std::tuple<Tensor, Tensor, Tensor> decoder_layer_fwd(const Tensor& x_in, const MaybeTensor& branch_in,
                                                     const std::vector<MaybeTensor>& parameters, int64_t heads,
                                                     int64_t activation, double scale, double eps, double attention_p,
                                                     double residual_p, const std::vector<double>& scalings,
                                                     const std::vector<double>& adapter_ps, const MaybeTensor& seeds,
                                                     bool bf16, bool keep) {
  const Layer l = make_layer(x_in, parameters, heads, activation, scale, eps, attention_p, residual_p, scalings, adapter_ps,
                             seeds, bf16);
  const Tensor x = contiguous(x_in);
  if (branch_in) check_stream("branch", *branch_in, branch_in->scalar_type(), x);
  const int64_t C = l.C;
  Tensor kept_memory, scratch;
  const Kept kept = lay_out(in_tensor(x, kept_memory), [&](Cursor& c) { return Kept(c, l, branch_in.has_value()); });
  // The norms n1 and n2, p where it is not added to s1 in the product's store, and g.
  const bool projects = l.parameters[out_w].has_value(), p_drops = projects && l.out_dropout.drop;
  const auto rooms = [&](Cursor& c) {
    return std::tuple{l.spare(c), c.take(l.bytes(C)), c.take(p_drops ? l.bytes(C) : 0), c.take(l.bytes(l.F))};
  };
  const auto [spare, n, p, g] = keep ? lay_out(in_scratch(), rooms) : lay_out(in_tensor(x, scratch), rooms);
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
  l.linear(n, C, qkv_w, 3 * C, kept.qkv, l.dtype, kept.low[qkv_w], spare);
  attention_forward(l.attention(), l.heads<const void>(kept.qkv, 3, 0), l.heads<const void>(kept.qkv, 3, 1),
                    l.heads<const void>(kept.qkv, 3, 2), l.heads(kept.a), kept.lse);
  if (projects && !p_drops) {
    l.linear(kept.a, C, out_w, C, s2, Dtype::f32, kept.low[out_w], spare, s1);
    l.norm(ln2_w, s2, n, kept.mean2, kept.rstd2);
  } else {
    if (projects) l.linear(kept.a, C, out_w, C, p, l.dtype, kept.low[out_w], spare);
    l.norm(ln2_w, s1, projects ? p : kept.a, l.dtype, l.out_dropout, s2, n, kept.mean2, kept.rstd2);
  }
  l.linear(n, C, fc_w, l.F, kept.h, l.dtype, kept.low[fc_w], spare);
  activation_forward(l.activation, l.dtype, kept.h, g, l.N * l.F);
  l.linear(g, l.F, proj_w, C, branch.mutable_data_ptr(), l.dtype, kept.low[proj_w], spare);
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

  // Whether x is needed for them.
  bool need_x(Parameter w) const { return wanted(w) || wanted(A_of(w)); }
  void bias(const void* dy, int64_t out, Parameter w) {
    if (wanted(bias_of(w))) column_sums(l.dtype, dy, out, of(bias_of(w)), l.N, out);
  }
  // Those of w and of its adapter, for y (N, out) = x (N, in) w^T + low B^T. low is the forward pass's, spare.dlow from
  // linear_dlow.
  void product(const void* dy, int64_t out, const void* x, int64_t in, Parameter w, const float* low, const Spare& spare) {
    if (wanted(w)) l.linear_dw(dy, out, x, in, w, of(w));
    const int64_t r = l.adapters[w].r;
    if (wanted(B_of(w)))
      gemm({out, r, l.N, {dy, out, l.dtype, true}, {low, r, Dtype::f32}, of(B_of(w)), r, Dtype::f32, l.dtype});
    if (wanted(A_of(w)))
      gemm({r, in, l.N, {spare.dlow, r, Dtype::f32, true}, {l.dropped(w, x, spare), in, l.dtype}, of(A_of(w)), in, Dtype::f32,
            l.dtype});
  }
  // Of a norm, see LayerNormBackward; dw is made beside db, wanted or not.
  void norm(Parameter w, const void* dy, const float* s, const float* mean, const float* rstd, const float* ds_in, float* ds,
            void* dbranch, Dtype branch_dtype, Dropout dropout) {
    float *dw = of(w), *db = of(bias_of(w));
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
    int64_t activation, double scale, double eps, double attention_p, double residual_p, const std::vector<double>& scalings,
    const std::vector<double>& adapter_ps, const MaybeTensor& seeds, bool bf16, const std::vector<bool>& wants) {
  const Layer l = make_layer(x_in, parameters, heads, activation, scale, eps, attention_p, residual_p, scalings, adapter_ps,
                             seeds, bf16);
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
  Tensor ds, dopen = new_empty(x, {0});
  const bool own_dp = bf16 || l.out_dropout.drop;
  const auto [spare, n, dn, dp_memory, dh, shared] = lay_out(in_scratch(), [&](Cursor& c) {
    return std::tuple{l.spare(c), c.take(l.bytes(C)), c.take(l.bytes(C)), c.take(own_dp ? l.bytes(C) : 0),
                      c.take(l.bytes(F)), c.take(l.bytes(std::max(F, 3 * C)))};
  });
  void *const g = shared, *const dqkv = shared;  // the MLP is done with g where attention begins
  ds = new_empty(x, grads.any_before(fc_w) ? x.sizes() : torch::headeronly::IntHeaderOnlyArrayRef{0});
  const auto result = [&] { return std::make_tuple(ds, dopen, grads.laid_out()); };

  // The MLP; g = act(h) is made on the way from dg to dh.
  const void* dm = dm_tensor.const_data_ptr();
  l.linear_dlow(dm, proj_w, spare.dlow);
  if (grads.any_before(proj_w)) {
    l.linear_dx(dm, C, proj_w, F, dh, spare);
    activation_backward(l.activation, l.dtype, kept.h, dh, dh, g, grads.of(fc_b), l.N, F);
  } else if (grads.need_x(proj_w)) {
    activation_forward(l.activation, l.dtype, kept.h, g, l.N * F);
  }
  grads.bias(dm, C, proj_w);
  grads.product(dm, C, g, F, proj_w, kept.low[proj_w], spare);
  if (!grads.any_before(proj_w)) return result();
  l.linear_dlow(dh, fc_w, spare.dlow);
  if (grads.need_x(fc_w)) l.norm(ln2_w, s2, n, kept.mean2, kept.rstd2);
  grads.product(dh, F, n, C, fc_w, kept.low[fc_w], spare);
  if (!grads.any_before(fc_w)) return result();
  l.linear_dx(dh, F, fc_w, C, dn, spare);
  void* dp = own_dp ? dp_memory : ds.mutable_data_ptr();
  grads.norm(ln2_w, dn, s2, kept.mean2, kept.rstd2, floats(dstream), mutable_floats(ds), own_dp ? dp : nullptr, l.dtype,
             l.out_dropout);

  // Attention.
  if (!grads.any_before(ln2_w)) return result();
  const void* da = dp;
  if (l.parameters[out_w]) {
    l.linear_dlow(dp, out_w, spare.dlow);
    grads.bias(dp, C, out_w);
    grads.product(dp, C, kept.a, C, out_w, kept.low[out_w], spare);
    if (!grads.any_before(out_w)) return result();
    l.linear_dx(dp, C, out_w, C, dn, spare);
    da = dn;
  }
  if (!grads.any_before(out_w)) return result();
  const auto part = [&](const void* packed, int i) { return l.heads<const void>(packed, 3, i); };
  attention_backward(l.attention(), part(kept.qkv, 0), part(kept.qkv, 1), part(kept.qkv, 2), l.heads<const void>(kept.a),
                     l.heads<const void>(da), kept.lse, l.heads(dqkv, 3, 0), l.heads(dqkv, 3, 1), l.heads(dqkv, 3, 2));
  l.linear_dlow(dqkv, qkv_w, spare.dlow);
  if (grads.need_x(qkv_w)) l.norm(ln1_w, s1, n, kept.mean1, kept.rstd1);
  grads.bias(dqkv, 3 * C, qkv_w);
  grads.product(dqkv, 3 * C, n, C, qkv_w, kept.low[qkv_w], spare);
  if (!grads.any_before(qkv_w)) return result();
  l.linear_dx(dqkv, 3 * C, qkv_w, C, dn, spare);
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
