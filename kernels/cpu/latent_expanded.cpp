// The expanded form: an item is one head of a sequence, with all its new tokens. A block of latents
// becomes keys and values of that head, which all tokens then meet, so that the work of expanding
// is done once per head, and never more than a block of the context is expanded.
#include "latent_tile.h"

namespace xllm {
namespace {

// One head's matrices as floats, and a block of latents on its way to keys and values.
struct State {
  int64_t rank, value, stride;  // padded to whole vectors; floats of a latent
  float *uk, *uv;               // [N, rank], [R, value]
  float *block, *turned;        // [LATENTS, stride], [stride, LATENTS]: latents
  float *keys, *values;         // [N + r (padded), LATENTS], [LATENTS, value]
  float* scores;                // [LATENTS, TILE]
};

template <class T>
State make_state(const Latent<T>& p, Scratch& scratch) {
  State s{p.padded_rank(), round_up(p.value, VL), p.padded_rank() + round_up(p.rope, VL)};
  float** parts[] = {&s.uk, &s.uv, &s.block, &s.turned, &s.keys, &s.values, &s.scores};
  int64_t sizes[] = {p.nope * s.rank,   p.rank * s.value,
                     LATENTS * s.stride, s.stride * LATENTS,
                     (p.nope + round_up(p.rope, VL)) * LATENTS, LATENTS * s.value,
                     LATENTS * TILE};
  int64_t total = 0;
  for (int64_t size : sizes) total += round_up(size, VL);
  float* memory = scratch.get(total);
  for (int i = 0; i < 7; i++) {
    *parts[i] = memory;
    memory += round_up(sizes[i], VL);
  }
  return s;
}

// Tiles of all new tokens: Q^T scaled, and the rows' positions.
template <class T>
std::vector<Tile> load_tiles(const Latent<T>& p, int64_t s, int64_t head, Scratch& scratch) {
  int64_t count = p.new_tokens(s), start = p.first_position(s), depth = p.nope + p.rope;
  int64_t columns = round_up(p.value, VL), padded = round_up(depth, VL);
  int64_t floats = Tile::floats(TILE, depth, columns), number = divide_up(count, TILE);
  float* memory = scratch.get(number * floats + TILE * padded);
  float* rows = memory + number * floats;
  std::vector<Tile> tiles;
  for (int64_t first = 0; first < count; first += TILE, memory += floats) {
    int64_t some = std::min(TILE, count - first);
    Tile t = make_tile(memory, round_up(some, VL), depth, columns);
    for (int64_t i = 0; i < t.width; i++) {  // lanes behind the last token repeat it
      int64_t local = first + std::min(i, some - 1), token = p.starts[s] + local;
      t.position[i] = float(start + local);
      widen(p.q_nope.at(token, head), p.nope, p.nope, rows + i * padded);
      widen(p.q_rope.at(token, head), p.rope, padded - p.nope, rows + i * padded + p.nope);
      for (int64_t d = 0; d < depth; d++) rows[i * padded + d] *= p.scale;
    }
    transpose_matrix(rows, padded, t.width, padded, t.q, t.width);
    tiles.push_back(t);
  }
  return tiles;
}

// Keys and values of `count` latents: keys^T = w_uk latents^T, values = latents w_uv.
template <class T>
void expand(const Latent<T>& p, const State& s, int64_t count) {
  int64_t padded = round_up(count, VL);
  transpose_matrix(s.block, s.stride, padded, s.stride, s.turned, LATENTS);
  multiply<false>(Product<float>{s.uk, s.rank, s.turned, LATENTS, p.rank, s.keys, LATENTS, nullptr},
                  p.nope, padded);
  std::memcpy(s.keys + p.nope * LATENTS, s.turned + s.rank * LATENTS,
              p.rope * LATENTS * sizeof(float));
  multiply<false>(Product<float>{s.block, s.stride, s.uv, s.value, p.rank, s.values, s.value,
                                 nullptr},
                  count, s.value);
}

template <class T>
void attend(const Latent<T>& p, int64_t sequence, int64_t head) {
  thread_local Scratch state_memory, tile_memory;
  State s = make_state(p, state_memory);
  for (int64_t i = 0; i < p.nope; i++)
    widen(p.uk + (head * p.nope + i) * p.rank, p.rank, s.rank, s.uk + i * s.rank);
  for (int64_t i = 0; i < p.rank; i++)
    widen(p.uv + (head * p.rank + i) * p.value, p.value, s.value, s.uv + i * s.value);
  std::vector<Tile> tiles = load_tiles(p, sequence, head, tile_memory);
  for (int64_t key = 0; key < p.lengths[sequence]; key += LATENTS) {
    int64_t count = std::min<int64_t>(LATENTS, p.lengths[sequence] - key);
    widen_latents(p, sequence, key, count, s.block, s.stride);
    expand(p, s, count);
    for (const Tile& t : tiles)
      if (t.position[t.width - 1] >= float(key))
        attend_block<true>(t, s.keys, LATENTS, s.values, s.value, key, count, s.scores);
  }
  for (int64_t i = 0; i < p.new_tokens(sequence); i++) {
    const Tile& t = tiles[i / TILE];
    const float* sums = t.sums + i % TILE * t.columns;
    float inverse = 1 / t.total[i % TILE];
    T* to = p.out + ((p.starts[sequence] + i) * p.heads + head) * p.value;
    each(p.value,
         [&](int64_t d, auto kind) { store(to + d, load_as(sums + d, kind) * inverse); });
  }
}

}  // namespace

template <class T>
void attend_expanded(const Latent<T>& p, const std::vector<int64_t>& sequences) {
  for_each_item(int64_t(sequences.size()) * p.heads, [&](int64_t i) {
    attend(p, sequences[i / p.heads], i % p.heads);
  });
}

template void attend_expanded(const Latent<float>&, const std::vector<int64_t>&);
template void attend_expanded(const Latent<bf16>&, const std::vector<int64_t>&);

}  // namespace xllm
