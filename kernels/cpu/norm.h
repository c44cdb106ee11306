// Root-mean-square norm of one row that is already float32.
#pragma once

#include "vec.h"

namespace xllm {

// row = rounded(weight * rounded(row / sqrt(mean(row^2) + eps))), n floats; rounded to T.
template <class T>
inline void norm_row(float* row, const T* weight, float eps, int64_t n) {
  Vec squares = {};
  float rest = 0;
  each(n, [&](int64_t i, auto kind) {
    auto x = load_as(row + i, kind);
    if constexpr (sizeof(x) == sizeof(Vec)) squares = fma(x, x, squares);
    else rest += x * x;
  });
  float scale = 1.f / std::sqrt((sum(squares) + rest) / float(n) + eps);
  each(n, [&](int64_t i, auto kind) {
    auto x = rounded<T>(load_as(row + i, kind) * scale);
    store(row + i, rounded<T>(load_as(weight + i, kind) * x));
  });
}

}  // namespace xllm
