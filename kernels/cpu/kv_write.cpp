// Copy keys and values into their slots; optionally norm and rotate q and k on the way.
//
// Every step rounds to T where the reference's tensor operations do.
#include "kv_write.h"

#include <cmath>

#include "parallel.h"

namespace xllm {
namespace {

constexpr int64_t GRAIN = 8;  // tokens a thread takes at least

// wide = rounded(weight * rounded(wide / rms(wide))), D floats.
template <class T>
void norm(float* __restrict wide, const T* __restrict weight, float eps, int64_t dim) {
  float squares = 0;
  Vec partial = {};
  int64_t i = 0;
  for (; i + VL <= dim; i += VL) partial = fma(load(wide + i), load(wide + i), partial);
  for (; i < dim; i++) squares += wide[i] * wide[i];
  float scale = 1.f / std::sqrt((squares + sum(partial)) / float(dim) + eps);
  for (i = 0; i < dim; i++)
    wide[i] = rounded<T>(to_float(weight[i]) * rounded<T>(wide[i] * scale));
}

// out = rounded(rounded(x cos) + rounded(rotate_half(x) sin)).
template <class T>
void rotate(const float* __restrict x, const T* __restrict cos, const T* __restrict sin,
            T* __restrict out, int64_t half) {
  for (int64_t i = 0; i < half; i++) {
    float a = x[i], b = x[half + i];
    float first = rounded<T>(a * to_float(cos[i])), second = rounded<T>(-b * to_float(sin[i]));
    round_to(first + second, out + i);
    first = rounded<T>(b * to_float(cos[half + i]));
    second = rounded<T>(a * to_float(sin[half + i]));
    round_to(first + second, out + half + i);
  }
}

template <class T>
void norm_rotate(const FusedWrite<T>& p, const T* x, const T* weight, int64_t token, T* out,
                 float* wide) {
  int64_t dim = p.cache.dim;
  for (int64_t i = 0; i < dim; i++) wide[i] = to_float(x[i]);
  if (weight) norm(wide, weight, p.eps, dim);
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
