// cross_entropy CASES SEED [DTYPE]: random cases of csrc/cuda/cross_entropy.cu against float64, each under two schedules.
// cross_entropy huge: offsets beyond 2^31.
#include "cuda/cross_entropy.h"

#include "driver.h"

namespace {

void test(DType dtype) {
  const int kind = pick(0, 3), rows = pick(1, 4);
  const int V = kind == 0 ? pick(1, 20) : kind == 1 ? pick(1, 600) : kind == 2 ? pick(4000, 9000) : 8 * pick(1, 700);
  const int stride = V + (pick(0, 2) ? 0 : pick(1, 17)), shift = pick(0, 3);
  const float smoothing = pick(0, 1) ? 0.f : pick(1, 10) * 0.1f;
  const bool want = pick(0, 3), has_bias = pick(0, 2) == 0;
  Buffer z(dtype, size_t(rows - 1) * stride + V, float(pick(0, 3)) * 3, shift), bias(dtype, has_bias ? V : 0, 1);
  Buffer scale(DType::f32, rows, 1);
  const bool infinite = pick(0, 7) == 0 && V > 1;  // a logit that another program has masked
  std::vector<int64_t> target(rows);
  for (auto& t : target) t = pick(0, V - 1);
  for (int r = 0; r < rows; ++r)
    for (int v = 0; v < V; ++v)
      if (z[size_t(r) * stride + v] != z[size_t(r) * stride + v]) z.set(size_t(r) * stride + v, 0);
  if (infinite && !smoothing) z.set(target[0] == 0 ? 1 : 0, -INFINITY);

  struct Result {
    Buffer z, loss;
  };
  const auto run = [&](unsigned seed) {
    emu::config.seed = seed;
    Result r{Buffer(dtype, z.n, 0, shift), Buffer(DType::f32, rows)};
    memcpy(r.z.data(), z.data(), z.n * z.size());
    softmax_gradient({dtype, r.z.data(), has_bias ? bias.data() : nullptr, target.data(), want ? scale.floats() : nullptr,
                      r.loss.floats(), rows, stride, V, smoothing},
                     nullptr);
    return r;
  };
  Result got = run(0), again = run(1 + pick(0, 1 << 20));
  same("loss", got.loss, again.loss);
  same("dz", got.z, again.z);
  std::vector<double> logits(V);
  for (int r = 0; r < rows; ++r) {
    const size_t row = size_t(r) * stride;
    double top = -INFINITY, sum = 0, mean = 0, most = 0;
    for (int v = 0; v < V; ++v) {
      logits[v] = z[row + v] + (has_bias ? bias[v] : 0.0);
      top = std::max(top, logits[v]);
      if (std::isfinite(logits[v])) most = std::max(most, std::fabs(logits[v]));
      mean += logits[v] / V;
    }
    for (int v = 0; v < V; ++v) sum += std::exp(logits[v] - top);
    double loss = top + std::log(sum) - (1 - smoothing) * logits[target[r]] - (smoothing ? smoothing * mean : 0);
    expect("loss", got.loss, r, loss, 1e-6 * (1 + most) * (1 + std::log(V)));
    for (int v = 0; v < V; ++v) {
      const double p = std::exp(logits[v] - top) / sum;
      const double dz = p - (v == target[r] ? 1 - smoothing : 0) - smoothing / V;
      if (want)
        expect("dz", got.z, row + v, scale[r] * dz, 1e-6 * std::fabs(scale[r]) * (p * (1 + most) + std::fabs(dz) + 0.1));
      else if (!(got.z[row + v] == z[row + v]))
        throw Mismatch("the logits changed");
    }
    for (int v = V; v < stride && r + 1 < rows; ++v)
      if (memcmp(static_cast<char*>(got.z.data()) + (row + v) * z.size(), static_cast<char*>(z.data()) + (row + v) * z.size(),
                 z.size()))
        throw Mismatch("what lies between two rows changed");
  }
}

// Only the last of 100,000 rows of 50,257 logits runs.
void test_huge() {
  const int64_t rows = 100000, V = 50257;
  float *z = reserve<float>(rows * V), *loss = reserve<float>(rows), *scale = reserve<float>(rows);
  int64_t* target = reserve<int64_t>(rows);
  target[rows - 1] = V - 1;
  scale[rows - 1] = 1;
  emu::config.only_block = rows - 1;
  softmax_gradient({DType::f32, z, nullptr, target, scale, loss, rows, V, int(V), 0}, nullptr);
  if (std::fabs(loss[rows - 1] - std::log(double(V))) > 1e-5) throw Mismatch("WRONG huge loss");
  if (std::fabs(z[rows * V - 1] - (1.0 / V - 1)) > 1e-6) throw Mismatch("WRONG huge gradient");
}

}  // namespace

int main(int argc, char** argv) { return run_driver(argc, argv, test, test_huge); }
