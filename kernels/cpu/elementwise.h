// Norms and gated activations over rows; see xllm/ops/norm.py and xllm/ops/activation.py.
#pragma once

#include "vec.h"

namespace xllm {

// x [M, N]; weight [N]. With a residual [M, N], x + residual goes to `total` and is normed.
template <class T>
struct Norm {
  const T *x, *residual, *weight;
  T *total, *out;
  float eps;
  int64_t m, n;
};

template <class T>
void rms_norm(const Norm<T>& problem);

// out = rounded(silu(gate)) * up, `count` values.
template <class T>
void silu_mul(const T* gate, const T* up, T* out, int64_t count);

}  // namespace xllm
