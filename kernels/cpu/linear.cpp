// y = x W^T + b over a packed weight. M rows, N outputs, K inputs.
//
// A tile is up to ROWS rows by the 32 outputs of one weight block, accumulated in registers over
// all of K. With few rows the weight is read once and the call is bound by memory; with many, a
// chunk of x that fits the second-level cache is reused over the blocks of a task.
#include "linear.h"

#include <type_traits>
#include <utility>

#include "parallel.h"

namespace xllm {
namespace {

constexpr int64_t BLOCK = 32;
constexpr int64_t PACK_GRAIN = 1 << 15;  // values of x that a thread packs at least
constexpr int64_t PACK_WIDTH = 128;      // inputs packed at a time: the result stays in L1
constexpr int64_t PREFETCH = 4096;       // bytes ahead; hardware prefetch stops at a page's end
constexpr int64_t WIDEN_TILES = 4;      // of a chunk: from there on float32 weights pay
constexpr int64_t X_BYTES = 1 << 20;     // a chunk of x: leaves room for a weight block in L2

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

// Add the bias, round, and write a tile of `rows` rows at output `first`.
template <class Dot, class T>
void write_tile(const Linear<T>& p, const float* sums, int64_t row, int64_t rows, int64_t first) {
  int64_t columns = std::min(BLOCK, p.n - first);
  for (int64_t m = 0; m < rows; m++) {
    const float* from = sums + m * BLOCK * Dot::LANES;
    T* to = p.out + (row + m) * p.n + first;
    for (int64_t n = 0; n < columns; n++) {
      float total = Dot::LANES == 2 ? from[2 * n] + from[2 * n + 1] : from[n];
      store(to + n, p.bias ? total + to_float(p.bias[first + n]) : total);
    }
  }
}

inline void convert(float x, float* to) { *to = x; }
inline void convert(bf16 x, float* to) { *to = to_float(x); }
inline void convert(bf16 x, bf16* to) { *to = x; }

// x [M, K] → tiles of `rows` rows (the last may have fewer), each [K / 2, rows, 2]: the kernel
// then reads one stream.
template <class X, class T>
void pack_rows(const Linear<T>& p, int64_t rows, X* packed) {
  int64_t tiles = divide_up(p.m, rows), grain = divide_up(PACK_GRAIN, rows * p.k);
  at::parallel_for(0, tiles, grain, [&](int64_t begin, int64_t end) {
    for (int64_t tile = begin; tile < end; tile++) {
      int64_t first = tile * rows, count = std::min(rows, p.m - first);
      X* to = packed + first * p.k;
      for (int64_t start = 0; start < p.k; start += PACK_WIDTH) {
        int64_t stop = std::min(p.k, start + PACK_WIDTH);
        for (int64_t m = 0; m < count; m++) {
          const T* from = p.x + (first + m) * p.k;
          X* at = to + start * count + m * 2;
          for (int64_t i = start; i < stop; i += 2, at += 2 * count) {
            convert(from[i], at);
            convert(from[i + 1], at + 1);
          }
        }
      }
    }
  });
}

// Outputs of one weight block for a tile of `count` rows of x; fetches what lies at `soon`.
template <class Dot, class T>
void run_tile(const Linear<T>& p, const typename Dot::X* x, int64_t row, int64_t count,
              int64_t block, typename Dot::W w, const T* soon) {
  alignas(64) float sums[Dot::ROWS * BLOCK * Dot::LANES];
  auto kernel = pick<Dot>(count, std::make_integer_sequence<int, Dot::ROWS>());
  kernel(x + row * p.k, p.k, w, reinterpret_cast<const char*>(soon), sums);
  write_tile<Dot>(p, sums, row, count, block * BLOCK);
}

// Outputs of one weight block for rows [first, last) of x, packed in tiles of `rows`.
template <class Dot, class T>
void run_block(const Linear<T>& p, const typename Dot::X* x, int64_t rows, int64_t first,
               int64_t last, int64_t block) {
  const T* w = p.weight + block * BLOCK * p.k;
  [[maybe_unused]] thread_local Scratch scratch;
  [[maybe_unused]] bool widen = last - first >= WIDEN_TILES * rows;
  for (int64_t row = first; row < last; row += rows) {
    int64_t count = std::min(rows, last - row);
    // The last tile of several finds this block in cache, so it fetches the next one.
    bool next = row != first && row + rows >= last;
    const T* soon = w + (next ? BLOCK * p.k : PREFETCH / int64_t(sizeof(T)));
#if !defined(__AVX512BF16__)
    if constexpr (std::is_same_v<Dot, Widened>) {
      if (widen) {
        float* wide = scratch.get(BLOCK * p.k);
        row == first ? run_tile<Widening>(p, x, row, count, block, {w, wide}, soon)
                     : run_tile<Wide>(p, x, row, count, block, wide, soon);
        continue;
      }
    }
#endif
    run_tile<Dot>(p, x, row, count, block, w, soon);
  }
}

template <class Dot, class T>
void run(const Linear<T>& p) {
  using X = typename Dot::X;
  if (p.m == 0) return;
  int64_t rows = divide_up(p.m, divide_up(p.m, Dot::ROWS));  // of a tile: even, at most ROWS
  Scratch memory;
  X* x = reinterpret_cast<X*>(memory.get(p.m * p.k));
  pack_rows(p, rows, x);
  int64_t tile_bytes = rows * p.k * int64_t(sizeof(X));
  int64_t chunk = rows * std::max<int64_t>(1, X_BYTES / tile_bytes);
  int64_t blocks = divide_up(p.n, BLOCK);
  int64_t blocks_per_task = std::max<int64_t>(1, blocks / (8 * at::get_num_threads()));
  int64_t tasks_per_chunk = divide_up(blocks, blocks_per_task);
  for_each_item(divide_up(p.m, chunk) * tasks_per_chunk, [&](int64_t task) {
    int64_t first = task / tasks_per_chunk * chunk, last = std::min(p.m, first + chunk);
    int64_t begin = task % tasks_per_chunk * blocks_per_task;
    int64_t end = std::min(blocks, begin + blocks_per_task);
    for (int64_t block = begin; block < end; block++)
      run_block<Dot>(p, x, rows, first, last, block);
  });
}

}  // namespace

void packed_linear(const Linear<float>& p) { run<Interleaved>(p); }

void packed_linear(const Linear<bf16>& p) {
#if defined(__AVX512BF16__)
  run<DotProduct>(p);
#else
  run<Widened>(p);
#endif
}

template <class T>
void packed_embedding(const T* weight, const int64_t* ids, T* out, int64_t count, int64_t k) {
  at::parallel_for(0, count, 4, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      const T* from = weight + ids[i] / BLOCK * BLOCK * k + ids[i] % BLOCK * 2;
      for (int64_t j = 0; j < k; j += 2)
        std::memcpy(out + i * k + j, from + j * BLOCK, 2 * sizeof(T));
    }
  });
}

template void packed_embedding(const float*, const int64_t*, float*, int64_t, int64_t);
template void packed_embedding(const bf16*, const int64_t*, bf16*, int64_t, int64_t);

}  // namespace xllm
