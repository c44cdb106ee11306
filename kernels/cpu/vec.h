// Vectors of floats for the instruction set that the compiler targets, bfloat16, exp and tanh.
//
// Everything is written with the compiler's generic vectors, which lower to any instruction set;
// intrinsics appear only where they do what generic code cannot (bfloat16 dot and rounding, FMA).
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace xllm {

#if defined(__AVX512F__)
constexpr int VL = 16;
#elif defined(__AVX2__)
constexpr int VL = 8;
#else
constexpr int VL = 4;
#endif
constexpr int VECTOR_REGISTERS = VL == 16 ? 32 : 16;

typedef float Vec __attribute__((vector_size(VL * 4)));
typedef int32_t Ints __attribute__((vector_size(VL * 4)));
typedef uint32_t Bits __attribute__((vector_size(VL * 4)));
typedef int64_t Pairs __attribute__((vector_size(VL * 4)));
typedef uint16_t Halves __attribute__((vector_size(VL * 2)));
// Unaligned views of memory.
typedef float VecAt __attribute__((vector_size(VL * 4), aligned(4), may_alias));
typedef uint32_t BitsAt __attribute__((vector_size(VL * 4), aligned(4), may_alias));
typedef uint16_t HalvesAt __attribute__((vector_size(VL * 2), aligned(2), may_alias));

struct bf16 {
  uint16_t bits;
};

inline float to_float(float x) { return x; }

inline float to_float(bf16 x) {
  uint32_t wide = uint32_t(x.bits) << 16;
  float result;
  std::memcpy(&result, &wide, 4);
  return result;
}

// Round to nearest, ties to even; a NaN stays a NaN.
inline bf16 to_bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return {x == x ? uint16_t(rounded) : uint16_t(0x7fc0)};
}

inline void store(float* p, float x) { *p = x; }
inline void store(bf16* p, float x) { *p = to_bf16(x); }

// Subtracting zero changes no float, so the compiler leaves just the broadcast.
inline Vec splat(float x) { return x - Vec{}; }

inline Vec load(const float* p) { return *reinterpret_cast<const VecAt*>(p); }

inline Vec load(const bf16* p) {
#if defined(__AVX512F__)
  __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return reinterpret_cast<Vec>(_mm512_slli_epi32(wide, 16));
#else
  Halves halves = *reinterpret_cast<const HalvesAt*>(p);
  return reinterpret_cast<Vec>(__builtin_convertvector(halves, Bits) << 16);
#endif
}

inline void store(float* p, Vec x) { *reinterpret_cast<VecAt*>(p) = x; }

inline void store(bf16* p, Vec x) {
#if defined(__AVX512BF16__)
  auto narrow = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(reinterpret_cast<__m512>(x)));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow);
#else
  Bits bits = reinterpret_cast<Bits>(x);
  bits = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  bits = x == x ? bits : Bits{} + 0x7fc0;
  *reinterpret_cast<HalvesAt*>(p) = __builtin_convertvector(bits, Halves);
#endif
}

// x as it reads back from memory of type T.
template <class T, class V>
inline V rounded(V x) {
  if constexpr (sizeof(T) == 4) {
    return x;
  } else if constexpr (sizeof(V) == 4) {
    return to_float(to_bf16(x));
  } else {
    Bits bits = reinterpret_cast<Bits>(x);
    bits = (bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000u;
    return x == x ? reinterpret_cast<Vec>(bits) : x;
  }
}

// One value or one vector from memory, as `kind` is a float or a Vec.
template <class T>
inline float load_as(const T* p, float) { return to_float(*p); }
template <class T>
inline Vec load_as(const T* p, Vec) { return load(p); }

// body(i, kind) for 0 ... n - 1: whole vectors with a Vec as kind, then the rest with a float.
template <class Body>
inline void each(int64_t n, const Body& body) {
  int64_t i = 0;
  for (; i + VL <= n; i += VL) body(i, Vec{});
  for (; i < n; i++) body(i, 0.f);
}

inline Vec fma(Vec a, Vec b, Vec c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__FMA__)
  return _mm256_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}

inline Vec max(Vec a, Vec b) { return a > b ? a : b; }

inline float sum(Vec x) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps(x);
#else
  float total = 0;
  for (int i = 0; i < VL; i++) total += x[i];
  return total;
#endif
}

inline float largest(Vec x) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps(x);
#else
  float best = x[0];
  for (int i = 1; i < VL; i++) best = x[i] > best ? x[i] : best;
  return best;
#endif
}

// e^x within 2 units in the last place; 0 below the smallest normal number. Cephes expf.
inline Vec exp(Vec x) {
  constexpr float shift = 12582912.f;  // 1.5 * 2^23: adding it rounds to an integer
  Vec low = splat(-87.33f), high = splat(88.37f);
  Vec y = max(low, x < high ? x : high);
  Vec n = fma(y, splat(1.44269504f), splat(shift)) - shift;
  Vec r = fma(n, splat(-0.693359375f), y);
  r = fma(n, splat(2.12194440e-4f), r);
  Vec p = splat(1.9875691500e-4f);
  p = fma(p, r, splat(1.3981999507e-3f));
  p = fma(p, r, splat(8.3334519073e-3f));
  p = fma(p, r, splat(4.1665795894e-2f));
  p = fma(p, r, splat(1.6666665459e-1f));
  p = fma(p, r, splat(5.0000001201e-1f));
  p = fma(p, r * r, r + 1.f);
  Ints power = (__builtin_convertvector(n, Ints) + 127) << 23;
  Vec result = p * reinterpret_cast<Vec>(power);
  return x < low ? Vec{} : result;
}

inline float exp(float x) { return std::exp(x); }

// tanh within a few units in the last place; the polynomial keeps small arguments accurate.
inline Vec tanh(Vec x) {
  Vec magnitude = x < 0.f ? -x : x;
  Vec big = 1.f - 2.f / (exp(magnitude + magnitude) + 1.f);
  Vec z = x * x;
  Vec p = splat(-5.70498872745e-3f);
  p = fma(p, z, splat(2.06390887954e-2f));
  p = fma(p, z, splat(-5.37397155531e-2f));
  p = fma(p, z, splat(1.33314422036e-1f));
  p = fma(p, z, splat(-3.33332819422e-1f));
  Vec small = fma(p * z, x, x);
  return magnitude < 0.625f ? small : (x < 0.f ? -big : big);
}

}  // namespace xllm
