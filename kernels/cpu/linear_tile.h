// The tile of a matrix product over a packed weight: up to ROWS rows of x by the 32 outputs of one
// weight block, accumulated in registers over all K inputs.
#pragma once

#include <type_traits>
#include <utility>

#include "parallel.h"
#include "vec.h"

namespace xllm {
namespace {

constexpr int64_t BLOCK = 32;
constexpr int64_t PACK_WIDTH = 128;  // inputs packed at a time: the result stays in L1
constexpr int64_t PREFETCH = 4096;   // bytes ahead; hardware prefetch stops at a page's end
constexpr int64_t WIDEN_TILES = 4;   // of a chunk: from there on float32 weights pay
constexpr int64_t X_BYTES = 1 << 20; // a chunk of x: leaves room for a weight block in L2

// How a pair of weights per lane meets a pair of inputs. X is what x is packed as; a block is
// taken VECTORS registers at a time, for up to ROWS rows.
#if defined(__AVX512BF16__)
struct DotProduct {
  using X = bf16;
  using W = const bf16*;
  using Stored = bf16;
  static constexpr int VECTORS = 2, ROWS = 12, LANES = 1;
  struct Weight {
    __m512bh pair;
  };
  static Weight load_weight(const bf16* w, int64_t at) {
    return {reinterpret_cast<__m512bh>(_mm512_loadu_si512(w + at))};
  }
  static void step(Vec (&sum)[VECTORS], const Weight (&w)[VECTORS], const bf16* x) {
    int32_t pair;
    std::memcpy(&pair, x, 4);
    auto both = reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair));
    for (int v = 0; v < VECTORS; v++) sum[v] = _mm512_dpbf16_ps(sum[v], w[v].pair, both);
  }
};
#else
// Weights widened in registers, for float32 FMAs.
struct Widened {
  using X = float;
  using W = const bf16*;
  using Stored = bf16;
  static constexpr int VECTORS = 2, ROWS = VECTOR_REGISTERS == 32 ? 12 : 4, LANES = 1;
  struct Weight {
    Vec even, odd;
  };
  static Weight load_weight(const bf16* w, int64_t at) {
    Bits pair = *reinterpret_cast<const BitsAt*>(w + at);
    return {reinterpret_cast<Vec>(pair << 16), reinterpret_cast<Vec>(pair & 0xffff0000u)};
  }
  static void step(Vec (&sum)[VECTORS], const Weight (&w)[VECTORS], const float* x) {
    Vec even = splat(x[0]), odd = splat(x[1]);
    for (int v = 0; v < VECTORS; v++) sum[v] = fma(w[v].even, even, sum[v]);
    for (int v = 0; v < VECTORS; v++) sum[v] = fma(w[v].odd, odd, sum[v]);
  }
};

// With many rows, the first tile of a block also writes the widened weights to memory, a vector of
// even ones before its odd ones, which costs it nothing ...
struct Widening : Widened {
  struct W {
    const bf16* from;
    float* to;
  };
  static Weight load_weight(const W& w, int64_t at) {
    Weight weight = Widened::load_weight(w.from, at);
    store(w.to + at, weight.even);
    store(w.to + at + VL, weight.odd);
    return weight;
  }
};

// ... and the others read them: nothing but FMAs is left for the vector units.
struct Wide : Widened {
  using W = const float*;
  static Weight load_weight(const float* w, int64_t at) {
    return {load(w + at), load(w + at + VL)};
  }
};
#endif

// Even and odd inputs in neighbouring lanes, added up at the end: no shuffle in the loop.
struct Interleaved {
  using X = float;
  using W = const float*;
  using Stored = float;
  static constexpr int VECTORS = 4, ROWS = VECTOR_REGISTERS == 32 ? 6 : 2, LANES = 2;
  struct Weight {
    Vec pair;
  };
  static Weight load_weight(const float* w, int64_t at) { return {load(w + at)}; }
  static void step(Vec (&sum)[VECTORS], const Weight (&w)[VECTORS], const float* x) {
    int64_t pair;
    std::memcpy(&pair, x, 8);
    Vec both = reinterpret_cast<Vec>(Pairs{} + pair);
    for (int v = 0; v < VECTORS; v++) sum[v] = fma(w[v].pair, both, sum[v]);
  }
};

// sums[M][BLOCK * LANES] of M packed rows of x, [K / 2, M, 2], and one weight block; fetches
// what lies at `soon` at the pace of the block's bytes in memory.
template <class Dot, int M>
void tile(const typename Dot::X* x, int64_t k, typename Dot::W w, const char* soon,
          float* sums) {
  constexpr int WIDTH = BLOCK * Dot::LANES;  // lanes of a block
  constexpr int STEP = Dot::VECTORS * VL;    // lanes of a pass
  constexpr int PER_LANE = 2 / Dot::LANES;   // weights a lane takes at a step
  for (int lane = 0; lane < WIDTH; lane += STEP) {
    Vec sum[M][Dot::VECTORS] = {};
    int64_t at = lane * PER_LANE;
    const typename Dot::X* pairs = x;
    for (int64_t i = 0; i < k; i += 2, at += BLOCK * 2, pairs += 2 * M) {
      typename Dot::Weight weight[Dot::VECTORS];
      for (int v = 0; v < Dot::VECTORS; v++) {
        int64_t from = at + v * VL * PER_LANE;
        weight[v] = Dot::load_weight(w, from);
        __builtin_prefetch(soon + from * int64_t(sizeof(typename Dot::Stored)));
      }
      for (int m = 0; m < M; m++) Dot::step(sum[m], weight, pairs + 2 * m);
    }
    for (int m = 0; m < M; m++)
      for (int v = 0; v < Dot::VECTORS; v++) store(sums + m * WIDTH + lane + v * VL, sum[m][v]);
  }
}

template <class Dot>
using Tile = void (*)(const typename Dot::X*, int64_t, typename Dot::W, const char*, float*);

template <class Dot, int... M>
constexpr Tile<Dot> pick(int64_t rows, std::integer_sequence<int, M...>) {
  constexpr Tile<Dot> table[] = {tile<Dot, M + 1>...};
  return table[rows - 1];
}

// The Dot for weights stored as T.
#if defined(__AVX512BF16__)
template <class T>
using DotOf = std::conditional_t<sizeof(T) == 4, Interleaved, DotProduct>;
#else
template <class T>
using DotOf = std::conditional_t<sizeof(T) == 4, Interleaved, Widened>;
#endif

// Add the bias (or none), round, and write a tile's sums as rows out, out + stride, ...
template <class Dot, class T>
void write_tile(const float* sums, int64_t rows, int64_t columns, const T* bias, T* out,
                int64_t stride) {
  for (int64_t m = 0; m < rows; m++) {
    const float* from = sums + m * BLOCK * Dot::LANES;
    for (int64_t n = 0; n < columns; n++) {
      float total = Dot::LANES == 2 ? from[2 * n] + from[2 * n + 1] : from[n];
      store(out + m * stride + n, bias ? total + to_float(bias[n]) : total);
    }
  }
}

inline void convert(float x, float* to) { *to = x; }
inline void convert(bf16 x, float* to) { *to = to_float(x); }
inline void convert(bf16 x, bf16* to) { *to = x; }

// `count` rows of x, row_of(0) ..., as a tile [K / 2, count, 2]: the kernel then reads one stream.
template <class X, class RowOf>
void pack_tile(const RowOf& row_of, int64_t count, int64_t k, X* packed) {
  for (int64_t start = 0; start < k; start += PACK_WIDTH) {
    int64_t stop = std::min(k, start + PACK_WIDTH);
    for (int64_t m = 0; m < count; m++) {
      const auto* from = row_of(m);
      X* at = packed + start * count + m * 2;
      for (int64_t i = start; i < stop; i += 2, at += 2 * count) {
        convert(from[i], at);
        convert(from[i + 1], at + 1);
      }
    }
  }
}

// Sums of one weight block for `count` rows of x, packed in tiles of `rows` (the last may have
// fewer), handed to write(sums, first row, rows).
template <class Dot, class T, class Write>
void run_block(const typename Dot::X* x, int64_t k, int64_t rows, int64_t count, const T* w,
               const Write& write) {
  alignas(64) float sums[Dot::ROWS * BLOCK * Dot::LANES];
  [[maybe_unused]] thread_local Scratch scratch;
  [[maybe_unused]] bool widen = count >= WIDEN_TILES * rows;
  for (int64_t row = 0; row < count; row += rows) {
    int64_t some = std::min(rows, count - row);
    // The last tile of several finds this block in cache, so it fetches the next one.
    bool next = row != 0 && row + rows >= count;
    auto soon = reinterpret_cast<const char*>(w + (next ? BLOCK * k : PREFETCH / sizeof(T)));
    auto run = [&]<class Kind>(Kind, typename Kind::W weight) {
      pick<Kind>(some, std::make_integer_sequence<int, Kind::ROWS>())(x + row * k, k, weight,
                                                                      soon, sums);
    };
#if !defined(__AVX512BF16__)
    if constexpr (std::is_same_v<Dot, Widened>) {
      if (widen) {
        float* wide = scratch.get(BLOCK * k);
        row == 0 ? run(Widening{}, {w, wide}) : run(Wide{}, wide);
        write(sums, row, some);
        continue;
      }
    }
#endif
    run(Dot{}, w);
    write(sums, row, some);
  }
}

}  // namespace
}  // namespace xllm
