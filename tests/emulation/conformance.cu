// The wrappers of csrc/cuda/mma.h. The factors of products are small integers, so that every sum is exact, whatever its
// order.
#include "cuda/mma.h"

#include "conformance.h"
#include "conformance_sm90.h"

namespace {

using namespace llmfast::cuda;
using namespace conformance;

template <int N, bool kTransposed>
__global__ void run_ldmatrix(const uint16_t* in, uint32_t* out) {
  LLMFAST_DYN_SHARED(uint16_t, tile, 16);
  for (int i = threadIdx.x; i < N * 64; i += 32) tile[i] = in[i];
  __syncwarp();
  uint32_t r[N];
  // Lanes beyond the addresses that are read give one that is none.
  ldmatrix<N, kTransposed>(r, int(threadIdx.x) < 8 * N ? tile + threadIdx.x * 8 : tile + 1);
  for (int i = 0; i < N; ++i) out[threadIdx.x * N + i] = r[i];
}

template <int N, bool kTransposed>
void test_ldmatrix() {
  std::vector<uint16_t> host(N * 64);
  for (auto& v : host) v = uint16_t(integer(0, 0xFFFF));
  Device<uint16_t> in(host);
  Device<uint32_t> out(32 * N);
  LLMFAST_LAUNCH((run_ldmatrix<N, kTransposed>), 1, 32, N * 128, nullptr, in.data(), out.data());
  std::vector<uint32_t> want(32 * N);
  for (int l = 0; l < 32; ++l)
    for (int i = 0; i < N; ++i)
      for (int half = 0; half < 2; ++half) {
        const int row = l / 4, column = l % 4 * 2 + half;
        const uint32_t v = host[i * 64 + (kTransposed ? column * 8 + row : row * 8 + column)];
        want[l * N + i] |= v << 16 * half;
      }
  require_same("register", out.host(), want);
}

template <typename T, int K>
__global__ void run_mma(const float* a, const float* b, float* d) {  // (16, K), (8, K), (16, 8)
  const int g = threadIdx.x / 4, t = threadIdx.x % 4;
  uint32_t fa[4], fb[2];
  for (int r = 0; r < 4; ++r) {
    const float* at = a + (g + 8 * (r & 1)) * K + K / 2 * (r >> 1);
    if constexpr (K == 16)
      fa[r] = pack2<T>(at[2 * t], at[2 * t + 1]);
    else
      fa[r] = to_tf32(at[t]);
  }
  for (int r = 0; r < 2; ++r) {
    const float* at = b + g * K + K / 2 * r;
    if constexpr (K == 16)
      fb[r] = pack2<T>(at[2 * t], at[2 * t + 1]);
    else
      fb[r] = to_tf32(at[t]);
  }
  float fd[4];
  for (int i = 0; i < 4; ++i) fd[i] = d[(g + 8 * (i >> 1)) * 8 + 2 * t + (i & 1)];
  if constexpr (K == 16)
    mma_m16n8k16<T>(fd, fa, fb);
  else
    mma_m16n8k8_tf32(fd, fa, fb);
  for (int i = 0; i < 4; ++i) d[(g + 8 * (i >> 1)) * 8 + 2 * t + (i & 1)] = fd[i];
}

template <typename T, int K>
void test_mma() {
  const int most = K == 16 ? 200 : 1000;
  std::vector<float> a(16 * K), b(8 * K), d(16 * 8);
  for (auto& v : a) v = float(integer(-most, most));
  for (auto& v : b) v = float(integer(-15, 15));
  for (auto& v : d) v = float(integer(-1000, 1000));
  Device<float> da(a), db(b), dd(d);
  LLMFAST_LAUNCH((run_mma<T, K>), 1, 32, 0, nullptr, da.data(), db.data(), dd.data());
  for (int m = 0; m < 16; ++m)
    for (int n = 0; n < 8; ++n)
      for (int k = 0; k < K; ++k) d[m * 8 + n] += a[m * K + k] * b[n * K + k];
  require_same("d", dd.host(), d);
}

__global__ void run_pack(const float* in, uint32_t* half, uint32_t* bfloat, uint32_t* tf32, float* exp2s) {
  const float low = in[2 * threadIdx.x], high = in[2 * threadIdx.x + 1];
  half[threadIdx.x] = pack2<__half>(low, high);
  bfloat[threadIdx.x] = pack2<__nv_bfloat16>(low, high);
  tf32[threadIdx.x] = to_tf32(low);
  exp2s[threadIdx.x] = fast_exp2(high);
}

// x rounded to a fraction of `bits` bits: to the even neighbour or away from zero where two are as near.
double rounded(double x, int bits, int lowest_exponent, bool to_even) {
  int exponent = 0;
  std::frexp(x, &exponent);
  const double unit = std::ldexp(1, std::max(exponent - 1, lowest_exponent) - bits);
  const double steps = std::fabs(x) / unit, whole = std::floor(steps), rest = steps - whole;
  const bool up = rest > 0.5 || (rest == 0.5 && (!to_even || std::fmod(whole, 2) == 1));
  return std::copysign((whole + up) * unit, x);
}

void test_rounding() {
  constexpr int n = 128;
  std::vector<float> in(2 * n);
  for (auto& v : in) {
    uint32_t bits = uint32_t(rng());
    if (integer(0, 1)) bits = (bits & ~0xFFFu) | 0x1000;  // ties are not rare
    memcpy(&v, &bits, 4);
    int exponent;
    v = std::ldexp(std::frexp(std::isfinite(v) ? v : 1.f, &exponent), integer(-14, 14));
  }
  in[0] = 0.f, in[1] = -INFINITY, in[3] = -200.f;
  Device<float> din(in), exp2s(n);
  Device<uint32_t> half(n), bfloat(n), tf32(n);
  LLMFAST_LAUNCH(run_pack, 1, n, 0, nullptr, din.data(), half.data(), bfloat.data(), tf32.data(), exp2s.data());
  const auto halves = half.host(), bfloats = bfloat.host(), tf32s = tf32.host();
  const auto powers = exp2s.host();
  for (int i = 0; i < n; ++i) {
    for (int j = 0; j < 2; ++j) {
      const float x = in[2 * i + j];
      if (!std::isfinite(x)) continue;
      const uint32_t h = halves[i] >> 16 * j & 0xFFFF, b = (bfloats[i] >> 16 * j & 0xFFFF) << 16;
      const double half_value = std::copysign(
          h >> 10 & 31 ? std::ldexp(1024 + (h & 1023), int(h >> 10 & 31) - 25) : std::ldexp(h & 1023, -24), x);
      float bfloat_value;
      memcpy(&bfloat_value, &b, 4);
      require(half_value == rounded(x, 10, -14, true), "pack2<__half> of " + std::to_string(x));
      require(bfloat_value == rounded(x, 7, -126, true), "pack2<__nv_bfloat16> of " + std::to_string(x));
    }
    float tf32_value;
    const uint32_t bits = tf32s[i] & ~0x1FFFu;
    memcpy(&tf32_value, &bits, 4);
    require(tf32_value == rounded(in[2 * i], 10, -126, false), "to_tf32 of " + std::to_string(in[2 * i]));
    const double want = std::exp2(double(in[2 * i + 1]));
    const bool as_zero = want < 0x1p-126;
    require(as_zero ? powers[i] == 0.f : !(std::fabs(powers[i] / want - 1) > 0x1p-21) || want > 3e38,
            "fast_exp2 of " + std::to_string(in[2 * i + 1]));
  }
}

// Three groups of copies, the middle one partly zeros; the first is read while the last is under way.
template <bool kWords>
__global__ void run_copies(const uint32_t* in, uint32_t* out) {
  LLMFAST_DYN_SHARED(uint32_t, to, 16);
  const int i = threadIdx.x;
  for (int group = 0; group < 3; ++group) {
    const int at = (group * 64 + i) * 4;
    const bool there = group != 1 || i % 3 != 0;
    if constexpr (kWords)
      for (int e = 0; e < 4; ++e) cp_async4(to + at + e, there ? in + at + e : nullptr, there);
    else
      cp_async16(to + at, there ? in + at : nullptr, there);
    cp_async_commit();
  }
  cp_async_wait<1>();
  __syncthreads();
  const int other = (i + 17) % 64;  // another thread's
  for (int group = 0; group < 3; ++group) {
    if (group == 2) {
      cp_async_wait<0>();
      __syncthreads();
    }
    for (int e = 0; e < 4; ++e) out[(group * 64 + other) * 4 + e] = to[(group * 64 + other) * 4 + e];
  }
}

template <bool kWords>
void test_copies() {
  std::vector<uint32_t> host(3 * 64 * 4);
  for (auto& v : host) v = uint32_t(rng());
  Device<uint32_t> in(host), out(host.size());
  LLMFAST_LAUNCH(run_copies<kWords>, 1, 64, host.size() * 4, nullptr, in.data(), out.data());
  for (int i = 0; i < 64; i += 3)
    for (int e = 0; e < 4; ++e) host[(64 + i) * 4 + e] = 0;
  require_same("word", out.host(), host);
}

}  // namespace

int main() {
  const int failed = run_all({
      {"ldmatrix x1", test_ldmatrix<1, false>},
      {"ldmatrix x2", test_ldmatrix<2, false>},
      {"ldmatrix x4", test_ldmatrix<4, false>},
      {"ldmatrix x1 trans", test_ldmatrix<1, true>},
      {"ldmatrix x2 trans", test_ldmatrix<2, true>},
      {"ldmatrix x4 trans", test_ldmatrix<4, true>},
      {"mma f16", test_mma<__half, 16>},
      {"mma bf16", test_mma<__nv_bfloat16, 16>},
      {"mma tf32", test_mma<float, 8>},
      {"rounding, exp2", test_rounding},
      {"cp.async 16", test_copies<false>},
      {"cp.async 4", test_copies<true>},
  });
  return run_sm90() || failed;
}
