// Memory for the length of a call, and such as a thread keeps for its next one.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <initializer_list>
#include <new>

namespace {

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t ratio_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class T>
class Memory {
 public:
  explicit Memory(int64_t count) : data_(new T[static_cast<size_t>(count)]) {}
  ~Memory() { delete[] data_; }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  T* get() const { return data_; }
  operator T*() const { return data_; }

 private:
  T* data_;
};

// Memory that a thread keeps for its next call.
class Scratch {
 public:
  Scratch() = default;
  ~Scratch() { std::free(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  void reserve(int64_t floats) {
    taken_ = 0;
    if (floats <= capacity_) return;
    std::free(data_);
    capacity_ = floats;
    data_ = std::malloc(static_cast<size_t>(floats) * sizeof(float) + 64);
    if (data_ == nullptr) throw std::bad_alloc();
  }

  float* take(int64_t floats) {
    const uintptr_t first = (reinterpret_cast<uintptr_t>(data_) + 63) / 64 * 64;
    float* part = reinterpret_cast<float*>(first) + taken_;
    taken_ += rounded(floats);
    return part;
  }

  static int64_t rounded(int64_t floats) { return (floats + 15) / 16 * 16; }

  // What is to be reserved for all of these to be taken.
  static int64_t all(std::initializer_list<int64_t> parts) {
    int64_t sum = 0;
    for (int64_t part : parts) sum += rounded(part);
    return sum;
  }

 private:
  void* data_ = nullptr;
  int64_t capacity_ = 0, taken_ = 0;
};

}  // namespace
