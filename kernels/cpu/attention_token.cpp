// Attention of one query token: every key and value is read once for the query heads that share
// it. Lanes run along D; scores of up to HEADS heads and 4 keys are in registers at a time.
#include "attention.h"

namespace xllm {
namespace {

constexpr int STEP = 4;     // keys in registers at a time
constexpr int VECTORS = 4;  // vectors of a value row in registers at a time

// R query rows of one KV head; `width` is D rounded up to whole vectors.
struct State {
  int64_t rows, width;
  float *q, *sums;          // [R, width]
  float* scores;            // [R, KEYS]
  float *maximum, *total;   // [R]
  float* decay;             // [R]: what the sums so far are multiplied by
  float* wide;              // [KEYS, width]: rows widened where D is not whole vectors
};

State make_state(float* memory, int64_t rows, int64_t width) {
  State s{};
  s.rows = rows;
  s.width = width;
  float** parts[] = {&s.q, &s.sums, &s.scores, &s.maximum, &s.total, &s.decay, &s.wide};
  int64_t sizes[] = {rows * width, rows * width, rows * KEYS, rows, rows, rows, KEYS * width};
  for (int i = 0; i < 7; i++) {
    *parts[i] = memory;
    memory += round_up(sizes[i], VL);
  }
  std::fill(s.sums, s.sums + rows * width, 0.f);
  std::fill(s.maximum, s.maximum + rows, NO_SCORE);
  std::fill(s.total, s.total + rows, 0.f);
  return s;
}

// out[i] = sum of x[i]'s lanes.
inline void sum4(const Vec* x, float* out) {
#if defined(__AVX512F__)
  auto interleave_add = [](__m512 a, __m512 b) {
    return _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  };
  __m512d ab = _mm512_castps_pd(interleave_add(x[0], x[1]));
  __m512d cd = _mm512_castps_pd(interleave_add(x[2], x[3]));
  __m512 all = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd)),
                             _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd)));
  __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
#else
  for (int i = 0; i < 4; i++) out[i] = sum(x[i]);
#endif
}

// scores[h][key] = q[h] . keys[key], `count` keys rounded up to STEP.
template <int HEADS, class R>
void score(const State& s, int64_t head, const R* const* keys, int64_t count) {
  const float* q = s.q + head * s.width;
  for (int64_t key = 0; key < count; key += STEP) {
    Vec dot[HEADS][STEP] = {};
    for (int64_t d = 0; d < s.width; d += VL) {
      Vec k[STEP];
      for (int i = 0; i < STEP; i++) k[i] = load(keys[key + i] + d);
      for (int h = 0; h < HEADS; h++) {
        Vec x = load(q + h * s.width + d);
        for (int i = 0; i < STEP; i++) dot[h][i] = fma(x, k[i], dot[h][i]);
      }
    }
    for (int h = 0; h < HEADS; h++) sum4(dot[h], s.scores + (head + h) * KEYS + key);
  }
}

// sums[h] = sums[h] * decay[h] + sum over keys of weight[h][key] values[key], N vectors from d.
template <int HEADS, int N, class R>
void add_columns(const State& s, int64_t head, const R* const* values, int64_t count, int64_t d) {
  Vec sum[HEADS][N];
  for (int h = 0; h < HEADS; h++)
    for (int n = 0; n < N; n++)
      sum[h][n] = load(s.sums + (head + h) * s.width + d + n * VL) * s.decay[head + h];
  for (int64_t key = 0; key < count; key++) {
    Vec v[N];
    for (int n = 0; n < N; n++) v[n] = load(values[key] + d + n * VL);
    for (int h = 0; h < HEADS; h++) {
      Vec weight = splat(s.scores[(head + h) * KEYS + key]);
      for (int n = 0; n < N; n++) sum[h][n] = fma(weight, v[n], sum[h][n]);
    }
  }
  for (int h = 0; h < HEADS; h++)
    for (int n = 0; n < N; n++) store(s.sums + (head + h) * s.width + d + n * VL, sum[h][n]);
}

template <int HEADS, class R>
void add_values(const State& s, int64_t head, const R* const* values, int64_t count) {
  int64_t d = 0;
  for (; d + VECTORS * VL <= s.width; d += VECTORS * VL)
    add_columns<HEADS, VECTORS>(s, head, values, count, d);
  for (; d < s.width; d += VL) add_columns<HEADS, 1>(s, head, values, count, d);
}

// Scores of one row to weights exp(score - maximum); keys from `count` on weigh nothing.
void soften(const State& s, int64_t row, int64_t count, float softcap) {
  float* scores = s.scores + row * KEYS;
  std::fill(scores + count, scores + KEYS, -INFINITY);
  Vec top = splat(s.maximum[row]);
  for (int64_t i = 0; i < KEYS; i += VL) {
    Vec x = load(scores + i);
    if (softcap != 0) {
      x = softcap * tanh(x / softcap);
      for (int64_t lane = std::max<int64_t>(0, count - i); lane < VL; lane++) x[lane] = -INFINITY;
      store(scores + i, x);
    }
    top = max(top, x);
  }
  float maximum = largest(top);
  Vec total = {};
  for (int64_t i = 0; i < KEYS; i += VL) {
    Vec weight = exp(load(scores + i) - maximum);
    store(scores + i, weight);
    total += weight;
  }
  s.decay[row] = std::exp(s.maximum[row] - maximum);
  s.total[row] = s.total[row] * s.decay[row] + sum(total);
  s.maximum[row] = maximum;
}

template <class R>
void each_head(const State& s, const R* const* rows, int64_t count, bool values) {
  for (int64_t h = 0; h < s.rows; h += 4) {
    switch (s.rows - h) {
      case 1: values ? add_values<1>(s, h, rows, count) : score<1>(s, h, rows, count); break;
      case 2: values ? add_values<2>(s, h, rows, count) : score<2>(s, h, rows, count); break;
      case 3: values ? add_values<3>(s, h, rows, count) : score<3>(s, h, rows, count); break;
      default: values ? add_values<4>(s, h, rows, count) : score<4>(s, h, rows, count);
    }
  }
}

// Keys (value = 0) or values (1) at [begin, begin + count) of the item's sequence.
template <class T>
void visit(const Attention<T>& p, const Item& item, const State& s, int64_t value, int64_t begin,
           int64_t count) {
  const T* rows[KEYS];
  for (int64_t i = 0; i < count; i++)
    rows[i] = p.row(item.sequence, value, item.group, begin + i);
  for (int64_t i = count; i % STEP; i++) rows[i] = rows[count - 1];
  if (s.width == p.cache.dim) return each_head(s, rows, count, value);
  const float* wide[KEYS];
  for (int64_t i = 0; i < round_up(count, STEP); i++) {
    float* to = s.wide + i * s.width;
    for (int64_t d = 0; d < s.width; d++) to[d] = d < p.cache.dim ? to_float(rows[i][d]) : 0.f;
    wide[i] = to;
  }
  each_head(s, wide, count, value);
}

}  // namespace

template <class T>
void attend_token(const Attention<T>& p, const Item& item, float* workspace) {
  thread_local Scratch scratch;
  int64_t rows = p.ratio(), dim = p.cache.dim, width = round_up(dim, VL);
  int64_t floats = rows * (2 * width + KEYS + 3) + KEYS * width + 7 * VL;
  State s = make_state(scratch.get(floats), rows, width);
  int64_t token = p.starts[item.sequence] + item.first;
  for (int64_t r = 0; r < rows; r++) {
    const T* q = p.q + (token * p.heads + item.group * rows + r) * dim;
    for (int64_t d = 0; d < width; d++)
      s.q[r * width + d] = d < dim ? to_float(q[d]) * p.scale : 0.f;
  }
  for (int64_t key = item.begin; key < item.end; key += KEYS) {
    int64_t count = std::min(KEYS, item.end - key);
    visit(p, item, s, 0, key, count);
    for (int64_t r = 0; r < rows; r++) soften(s, r, count, p.softcap);
    visit(p, item, s, 1, key, count);
  }
  for (int64_t r = 0; r < rows; r++)
    finish(p, item, {s.sums + r * width, s.maximum[r], s.total[r]}, r, workspace);
}

template void attend_token(const Attention<float>&, const Item&, float*);
template void attend_token(const Attention<bf16>&, const Item&, float*);

}  // namespace xllm
