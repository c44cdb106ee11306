// One matrix product per expert: each expert that has rows is read once per chunk of its rows.
//
// A chunk is rows of one expert whose packed x fits the second-level cache. A task is a range of
// weight blocks for a chunk and packs the chunk's x for itself: no barrier lies between, and with
// fewer chunks than threads several share one expert.
#include "group_matmul.h"

#include <vector>

#include "linear_tile.h"

namespace xllm {
namespace {

constexpr int64_t TASKS_PER_THREAD = 8;  // so that the last ones end together
constexpr int64_t GRAIN = 1 << 13;       // values that a thread combines at least

struct Chunk {
  int64_t expert, first, last;
};

// The rows of each expert in even parts of at most `most`, in whole tiles but for the last.
template <class T>
std::vector<Chunk> chunks_of(const GroupMatmul<T>& p, int64_t most, int64_t tile) {
  std::vector<Chunk> chunks;
  for (int64_t e = 0; e < p.experts; e++) {
    int64_t first = p.offsets[e], last = p.offsets[e + 1];
    if (first == last) continue;
    int64_t part = round_up(divide_up(last - first, divide_up(last - first, most)), tile);
    for (; first < last; first += part)
      chunks.push_back({e, first, std::min(last, first + part)});
  }
  return chunks;
}

// Outputs of blocks [begin, end) for a chunk.
template <class Dot, class T>
void run_chunk(const GroupMatmul<T>& p, const Chunk& chunk, int64_t begin, int64_t end) {
  using X = typename Dot::X;
  thread_local Scratch scratch;
  int64_t count = chunk.last - chunk.first;
  int64_t rows = divide_up(count, divide_up(count, Dot::ROWS));  // of a tile: even, at most ROWS
  X* x = reinterpret_cast<X*>(scratch.get(count * p.k));
  for (int64_t row = 0; row < count; row += rows) {
    auto row_of = [&](int64_t m) {
      int64_t r = chunk.first + row + m;
      return p.x + (p.rows ? p.rows[r] : r) * p.k;
    };
    pack_tile(row_of, std::min(rows, count - row), p.k, x + row * p.k);
  }
  const T* weight = p.weight + chunk.expert * round_up(p.n, BLOCK) * p.k;
  const T* bias = p.bias ? p.bias + chunk.expert * p.n : nullptr;
  for (int64_t n = begin * BLOCK; n < end * BLOCK; n += BLOCK) {
    int64_t columns = std::min(BLOCK, p.n - n);
    auto write = [&](const float* sums, int64_t row, int64_t some) {
      write_tile<Dot>(sums, some, columns, bias ? bias + n : nullptr,
                      p.out + (chunk.first + row) * p.n + n, p.n);
    };
    run_block<Dot>(x, p.k, rows, count, weight + n * p.k, write);
  }
}

template <class Dot, class T>
void run(const GroupMatmul<T>& p) {
  int64_t most = Dot::ROWS * std::max<int64_t>(
      1, X_BYTES / (Dot::ROWS * p.k * int64_t(sizeof(typename Dot::X))));
  std::vector<Chunk> chunks = chunks_of(p, most, Dot::ROWS);
  if (chunks.empty()) return;
  int64_t blocks = divide_up(p.n, BLOCK), count = chunks.size();
  int64_t wanted = divide_up(TASKS_PER_THREAD * at::get_num_threads(), count);
  int64_t per_task = divide_up(blocks, std::min(blocks, wanted));
  int64_t tasks = divide_up(blocks, per_task);  // of a chunk
  for_each_item(count * tasks, [&](int64_t task) {
    int64_t begin = task % tasks * per_task;
    run_chunk<Dot>(p, chunks[task / tasks], begin, std::min(blocks, begin + per_task));
  });
}

}  // namespace

void packed_group_matmul(const GroupMatmul<float>& p) { run<DotOf<float>>(p); }
void packed_group_matmul(const GroupMatmul<bf16>& p) { run<DotOf<bf16>>(p); }

void group_tokens(const int64_t* ids, int64_t tokens, int64_t picks, int64_t experts, int32_t* rows,
                  int32_t* places, int32_t* offsets) {
  std::fill_n(offsets, experts + 1, 0);
  for (int64_t i = 0; i < tokens * picks; i++) offsets[ids[i] + 1]++;
  for (int64_t e = 0; e < experts; e++) offsets[e + 1] += offsets[e];
  std::vector<int32_t> next(offsets, offsets + experts);
  for (int64_t i = 0; i < tokens * picks; i++) {
    places[i] = next[ids[i]]++;
    rows[places[i]] = int32_t(i / picks);
  }
}

template <class T, class W>
void combine_experts(const T* y, const int32_t* places, const W* weights, T* out, int64_t tokens,
                     int64_t picks, int64_t n) {
  at::parallel_for(0, tokens, divide_up(GRAIN, n * picks), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; t++) {
      each(n, [&](int64_t i, auto kind) {
        auto total = kind;  // zero
        for (int64_t pick = t * picks; pick < (t + 1) * picks; pick++) {
          auto product = load_as(y + places[pick] * n + i, kind) * to_float(weights[pick]);
          total += sizeof(W) == 4 ? product : rounded<T>(product);
        }
        store(out + t * n + i, total);
      });
    }
  });
}

template void combine_experts(const float*, const int32_t*, const float*, float*, int64_t, int64_t,
                              int64_t);
template void combine_experts(const bf16*, const int32_t*, const float*, bf16*, int64_t, int64_t,
                              int64_t);
template void combine_experts(const bf16*, const int32_t*, const bf16*, bf16*, int64_t, int64_t,
                              int64_t);

}  // namespace xllm
