// The absorbed form: queries times w_uk, attention in the space of latents, results times w_uv.
//
// The matrices are read once for all tokens of the call. A block of latents is read and widened
// once for up to GROUP rows (query token x head), to all of which it is both key and value. The
// context is split where that gives too few items, and partial results are merged (Dao et al.
// 2023, flash-decoding).
#include "latent_tile.h"

namespace xllm {
namespace {

constexpr int64_t GROUP = (128 + TILE - 1) / TILE * TILE;  // rows that share a widened block
constexpr int64_t MIN_SPLIT = 256;  // keys of a part at least: below, merging costs more
constexpr int64_t CHUNK = 64;       // tokens that meet one head's matrix at a time

// Rows [first, first + rows) of a sequence, whose first token is the `token`-th of the call,
// against keys [begin, end).
struct Item {
  int64_t sequence, token, first, rows, begin, end;
  int64_t partial;  // first row in the workspace of partial results; -1 for a whole result
};

// Items whose partial results make up the same rows; parts follow each other in the workspace.
struct Split {
  Item whole;
  int64_t parts;
};

template <class T>
struct Work {
  const Latent<T>& p;
  int64_t rank, depth;           // padded; of a query row: [padded rank, r]
  std::vector<int64_t> tokens;   // of the call, by their place in the batch
  std::vector<Item> items;
  std::vector<Split> splits;
  int64_t partial_rows = 0;
  float *queries, *results;      // [tokens, H, depth], [tokens, H, padded rank]
  float* partials;               // [partial_rows, padded rank + 2]: sums, maximum, total

  explicit Work(const Latent<T>& problem)
      : p(problem), rank(problem.padded_rank()), depth(rank + problem.rope) {}
  int64_t rows() const { return int64_t(tokens.size()) * p.heads; }
  int64_t partial_width() const { return rank + 2; }
};

template <class T>
void add_items(Work<T>& w, int64_t s) {
  int64_t count = w.p.new_tokens(s), rows = count * w.p.heads, token = w.tokens.size();
  int64_t size = round_up(divide_up(rows, divide_up(rows, GROUP)), VL);
  for (int64_t first = 0; first < rows; first += size) {
    int64_t some = std::min(size, rows - first);
    int64_t end = w.p.first_position(s) + (first + some - 1) / w.p.heads + 1;
    w.items.push_back({s, token, first, some, 0, end, -1});
  }
  for (int64_t i = 0; i < count; i++) w.tokens.push_back(w.p.starts[s] + i);
}

template <class T>
void split_item(Work<T>& w, const Item& whole, int64_t most_parts, std::vector<Item>& items) {
  int64_t parts = std::min(most_parts, whole.end / MIN_SPLIT);
  if (parts < 2) return items.push_back(whole);
  int64_t size = round_up(divide_up(whole.end, parts), LATENTS);
  Split split{whole, 0};
  split.whole.partial = w.partial_rows;
  for (int64_t begin = 0; begin < whole.end; begin += size, split.parts++) {
    Item part = whole;
    part.begin = begin;
    part.end = std::min(whole.end, begin + size);
    part.partial = w.partial_rows;
    w.partial_rows += whole.rows;
    items.push_back(part);
  }
  w.splits.push_back(split);
}

template <class T>
void split_items(Work<T>& w) {
  int64_t wanted = 2 * at::get_num_threads(), count = int64_t(w.items.size());
  if (count < wanted) {
    std::vector<Item> items;
    for (const Item& item : w.items) split_item(w, item, divide_up(2 * wanted, count), items);
    w.items = std::move(items);
  }
  // The largest first: a long one taken last would leave the other threads idle.
  std::stable_sort(w.items.begin(), w.items.end(), [](const Item& a, const Item& b) {
    return a.rows * (a.end - a.begin) > b.rows * (b.end - b.begin);
  });
}

// Run work(head, first token, tokens): one head's matrix meets a chunk of the tokens.
template <class T, class Run>
void by_head(const Work<T>& w, const Run& run) {
  int64_t count = w.tokens.size(), chunks = divide_up(count, CHUNK);
  for_each_item(w.p.heads * chunks, [&](int64_t i) {
    int64_t first = i % chunks * CHUNK;
    run(i / chunks, first, std::min(CHUNK, count - first));
  });
}

// queries = scale [q_nope w_uk, q_rope].
template <class T>
void absorb_queries(const Work<T>& w) {
  const Latent<T>& p = w.p;
  by_head(w, [&](int64_t head, int64_t first, int64_t count) {
    thread_local Scratch scratch;
    float* q = scratch.get(count * p.nope);
    float* to = w.queries + (first * p.heads + head) * w.depth;
    int64_t stride = p.heads * w.depth;
    for (int64_t i = 0; i < count; i++) {
      int64_t token = w.tokens[first + i];
      const T *nope = p.q_nope.at(token, head), *rope = p.q_rope.at(token, head);
      for (int64_t d = 0; d < p.nope; d++) q[i * p.nope + d] = to_float(nope[d]) * p.scale;
      for (int64_t d = 0; d < p.rope; d++)
        to[i * stride + w.rank + d] = to_float(rope[d]) * p.scale;
    }
    Padded<T> uk(p.uk + head * p.nope * p.rank, p.nope, p.rank);
    multiply_few(Product<T>{q, p.nope, uk.data, uk.stride, p.nope, to, stride, nullptr}, count,
                 w.rank);
  });
}

// out = results w_uv, rounded.
template <class T>
void project_results(const Work<T>& w) {
  const Latent<T>& p = w.p;
  by_head(w, [&](int64_t head, int64_t first, int64_t count) {
    thread_local Scratch scratch;
    Padded<T> uv(p.uv + head * p.rank * p.value, p.rank, p.value);
    float* values = scratch.get(count * uv.stride);
    const float* from = w.results + (first * p.heads + head) * w.rank;
    multiply_few(Product<T>{from, p.heads * w.rank, uv.data, uv.stride, p.rank, values, uv.stride,
                            nullptr},
                 count, uv.stride);
    for (int64_t i = 0; i < count; i++) {
      T* to = p.out + (w.tokens[first + i] * p.heads + head) * p.value;
      const float* row = values + i * uv.stride;
      each(p.value, [&](int64_t d, auto kind) { store(to + d, load_as(row + d, kind)); });
    }
  });
}

// Rows [first, first + count) of an item, transposed; lanes behind them repeat the last.
template <class T>
void load_tile(const Work<T>& w, const Item& item, int64_t first, int64_t count, const Tile& t) {
  int64_t start = w.p.first_position(item.sequence);
  const float* from = w.queries + (item.token * w.p.heads + item.first + first) * w.depth;
  for (int64_t lane = 0; lane < t.width; lane += VL) {
    const float* rows[VL];
    for (int64_t i = 0; i < VL; i++) {
      int64_t r = std::min(lane + i, count - 1);
      rows[i] = from + r * w.depth;
      t.position[lane + i] = float(start + (item.first + first + r) / w.p.heads);
    }
    int64_t d = 0;
    for (; d + VL <= w.depth; d += VL) {
      Vec block[VL];
      for (int i = 0; i < VL; i++) block[i] = load(rows[i] + d);
      transpose(block);
      for (int i = 0; i < VL; i++) store(t.q + (d + i) * t.width + lane, block[i]);
    }
    for (; d < w.depth; d++)
      for (int i = 0; i < VL; i++) t.q[d * t.width + lane + i] = rows[i][d];
  }
}

// Row r of a tile that starts at row `first` of the item.
template <class T>
void finish(const Work<T>& w, const Item& item, int64_t first, const Tile& t, int64_t r) {
  const float* sums = t.sums + r * t.columns;
  if (item.partial >= 0) {
    float* to = w.partials + (item.partial + first + r) * w.partial_width();
    std::memcpy(to, sums, w.rank * sizeof(float));
    to[w.rank] = t.maximum[r];
    to[w.rank + 1] = t.total[r];
    return;
  }
  float* to = w.results + (item.token * w.p.heads + item.first + first + r) * w.rank;
  float inverse = 1 / t.total[r];
  for (int64_t d = 0; d < w.rank; d += VL) store(to + d, load(sums + d) * inverse);
}

template <class T>
void attend(const Work<T>& w, const Item& item) {
  thread_local Scratch scratch;
  int64_t stride = w.rank + round_up(w.p.rope, VL), tiles = divide_up(item.rows, TILE);
  int64_t floats = Tile::floats(TILE, w.depth, w.rank);
  float* memory = scratch.get(tiles * floats + LATENTS * (stride + TILE));
  float *block = memory + tiles * floats, *scores = block + LATENTS * stride;
  std::vector<Tile> all;
  for (int64_t first = 0; first < item.rows; first += TILE, memory += floats) {
    int64_t count = std::min(TILE, item.rows - first);
    all.push_back(make_tile(memory, round_up(count, VL), w.depth, w.rank));
    load_tile(w, item, first, count, all.back());
  }
  for (int64_t key = item.begin; key < item.end; key += LATENTS) {
    int64_t count = std::min(LATENTS, item.end - key);
    widen_latents(w.p, item.sequence, key, count, block, stride);
    for (const Tile& t : all)
      attend_block<false>(t, block, stride, block, stride, key, count, scores);
  }
  for (int64_t r = 0; r < item.rows; r++) finish(w, item, r / TILE * TILE, all[r / TILE], r % TILE);
}

// Row r of a split item from its parts.
template <class T>
void merge(const Work<T>& w, const Split& split, int64_t r) {
  int64_t width = w.partial_width(), step = split.whole.rows * width;
  const float* first = w.partials + (split.whole.partial + r) * width;
  float* to = w.results + (split.whole.token * w.p.heads + split.whole.first + r) * w.rank;
  float maximum = NO_SCORE, total = 0;
  for (int64_t i = 0; i < split.parts; i++) maximum = std::max(maximum, first[i * step + w.rank]);
  std::fill(to, to + w.rank, 0.f);
  for (int64_t i = 0; i < split.parts; i++) {
    const float* part = first + i * step;
    float weight = std::exp(part[w.rank] - maximum);
    total += weight * part[w.rank + 1];
    for (int64_t d = 0; d < w.rank; d += VL)
      store(to + d, fma(splat(weight), load(part + d), load(to + d)));
  }
  for (int64_t d = 0; d < w.rank; d += VL) store(to + d, load(to + d) / total);
}

}  // namespace

template <class T>
void attend_absorbed(const Latent<T>& p, const std::vector<int64_t>& sequences) {
  Work<T> w(p);
  for (int64_t s : sequences) add_items(w, s);
  split_items(w);
  thread_local Scratch scratch;
  w.queries = scratch.get(w.rows() * (w.depth + w.rank) + w.partial_rows * w.partial_width());
  w.results = w.queries + w.rows() * w.depth;
  w.partials = w.results + w.rows() * w.rank;
  absorb_queries(w);
  for_each_item(int64_t(w.items.size()), [&](int64_t i) { attend(w, w.items[i]); });
  for (const Split& split : w.splits)
    at::parallel_for(0, split.whole.rows, 8, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; r++) merge(w, split, r);
    });
  project_results(w);
}

template void attend_absorbed(const Latent<float>&, const std::vector<int64_t>&);
template void attend_absorbed(const Latent<bf16>&, const std::vector<int64_t>&);

}  // namespace xllm
