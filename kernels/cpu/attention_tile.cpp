// Attention of several query tokens of one KV head.
//
// Scores have rows (query token x head of the group) along the lanes, so that keys are used as
// stored, one broadcast float at a time, and softmax needs no sum across lanes; the weighted sums
// have the head size along the lanes, so that values and results are used as stored too:
//   scores[keys, rows] = K[keys, D] Q^T[D, rows]
//   sums[rows, D] = decay[rows] sums[rows, D] + weights[keys, rows]^T V[keys, D]
// Keys and values are widened a piece at a time, small enough to stay in the first-level cache.
#include "attention.h"
#include "transpose.h"

namespace xllm {
namespace {

constexpr int MR = VECTOR_REGISTERS == 32 ? 8 : 4;  // rows of a product held in registers
constexpr int NV = 3;                               // vectors of a product held in registers
constexpr int64_t PANEL = NV * VL;                  // columns of V widened at a time

struct State {
  int64_t dim, width, depth;  // D; rows rounded up to whole vectors; so is D
  float *q, *sums;            // [D, width]; [width, depth]
  float *k, *v;               // [MR, D], [KEYS, PANEL]: pieces
  float* scores;              // [KEYS, width]
  float *maximum, *total;     // [width]
  float* decay;               // [width]: what the sums so far are multiplied by
  float* position;            // [width]: of each row's query; exact in a float up to 2^24
};

int64_t state_floats(int64_t dim, int64_t width) {
  return (dim + round_up(dim, VL)) * width + MR * dim + KEYS * (PANEL + width) + 4 * width;
}

State make_state(float* memory, int64_t dim, int64_t width) {
  State s{};
  s.dim = dim;
  s.width = width;
  s.depth = round_up(dim, VL);
  float** parts[] = {&s.q,     &s.sums,     &s.v, &s.scores, &s.maximum, &s.total,
                     &s.decay, &s.position, &s.k};
  int64_t sizes[] = {dim * width, width * s.depth, KEYS * PANEL, KEYS * width, width, width,
                     width,       width,           MR * dim};
  for (int i = 0; i < 9; i++) {
    *parts[i] = memory;
    memory += sizes[i];
  }
  std::fill(s.sums, s.sums + width * s.depth, 0.f);
  std::fill(s.v, s.v + KEYS * PANEL, 0.f);  // lanes beyond D: no garbage, which may be slow
  std::fill(s.maximum, s.maximum + width, NO_SCORE);
  std::fill(s.total, s.total + width, 0.f);
  return s;
}

// c[M, N vectors] = a b over `depth`, with a [M, depth] and the rows of each matrix a stride apart;
// SUM reads a as [depth, M] and adds to c times `decay` by row.
template <int M, int N, bool SUM>
void product(const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t depth,
             float* c, int64_t c_stride, const float* decay) {
  Vec sum[M][N];
  for (int m = 0; m < M; m++)
    for (int n = 0; n < N; n++)
      sum[m][n] = SUM ? splat(decay[m]) * load(c + m * c_stride + n * VL) : Vec{};
  for (int64_t i = 0; i < depth; i++) {
    Vec x[N];
    for (int n = 0; n < N; n++) x[n] = load(b + i * b_stride + n * VL);
    for (int m = 0; m < M; m++) {
      Vec y = splat(SUM ? a[i * a_stride + m] : a[m * a_stride + i]);
      for (int n = 0; n < N; n++) sum[m][n] = fma(y, x[n], sum[m][n]);
    }
  }
  for (int m = 0; m < M; m++)
    for (int n = 0; n < N; n++) store(c + m * c_stride + n * VL, sum[m][n]);
}

// Scores of the MR keys from `key` on.
template <int N>
void score_panel(const State& s, int64_t lane, int64_t key) {
  product<MR, N, false>(s.k, s.dim, s.q + lane, s.width, s.dim, s.scores + key * s.width + lane,
                        s.width, nullptr);
}

// Columns from `first` on of the weighted sum of `count` values.
template <int N>
void value_panel(const State& s, int64_t first, int64_t rows, int64_t count) {
  for (int64_t r = 0; r < rows; r += MR)
    product<MR, N, true>(s.scores + r, s.width, s.v, PANEL, count, s.sums + r * s.depth + first,
                         s.depth, s.decay + r);
}

// Rows of keys or values [begin, begin + count) in the cache.
template <class T>
struct Rows {
  const T* at[KEYS];

  Rows(const Attention<T>& p, const Item& item, int64_t value, int64_t begin, int64_t count) {
    for (int64_t i = 0; i < count; i++) at[i] = p.row(item.sequence, value, item.group, begin + i);
  }
};

// Pages lie anywhere: nothing but this fetches the first lines of the next.
template <class T>
void prefetch(const T* row, int64_t dim) {
  for (int64_t d = 0; d < dim; d += 64 / int64_t(sizeof(T))) __builtin_prefetch(row + d, 0, 2);
}

// Columns [first, first + dim) of a row, as floats.
template <class T>
void widen(const T* row, int64_t first, int64_t dim, float* to) {
  each(dim, [&](int64_t d, auto kind) { store(to + d, load_as(row + first + d, kind)); });
}

// Scores of `count` keys; fetches the values for the next step.
template <class T>
void score(const State& s, const Rows<T>& keys, const Rows<T>& values, int64_t count) {
  for (int64_t key = 0; key < count; key += MR) {
    int64_t some = std::min<int64_t>(MR, count - key);
    for (int64_t i = 0; i < some; i++) {
      widen(keys.at[key + i], 0, s.dim, s.k + i * s.dim);
      prefetch(values.at[key + i], s.dim);
    }
    std::fill(s.k + some * s.dim, s.k + MR * s.dim, 0.f);
    for (int64_t lane = 0; lane < s.width; lane += PANEL) {
      switch (std::min<int64_t>(NV, (s.width - lane) / VL)) {
        case 1: score_panel<1>(s, lane, key); break;
        case 2: score_panel<2>(s, lane, key); break;
        default: score_panel<3>(s, lane, key);
      }
    }
  }
}

// Weighted sum of `count` values; fetches the `next_count` keys of the next block.
template <class T>
void add_values(const State& s, const Rows<T>& values, int64_t rows, int64_t count,
                const Rows<T>& next, int64_t next_count) {
  int64_t fetched = 0;
  for (int64_t first = 0; first < s.depth; first += PANEL) {
    int64_t columns = std::min(PANEL, s.dim - first);
    for (int64_t i = 0; i < count; i++) widen(values.at[i], first, columns, s.v + i * PANEL);
    // The lanes beyond D add up in columns that nobody reads.
    int64_t until = next_count * std::min(s.depth, first + PANEL) / s.depth;
    for (; fetched < until; fetched++) prefetch(next.at[fetched], s.dim);
    switch (divide_up(columns, VL)) {
      case 1: value_panel<1>(s, first, rows, count); break;
      case 2: value_panel<2>(s, first, rows, count); break;
      default: value_panel<3>(s, first, rows, count);
    }
  }
}

struct Mask {
  bool needed;
  float first_key, window;
};

// Softmax of one vector of rows over `count` keys.
void soften(const State& s, int64_t lane, int64_t count, float softcap, Mask mask) {
  Vec position = load(s.position + lane), oldest = position - mask.window;
  Vec before = load(s.maximum + lane), top = before;
  float* scores = s.scores + lane;
  for (int64_t key = 0; key < count; key++) {
    Vec x = load(scores + key * s.width);
    if (softcap != 0) x = softcap * tanh(x / softcap);
    if (mask.needed) {
      Vec at = splat(mask.first_key + float(key));
      x = at > position ? splat(-INFINITY) : x;
      x = at > oldest ? x : splat(-INFINITY);
    }
    if (softcap != 0 || mask.needed) store(scores + key * s.width, x);
    top = max(top, x);
  }
  Vec total = {};
  for (int64_t key = 0; key < count; key++) {
    Vec weight = exp(load(scores + key * s.width) - top);
    store(scores + key * s.width, weight);
    total += weight;
  }
  Vec decay = exp(before - top);
  store(s.maximum + lane, top);
  store(s.total + lane, load(s.total + lane) * decay + total);
  store(s.decay + lane, decay);
}

// Q^T scaled, and the rows' positions; lanes beyond the rows repeat the last one.
template <class T>
void load_queries(const Attention<T>& p, const Item& item, const State& s) {
  int64_t ratio = p.ratio(), rows = item.tokens * ratio, start = p.first_position(item.sequence);
  for (int64_t lane = 0; lane < s.width; lane += VL) {
    const T* q[VL];
    for (int64_t i = 0; i < VL; i++) {
      int64_t r = std::min(lane + i, rows - 1), local = item.first + r / ratio;
      int64_t token = p.starts[item.sequence] + local;
      s.position[lane + i] = float(start + local);
      q[i] = p.q + (token * p.heads + item.group * ratio + r % ratio) * s.dim;
    }
    int64_t d = 0;
    for (; d + VL <= s.dim; d += VL) {
      Vec block[VL];
      for (int i = 0; i < VL; i++) block[i] = load(q[i] + d) * p.scale;
      transpose(block);
      for (int i = 0; i < VL; i++) store(s.q + (d + i) * s.width + lane, block[i]);
    }
    for (; d < s.dim; d++)
      for (int i = 0; i < VL; i++) s.q[d * s.width + lane + i] = to_float(q[i][d]) * p.scale;
  }
}

}  // namespace

template <class T>
void attend_tile(const Attention<T>& p, const Item& item, float* workspace) {
  thread_local Scratch scratch;
  int64_t rows = item.tokens * p.ratio(), dim = p.cache.dim, width = round_up(rows, VL);
  State s = make_state(scratch.get(state_floats(dim, width)), dim, width);
  load_queries(p, item, s);
  int64_t first = p.first_position(item.sequence) + item.first, last = first + item.tokens - 1;
  Rows<T> keys(p, item, 0, item.begin, std::min(KEYS, item.end - item.begin));
  for (int64_t key = item.begin; key < item.end; key += KEYS) {
    int64_t count = std::min(KEYS, item.end - key);
    int64_t next_count = std::min(KEYS, item.end - key - count);
    Rows<T> values(p, item, 1, key, count), next(p, item, 0, key + count, next_count);
    score(s, keys, values, count);
    bool masked = key + count - 1 > first || key <= last - p.window;
    Mask mask{masked, float(key), float(p.window)};
    for (int64_t lane = 0; lane < width; lane += VL) soften(s, lane, count, p.softcap, mask);
    add_values(s, values, rows, count, next, next_count);
    keys = next;
  }
  for (int64_t r = 0; r < rows; r++)
    finish(p, item, {s.sums + r * s.depth, s.maximum[r], s.total[r]}, r, workspace);
}

template void attend_tile(const Attention<float>&, const Item&, float*);
template void attend_tile(const Attention<bf16>&, const Item&, float*);

}  // namespace xllm
