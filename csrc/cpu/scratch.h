#pragma once
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>

namespace llmfast::cpu {

// Memory that a thread keeps between calls: it only grows, so that a training step touches no fresh pages.
class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { std::free(data_); }

  // Room for n elements of T, aligned to 64 bytes; what it held is lost.
  template <typename T>
  T* get(int64_t n) {
    const size_t bytes = size_t(n) * sizeof(T);
    if (bytes > size_) {
      std::free(data_);
      size_ = (bytes + bytes / 8 + 4095) / 4096 * 4096;
      data_ = std::aligned_alloc(64, size_);
      if (!data_) {
        size_ = 0;
        throw std::bad_alloc();
      }
    }
    return static_cast<T*>(data_);
  }

 private:
  void* data_ = nullptr;
  size_t size_ = 0;
};

}  // namespace llmfast::cpu
