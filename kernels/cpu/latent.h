// Multi-head latent attention over a paged cache of latents; see xllm/ops/latent.py.
//
// T tokens, S sequences, H heads; N features of a head without and r with rotary position, R rank
// of the latent, V value size.
#pragma once

#include <vector>

#include "parallel.h"
#include "vec.h"

namespace xllm {

// One layer's cache [P, K, R + r]; pages may lie `page_stride` elements apart.
template <class T>
struct LatentCache {
  T* data;
  int64_t pages, page_size, width, page_stride;

  T* row(int64_t page, int64_t offset) const { return data + page * page_stride + offset * width; }
};

// latent [T, R], k_rope [T, r] with tokens `latent_stride`, `rope_stride` elements apart.
template <class T>
struct LatentWrite {
  const T *latent, *k_rope;
  int64_t latent_stride, rope_stride, rank;
  LatentCache<T> cache;
  const int64_t* slots;  // [T]
  int64_t tokens;
};

template <class T>
void latent_write(const LatentWrite<T>& problem);

// [T, H, n] with any distance between tokens and heads.
template <class T>
struct Heads {
  const T* data;
  int64_t token_stride, head_stride;

  const T* at(int64_t token, int64_t head) const {
    return data + token * token_stride + head * head_stride;
  }
};

enum class Form { by_cost, absorbed, expanded };

template <class T>
struct Latent {
  Heads<T> q_nope, q_rope;
  T* out;  // [T, H, V]
  LatentCache<const T> cache;
  const T *uk, *uv;        // [H, N, R], [H, R, V]
  const int32_t* table;    // [S, table_width]
  const int32_t* starts;   // [S + 1]
  const int32_t* lengths;  // [S]
  int64_t sequences, tokens, heads, table_width;
  int64_t nope, rope, rank, value;
  float scale;
  Form form;

  int64_t new_tokens(int64_t s) const { return starts[s + 1] - starts[s]; }
  // Position of token 0 of the sequence's new ones.
  int64_t first_position(int64_t s) const { return lengths[s] - new_tokens(s); }
  int64_t padded_rank() const { return round_up(rank, VL); }

  const T* row(int64_t s, int64_t position) const {
    int64_t page = table[s * table_width + position / cache.page_size];
    return cache.row(page, position % cache.page_size);
  }
};

// Sequences whose queries and results meet the matrices: heads share the latents.
template <class T>
void attend_absorbed(const Latent<T>& problem, const std::vector<int64_t>& sequences);

// Sequences whose keys and values are computed, a block of latents of one head at a time.
template <class T>
void attend_expanded(const Latent<T>& problem, const std::vector<int64_t>& sequences);

template <class T>
void paged_latent_attention(const Latent<T>& problem);

}  // namespace xllm
