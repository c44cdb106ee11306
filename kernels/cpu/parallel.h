// Work sharing on torch's thread pool, and scratch memory of a thread.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <memory>

namespace xllm {

// Run work(0) ... work(count - 1), each thread taking the next one: items may differ in cost, and
// another process may hold one of the cores.
template <class Work>
void for_each_item(int64_t count, const Work& work) {
  int64_t threads = std::min<int64_t>(count, at::get_num_threads());
  std::atomic<int64_t> next{0};
  at::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (int64_t i = next++; i < count; i = next++) work(i);
  });
}

// Uninitialised floats that start at a cache line.
class Scratch {
 public:
  float* get(int64_t floats) {
    if (floats > capacity_) {
      memory_.reset(static_cast<float*>(std::aligned_alloc(64, (floats * 4 + 63) / 64 * 64)));
      capacity_ = floats;
    }
    return memory_.get();
  }

 private:
  std::unique_ptr<float, decltype(&std::free)> memory_{nullptr, &std::free};
  int64_t capacity_ = 0;
};

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return divide_up(a, b) * b; }

}  // namespace xllm
