// Transposition of blocks of VL x VL floats in registers.
#pragma once

#include <utility>

#include "vec.h"

namespace xllm {

// 2 VL lanes of a and b where lanes with bit STEP are swapped between the two: a stage of a
// transposition.
template <int STEP, int... LANE>
void swap_lanes(Vec& a, Vec& b, std::integer_sequence<int, LANE...>) {
  Vec low = __builtin_shufflevector(a, b, (LANE & STEP ? VL + LANE - STEP : LANE)...);
  b = __builtin_shufflevector(a, b, (LANE & STEP ? VL + LANE : LANE + STEP)...);
  a = low;
}

template <int STEP = VL / 2>
void transpose(Vec (&rows)[VL]) {
  for (int i = 0; i < VL; i++)
    if (!(i & STEP))
      swap_lanes<STEP>(rows[i], rows[i + STEP], std::make_integer_sequence<int, VL>());
  if constexpr (STEP > 1) transpose<STEP / 2>(rows);
}

}  // namespace xllm
