// Attention of several query tokens of one KV head.
//
// Rows (query token x head of the group) lie along the lanes, so that keys and values are used as
// stored, one broadcast float at a time, and softmax needs no sum across lanes:
//   scores[keys, rows] = K[keys, D] Q^T[D, rows]
//   sums[D, rows] += V^T[D, keys] weights[keys, rows]
#include "attention.h"

namespace xllm {
namespace {

constexpr int MR = VECTOR_REGISTERS == 32 ? 8 : 4;  // rows of a product held in registers
constexpr int NV = 3;                               // vectors of a product held in registers

struct State {
  int64_t dim, width;       // D; rows rounded up to whole vectors
  float *q, *sums;          // [D, width]
  float *k, *v;             // [KEYS, D]
  float* scores;            // [KEYS, width]
  float *maximum, *total;   // [width]
  float* position;          // [width]: of each row's query; exact in a float up to 2^24
};

int64_t state_floats(int64_t dim, int64_t width) {
  return 2 * dim * width + 2 * KEYS * dim + KEYS * width + 3 * width;
}

State make_state(float* memory, int64_t dim, int64_t width) {
  State s{};
  s.dim = dim;
  s.width = width;
  float** parts[] = {&s.q, &s.sums, &s.scores, &s.maximum, &s.total, &s.position, &s.k, &s.v};
  int64_t sizes[] = {dim * width, dim * width, KEYS * width, width, width, width,
                     KEYS * dim,  KEYS * dim};
  for (int i = 0; i < 8; i++) {
    *parts[i] = memory;
    memory += sizes[i];
  }
  std::fill(s.q, s.q + 2 * dim * width, 0.f);  // q and sums
  std::fill(s.maximum, s.maximum + width, NO_SCORE);
  std::fill(s.total, s.total + width, 0.f);
  return s;
}

// c[M, N vectors] = a b over `depth`, a [M, depth] with rows `stride` apart; TRANSPOSED reads a as
// [depth, M] and adds to c.
template <int M, int N, bool TRANSPOSED>
void product(const float* a, int64_t stride, const float* b, int64_t depth, float* c,
             int64_t width) {
  Vec sum[M][N];
  for (int m = 0; m < M; m++)
    for (int n = 0; n < N; n++) sum[m][n] = TRANSPOSED ? load(c + m * width + n * VL) : Vec{};
  for (int64_t i = 0; i < depth; i++) {
    Vec x[N];
    for (int n = 0; n < N; n++) x[n] = load(b + i * width + n * VL);
    for (int m = 0; m < M; m++) {
      Vec y = splat(TRANSPOSED ? a[i * stride + m] : a[m * stride + i]);
      for (int n = 0; n < N; n++) sum[m][n] = fma(y, x[n], sum[m][n]);
    }
  }
  for (int m = 0; m < M; m++)
    for (int n = 0; n < N; n++) store(c + m * width + n * VL, sum[m][n]);
}

// One panel of N vectors: scores of `count` keys, or the weighted sum of as many values.
template <int N>
void score_panel(const State& s, int64_t lane, int64_t count) {
  for (int64_t key = 0; key < count; key += MR)
    product<MR, N, false>(s.k + key * s.dim, s.dim, s.q + lane, s.dim,
                          s.scores + key * s.width + lane, s.width);
}

template <int N>
void value_panel(const State& s, int64_t lane, int64_t count) {
  for (int64_t d = 0; d < s.dim; d += MR)
    product<MR, N, true>(s.v + d, s.dim, s.scores + lane, count, s.sums + d * s.width + lane,
                         s.width);
}

void multiply(const State& s, int64_t count, bool values) {
  for (int64_t lane = 0; lane < s.width; lane += NV * VL) {
    switch (std::min<int64_t>(NV, (s.width - lane) / VL)) {
      case 1: values ? value_panel<1>(s, lane, count) : score_panel<1>(s, lane, count); break;
      case 2: values ? value_panel<2>(s, lane, count) : score_panel<2>(s, lane, count); break;
      default: values ? value_panel<3>(s, lane, count) : score_panel<3>(s, lane, count);
    }
  }
}

// Keys and values at [begin, begin + count) as floats; keys beyond, up to MR, as zeros.
template <class T>
void widen(const Attention<T>& p, const Item& item, const State& s, int64_t begin, int64_t count) {
  for (int64_t value = 0; value < 2; value++) {
    float* to = value ? s.v : s.k;
    for (int64_t i = 0; i < count; i++, to += s.dim) {
      const T* from = p.row(item.sequence, value, item.group, begin + i);
      each(s.dim, [&](int64_t d, auto kind) { store(to + d, load_as(from + d, kind)); });
    }
  }
  std::fill(s.k + count * s.dim, s.k + round_up(count, MR) * s.dim, 0.f);
}

struct Mask {
  bool needed;
  float first_key, window;
};

// Softmax of one vector of rows over `count` keys; returns what the sums so far are multiplied by.
Vec soften(const State& s, int64_t lane, int64_t count, float softcap, Mask mask) {
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
  return decay;
}

void rescale(const State& s, int64_t lane, Vec decay) {
  for (int64_t d = 0; d < s.dim; d++)
    store(s.sums + d * s.width + lane, load(s.sums + d * s.width + lane) * decay);
}

// Q^T scaled, and the rows' positions; lanes beyond the rows stay zero and attend as position 0.
template <class T>
void load_queries(const Attention<T>& p, const Item& item, const State& s) {
  int64_t ratio = p.ratio(), rows = item.tokens * ratio, start = p.first_position(item.sequence);
  for (int64_t r = 0; r < s.width; r++) {
    int64_t local = item.first + std::min(r, rows - 1) / ratio;
    s.position[r] = float(start + local);
    if (r >= rows) continue;
    int64_t token = p.starts[item.sequence] + local;
    const T* q = p.q + (token * p.heads + item.group * ratio + r % ratio) * s.dim;
    for (int64_t d = 0; d < s.dim; d++) s.q[d * s.width + r] = to_float(q[d]) * p.scale;
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
  for (int64_t key = item.begin; key < item.end; key += KEYS) {
    int64_t count = std::min(KEYS, item.end - key);
    widen(p, item, s, key, count);
    multiply(s, count, false);
    bool masked = key + count - 1 > first || key <= last - p.window;
    Mask mask{masked, float(key), float(p.window)};
    for (int64_t lane = 0; lane < width; lane += VL)
      rescale(s, lane, soften(s, lane, count, p.softcap, mask));
    multiply(s, count, true);
  }
  float sums[MAX_DIM];
  for (int64_t r = 0; r < rows; r++) {
    for (int64_t d = 0; d < dim; d++) sums[d] = s.sums[d * width + r];
    finish(p, item, {sums, s.maximum[r], s.total[r]}, r, workspace);
  }
}

template void attend_tile(const Attention<float>&, const Item&, float*);
template void attend_tile(const Attention<bf16>&, const Item&, float*);

}  // namespace xllm
