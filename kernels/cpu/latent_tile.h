// What both forms of latent attention are made of: products of float matrices, and attention of a
// tile of query rows, which lie along the lanes (see attention_tile.cpp), to a block of keys.
#pragma once

#include <algorithm>

#include "latent.h"
#include "transpose.h"

namespace xllm {
namespace {

constexpr int MR = VECTOR_REGISTERS == 32 ? 8 : 4;  // rows of a product held in registers
constexpr int NV = 3;                               // vectors of a product held in registers
constexpr int64_t TILE = NV * VL;                   // query rows of a tile
constexpr int64_t LATENTS = 96;                     // latents of a block: whole vectors and MR
constexpr float NO_SCORE = -1e30f;  // running maximum before any key: finite, so no NaN arises

// c = a b; with `decay`, c = decay c + a b by row. b may be stored in T, the others are floats.
template <class B>
struct Product {
  const float* a;
  int64_t a_stride;
  const B* b;
  int64_t b_stride, depth;
  float* c;
  int64_t c_stride;
  const float* decay;
};

// M rows from `row` and N vectors from `column` of c. a is [rows, depth], or [depth, rows] if DEEP.
template <int M, int N, bool DEEP, class B>
inline void multiply_tile(const Product<B>& p, int64_t row, int64_t column) {
  const float* a = p.a + (DEEP ? row : row * p.a_stride);
  const B* b = p.b + column;
  float* c = p.c + row * p.c_stride + column;
  Vec sum[M][N] = {};
  if (p.decay)
    for (int m = 0; m < M; m++)
      for (int n = 0; n < N; n++)
        sum[m][n] = splat(p.decay[row + m]) * load(c + m * p.c_stride + n * VL);
  for (int64_t i = 0; i < p.depth; i++) {
    Vec x[N];
    for (int n = 0; n < N; n++) x[n] = load(b + i * p.b_stride + n * VL);
    for (int m = 0; m < M; m++) {
      Vec y = splat(DEEP ? a[i * p.a_stride + m] : a[m * p.a_stride + i]);
      for (int n = 0; n < N; n++) sum[m][n] = fma(y, x[n], sum[m][n]);
    }
  }
  for (int m = 0; m < M; m++)
    for (int n = 0; n < N; n++) store(c + m * p.c_stride + n * VL, sum[m][n]);
}

template <int M, int N, bool DEEP, class B>
void multiply_panel(const Product<B>& p, int64_t rows, int64_t column) {
  int64_t row = 0;
  for (; row + M <= rows; row += M) multiply_tile<M, N, DEEP>(p, row, column);
  for (; row < rows; row++) multiply_tile<1, N, DEEP>(p, row, column);
}

// `columns` is a multiple of VL.
template <int M, int N, bool DEEP, class B>
void multiply_by(const Product<B>& p, int64_t rows, int64_t columns) {
  int64_t column = 0;
  for (; column + N * VL <= columns; column += N * VL) multiply_panel<M, N, DEEP>(p, rows, column);
  for (; column < columns; column += VL) multiply_panel<M, 1, DEEP>(p, rows, column);
}

template <bool DEEP, class B>
void multiply(const Product<B>& p, int64_t rows, int64_t columns) {
  if (columns % (NV * VL) == 2 * VL) {
    multiply_by<MR, NV, DEEP>(p, rows, columns - 2 * VL);
    return multiply_panel<MR, 2, DEEP>(p, rows, columns - 2 * VL);
  }
  multiply_by<MR, NV, DEEP>(p, rows, columns);
}

// Few rows: bound by reading b, so the more of its columns at a time the better.
template <class B>
void multiply_few(const Product<B>& p, int64_t rows, int64_t columns) {
  constexpr int WIDE = VECTOR_REGISTERS / 4;
  if (rows >= MR) return multiply<false>(p, rows, columns);
  if (rows >= 4) return multiply_by<4, WIDE / 2, false>(p, rows, columns);
  if (rows >= 2) return multiply_by<2, WIDE, false>(p, rows, columns);
  multiply_by<1, WIDE, false>(p, rows, columns);
}

// `count` values as floats; zeros up to `width`.
template <class T>
void widen(const T* from, int64_t count, int64_t width, float* to) {
  each(count, [&](int64_t i, auto kind) { store(to + i, load_as(from + i, kind)); });
  std::fill(to + count, to + width, 0.f);
}

// to[c][r] = from[r][c] of whole vectors of rows and columns.
inline void transpose_matrix(const float* from, int64_t from_stride, int64_t rows, int64_t columns,
                             float* to, int64_t to_stride) {
  for (int64_t r = 0; r < rows; r += VL)
    for (int64_t c = 0; c < columns; c += VL) {
      Vec block[VL];
      for (int i = 0; i < VL; i++) block[i] = load(from + (r + i) * from_stride + c);
      transpose(block);
      for (int i = 0; i < VL; i++) store(to + (c + i) * to_stride + r, block[i]);
    }
}

// Latents [begin, begin + count) of a sequence as floats [round_up(count, VL), stride]: the latent,
// padded to whole vectors, then the rotated key, padded too; zero rows behind the last.
template <class T>
void widen_latents(const Latent<T>& p, int64_t s, int64_t begin, int64_t count, float* to,
                   int64_t stride) {
  int64_t rank = p.padded_rank();
  for (int64_t i = 0; i < count; i++) {
    const T* row = p.row(s, begin + i);
    widen(row, p.rank, rank, to + i * stride);
    widen(row + p.rank, p.rope, stride - rank, to + i * stride + rank);
  }
  std::fill(to + count * stride, to + round_up(count, VL) * stride, 0.f);
}

// Query rows along the lanes, `width` of them (whole vectors), and what they have seen so far.
struct Tile {
  int64_t width, depth, columns;  // columns: of a value, whole vectors
  float *q, *sums;                // [depth, width], [width, columns]
  float *maximum, *total, *decay, *position;  // [width]

  static int64_t floats(int64_t width, int64_t depth, int64_t columns) {
    return width * (round_up(depth, VL) + columns + 4);
  }
};

inline Tile make_tile(float* memory, int64_t width, int64_t depth, int64_t columns) {
  Tile t{width, depth, columns};
  t.q = memory;
  t.sums = t.q + round_up(depth, VL) * width;
  t.maximum = t.sums + width * columns;
  t.total = t.maximum + width;
  t.decay = t.total + width;
  t.position = t.decay + width;
  std::fill(t.sums, t.sums + width * columns, 0.f);
  std::fill(t.maximum, t.maximum + width, NO_SCORE);
  std::fill(t.total, t.total + width, 0.f);
  return t;
}

// Softmax of one vector of rows over `count` keys; only those up to a row's position count.
inline void soften(const Tile& t, float* scores, int64_t lane, int64_t count, bool masked,
                   int64_t first_key) {
  Vec position = load(t.position + lane), before = load(t.maximum + lane), top = before;
  for (int64_t key = 0; key < count; key++) {
    float* at = scores + key * t.width + lane;
    Vec x = load(at);
    if (masked) {
      x = splat(float(first_key + key)) > position ? splat(-INFINITY) : x;
      store(at, x);
    }
    top = max(top, x);
  }
  Vec total = {};
  for (int64_t key = 0; key < count; key++) {
    float* at = scores + key * t.width + lane;
    Vec weight = exp(load(at) - top);
    store(at, weight);
    total += weight;
  }
  Vec decay = exp(before - top);
  store(t.maximum + lane, top);
  store(t.total + lane, load(t.total + lane) * decay + total);
  store(t.decay + lane, decay);
}

// Add `count` keys and values, the first at position `first_key`. Keys are [count, depth], or
// [depth, count] if DEEP; `scores` has room for [LATENTS, width].
template <bool DEEP>
void attend_block(const Tile& t, const float* keys, int64_t key_stride, const float* values,
                  int64_t value_stride, int64_t first_key, int64_t count, float* scores) {
  multiply<DEEP>(Product<float>{keys, key_stride, t.q, t.width, t.depth, scores, t.width, nullptr},
                 round_up(count, MR), t.width);
  bool masked = float(first_key + count - 1) > t.position[0];
  for (int64_t lane = 0; lane < t.width; lane += VL)
    soften(t, scores, lane, count, masked, first_key);
  multiply<true>(Product<float>{scores, t.width, values, value_stride, count, t.sums, t.columns,
                                t.decay},
                 t.width, t.columns);
}

// One head's matrix [rows, columns] with whole vectors of columns: as it is, or a padded copy.
template <class T>
class Padded {
 public:
  Padded(const T* matrix, int64_t rows, int64_t columns) : data(matrix), stride(columns) {
    if (columns % VL == 0) return;
    stride = round_up(columns, VL);
    copy_.resize(rows * stride);
    for (int64_t i = 0; i < rows; i++)
      std::memcpy(&copy_[i * stride], matrix + i * columns, columns * sizeof(T));
    data = copy_.data();
  }

  const T* data;
  int64_t stride;

 private:
  std::vector<T> copy_;
};

}  // namespace
}  // namespace xllm
