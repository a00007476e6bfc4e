// activation CASES SEED [DTYPE]: random arrays through csrc/cuda/activation.cu against float64. activation huge: offsets beyond
// 2^31.
#include "cuda/activation.h"

#include "activations.h"
#include "driver.h"

namespace {

void test(DType dtype) {
  const int n = pick(0, 1) ? pick(1, 100) : pick(1, 9000);
  const Activation activation = Activation(pick(1, 3));
  const bool want_a = pick(0, 2);
  Buffer h(dtype, n, 2), dy(dtype, n, 1);
  struct Result {
    Buffer a, dh, again;
  };
  const auto run = [&](unsigned seed) {
    emu::config.seed = seed;
    Result r{Buffer(dtype, n), Buffer(dtype, n), Buffer(dtype, want_a ? n : 0)};
    memcpy(r.dh.data(), dy.data(), n * dy.size());
    activation_forward(dtype, activation, h.data(), r.a.data(), n, nullptr);
    activation_backward(dtype, activation, h.data(), r.dh.data(), want_a ? r.again.data() : nullptr, n, nullptr);
    return r;
  };
  Result got = run(0), other = run(1 + pick(0, 1 << 20));
  same("a", got.a, other.a);
  same("dh", got.dh, other.dh);
  if (want_a) same("a of the backward pass", got.a, got.again);
  for (int i = 0; i < n; ++i) {
    expect("a", got.a, i, act(activation, h[i]), 1e-6 * (1 + std::fabs(h[i])));
    expect("dh", got.dh, i, dy[i] * act_slope(activation, h[i]), 2e-6 * (1 + std::fabs(h[i] * dy[i])));
  }
}

// Only the last block of 2^31 + 1000 elements runs.
void test_huge() {
  const int64_t n = (int64_t(1) << 31) + 1000;
  auto *h = reserve<float>(n), *a = reserve<float>(n);
  h[n - 1] = 3.f;
  emu::config.only_block = (n + 1023) / 1024 - 1;
  activation_forward(DType::f32, Activation::relu, h, a, n, nullptr);
  if (a[n - 1] != 3.f) throw Mismatch("WRONG huge activation");
}

}  // namespace

int main(int argc, char** argv) { return run_driver(argc, argv, test, test_huge); }
