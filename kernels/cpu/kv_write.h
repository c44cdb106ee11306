// Writing keys and values into the paged cache; see xllm/ops/attention.py.
#pragma once

#include "vec.h"

namespace xllm {

// One layer's cache [P, 2, G, K, D]; pages may lie `page_stride` elements apart.
template <class T>
struct Cache {
  T* data;
  int64_t pages, groups, page_size, dim, page_stride;

  T* row(int64_t page, int64_t value, int64_t group, int64_t offset) const {
    return data + page * page_stride + ((value * groups + group) * page_size + offset) * dim;
  }
};

// k, v [T, G, D] with tokens `k_stride`, `v_stride` elements apart.
template <class T>
struct KvWrite {
  const T *k, *v;
  int64_t k_stride, v_stride;
  Cache<T> cache;
  const int64_t* slots;  // [T]
  int64_t tokens;
};

template <class T>
void kv_write(const KvWrite<T>& problem);

// qkv [T, (H + 2 G) D] with rows `stride` apart → out [T, H, D] and the cache. H query heads.
template <class T>
struct FusedWrite {
  const T* qkv;
  int64_t stride, heads;
  const T *q_norm, *k_norm;  // [D], both null for none
  float eps;
  const T *cos, *sin;  // [T, D]
  T* out;
  Cache<T> cache;
  const int64_t* slots;  // [T]
  int64_t tokens;
};

template <class T>
void qk_norm_rope_kv_write(const FusedWrite<T>& problem);

}  // namespace xllm
