// Plan of paged attention: items of work by sequence, KV head and query tile; the context is split
// where that gives too few items, and partial results are merged (Dao et al. 2023, flash-decoding).
#include "attention.h"

#include <vector>

namespace xllm {
namespace {

constexpr int64_t MIN_SPLIT = 256;  // keys of a part at least: below, merging costs more

// Items whose partial results make up the same rows; parts follow each other in the workspace.
struct Split {
  Item whole;
  int64_t parts;
};

struct Plan {
  std::vector<Item> items;
  std::vector<Split> splits;
  int64_t partial_rows = 0;
};

template <class T>
std::vector<Item> whole_items(const Attention<T>& p) {
  std::vector<Item> items;
  int64_t most = tile_tokens(p.ratio());
  for (int64_t s = 0; s < p.sequences; s++) {
    int64_t count = p.new_tokens(s), start = p.first_position(s);
    for (int64_t first = 0; first < count; first += most) {
      int64_t tokens = std::min(most, count - first), end = start + first + tokens;
      int64_t begin = p.window > start + first ? 0 : start + first + 1 - p.window;
      for (int64_t g = 0; g < p.cache.groups; g++)
        items.push_back({s, g, first, tokens, begin, end, -1});
    }
  }
  return items;
}

void split_item(Plan& plan, const Item& whole, int64_t rows, int64_t most_parts) {
  int64_t keys = whole.end - whole.begin;
  int64_t parts = std::min(most_parts, keys / MIN_SPLIT);
  if (parts < 2) {
    plan.items.push_back(whole);
    return;
  }
  int64_t size = round_up(divide_up(keys, parts), KEYS);
  Split split{whole, 0};
  split.whole.partial = plan.partial_rows;
  for (int64_t begin = whole.begin; begin < whole.end; begin += size) {
    Item part = whole;
    part.begin = begin;
    part.end = std::min(whole.end, begin + size);
    part.partial = plan.partial_rows;
    plan.partial_rows += rows;
    plan.items.push_back(part);
    split.parts++;
  }
  plan.splits.push_back(split);
}

template <class T>
Plan make_plan(const Attention<T>& p) {
  std::vector<Item> whole = whole_items(p);
  int64_t wanted = 2 * at::get_num_threads(), count = int64_t(whole.size());
  Plan plan;
  if (count >= wanted) {
    plan.items = std::move(whole);
  } else {
    int64_t parts = divide_up(2 * wanted, std::max<int64_t>(count, 1));
    for (const Item& item : whole) split_item(plan, item, item.tokens * p.ratio(), parts);
  }
  // The largest first: a long one taken last would leave the other threads idle.
  std::stable_sort(plan.items.begin(), plan.items.end(),
                   [](const Item& a, const Item& b) { return a.cost() > b.cost(); });
  return plan;
}

template <class T>
void merge(const Attention<T>& p, const Split& split, const float* workspace) {
  int64_t dim = p.cache.dim, rows = split.whole.tokens * p.ratio();
  std::vector<float> sums(dim);
  Item whole = split.whole;
  whole.partial = -1;
  for (int64_t r = 0; r < rows; r++) {
    const float* first = workspace + (split.whole.partial + r) * partial_width(dim);
    int64_t step = rows * partial_width(dim);
    float maximum = NO_SCORE, total = 0;
    for (int64_t i = 0; i < split.parts; i++) maximum = std::max(maximum, first[i * step + dim]);
    std::fill(sums.begin(), sums.end(), 0.f);
    for (int64_t i = 0; i < split.parts; i++) {
      const float* part = first + i * step;
      float weight = std::exp(part[dim] - maximum);
      total += weight * part[dim + 1];
      for (int64_t d = 0; d < dim; d++) sums[d] += weight * part[d];
    }
    finish(p, whole, {sums.data(), maximum, total}, r, nullptr);
  }
}

// Rows of q that belong to no sequence: the sequences' rows are one range.
template <class T>
void clear_outside(const Attention<T>& p) {
  int64_t row = p.heads * p.cache.dim;
  int64_t first = p.starts[0], last = p.starts[p.sequences];
  std::memset(p.out, 0, first * row * sizeof(T));
  std::memset(p.out + last * row, 0, (p.tokens - last) * row * sizeof(T));
}

}  // namespace

template <class T>
void write_output(const Attention<T>& p, const Row& row, int64_t token, int64_t head) {
  float total = row.total, factor = 1;
  if (p.sinks) {
    float maximum = std::max(row.maximum, p.sinks[head]);
    factor = std::exp(row.maximum - maximum);
    total = total * factor + std::exp(p.sinks[head] - maximum);
  }
  T* out = p.out + (token * p.heads + head) * p.cache.dim;
  float inverse = factor / total;
  each(p.cache.dim,
       [&](int64_t d, auto kind) { store(out + d, load_as(row.sums + d, kind) * inverse); });
}

template <class T>
void paged_attention(const Attention<T>& p) {
  clear_outside(p);
  Plan plan = make_plan(p);
  Scratch memory;
  float* workspace = memory.get(plan.partial_rows * partial_width(p.cache.dim));
  for_each_item(int64_t(plan.items.size()), [&](int64_t i) {
    const Item& item = plan.items[i];
    item.tokens == 1 ? attend_token(p, item, workspace) : attend_tile(p, item, workspace);
  });
  for_each_item(int64_t(plan.splits.size()),
                [&](int64_t i) { merge(p, plan.splits[i], workspace); });
}

template void write_output(const Attention<float>&, const Row&, int64_t, int64_t);
template void write_output(const Attention<bf16>&, const Row&, int64_t, int64_t);
template void paged_attention(const Attention<float>&);
template void paged_attention(const Attention<bf16>&);

}  // namespace xllm
