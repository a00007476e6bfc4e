#pragma once
// What the drivers of emulated kernels share: random sizes, buffers of exact size, comparisons, the command line.
#include <cstdio>
#include <functional>
#include <memory>

#include "cuda/dialect.h"

using namespace llmfast::cuda;

namespace {

std::mt19937 rng;
int pick(int low, int high) { return std::uniform_int_distribution<int>(low, high)(rng); }

struct Mismatch : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// n elements of any of the three types, `shift` elements behind an aligned address; a heap block of exactly that size,
// so that ASan sees every overrun.
struct Buffer {
  DType dtype;
  size_t n;
  std::unique_ptr<unsigned char[]> bytes;
  size_t offset;
  Buffer(DType dtype_, size_t n_, float scale = 0, int shift = 0)
      : dtype(dtype_), n(n_), offset(shift * size()) {
    bytes.reset(new unsigned char[n * size() + offset]);
    memset(bytes.get(), 0xFF, n * size() + offset);
    std::normal_distribution<float> normal;
    if (scale != 0.f)
      for (size_t i = 0; i < n; ++i) set(i, normal(rng) * scale);
  }
  size_t size() const { return dtype == DType::f32 ? 4 : 2; }
  void* data() { return bytes.get() + offset; }
  template <typename T>
  T& at(size_t i) { return static_cast<T*>(data())[i]; }
  void set(size_t i, float v) {
    if (dtype == DType::f32) at<float>(i) = v;
    if (dtype == DType::f16) at<__half>(i) = v;
    if (dtype == DType::bf16) at<__nv_bfloat16>(i) = v;
  }
  double operator[](size_t i) {
    return dtype == DType::f32 ? at<float>(i) : dtype == DType::f16 ? float(at<__half>(i)) : float(at<__nv_bfloat16>(i));
  }
  float* floats() { return static_cast<float*>(data()); }
};

// |got - want| <= 2 roundings of the type + `slack` of float32 arithmetic
void expect(const char* what, Buffer& got, size_t i, double want, double slack) {
  const double rounding = got.dtype == DType::f32 ? 0 : got.dtype == DType::f16 ? 0x1p-11 : 0x1p-8;
  const double tiny = got.dtype == DType::f16 ? 0x1p-24 : 0;  // float16's smallest step
  const double error = std::fabs(got[i] - want);
  if (!(error <= rounding * std::fabs(want) + tiny + slack))
    throw Mismatch(std::string("WRONG ") + what + "[" + std::to_string(i) + "] is " + std::to_string(got[i]) +
                   ", not " + std::to_string(want));
}

void same(const char* what, Buffer& a, Buffer& b) {
  if (memcmp(a.data(), b.data(), a.n * a.size())) throw Mismatch(std::string("DEPENDS ON THE SCHEDULE: ") + what);
}

// Address space, not memory: for offsets beyond 2^31.
template <typename T>
T* reserve(int64_t count) {
  void* p = mmap(nullptr, count * sizeof(T), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) throw Mismatch("no address space");
  return static_cast<T*>(p);
}

// PROGRAM CASES SEED [DTYPE]: test(dtype) with random numbers of its own for each case. PROGRAM huge: test_huge.
int run_driver(int argc, char** argv, const std::function<void(DType)>& test, void (*test_huge)()) {
  const bool huge = argc > 1 && !strcmp(argv[1], "huge");
  if (argc < 3 && !huge) return 2;
  const int cases = huge ? 0 : atoi(argv[1]), seed = huge ? 0 : atoi(argv[2]);
  int i = 0;
  try {
    if (huge) test_huge();
    for (; i < cases; ++i) {
      rng.seed(seed * 1000003u + i);
      test(DType(argc > 3 ? atoi(argv[3]) : i % 3));
    }
  } catch (const std::exception& error) {
    printf("case %d: %s\n", i, error.what());
    return 1;
  }
  printf("ok: %ld launches\n", long(emu::machine.launches));
  return 0;
}

}  // namespace
