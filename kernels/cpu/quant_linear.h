// Linear layers over quantised weights; see xllm/ops/quant_linear.py for the layouts.
#pragma once

#include "vec.h"

namespace xllm {

// What a code is stored in: int8_t itself, Float8 (e4m3), or Nibbles (eight inputs of an output).
struct Float8 {
  uint8_t bits;
};
struct Nibbles {
  uint32_t bits;
};

// M rows of x, K inputs in groups of `group`, N outputs. K and group are multiples of 8.
template <class T, class Code>
struct QuantLinear {
  const T* x;           // [M, K]
  const Code* codes;    // [N / 32, K or K / 8, 32]
  const float* scales;  // [N / 32, groups, 32]
  const int8_t* zeros;  // like scales, or null
  const T* bias;        // [N] or null
  T* out;               // [M, N]
  int64_t m, n, k, group;
};

template <class T, class Code>
void quant_linear(const QuantLinear<T, Code>& problem);

}  // namespace xllm
