#pragma once
// For programs that run the same in the emulator (g++ -x c++ -DLLMFAST_EMULATE) and on a GPU (nvcc): each wrapper of PTX
// on random data against its meaning, written out on the host. What passes on both gives the same on both.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/dialect.h"

namespace conformance {

inline void require(bool condition, const std::string& message) {
  if (!condition) throw std::runtime_error(message);
}

#ifdef LLMFAST_EMULATE
inline void check_cuda(int) {}
#else
inline void check_cuda(cudaError_t error) { require(error == cudaSuccess, cudaGetErrorString(error)); }
#endif

// n elements in the device's memory.
template <typename T>
class Device {
 public:
  explicit Device(size_t n) : Device(std::vector<T>(n)) {}
#ifdef LLMFAST_EMULATE
  explicit Device(const std::vector<T>& host) : host_(host) {}
  T* data() { return host_.data(); }
  std::vector<T> host() const { return host_; }

 private:
  std::vector<T> host_;
#else
  explicit Device(const std::vector<T>& host) : n_(host.size()) {
    check_cuda(cudaMalloc(&data_, n_ * sizeof(T)));
    check_cuda(cudaMemcpy(data_, host.data(), n_ * sizeof(T), cudaMemcpyHostToDevice));
  }
  Device(const Device&) = delete;
  ~Device() { cudaFree(data_); }
  T* data() { return data_; }
  std::vector<T> host() const {
    check_cuda(cudaDeviceSynchronize());
    std::vector<T> result(n_);
    check_cuda(cudaMemcpy(result.data(), data_, n_ * sizeof(T), cudaMemcpyDeviceToHost));
    return result;
  }

 private:
  size_t n_;
  T* data_ = nullptr;
#endif
};

inline std::mt19937 rng(1);
inline int integer(int low, int high) { return std::uniform_int_distribution<int>(low, high)(rng); }

template <typename T>
void require_same(const std::string& what, const std::vector<T>& got, const std::vector<T>& want) {
  for (size_t i = 0; i < want.size(); ++i)
    require(!memcmp(&got[i], &want[i], sizeof(T)), what + ": element " + std::to_string(i) + " is " +
                                                       std::to_string(double(got[i])) + ", not " +
                                                       std::to_string(double(want[i])));
}

struct Case {
  const char* name;
  void (*run)();
};

// Runs the cases, or in the emulator those under several schedules; 0 if all conform.
template <size_t N>
int run_all(const Case (&cases)[N]) {
  int failed = 0;
  for (const Case& one : cases) {
    try {
#ifdef LLMFAST_EMULATE
      for (unsigned seed : {0u, 1u, 7u}) {
        emu::config.seed = seed;
        emu::config.late_copies = seed != 1;
        one.run();
      }
#else
      for (int i = 0; i < 3; ++i) one.run();
#endif
      printf("%-24s ok\n", one.name);
    } catch (const std::exception& error) {
      ++failed;
      printf("%-24s FAILED: %s\n", one.name, error.what());
    }
  }
  return failed ? 1 : 0;
}

}  // namespace conformance
