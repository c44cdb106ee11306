// y = x W^T + b over a packed weight. M rows, N outputs, K inputs.
//
// With few rows the weight is read once and the call is bound by memory; with many, a chunk of x
// that fits the second-level cache is reused over the blocks of a task.
#include "linear.h"

#include "linear_tile.h"

namespace xllm {
namespace {

constexpr int64_t PACK_GRAIN = 1 << 15;  // values of x that a thread packs at least

// x [M, K] → tiles of `rows` rows (the last may have fewer), each [K / 2, rows, 2].
template <class X, class T>
void pack_rows(const Linear<T>& p, int64_t rows, X* packed) {
  int64_t tiles = divide_up(p.m, rows), grain = divide_up(PACK_GRAIN, rows * p.k);
  at::parallel_for(0, tiles, grain, [&](int64_t begin, int64_t end) {
    for (int64_t first = begin * rows; first < std::min(p.m, end * rows); first += rows)
      pack_tile([&](int64_t m) { return p.x + (first + m) * p.k; }, std::min(rows, p.m - first),
                p.k, packed + first * p.k);
  });
}

template <class Dot, class T>
void run(const Linear<T>& p) {
  using X = typename Dot::X;
  if (p.m == 0) return;
  int64_t rows = divide_up(p.m, divide_up(p.m, Dot::ROWS));  // of a tile: even, at most ROWS
  Scratch memory;
  X* x = reinterpret_cast<X*>(memory.get(p.m * p.k));
  pack_rows(p, rows, x);
  int64_t tile_bytes = rows * p.k * int64_t(sizeof(X));
  int64_t chunk = rows * std::max<int64_t>(1, X_BYTES / tile_bytes);
  int64_t blocks = divide_up(p.n, BLOCK);
  int64_t blocks_per_task = std::max<int64_t>(1, blocks / (8 * at::get_num_threads()));
  int64_t tasks_per_chunk = divide_up(blocks, blocks_per_task);
  for_each_item(divide_up(p.m, chunk) * tasks_per_chunk, [&](int64_t task) {
    int64_t first = task / tasks_per_chunk * chunk, last = std::min(p.m, first + chunk);
    int64_t begin = task % tasks_per_chunk * blocks_per_task;
    int64_t end = std::min(blocks, begin + blocks_per_task);
    for (int64_t block = begin; block < end; block++) {
      int64_t n = block * BLOCK, columns = std::min(BLOCK, p.n - n);
      const T* bias = p.bias ? p.bias + n : nullptr;
      auto write = [&](const float* sums, int64_t row, int64_t some) {
        write_tile<Dot>(sums, some, columns, bias, p.out + (first + row) * p.n + n, p.n);
      };
      run_block<Dot>(x + first * p.k, p.k, rows, last - first, p.weight + n * p.k, write);
    }
  });
}

}  // namespace

void packed_linear(const Linear<float>& p) { run<DotOf<float>>(p); }
void packed_linear(const Linear<bf16>& p) { run<DotOf<bf16>>(p); }

template <class T>
void packed_embedding(const T* weight, const int64_t* ids, T* out, int64_t count, int64_t k) {
  at::parallel_for(0, count, 4, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      const T* from = weight + ids[i] / BLOCK * BLOCK * k + ids[i] % BLOCK * 2;
      for (int64_t j = 0; j < k; j += 2)
        std::memcpy(out + i * k + j, from + j * BLOCK, 2 * sizeof(T));
    }
  });
}

template void packed_embedding(const float*, const int64_t*, float*, int64_t, int64_t);
template void packed_embedding(const bf16*, const int64_t*, bf16*, int64_t, int64_t);

}  // namespace xllm
