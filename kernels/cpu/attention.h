// Ragged causal attention over a paged cache; see xllm/ops/attention.py.
//
// T tokens, S sequences, H query heads, G KV heads, D head size; a KV head serves H / G query
// heads. A *row* is one query token of one head.
#pragma once

#include "kv_write.h"
#include "parallel.h"

namespace xllm {

constexpr int64_t KEYS = 64;        // keys taken at a time
constexpr int64_t MAX_DIM = 1024;   // head size at most
constexpr float NO_SCORE = -1e30f;  // running maximum before any key: finite, so no NaN arises

template <class T>
struct Attention {
  const T* q;  // [T, H, D]
  T* out;      // [T, H, D]
  Cache<const T> cache;
  const int32_t* table;    // [S, table_width]
  const int32_t* starts;   // [S + 1]
  const int32_t* lengths;  // [S]
  const float* sinks;      // [H] or null
  int64_t sequences, tokens, heads, table_width;
  int64_t window;  // positions a query sees, its own included
  float scale;
  float softcap;  // 0 for none

  int64_t ratio() const { return heads / cache.groups; }
  int64_t new_tokens(int64_t s) const { return starts[s + 1] - starts[s]; }
  // Position of token 0 of the sequence's new ones.
  int64_t first_position(int64_t s) const { return lengths[s] - new_tokens(s); }

  const T* row(int64_t s, int64_t value, int64_t group, int64_t position) const {
    int64_t page = table[s * table_width + position / cache.page_size];
    return cache.row(page, value, group, position % cache.page_size);
  }
};

// Queries [first, first + tokens) of a sequence for one KV head, against keys [begin, end).
struct Item {
  int64_t sequence, group, first, tokens, begin, end;
  int64_t partial;  // first row in the workspace of partial results; -1 writes the output

  int64_t cost() const { return tokens * (end - begin); }
};

// Unnormalised result of one row over some of its keys.
struct Row {
  const float* sums;    // [D]
  float maximum, total;  // of the scores; of exp(score - maximum)
};

// Floats of one row in the workspace: its sums, maximum and total.
inline int64_t partial_width(int64_t dim) { return dim + 2; }

// Normalise and round a row into the output; the head's sink adds to the total.
template <class T>
void write_output(const Attention<T>& p, const Row& row, int64_t token, int64_t head);

// Row `index` of an item, to the output or to the workspace.
template <class T>
void finish(const Attention<T>& p, const Item& item, const Row& row, int64_t index,
            float* workspace) {
  int64_t ratio = p.ratio(), dim = p.cache.dim;
  if (item.partial < 0) {
    int64_t token = p.starts[item.sequence] + item.first + index / ratio;
    write_output(p, row, token, item.group * ratio + index % ratio);
    return;
  }
  float* to = workspace + (item.partial + index) * partial_width(dim);
  std::memcpy(to, row.sums, dim * sizeof(float));
  to[dim] = row.maximum;
  to[dim + 1] = row.total;
}

// One query token, lanes along D: bound by reading the cache.
template <class T>
void attend_token(const Attention<T>& p, const Item& item, float* workspace);

// Several query tokens, lanes along rows: bound by arithmetic.
template <class T>
void attend_tile(const Attention<T>& p, const Item& item, float* workspace);

// Query tokens of a tile.
inline int64_t tile_tokens(int64_t ratio) { return std::max<int64_t>(1, 48 / ratio); }

template <class T>
void paged_attention(const Attention<T>& problem);

}  // namespace xllm
