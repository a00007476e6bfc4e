// layer_norm CASES SEED [DTYPE]: random cases of csrc/cuda/layer_norm.cu against float64, each under two schedules, which
// must agree bit for bit. layer_norm huge: offsets beyond 2^31.
#include <cstdio>
#include <memory>

#include "cuda/layer_norm.h"

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

struct Result {
  Buffer y, mean, rstd, dx, dw, db;
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

void test(DType dtype) {
  const int rows = pick(1, 40), kind = pick(0, 3);
  const int n = kind == 0 ? pick(1, 9) : kind == 1 ? pick(1, 700) : kind == 2 ? 8 * pick(1, 128) : pick(1000, 2100);
  const bool float_parameters = dtype == DType::f32 || pick(0, 1);
  const bool has_weight = pick(0, 4), has_bias = has_weight && pick(0, 2);
  const int multiprocessors = pick(1, 5), shift = pick(0, 3) ? 0 : pick(1, 3);
  const DType parameter = float_parameters ? DType::f32 : dtype;
  const size_t size = size_t(rows) * n;
  const float eps = 1e-5f;
  Buffer x(dtype, size, 1, shift), dy(dtype, size, 1, shift), w(parameter, n, 1), b(parameter, n, 1);
  const double offset = pick(0, 2) ? 0 : 3;
  for (size_t i = 0; i < size; ++i) x.set(i, float(x[i] + offset));

  const auto run = [&](unsigned seed) {
    emu::config.seed = seed;
    const DType f32 = DType::f32;
    Result r{Buffer(dtype, size, 0, shift), Buffer(f32, rows), Buffer(f32, rows), Buffer(dtype, size, 0, shift),
             Buffer(parameter, has_weight ? n : 0), Buffer(parameter, has_bias ? n : 0)};
    const int blocks = layer_norm_backward_blocks(rows, n, multiprocessors);
    Buffer partial(f32, size_t(has_weight + has_bias) * blocks * n);
    void* weight = has_weight ? w.data() : nullptr;
    layer_norm_forward({dtype, float_parameters, x.data(), weight, has_bias ? b.data() : nullptr, r.y.data(),
                        r.mean.floats(), r.rstd.floats(), rows, n, eps},
                       multiprocessors, nullptr);
    layer_norm_backward({dtype, float_parameters, dy.data(), x.data(), weight, r.mean.floats(), r.rstd.floats(),
                         r.dx.data(), has_weight ? r.dw.data() : nullptr, has_bias ? r.db.data() : nullptr,
                         partial.floats(), rows, n},
                        multiprocessors, nullptr);
    return r;
  };
  Result got = run(0), again = run(pick(0, 1) ? 1 : 2 + pick(0, 1 << 20));

  std::vector<double> dw(n), db(n), size_dw(n), size_db(n);
  for (int r = 0; r < rows; ++r) {
    const size_t row = size_t(r) * n;
    double mean = 0, variance = 0, sum_g = 0, sum_gh = 0, most = 0;
    for (int i = 0; i < n; ++i) mean += x[row + i] / n;
    for (int i = 0; i < n; ++i) variance += (x[row + i] - mean) * (x[row + i] - mean) / n;
    const double rstd = 1 / std::sqrt(variance + eps);
    const auto h = [&](int i) { return (x[row + i] - mean) * rstd; };
    const auto weight = [&](int i) { return has_weight ? w[i] : 1.0; };
    for (int i = 0; i < n; ++i) {
      const double g = dy[row + i] * weight(i);
      sum_g += g / n;
      sum_gh += g * h(i) / n;
      most = std::max({most, std::fabs(g), std::fabs(x[row + i])});
      dw[i] += dy[row + i] * h(i);
      db[i] += dy[row + i];
      size_dw[i] += std::fabs(dy[row + i]) * (std::fabs(h(i)) + rstd * 4);
      size_db[i] += std::fabs(dy[row + i]);
    }
    expect("mean", got.mean, r, mean, 1e-6 * (most + 1));
    expect("rstd", got.rstd, r, rstd, 1e-5 * rstd * (1 + rstd * rstd * most * 1e-2));
    for (int i = 0; i < n; ++i) {
      const double y = h(i) * weight(i) + (has_bias ? b[i] : 0.0);
      expect("y", got.y, row + i, y, 1e-5 * (1 + std::fabs(weight(i))) * (1 + rstd));
      expect("dx", got.dx, row + i, rstd * (dy[row + i] * weight(i) - sum_g - h(i) * sum_gh),
             1e-5 * rstd * (1 + most) * (1 + rstd));
    }
  }
  for (int i = 0; i < n && has_weight; ++i) expect("dw", got.dw, i, dw[i], 2e-6 * size_dw[i] + 1e-6);
  for (int i = 0; i < n && has_bias; ++i) expect("db", got.db, i, db[i], 2e-6 * size_db[i] + 1e-6);
  same("y", got.y, again.y);
  same("mean", got.mean, again.mean);
  same("rstd", got.rstd, again.rstd);
  same("dx", got.dx, again.dx);
  same("dw", got.dw, again.dw);
  same("db", got.db, again.db);
}

// Only the last block of a (5,000,000, 1000) float32 array runs: its offsets lie beyond 2^32.
void test_huge() {
  const int64_t rows = 5000000, n = 1000;
  const auto reserve = [](int64_t count) {  // address space, not memory
    void* p = mmap(nullptr, count * 4, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) throw Mismatch("no address space");
    return static_cast<float*>(p);
  };
  float *x = reserve(rows * n), *y = reserve(rows * n), *mean = reserve(rows), *rstd = reserve(rows);
  const int64_t last = (rows - 1) * n;
  for (int i = 0; i < n; ++i) x[last + i] = float(i);
  const int many = 1 << 26;  // so that each block has one step
  const auto run_last = [&](int rows_of_block, auto f) {
    emu::config.only_block = (rows - 1) / rows_of_block;
    f();
  };
  run_last(2, [&] { layer_norm_forward({DType::f32, true, x, nullptr, nullptr, y, mean, rstd, rows, n, 0}, many, nullptr); });
  const double want = (n - 1 - 499.5) / std::sqrt((1e6 - 1) / 12);
  if (std::fabs(y[last + n - 1] - want) > 1e-4) throw Mismatch("WRONG huge forward " + std::to_string(y[last + n - 1]));
  // The gradient of the sum of y^2 / 2 is zero, and dy = y here.
  float* dx = reserve(rows * n);
  dx[last] = 7;
  run_last(8, [&] {
    layer_norm_backward({DType::f32, true, y, x, nullptr, mean, rstd, dx, nullptr, nullptr, nullptr, rows, n}, many, nullptr);
  });
  for (int i = 0; i < n; ++i)
    if (std::fabs(dx[last + i]) > 1e-6) throw Mismatch("WRONG huge backward " + std::to_string(dx[last + i]));
}

}  // namespace

int main(int argc, char** argv) {
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
}
