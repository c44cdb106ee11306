// Root-mean-square norms and SwiGLU: one pass over memory, rounding where the references round.
#include "elementwise.h"

#include "norm.h"
#include "parallel.h"

namespace xllm {
namespace {

constexpr int64_t GRAIN = 1 << 13;  // values a thread takes at least

}  // namespace

template <class T>
void rms_norm(const Norm<T>& p) {
  at::parallel_for(0, p.m, divide_up(GRAIN, p.n), [&](int64_t begin, int64_t end) {
    thread_local Scratch scratch;
    float* row = scratch.get(p.n);
    for (int64_t at = begin * p.n; at < end * p.n; at += p.n) {
      each(p.n, [&](int64_t i, auto kind) {
        auto x = load_as(p.x + at + i, kind);
        if (p.residual) {
          x = rounded<T>(load_as(p.residual + at + i, kind) + x);
          store(p.total + at + i, x);
        }
        store(row + i, x);
      });
      norm_row(row, p.weight, p.eps, p.n);
      each(p.n, [&](int64_t i, auto kind) { store(p.out + at + i, load_as(row + i, kind)); });
    }
  });
}

template <class T>
void silu_mul(const T* gate, const T* up, T* out, int64_t count) {
  at::parallel_for(0, count, GRAIN, [&](int64_t begin, int64_t end) {
    each(end - begin, [&](int64_t i, auto kind) {
      auto x = load_as(gate + begin + i, kind);
      auto silu = rounded<T>(x / (1.f + exp(-x)));
      store(out + begin + i, silu * load_as(up + begin + i, kind));
    });
  });
}

template void rms_norm(const Norm<float>&);
template void rms_norm(const Norm<bf16>&);
template void silu_mul(const float*, const float*, float*, int64_t);
template void silu_mul(const bf16*, const bf16*, bf16*, int64_t);

}  // namespace xllm
