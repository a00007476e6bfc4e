// One new token of every row through the whole decoder, in one call: embedding, every layer, logits.
//
// All threads run `Step::thread` side by side. The work is cut into phases (a matrix product, or the attention of a layer),
// a phase into chunks. A thread claims the next chunk of the phase, and when all are claimed waits until all are done: only
// ever for chunks that a running thread has claimed. So it is right, and ends, for any number of threads, even if one comes
// late or never. Every thread makes the norms that it needs itself: cheaper than one more wait.
//
// B rows, C width, H heads, D head size, S slots of the cache, V vocabulary. Sums, activations and norms are float32.
#include "cpu/decode.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

#include "cpu/activation.h"
#include "cpu/gemv.h"
#include "cpu/layer_norm.h"
#include "stable.h"

namespace llmfast::cpu {
namespace {

// ---- The model ----

struct Norm {
  const float *w, *b;
};

struct Matrix {
  int64_t N, K;
  const void* w;       // (N, K) of the model's weight type; null: absent
  const float* scale;  // (N,), of int8 weights
  const float* bias;   // (N,) or null
};

struct Layer {
  Norm ln_1;
  Matrix qkv, attn_proj;
  Norm ln_2;
  Matrix fc, proj;
};

struct Model {
  std::vector<Tensor> tensors;  // keep what the pointers point to
  int64_t C, V, positions;
  int64_t heads;
  float scale, eps;
  Activation activation;
  ScalarType type, position_type;
  Matrix wte;
  const void* wpe;
  std::vector<Layer> layers;
  Norm ln_f;
  Matrix head;
};

constexpr int64_t kBeforeLayers = 8, kOfLayer = 16;

// Takes tensors one after the other from the list that decode_prepare documents, and checks them.
class WeightReader {
 public:
  explicit WeightReader(const std::vector<Tensor>& tensors) : tensors_(tensors) {}

  const Tensor& next() { return tensors_[at_++]; }

  const float* vector(int64_t n, bool required = false) {
    const Tensor& t = next();
    if (t.numel() == 0 && !required) return nullptr;
    STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float && t.dim() == 1 && t.size(0) == n && t.is_contiguous() && t.is_cpu(),
                    "weights[", at_ - 1, "] must be contiguous float32 (", n, ",) on the CPU");
    return static_cast<const float*>(t.const_data_ptr());
  }

  Norm norm(int64_t n) {
    const float* w = vector(n, true);
    return {w, vector(n)};
  }

  // Weight and scale, the latter for int8 alone.
  Matrix table(int64_t N, int64_t K, ScalarType type) {
    const Tensor& t = next();
    STD_TORCH_CHECK(t.scalar_type() == type && t.dim() == 2 && t.size(0) == N && t.size(1) == K && t.is_contiguous() && t.is_cpu(),
                    "weights[", at_ - 1, "] must be contiguous ", torch::headeronly::toString(type), " (", N, ", ", K,
                    ") on the CPU");
    const void* w = t.const_data_ptr();
    return {N, K, w, vector(N, type == ScalarType::Char), nullptr};
  }

  Matrix matrix(int64_t N, int64_t K, ScalarType type, bool optional = false) {
    Matrix m{N, K, nullptr, nullptr, nullptr};
    if (optional && tensors_[at_].numel() == 0)
      at_ += 2;
    else
      m = table(N, K, type);
    m.bias = vector(N);
    return m;
  }

 private:
  const std::vector<Tensor>& tensors_;
  int64_t at_ = 0;
};

Model read_model(const std::vector<Tensor>& weights, int64_t heads, double scale, double eps, int64_t activation) {
  const int64_t count = int64_t(weights.size()), layers = (count - kBeforeLayers) / kOfLayer;
  STD_TORCH_CHECK(count >= kBeforeLayers && count == kBeforeLayers + layers * kOfLayer && weights[0].dim() == 2 && weights[2].dim() == 2,
                  "weights must be ", kBeforeLayers, " tensors and ", kOfLayer, " for each layer, got ", count);
  Model m;
  m.tensors = weights;
  m.V = weights[0].size(0), m.C = weights[0].size(1);
  STD_TORCH_CHECK(heads > 0 && m.C % heads == 0, "n_head must divide the width ", m.C, ", got ", heads);
  STD_TORCH_CHECK(activation >= 0 && activation < kActivations, "activation must be 0, 1 or 2, got ", activation);
  m.heads = heads, m.scale = float(scale), m.eps = float(eps), m.activation = Activation(activation);
  m.type = weights[0].scalar_type();
  STD_TORCH_CHECK(m.type == ScalarType::Float || m.type == ScalarType::BFloat16 || m.type == ScalarType::Char,
                  "weights[0] must be float32, bfloat16 or int8, got ", torch::headeronly::toString(m.type));
  WeightReader read(weights);
  m.wte = read.table(m.V, m.C, m.type);
  m.positions = weights[2].size(0);
  m.position_type = m.type == ScalarType::BFloat16 ? ScalarType::BFloat16 : ScalarType::Float;
  const Tensor& wpe = read.next();
  STD_TORCH_CHECK(wpe.scalar_type() == m.position_type && wpe.size(1) == m.C && wpe.is_contiguous() && wpe.is_cpu(),
                  "weights[2] must be contiguous ", torch::headeronly::toString(m.position_type), " (positions, ", m.C, ")");
  m.wpe = wpe.const_data_ptr();
  m.ln_f = read.norm(m.C);
  m.head = read.matrix(m.V, m.C, m.type);
  m.layers.resize(layers);
  for (Layer& l : m.layers) {
    l.ln_1 = read.norm(m.C);
    l.qkv = read.matrix(3 * m.C, m.C, m.type);
    l.attn_proj = read.matrix(m.C, m.C, m.type, true);
    l.ln_2 = read.norm(m.C);
    l.fc = read.matrix(4 * m.C, m.C, m.type);
    l.proj = read.matrix(m.C, 4 * m.C, m.type);
  }
  return m;
}

// ---- Threads ----

struct alignas(64) Counter {
  std::atomic<int64_t> claimed{0}, done{0};
};

void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

constexpr int kSpins = 4000;  // tens of microseconds: then whoever has the work may need this core

// A grow-only buffer of one thread, 64-byte aligned.
template <typename T>
class Buffer {
 public:
  T* get(int64_t n) {
    if (n > size_) {
      memory_.reset(new (std::align_val_t(64)) T[n]);
      size_ = n;
    }
    return memory_.get();
  }

 private:
  struct Delete {
    void operator()(T* p) const { ::operator delete[](p, std::align_val_t(64)); }
  };
  std::unique_ptr<T[], Delete> memory_;
  int64_t size_ = 0;
};

// What a thread needs for itself.
struct Own {
  Buffer<float> norm, stats, part, scores, scale;
  Buffer<int16_t> quantized;
  int64_t phase;
};

// ---- The step ----

struct Cache {
  ScalarType type;
  void* data;
  int64_t layer, kv, row, head, slots;  // strides in elements, and the number of slots
};

float to_float(const void* data, ScalarType type, int64_t i) {
  if (type == ScalarType::Float) return static_cast<const float*>(data)[i];
  if (type == ScalarType::Char) return static_cast<const int8_t*>(data)[i];
  const uint32_t bits = uint32_t(static_cast<const uint16_t*>(data)[i]) << 16;
  float f;
  std::memcpy(&f, &bits, sizeof f);
  return f;
}

class Step {
 public:
  Step(const Model& model, const Cache& cache, const std::vector<int64_t>& tokens, const std::vector<int64_t>& lengths,
       float* logits)
      : m_(model), cache_(cache), tokens_(tokens), lengths_(lengths), B_(int64_t(tokens.size())),
        logits_(logits), threads_(torch::stable::get_num_threads()), counters_(5 * model.layers.size() + 1) {
    static thread_local Buffer<float> shared;
    x_ = shared.get(B_ * m_.C * (1 + 3 + 1 + 4));
    qkv_ = x_ + B_ * m_.C, attended_ = qkv_ + 3 * B_ * m_.C, hidden_ = attended_ + B_ * m_.C;
  }

  void run() {
    embed();
    torch::stable::parallel_for(0, threads_, 1, [&](int64_t, int64_t) { thread(); });
  }

 private:
  void embed() {
    for (int64_t b = 0; b < B_; ++b) {
      const float scale = m_.wte.scale ? m_.wte.scale[tokens_[b]] : 1.f;
      for (int64_t c = 0; c < m_.C; ++c)
        x_[b * m_.C + c] = scale * to_float(m_.wte.w, m_.type, tokens_[b] * m_.C + c) +
                           to_float(m_.wpe, m_.position_type, lengths_[b] * m_.C + c);
    }
  }

  // work(i) for every chunk i < count of the next phase, shared among the threads that are here.
  template <typename Work>
  void share(Own& own, int64_t count, Work work) {
    Counter& counter = counters_[own.phase++];
    for (int64_t i; (i = counter.claimed.fetch_add(1, std::memory_order_relaxed)) < count;) {
      work(i);
      counter.done.fetch_add(1, std::memory_order_release);
    }
    for (int spins = 0; counter.done.load(std::memory_order_acquire) < count; ++spins)
      spins < kSpins ? pause() : std::this_thread::yield();
  }

  // input(): what the weights are multiplied with, (B, K), asked of each thread that does a part.
  // output(part, n0, n1): takes the (B, n1 - n0) results of rows [n0, n1) of the weights.
  template <typename Input, typename Output>
  void product(Own& own, const Matrix& w, Input input, Output output) {
    const int64_t row_bytes = w.K * (m_.type == ScalarType::Float ? 4 : m_.type == ScalarType::BFloat16 ? 2 : 1);
    const int64_t bytes = std::clamp<int64_t>(w.N * row_bytes / (4 * threads_), kMinChunk, kMaxChunk);
    const int64_t rows = std::max<int64_t>(1, bytes / row_bytes);
    const float* x = nullptr;
    share(own, (w.N + rows - 1) / rows, [&](int64_t chunk) {
      const bool first = x == nullptr;
      if (first) x = input();
      const int64_t n0 = chunk * rows, n1 = std::min(w.N, n0 + rows), n = n1 - n0;
      float* part = own.part.get(B_ * rows);
      multiply(own, w, x, first, n0, n, part);
      if (w.bias)
        for (int64_t b = 0; b < B_; ++b)
          for (int64_t i = 0; i < n; ++i) part[b * n + i] += w.bias[n0 + i];
      output(part, n0, n);
    });
  }

  void multiply(Own& own, const Matrix& w, const float* x, bool first, int64_t n0, int64_t n, float* part) {
    const GemvTable& kernels = LLMFAST_SIMD(gemv);
    if (m_.type == ScalarType::Float) {
      kernels.f32(static_cast<const float*>(w.w) + n0 * w.K, n, w.K, x, B_, part);
    } else if (m_.type == ScalarType::BFloat16) {
      kernels.bf16(static_cast<const uint16_t*>(w.w) + n0 * w.K, n, w.K, x, B_, part);
    } else {
      int16_t* q = own.quantized.get(B_ * w.K);
      float* scale = own.scale.get(B_);
      if (first)
        for (int64_t b = 0; b < B_; ++b) scale[b] = kernels.quantize(x + b * w.K, w.K, q + b * w.K);
      kernels.int8(static_cast<const int8_t*>(w.w) + n0 * w.K, n, w.K, q, B_, part);
      for (int64_t b = 0; b < B_; ++b)
        for (int64_t i = 0; i < n; ++i) part[b * n + i] *= scale[b] * w.scale[n0 + i];
    }
  }

  // The three outputs of a product, into rows of `stride`.
  auto to(float* y, int64_t stride) {
    return [=](const float* part, int64_t n0, int64_t n) {
      for (int64_t b = 0; b < B_; ++b) std::copy(part + b * n, part + (b + 1) * n, y + b * stride + n0);
    };
  }
  auto add_to(float* y, int64_t stride) {
    return [=](const float* part, int64_t n0, int64_t n) {
      for (int64_t b = 0; b < B_; ++b)
        for (int64_t i = 0; i < n; ++i) y[b * stride + n0 + i] += part[b * n + i];
    };
  }
  auto activated(float* y, int64_t stride) {
    return [=](float* part, int64_t n0, int64_t n) {
      LLMFAST_SIMD(activation).f32.forward[int(m_.activation)](part, part, 0, B_ * n);
      to(y, stride)(part, n0, n);
    };
  }

  const float* normed(Own& own, const Norm& norm) {
    float* y = own.norm.get(B_ * m_.C);
    float* stats = own.stats.get(2 * B_);
    LayerNormForward a{};
    a.n = m_.C, a.eps = m_.eps, a.w = norm.w, a.b = norm.b;
    a.residual = x_, a.y = y, a.mean = stats, a.rstd = stats + B_;
    LLMFAST_SIMD(layer_norm).forward(a, 0, B_);
    return y;
  }

  void attend(Own& own, int64_t layer, bool add) {
    const int64_t C = m_.C, H = m_.heads, D = C / H;
    share(own, B_ * H, [&](int64_t chunk) {
      const int64_t b = chunk / H, h = chunk % H, at = layer * cache_.layer + b * cache_.row + h * cache_.head;
      const float* q = qkv_ + 3 * b * C + h * D;
      float* scores = own.scores.get(cache_.slots);
      float* out = attended_ + b * C + h * D;
      const auto run = [&](auto kernel, auto* data) {
        kernel(q, q + C, q + 2 * C, data + at, data + at + cache_.kv, lengths_[b], D, m_.scale, scores, out);
      };
      if (cache_.type == ScalarType::Float)
        run(LLMFAST_SIMD(decode_head).f32, static_cast<float*>(cache_.data));
      else
        run(LLMFAST_SIMD(decode_head).bf16, static_cast<uint16_t*>(cache_.data));
      if (add)
        for (int64_t d = 0; d < D; ++d) x_[b * C + h * D + d] += out[d];
    });
  }

  void thread() {
    static thread_local Own own;
    own.phase = 0;
    const int64_t C = m_.C;
    for (const Layer& layer : m_.layers) {
      product(own, layer.qkv, [&] { return normed(own, layer.ln_1); }, to(qkv_, 3 * C));
      attend(own, int64_t(&layer - m_.layers.data()), layer.attn_proj.w == nullptr);
      if (layer.attn_proj.w) product(own, layer.attn_proj, [&] { return attended_; }, add_to(x_, C));
      product(own, layer.fc, [&] { return normed(own, layer.ln_2); }, activated(hidden_, 4 * C));
      product(own, layer.proj, [&] { return hidden_; }, add_to(x_, C));
    }
    product(own, m_.head, [&] { return normed(own, m_.ln_f); }, to(logits_, m_.V));
  }

  // Long enough for the processor to see a stream, short enough that the last one does not keep all waiting.
  static constexpr int64_t kMinChunk = 16 << 10, kMaxChunk = 256 << 10;

  const Model& m_;
  const Cache& cache_;
  const std::vector<int64_t>&tokens_, &lengths_;
  int64_t B_;
  float* logits_;
  int64_t threads_;
  std::vector<Counter> counters_;
  float *x_, *qkv_, *attended_, *hidden_;  // residual stream (B, C), (B, 3 C), (B, C), (B, 4 C)
};

// ---- The ops ----

// Prepared models by number. A step with an unknown number is an error, and tensors live as long as their model.
std::mutex plans_lock;
std::map<int64_t, std::shared_ptr<const Model>> plans;
int64_t last_plan = 0;

int64_t decode_prepare(std::vector<Tensor> weights, int64_t heads, double scale, double eps, int64_t activation) {
  auto model = std::make_shared<const Model>(read_model(weights, heads, scale, eps, activation));
  const std::lock_guard<std::mutex> guard(plans_lock);
  plans.emplace(++last_plan, std::move(model));
  return last_plan;
}

void decode_release(int64_t plan) {
  const std::lock_guard<std::mutex> guard(plans_lock);
  plans.erase(plan);
}

std::shared_ptr<const Model> model_of(int64_t plan) {
  const std::lock_guard<std::mutex> guard(plans_lock);
  const auto found = plans.find(plan);
  STD_TORCH_CHECK(found != plans.end(), "plan must come from decode_prepare, got ", plan);
  return found->second;
}

Tensor decode_step(int64_t plan, std::vector<int64_t> tokens, std::vector<int64_t> lengths, Tensor cache) {
  const std::shared_ptr<const Model> model = model_of(plan);
  const Model& m = *model;
  const int64_t B = int64_t(tokens.size()), L = int64_t(m.layers.size()), D = m.C / m.heads;
  STD_TORCH_CHECK(cache.scalar_type() == ScalarType::Float || cache.scalar_type() == ScalarType::BFloat16,
                  "cache must be float32 or bfloat16, got ", torch::headeronly::toString(cache.scalar_type()));
  STD_TORCH_CHECK(cache.dim() == 6 && cache.is_cpu() && cache.size(0) == L && cache.size(1) == 2 && cache.size(2) == B &&
                      cache.size(3) == m.heads && cache.size(5) == D && cache.stride(5) == 1 && cache.stride(4) == D,
                  "cache must be (", L, ", 2, ", B, ", ", m.heads, ", slots, ", D,
                  ") on the CPU, the slots of a head one behind the other");
  STD_TORCH_CHECK(lengths.size() == tokens.size(), "lengths must have ", B, " numbers as tokens has, got ", lengths.size());
  const int64_t slots = cache.size(4), room = std::min(slots, m.positions);
  for (int64_t b = 0; b < B; ++b) {
    STD_TORCH_CHECK(tokens[b] >= 0 && tokens[b] < m.V, "tokens must lie in [0, ", m.V, "), got ", tokens[b]);
    STD_TORCH_CHECK(lengths[b] >= 0 && lengths[b] < room, "lengths must lie in [0, ", room, "), got ", lengths[b]);
  }
  Tensor logits = torch::stable::new_empty(cache, {B, m.V}, ScalarType::Float);
  const Cache view{cache.scalar_type(), cache.mutable_data_ptr(), cache.stride(0), cache.stride(1),
                   cache.stride(2),     cache.stride(3),          slots};
  Step(m, view, tokens, lengths, static_cast<float*>(logits.mutable_data_ptr())).run();
  return logits;
}

}  // namespace
}  // namespace llmfast::cpu

STABLE_TORCH_LIBRARY_IMPL(llmfast, CPU, m) {
  m.impl("decode_prepare", TORCH_BOX(&llmfast::cpu::decode_prepare));
  m.impl("decode_step", TORCH_BOX(&llmfast::cpu::decode_step));
}

STABLE_TORCH_LIBRARY_IMPL(llmfast, CompositeExplicitAutograd, m) {
  m.impl("decode_release", TORCH_BOX(&llmfast::cpu::decode_release));
}
