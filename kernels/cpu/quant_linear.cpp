// y = x W^T + b over quantised weights, with float32 sums.
//
// Codes become floats in registers, a whole group is summed over, and only then scaled: with few
// rows a call is bound by reading the codes. With many rows, a block of the weight is made float32
// once and then shared by all tiles.
#include "quant_linear.h"

#include "linear_tile.h"

namespace xllm {
namespace {

constexpr int64_t UNROLL = 8;  // inputs taken at a step
// A chunk of x, for which a block is made float32 once: it streams from the third-level cache
// faster than it is used.
constexpr int64_t CHUNK_BYTES = 4 << 20;
constexpr int VECTORS = 2, ROWS = VECTOR_REGISTERS == 32 ? 12 : 4;
typedef int8_t BytesAt __attribute__((vector_size(VL), aligned(1), may_alias));

inline Ints widen(const void* p) {
#if defined(__AVX512F__)
  return reinterpret_cast<Ints>(
      _mm512_cvtepi8_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p))));
#elif defined(__AVX2__)
  return reinterpret_cast<Ints>(
      _mm256_cvtepi8_epi32(_mm_loadl_epi64(static_cast<const __m128i*>(p))));
#else
  return __builtin_convertvector(*static_cast<const BytesAt*>(p), Ints);
#endif
}

// How UNROLL codes of VL outputs become floats. `Words` is what is read once for all of them;
// `code(words, p, j)` the codes of input j, which are `factor` times too small.
struct FromInt8 {
  using Stored = int8_t;
  static constexpr int64_t INPUTS = 1;  // per stored value
  static constexpr float FACTOR = 1;
  struct Words {};
  static Words read(const int8_t*) { return {}; }
  static Vec code(Words, const int8_t* p, int j) {
    return __builtin_convertvector(widen(p + j * BLOCK), Vec);
  }
};

struct FromFloat8 {
  using Stored = Float8;
  static constexpr int64_t INPUTS = 1;
  static constexpr float FACTOR = 256;  // 2^(15 - 7): the exponent biases of float16 and e4m3
  struct Words {};
  static Words read(const Float8*) { return {}; }
  static Vec code(Words, const Float8* p, int j) {
#if defined(__AVX512F__)
    // As float16 bits the value is 2^8 times too small, subnormals included.
    __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + j * BLOCK));
    __m256i half = _mm256_slli_epi16(_mm256_cvtepi8_epi16(bytes), 7);
    return _mm512_cvtph_ps(_mm256_and_si256(half, _mm256_set1_epi16(int16_t(0xbfff))));
#else
    Ints byte = widen(p + j * BLOCK), magnitude = byte & 127;
    Ints sign = byte & int32_t(0x80000000);
    Ints normal = (magnitude << 20) + ((120 - 8) << 23);
    Vec small = __builtin_convertvector(magnitude, Vec) * 0x1p-17f;
    Ints bits = magnitude < 8 ? reinterpret_cast<Ints>(small) : normal;
    return reinterpret_cast<Vec>(bits | sign);
#endif
  }
};

struct FromNibbles {
  using Stored = Nibbles;
  static constexpr int64_t INPUTS = 8;
  static constexpr float FACTOR = 1;
  using Words = Bits;
  static Words read(const Nibbles* p) { return *reinterpret_cast<const BitsAt*>(p); }
  static Vec code(Words words, const Nibbles*, int j) {
#if defined(__AVX512F__)
    // A permutation looks at the low four bits of each index only.
    const __m512 table = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1);
    return _mm512_permutexvar_ps(reinterpret_cast<__m512i>(words >> (4 * j)), table);
#else
    return __builtin_convertvector(reinterpret_cast<Ints>(words << (28 - 4 * j)) >> 28, Vec);
#endif
  }
};

// Weights that a block of them was made into.
struct FromFloat {
  using Stored = float;
  static constexpr int64_t INPUTS = 1;
  static constexpr float FACTOR = 1;
  struct Words {};
  static Words read(const float*) { return {}; }
  static Vec code(Words, const float* p, int j) { return load(p + j * BLOCK); }
};

// One block of 32 outputs: codes, and scales and zero points [groups, 32]; null: 1 and 0.
template <class From>
struct Block {
  const typename From::Stored* codes;
  const float* scales;
  const int8_t* zeros;

  Vec scale(int64_t group, int lane) const {
    return scales ? load(scales + group * BLOCK + lane) * From::FACTOR : splat(1);
  }
  // In units of what `code` returns.
  Vec zero(int64_t group, int lane) const {
    Vec codes = __builtin_convertvector(widen(zeros + group * BLOCK + lane), Vec);
    return codes * (1 / From::FACTOR);
  }
};

// totals[M][BLOCK] of M packed rows of x, [K / 2, M, 2], and one block, whose bytes are fetched at
// `soon` at the pace at which they are used here. sums [groups, M]: of x over each group.
template <class From, int M>
void tile(const float* x, const float* sums, int64_t k, int64_t group, const Block<From>& block,
          const char* soon, float* totals) {
  constexpr int CHAINS = M <= 2 ? 2 : 1;  // of sums: enough to hide how long an FMA takes
  constexpr int64_t LINES = UNROLL / From::INPUTS * BLOCK * sizeof(typename From::Stored) / 64;
  for (int lane = 0; lane < BLOCK; lane += VECTORS * VL) {
    Vec total[M][VECTORS] = {};
    const float* at = x;
    const auto* codes = block.codes + lane;
    const char* fetch = soon;
    for (int64_t begin = 0, g = 0; begin < k; begin += group, g++) {
      Vec sum[CHAINS][M][VECTORS] = {};
      int64_t end = std::min(k, begin + group);
      for (int64_t i = begin; i < end; i += UNROLL, at += UNROLL * M, fetch += 64 * LINES) {
        typename From::Words words[VECTORS];
        for (int v = 0; v < VECTORS; v++) words[v] = From::read(codes + v * VL);
        for (int line = 0; line < LINES; line++) __builtin_prefetch(fetch + 64 * line);
#pragma GCC unroll 8
        for (int j = 0; j < UNROLL; j++) {
          Vec code[VECTORS];
          for (int v = 0; v < VECTORS; v++) code[v] = From::code(words[v], codes + v * VL, j);
          for (int m = 0; m < M; m++) {
            Vec both = splat(at[j / 2 * 2 * M + 2 * m + j % 2]);
            for (int v = 0; v < VECTORS; v++)
              sum[j % CHAINS][m][v] = fma(code[v], both, sum[j % CHAINS][m][v]);
          }
        }
        codes += UNROLL / From::INPUTS * BLOCK;
      }
      for (int v = 0; v < VECTORS; v++) {
        Vec scale = block.scale(g, lane + v * VL);
        Vec zero = block.zeros ? block.zero(g, lane + v * VL) : Vec{};
        for (int m = 0; m < M; m++) {
          Vec all = CHAINS == 2 ? sum[0][m][v] + sum[CHAINS - 1][m][v] : sum[0][m][v];
          if (block.zeros) all -= zero * sums[g * M + m];
          total[m][v] = fma(all, scale, total[m][v]);
        }
      }
    }
    for (int m = 0; m < M; m++)
      for (int v = 0; v < VECTORS; v++) store(totals + m * BLOCK + lane + v * VL, total[m][v]);
  }
}

template <class From>
using QuantTile = void (*)(const float*, const float*, int64_t, int64_t, const Block<From>&,
                           const char*, float*);

template <class From, int... M>
QuantTile<From> pick_tile(int64_t rows, std::integer_sequence<int, M...>) {
  constexpr QuantTile<From> table[] = {tile<From, M + 1>...};
  return table[rows - 1];
}

// Float32 weights [K, 32] of a block.
template <class From>
void make_weights(const Block<From>& block, int64_t k, int64_t group, float* out) {
  for (int lane = 0; lane < BLOCK; lane += VL) {
    for (int64_t begin = 0, g = 0; begin < k; begin += group, g++) {
      Vec scale = block.scale(g, lane), zero = block.zeros ? block.zero(g, lane) : Vec{};
      for (int64_t i = begin; i < std::min(k, begin + group); i += UNROLL) {
        const auto* codes = block.codes + i / From::INPUTS * BLOCK + lane;
        auto words = From::read(codes);
        for (int j = 0; j < UNROLL; j++)
          store(out + (i + j) * BLOCK + lane, (From::code(words, codes, j) - zero) * scale);
      }
    }
  }
}

// Rows of x packed in tiles of `rows`, and their sums over each group.
struct Packed {
  const float *x, *sums;
  int64_t rows, k, group, groups;

  const float* tile(int64_t row) const { return x + row * k; }
  const float* tile_sums(int64_t row) const { return sums + row * groups; }
};

// Outputs of one block for rows [first, last).
template <class From, class T, class Write>
void run_rows(const Packed& p, int64_t first, int64_t last, const Block<From>& block,
              const char* soon, const Write& write) {
  alignas(64) float totals[ROWS * BLOCK];
  for (int64_t row = first; row < last; row += p.rows) {
    int64_t count = std::min(p.rows, last - row);
    auto kernel = pick_tile<From>(count, std::make_integer_sequence<int, ROWS>());
    kernel(p.tile(row), p.tile_sums(row), p.k, block.scales ? p.group : p.k, block, soon, totals);
    write(totals, row, count);
  }
}

template <class From, class T, class Code>
void run_block(const QuantLinear<T, Code>& p, const Packed& packed, int64_t first, int64_t last,
               int64_t index) {
  int64_t stored = p.k / From::INPUTS * BLOCK, grid = packed.groups * BLOCK * index;
  const Code* codes = p.codes + stored * index;
  Block<From> block{codes, p.scales + grid, p.zeros ? p.zeros + grid : nullptr};
  auto soon = reinterpret_cast<const char*>(codes) + PREFETCH;
  int64_t n = index * BLOCK, columns = std::min(BLOCK, p.n - n);
  auto write = [&](const float* totals, int64_t row, int64_t count) {
    const T* bias = p.bias ? p.bias + n : nullptr;
    for (int64_t m = 0; m < count; m++)
      for (int64_t i = 0; i < columns; i++)
        store(p.out + (row + m) * p.n + n + i,
              totals[m * BLOCK + i] + (bias ? to_float(bias[i]) : 0.f));
  };
  if (last - first < WIDEN_TILES * packed.rows)
    return run_rows<From, T>(packed, first, last, block, soon, write);
  thread_local Scratch scratch;
  float* weights = scratch.get(p.k * BLOCK);
  make_weights(block, p.k, p.group, weights);
  Block<FromFloat> wide{weights, nullptr, nullptr};
  run_rows<FromFloat, T>(packed, first, last, wide, reinterpret_cast<const char*>(weights), write);
}

// Pack x and sum it over groups, a tile at a time.
template <class T, class Code>
Packed pack_rows(const QuantLinear<T, Code>& p, int64_t rows, Scratch& memory) {
  int64_t groups = divide_up(p.k, p.group);
  float* x = memory.get(p.m * (p.k + groups));
  float* sums = x + p.m * p.k;
  at::parallel_for(0, divide_up(p.m, rows), divide_up(1 << 15, rows * p.k), [&](int64_t begin,
                                                                              int64_t end) {
    for (int64_t row = begin * rows; row < std::min(p.m, end * rows); row += rows) {
      int64_t count = std::min(rows, p.m - row);
      const T* from = p.x + row * p.k;
      pack_tile([&](int64_t m) { return from + m * p.k; }, count, p.k, x + row * p.k);
      if (!p.zeros) continue;
      for (int64_t m = 0; m < count; m++)
        for (int64_t g = 0; g < groups; g++) {
          Vec total = {};
          int64_t stop = std::min(p.k, (g + 1) * p.group), i = g * p.group;
          for (; i + VL <= stop; i += VL) total += load(from + m * p.k + i);
          float rest = sum(total);
          for (; i < stop; i++) rest += to_float(from[m * p.k + i]);
          sums[row * groups + g * count + m] = rest;
        }
    }
  });
  return {x, sums, rows, p.k, p.group, groups};
}

template <class From, class T, class Code>
void run(const QuantLinear<T, Code>& p) {
  if (p.m == 0) return;
  int64_t rows = divide_up(p.m, divide_up(p.m, ROWS));  // of a tile: even, at most ROWS
  Scratch memory;
  Packed packed = pack_rows(p, rows, memory);
  int64_t tile_bytes = rows * p.k * int64_t(sizeof(float));
  int64_t chunk = rows * std::max<int64_t>(1, CHUNK_BYTES / tile_bytes);
  int64_t blocks = divide_up(p.n, BLOCK);
  int64_t each = std::max<int64_t>(1, blocks / (8 * at::get_num_threads()));
  int64_t tasks = divide_up(blocks, each);
  for_each_item(divide_up(p.m, chunk) * tasks, [&](int64_t task) {
    int64_t first = task / tasks * chunk, last = std::min(p.m, first + chunk);
    int64_t begin = task % tasks * each;
    for (int64_t index = begin; index < std::min(blocks, begin + each); index++)
      run_block<From>(p, packed, first, last, index);
  });
}

}  // namespace

template <class T, class Code>
void quant_linear(const QuantLinear<T, Code>& p) {
  if constexpr (std::is_same_v<Code, int8_t>) run<FromInt8>(p);
  else if constexpr (std::is_same_v<Code, Float8>) run<FromFloat8>(p);
  else run<FromNibbles>(p);
}

template void quant_linear(const QuantLinear<float, int8_t>&);
template void quant_linear(const QuantLinear<float, Float8>&);
template void quant_linear(const QuantLinear<float, Nibbles>&);
template void quant_linear(const QuantLinear<bf16, int8_t>&);
template void quant_linear(const QuantLinear<bf16, Float8>&);
template void quant_linear(const QuantLinear<bf16, Nibbles>&);

}  // namespace xllm
