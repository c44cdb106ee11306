// Copy keys and values into their slots; optionally norm and rotate q and k on the way.
//
// Every step rounds to T where the reference's tensor operations do.
#include "kv_write.h"

#include "norm.h"
#include "parallel.h"

namespace xllm {
namespace {

constexpr int64_t GRAIN = 8;  // tokens a thread takes at least

// out = rounded(rounded(x cos) + rounded(rotate_half(x) sin)), twice `half` values.
template <class T>
void rotate(const float* x, const T* cos, const T* sin, T* out, int64_t half) {
  each(half, [&](int64_t i, auto kind) {
    auto a = load_as(x + i, kind), b = load_as(x + half + i, kind);
    auto first = rounded<T>(a * load_as(cos + i, kind));
    store(out + i, first + rounded<T>(-b * load_as(sin + i, kind)));
    auto second = rounded<T>(b * load_as(cos + half + i, kind));
    store(out + half + i, second + rounded<T>(a * load_as(sin + half + i, kind)));
  });
}

template <class T>
void norm_rotate(const FusedWrite<T>& p, const T* x, const T* weight, int64_t token, T* out,
                 float* wide) {
  int64_t dim = p.cache.dim;
  each(dim, [&](int64_t i, auto kind) { store(wide + i, load_as(x + i, kind)); });
  if (weight) norm_row(wide, weight, p.eps, dim);
  rotate(wide, p.cos + token * dim, p.sin + token * dim, out, dim / 2);
}

}  // namespace

template <class T>
void kv_write(const KvWrite<T>& p) {
  const Cache<T>& cache = p.cache;
  at::parallel_for(0, p.tokens, GRAIN, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; t++) {
      int64_t page = p.slots[t] / cache.page_size, offset = p.slots[t] % cache.page_size;
      for (int64_t g = 0; g < cache.groups; g++) {
        size_t bytes = cache.dim * sizeof(T);
        std::memcpy(cache.row(page, 0, g, offset), p.k + t * p.k_stride + g * cache.dim, bytes);
        std::memcpy(cache.row(page, 1, g, offset), p.v + t * p.v_stride + g * cache.dim, bytes);
      }
    }
  });
}

template <class T>
void qk_norm_rope_kv_write(const FusedWrite<T>& p) {
  const Cache<T>& cache = p.cache;
  int64_t dim = cache.dim;
  at::parallel_for(0, p.tokens, GRAIN, [&](int64_t begin, int64_t end) {
    thread_local Scratch scratch;
    float* wide = scratch.get(dim);
    for (int64_t t = begin; t < end; t++) {
      const T* q = p.qkv + t * p.stride;
      const T *k = q + p.heads * dim, *v = k + cache.groups * dim;
      int64_t page = p.slots[t] / cache.page_size, offset = p.slots[t] % cache.page_size;
      for (int64_t h = 0; h < p.heads; h++)
        norm_rotate(p, q + h * dim, p.q_norm, t, p.out + (t * p.heads + h) * dim, wide);
      for (int64_t g = 0; g < cache.groups; g++) {
        norm_rotate(p, k + g * dim, p.k_norm, t, cache.row(page, 0, g, offset), wide);
        std::memcpy(cache.row(page, 1, g, offset), v + g * dim, dim * sizeof(T));
      }
    }
  });
}

template void kv_write(const KvWrite<float>&);
template void kv_write(const KvWrite<bf16>&);
template void qk_norm_rope_kv_write(const FusedWrite<float>&);
template void qk_norm_rope_kv_write(const FusedWrite<bf16>&);

}  // namespace xllm
