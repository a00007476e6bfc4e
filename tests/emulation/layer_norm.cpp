// layer_norm CASES SEED [DTYPE]: random cases of csrc/cuda/layer_norm.cu, with and without a residual, against float64, each
// under two schedules, which must agree bit for bit. layer_norm huge: offsets beyond 2^31.
#include "cuda/layer_norm.h"

#include "driver.h"

namespace {

struct Result {
  Buffer s, dropped, y, mean, rstd, dx, dw, db;
};

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
  // With a residual: s = residual + dropout(x), and a gradient ds that reaches s beside y's.
  const bool add = pick(0, 1), has_ds = add && pick(0, 2);
  const int64_t seed = int64_t(pick(0, 1 << 30)) << 33 | pick(0, 1 << 30);
  const Dropout dropout = add && pick(0, 1) ? make_dropout(&seed, pick(1, 9) * 0.1) : Dropout{};
  Buffer residual(dtype, add ? size : 0, 1, shift), ds(dtype, has_ds ? size : 0, 1, shift);
  const double offset = pick(0, 2) ? 0 : 3;
  for (size_t i = 0; i < size; ++i) x.set(i, float(x[i] + offset));

  const auto run = [&](unsigned seed) {
    emu::config.seed = seed;
    const DType f32 = DType::f32;
    Result r{Buffer(dtype, add ? size : 0, 0, shift), Buffer(dtype, dropout.seed ? size : 0, 0, shift),
             Buffer(dtype, size, 0, shift), Buffer(f32, rows), Buffer(f32, rows), Buffer(dtype, size, 0, shift),
             Buffer(parameter, has_weight ? n : 0), Buffer(parameter, has_bias ? n : 0)};
    const int blocks = layer_norm_backward_blocks(rows, n, multiprocessors);
    Buffer partial(f32, size_t(has_weight + has_bias) * blocks * n);
    void* weight = has_weight ? w.data() : nullptr;
    layer_norm_forward({dtype, float_parameters, x.data(), weight, has_bias ? b.data() : nullptr, r.y.data(),
                        r.mean.floats(), r.rstd.floats(), rows, n, eps, add ? residual.data() : nullptr,
                        add ? r.s.data() : nullptr, dropout},
                       multiprocessors, nullptr);
    layer_norm_backward({dtype, float_parameters, dy.data(), add ? r.s.data() : x.data(), weight, r.mean.floats(), r.rstd.floats(),
                         r.dx.data(), has_weight ? r.dw.data() : nullptr, has_bias ? r.db.data() : nullptr,
                         partial.floats(), rows, n, has_ds ? ds.data() : nullptr,
                         dropout.seed ? r.dropped.data() : nullptr, dropout},
                        multiprocessors, nullptr);
    return r;
  };
  Result got = run(0), again = run(pick(0, 1) ? 1 : 2 + pick(0, 1 << 20));

  const auto mask = [&](size_t i) {
    if (!dropout.seed) return 1.0;
    return kept<1>(seed, dropout.drop, int64_t(i / n), int64_t(i % n)) ? double(dropout.scale) : 0.0;
  };
  for (size_t i = 0; i < size && add; ++i) {
    const double s = x[i] * mask(i) + residual[i];
    expect("s", got.s, i, s, 1e-6 * (std::fabs(s) + std::fabs(residual[i])));
  }
  Buffer& in = add ? got.s : x;

  std::vector<double> dw(n), db(n), size_dw(n), size_db(n);
  for (int r = 0; r < rows; ++r) {
    const size_t row = size_t(r) * n;
    double mean = 0, variance = 0, sum_g = 0, sum_gh = 0, most = 0;
    for (int i = 0; i < n; ++i) mean += in[row + i] / n;
    for (int i = 0; i < n; ++i) variance += (in[row + i] - mean) * (in[row + i] - mean) / n;
    const double rstd = 1 / std::sqrt(variance + eps);
    const auto h = [&](int i) { return (in[row + i] - mean) * rstd; };
    const auto weight = [&](int i) { return has_weight ? w[i] : 1.0; };
    for (int i = 0; i < n; ++i) {
      const double g = dy[row + i] * weight(i);
      sum_g += g / n;
      sum_gh += g * h(i) / n;
      most = std::max({most, std::fabs(g), std::fabs(in[row + i])});
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
      const double dx = rstd * (dy[row + i] * weight(i) - sum_g - h(i) * sum_gh) + (has_ds ? ds[row + i] : 0.0);
      const double slack = 1e-5 * rstd * (1 + most) * (1 + rstd) + 1e-6 * std::fabs(dx);
      expect("dx", got.dx, row + i, dx, slack);
      if (dropout.seed) expect("dropped dx", got.dropped, row + i, dx * mask(row + i), slack * mask(row + i));
    }
  }
  for (int i = 0; i < n && has_weight; ++i) expect("dw", got.dw, i, dw[i], 2e-6 * size_dw[i] + 1e-6);
  for (int i = 0; i < n && has_bias; ++i) expect("db", got.db, i, db[i], 2e-6 * size_db[i] + 1e-6);
  same("s", got.s, again.s);
  same("dropped dx", got.dropped, again.dropped);
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
  float *x = reserve<float>(rows * n), *y = reserve<float>(rows * n), *mean = reserve<float>(rows), *rstd = reserve<float>(rows);
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
  float* dx = reserve<float>(rows * n);
  dx[last] = 7;
  run_last(8, [&] {
    layer_norm_backward({DType::f32, true, y, x, nullptr, mean, rstd, dx, nullptr, nullptr, nullptr, rows, n}, many, nullptr);
  });
  for (int i = 0; i < n; ++i)
    if (std::fabs(dx[last + i]) > 1e-6) throw Mismatch("WRONG huge backward " + std::to_string(dx[last + i]));
}

}  // namespace

int main(int argc, char** argv) { return run_driver(argc, argv, test, test_huge); }
