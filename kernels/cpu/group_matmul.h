// Matrix products per expert over packed weights, and what sorts and combines their rows; see
// xllm/ops/group_matmul.py.
#pragma once

#include "vec.h"

namespace xllm {

// Row r of group e, offsets[e] <= r < offsets[e + 1], is x[rows[r]] W[e]^T + bias[e].
template <class T>
struct GroupMatmul {
  const T* x;            // [*, K]
  const T* weight;       // [E, N / 32, K / 2, 32, 2]
  const T* bias;         // [E, N], or null
  const int32_t* offsets;  // [E + 1]
  const int32_t* rows;   // [R], or null: row r itself
  T* out;                // [R, N]
  int64_t experts, n, k;
};

void packed_group_matmul(const GroupMatmul<float>& problem);
void packed_group_matmul(const GroupMatmul<bf16>& problem);

// ids [tokens, picks] → rows [tokens * picks], places [tokens, picks], offsets [experts + 1].
void group_tokens(const int64_t* ids, int64_t tokens, int64_t picks, int64_t experts, int32_t* rows,
                  int32_t* places, int32_t* offsets);

// out[t] = sum_k weights[t, k] * y[places[t, k]] in float32; y [R, N], out [tokens, N].
template <class T, class W>
void combine_experts(const T* y, const int32_t* places, const W* weights, T* out, int64_t tokens,
                     int64_t picks, int64_t n);

}  // namespace xllm
