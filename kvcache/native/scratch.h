// Memory that a thread keeps between calls.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <new>

namespace keysift {

// Floats aligned to a cache line; grows, never shrinks; growing forgets the contents.
class Buffer {
 public:
  Buffer() = default;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { std::free(data_); }

  float* floats(std::size_t count) {
    if (count > count_) grow(count);
    return data_;
  }

 private:
  void grow(std::size_t count) {
    std::free(data_);
    count_ = 0;
    const std::size_t rounded = (count + 15) / 16 * 16;
    data_ = static_cast<float*>(std::aligned_alloc(64, rounded * sizeof(float)));
    if (data_ == nullptr) throw std::bad_alloc();
    count_ = rounded;
  }

  float* data_ = nullptr;
  std::size_t count_ = 0;
};

}  // namespace keysift
