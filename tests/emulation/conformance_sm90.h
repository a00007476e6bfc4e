#pragma once
// The wrappers of csrc/cuda/hopper.h and hopper_attention.h, for conformance.cu. They run in the emulator and on compute capability 9.0.
#include "conformance.h"
#include "cuda/hopper_attention.h"

namespace conformance {

using namespace llmfast::cuda;

// Every thread writes, arrives, waits and reads what another has written, in three phases.
__global__ void run_barrier(uint32_t* out) {
#if LLMFAST_SM90_CODE
  LLMFAST_DYN_SHARED(uint32_t, values, 1024);
  uint64_t* barrier = reinterpret_cast<uint64_t*>(values + 96);
  if (threadIdx.x == 0) {
    barrier_init(barrier, 96);
    barrier_init_fence();
  }
  __syncthreads();
  for (int phase = 0; phase < 3; ++phase) {
    values[threadIdx.x] = threadIdx.x * 7 + phase;
    barrier_arrive(barrier);
    barrier_wait(barrier, phase & 1);
    out[phase * 96 + threadIdx.x] = values[(threadIdx.x + 41) % 96];
    __syncthreads();
  }
#endif
}

inline void test_barrier() {
  Device<uint32_t> out(3 * 96);
  LLMFAST_LAUNCH(run_barrier, 1, 96, 96 * 4 + 8, nullptr, out.data());
  std::vector<uint32_t> want(3 * 96);
  for (int i = 0; i < 3 * 96; ++i) want[i] = (i % 96 + 41) % 96 * 7 + i / 96;
  require_same("value", out.host(), want);
}

// The first 64 of 128 threads exchange values behind a barrier of their own, while the others never come to it.
__global__ void run_named_barrier(uint32_t* out) {
#if LLMFAST_SM90_CODE
  LLMFAST_DYN_SHARED(uint32_t, values, 1024);
  if (threadIdx.x >= 64) return;
  values[threadIdx.x] = threadIdx.x * 5;
  named_barrier(3, 64);
  out[threadIdx.x] = values[63 - threadIdx.x];
#endif
}

inline void test_named_barrier() {
  Device<uint32_t> out(64);
  LLMFAST_LAUNCH(run_named_barrier, 1, 128, 256, nullptr, out.data());
  std::vector<uint32_t> want(64);
  for (int i = 0; i < 64; ++i) want[i] = (63 - i) * 5;
  require_same("value", out.host(), want);
}

#if LLMFAST_SM90_CODE
// One thread begins copies of so many bytes; all wait until they are there.
template <typename F>
__device__ void fetch(uint64_t* barrier, int bytes, F begin) {
  if (threadIdx.x == 0) {
    barrier_init(barrier, 1);
    barrier_init_fence();
    barrier_arrive_expect(barrier, bytes);
    begin();
  }
  __syncthreads();
  barrier_wait(barrier, 0);
}
#endif

// A box, byte by byte as it lies in shared memory.
__global__ void run_tma(const __grid_constant__ TensorMap map, int row, int column, int bytes, uint16_t* out) {
#if LLMFAST_SM90_CODE
  LLMFAST_DYN_SHARED(unsigned char, tile, 1024);
  uint64_t* barrier = reinterpret_cast<uint64_t*>(tile + bytes);
  fetch(barrier, bytes, [&] { tma_load(tile, &map, row, column, barrier); });
  for (int i = threadIdx.x; i < bytes / 2; i += blockDim.x) out[i] = reinterpret_cast<uint16_t*>(tile)[i];
#endif
}

inline void test_tma() {
  const int boxes[][3] = {{0, 0, 64}, {64, 64, 16}, {5, 72, 64}, {-3, -8, 24}, {200, 0, 8}};
  for (const auto& [row, column, box_rows] : boxes) {
    const int rows = 101, columns = 104, stride = 112;
    std::vector<uint16_t> host(rows * stride);
    for (auto& v : host) v = uint16_t(integer(1, 0xFFFF));
    Device<uint16_t> in(host), out(box_rows * kTileRow);
    TensorMap map;
    require(make_tensor_map(&map, in.data(), rows, columns, stride, box_rows), "no tensor map");
    const int bytes = box_rows * kTileRow * 2;
    LLMFAST_LAUNCH(run_tma, 1, 64, bytes + 8, nullptr, map, row, column, bytes, out.data());
    std::vector<uint16_t> want(box_rows * kTileRow);
    for (int r = 0; r < box_rows; ++r)
      for (int c = 0; c < kTileRow; ++c) {
        const int y = row + r, x = column + c;
        const bool there = y >= 0 && y < rows && x >= 0 && x < columns;
        want[r * kTileRow + ((c / 8) ^ (r % 8)) * 8 + c % 8] = there ? host[y * stride + x] : 0;
      }
    require_same("element", out.host(), want);
  }
}

// d (64, N) = a (64, 64) b (64, N) twice, the second time on top.
template <typename T, int N, bool kBAcrossK>
__global__ void run_wgmma(const __grid_constant__ TensorMap a_map, const __grid_constant__ TensorMap b_map, float* out) {
#if LLMFAST_SM90_CODE
  constexpr int kABytes = 64 * 128, kBBytes = N * 128;
  LLMFAST_DYN_SHARED(unsigned char, shared, 1024);
  uint64_t* barrier = reinterpret_cast<uint64_t*>(shared + kABytes + kBBytes);
  fetch(barrier, kABytes + kBBytes, [&] {
    tma_load(shared, &a_map, 0, 0, barrier);
    if (kBAcrossK)
      for (int n = 0; n < N; n += 64) tma_load(shared + kABytes + n * 128, &b_map, 0, n, barrier);
    else
      tma_load(shared + kABytes, &b_map, 0, 0, barrier);
  });
  float d[N / 2];
  for (int i = 0; i < N / 2; ++i) d[i] = 1e30f;  // the first product does not read it
  for (int turn = 0; turn < 2; ++turn) {
    uint64_t a = descriptor_along_k(shared_address(shared));
    uint64_t b = shared_address(shared) + kABytes;
    b = kBAcrossK ? descriptor_across_k(uint32_t(b), 64 * 128) : descriptor_along_k(uint32_t(b));
    wgmma_fence();
    for (int k = 0; k < 64; k += 16) {
      wgmma<T, N, kBAcrossK>(d, a, b, turn > 0 || k > 0);
      a = step_along_k(a);
      b = kBAcrossK ? step_across_k(b) : step_along_k(b);
    }
    wgmma_commit();
    wgmma_wait<0>();
  }
  for (int i = 0; i < N / 2; ++i) {
    const int row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4 + 8 * (i >> 1 & 1);
    out[row * N + i / 4 * 8 + threadIdx.x % 4 * 2 + (i & 1)] = d[i];
  }
#endif
}

template <typename T, int N, bool kBAcrossK>
void test_wgmma() {
  std::vector<T> a(64 * 64), b(64 * N);
  for (auto& v : a) v = T(float(integer(-8, 8)));
  for (auto& v : b) v = T(float(integer(-8, 8)));
  Device<T> a_there(a), b_there(b);
  Device<float> out(64 * N);
  TensorMap a_map, b_map;
  require(make_tensor_map(&a_map, a_there.data(), 64, 64, 64, 64), "no tensor map");
  require(kBAcrossK ? make_tensor_map(&b_map, b_there.data(), 64, N, N, 64) : make_tensor_map(&b_map, b_there.data(), N, 64, 64, N),
          "no tensor map");
  LLMFAST_LAUNCH((run_wgmma<T, N, kBAcrossK>), 1, 128, 64 * 128 + N * 128 + 8, nullptr, a_map, b_map, out.data());
  std::vector<float> want(64 * N);
  for (int m = 0; m < 64; ++m)
    for (int n = 0; n < N; ++n)
      for (int k = 0; k < 64; ++k)
        want[m * N + n] += 2 * float(a[m * 64 + k]) * float(b[kBAcrossK ? k * N + n : n * 64 + k]);
  require_same("element", out.host(), want);
}

// Boxes of one head of a (B, H, T, D) array whose rows lie among those of the other heads.
__global__ void run_tma_head(const __grid_constant__ HeadsMap map, int batch, int head, int row, int column, int bytes,
                             uint16_t* out) {
#if LLMFAST_SM90_CODE
  LLMFAST_DYN_SHARED(unsigned char, tile, 1024);
  uint64_t* barrier = reinterpret_cast<uint64_t*>(tile + bytes);
  fetch(barrier, bytes, [&] { tma_load_head(tile, &map, batch, head, row, column, barrier); });
  for (int i = threadIdx.x; i < bytes / 2; i += blockDim.x) out[i] = reinterpret_cast<uint16_t*>(tile)[i];
#endif
}

inline void test_tma_head() {
  const int B = 2, H = 3, T = 37, D = 72, box_rows = 16;
  std::vector<uint16_t> host(B * T * H * D);
  for (auto& v : host) v = uint16_t(integer(1, 0xFFFF));
  Device<uint16_t> in(host), out(box_rows * kTileRow);
  HeadsMap map{};
  require(make_heads_map(&map, {in.data(), T * H * D, D, H * D}, B, H, T, D, box_rows), "no tensor map");
  const int places[][4] = {{0, 0, 0, 0}, {1, 2, 16, 64}, {1, 0, 32, 0}, {0, 1, 48, 64}};
  for (const auto& [batch, head, row, column] : places) {
    const int bytes = box_rows * kTileRow * 2;
    LLMFAST_LAUNCH(run_tma_head, 1, 64, bytes + 8, nullptr, map, batch, head, row, column, bytes, out.data());
    std::vector<uint16_t> want(box_rows * kTileRow);
    for (int r = 0; r < box_rows; ++r)
      for (int c = 0; c < kTileRow; ++c)
        if (row + r < T && column + c < D)
          want[r * kTileRow + ((c / 8) ^ (r % 8)) * 8 + c % 8] = host[((batch * T + row + r) * H + head) * D + column + c];
    require_same("element", out.host(), want);
  }
}

// d (64, N) = 1 + a (64, 32) b (32, N), a in registers.
template <typename T, int N>
__global__ void run_wgmma_from_registers(const float* a, const __grid_constant__ TensorMap b_map, float* out) {
#if LLMFAST_SM90_CODE
  constexpr int kBytes = 32 * 128;  // of 64 columns of b
  LLMFAST_DYN_SHARED(unsigned char, shared, 1024);
  uint64_t* barrier = reinterpret_cast<uint64_t*>(shared + N / 64 * kBytes);
  fetch(barrier, N / 64 * kBytes, [&] { for (int n = 0; n < N; n += 64) tma_load(shared + n / 64 * kBytes, &b_map, 0, n, barrier); });
  const int row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  float d[N / 2];
  uint32_t fragment[2][4];
  for (int i = 0; i < N / 2; ++i) d[i] = 1.f;
  for (int step = 0; step < 2; ++step)
    for (int r = 0; r < 4; ++r) {
      const float* at = a + (row + 8 * (r & 1)) * 32 + step * 16 + 8 * (r >> 1) + 2 * t;
      fragment[step][r] = pack2<T>(at[0], at[1]);
    }
  uint64_t b = descriptor_across_k(shared_address(shared), kBytes);
  wgmma_fence();
  for (int step = 0; step < 2; ++step) {
    wgmma_from_registers<T, N>(d, fragment[step], b);
    b = step_across_k(b);
  }
  wgmma_commit();
  wgmma_wait<0>();
  for (int i = 0; i < N / 2; ++i) out[(row + 8 * (i >> 1 & 1)) * N + i / 4 * 8 + 2 * t + (i & 1)] = d[i];
#endif
}

template <typename T, int N>
void test_wgmma_from_registers() {
  std::vector<float> a(64 * 32);
  std::vector<T> b(32 * N);
  for (auto& v : a) v = float(integer(-8, 8));
  for (auto& v : b) v = T(float(integer(-8, 8)));
  Device<float> a_there(a), out(64 * N);
  Device<T> b_there(b);
  TensorMap b_map;
  require(make_tensor_map(&b_map, b_there.data(), 32, N, N, 32), "no tensor map");
  LLMFAST_LAUNCH((run_wgmma_from_registers<T, N>), 1, 128, N * 64 + 8, nullptr, a_there.data(), b_map, out.data());
  std::vector<float> want(64 * N, 1.f);
  for (int m = 0; m < 64; ++m)
    for (int n = 0; n < N; ++n)
      for (int k = 0; k < 32; ++k) want[m * N + n] += a[m * 32 + k] * float(b[k * N + n]);
  require_same("element", out.host(), want);
}

#ifdef LLMFAST_EMULATE
inline bool has_sm90() { return true; }
#else
inline bool has_sm90() {
  int major = 0;
  check_cuda(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0));
  return major == 9;
}
#endif

inline int run_sm90() {
  if (!has_sm90()) {
    printf("the wrappers of sm_90a: not on this GPU\n");
    return 0;
  }
  return run_all({
      {"barrier in shared memory", test_barrier},
      {"named barrier", test_named_barrier},
      {"copy by tensor map", test_tma},
      {"wgmma f16 N64", test_wgmma<__half, 64, false>},
      {"wgmma bf16 N64", test_wgmma<__nv_bfloat16, 64, false>},
      {"wgmma f16 N128", test_wgmma<__half, 128, false>},
      {"wgmma bf16 N128", test_wgmma<__nv_bfloat16, 128, false>},
      {"wgmma f16 N64 across", test_wgmma<__half, 64, true>},
      {"wgmma bf16 N64 across", test_wgmma<__nv_bfloat16, 64, true>},
      {"wgmma f16 N128 across", test_wgmma<__half, 128, true>},
      {"wgmma bf16 N128 across", test_wgmma<__nv_bfloat16, 128, true>},
      {"copy out of a head", test_tma_head},
      {"wgmma f16 N64 from registers", test_wgmma_from_registers<__half, 64>},
      {"wgmma bf16 N64 from registers", test_wgmma_from_registers<__nv_bfloat16, 64>},
      {"wgmma f16 N128 from registers", test_wgmma_from_registers<__half, 128>},
      {"wgmma bf16 N128 from registers", test_wgmma_from_registers<__nv_bfloat16, 128>},
  });
}

}  // namespace conformance
