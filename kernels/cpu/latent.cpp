// Latent attention: the choice of form per sequence, and writing latents into the cache.
#include "latent.h"

#include <cstring>

namespace xllm {
namespace {

constexpr int64_t FEWEST_EXPANDED = 16;

// Whether computing keys and values takes fewer operations: `expands` of xllm/ops/latent.py.
template <class T>
bool expands(const Latent<T>& p, int64_t s) {
  if (p.form != Form::by_cost) return p.form == Form::expanded;
  double count = p.new_tokens(s), cached = p.first_position(s);
  double pairs = count * cached + count * (count + 1) / 2;
  double saved = pairs * (2 * p.rank - p.nope - p.value);
  return count >= FEWEST_EXPANDED && saved > cached * double(p.rank) * (p.nope + p.value);
}

// Rows of q that belong to no sequence: the sequences' rows are one range.
template <class T>
void clear_outside(const Latent<T>& p) {
  int64_t row = p.heads * p.value, first = p.starts[0], last = p.starts[p.sequences];
  std::memset(p.out, 0, first * row * sizeof(T));
  std::memset(p.out + last * row, 0, (p.tokens - last) * row * sizeof(T));
}

}  // namespace

template <class T>
void paged_latent_attention(const Latent<T>& p) {
  clear_outside(p);
  std::vector<int64_t> absorbed, expanded;
  for (int64_t s = 0; s < p.sequences; s++)
    if (p.new_tokens(s) > 0) (expands(p, s) ? expanded : absorbed).push_back(s);
  if (!absorbed.empty()) attend_absorbed(p, absorbed);
  if (!expanded.empty()) attend_expanded(p, expanded);
}

template <class T>
void latent_write(const LatentWrite<T>& p) {
  at::parallel_for(0, p.tokens, 64, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      T* to = p.cache.row(p.slots[i] / p.cache.page_size, p.slots[i] % p.cache.page_size);
      std::memcpy(to, p.latent + i * p.latent_stride, p.rank * sizeof(T));
      std::memcpy(to + p.rank, p.k_rope + i * p.rope_stride,
                  (p.cache.width - p.rank) * sizeof(T));
    }
  });
}

template void paged_latent_attention(const Latent<float>&);
template void paged_latent_attention(const Latent<bf16>&);
template void latent_write(const LatentWrite<float>&);
template void latent_write(const LatentWrite<bf16>&);

}  // namespace xllm
