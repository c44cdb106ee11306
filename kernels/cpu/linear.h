// Linear layers and embeddings over packed weights; see xllm/ops/linear.py for the layout.
#pragma once

#include "vec.h"

namespace xllm {

// M rows of x, K inputs, N outputs; bias may be null.
template <class T>
struct Linear {
  const T* x;       // [M, K]
  const T* weight;  // [N / 32, K / 2, 32, 2]
  const T* bias;    // [N]
  T* out;           // [M, N]
  int64_t m, n, k;
};

void packed_linear(const Linear<float>& problem);
void packed_linear(const Linear<bf16>& problem);

// Rows ids [count] of weight [V / 32, K / 2, 32, 2] → out [count, K].
template <class T>
void packed_embedding(const T* weight, const int64_t* ids, T* out, int64_t count, int64_t k);

}  // namespace xllm
