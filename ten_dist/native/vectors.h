// Vectors of floats, what the operators for CPUs compute with.
//
// They are those of GCC and clang, LANES floats each: the compiler maps them to what the
// processor has. Built without -ffast-math: the rounding below depends on exact sums.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace ten_dist {

constexpr int LANES = 16;
typedef float Floats __attribute__((vector_size(LANES * 4)));
typedef double Doubles __attribute__((vector_size(LANES * 8)));
typedef int32_t Ints __attribute__((vector_size(LANES * 4)));
typedef uint32_t Words __attribute__((vector_size(LANES * 4)));
typedef uint16_t Halves __attribute__((vector_size(LANES * 2)));

inline Floats all(float value) { return Floats{} + value; }
inline Words bits(Floats x) { return reinterpret_cast<Words>(x); }
inline Floats floats(Words x) { return reinterpret_cast<Floats>(x); }
inline Floats choose(Ints condition, Floats yes, Floats no) { return condition ? yes : no; }
inline Doubles wide(Floats x) { return __builtin_convertvector(x, Doubles); }

// bfloat16 is stored as its 16 bits, the upper half of a float. The instructions named here
// are those that compilers do not find in the portable text beside them.
inline Floats load(const float* from) {
  Floats result;
  std::memcpy(&result, from, sizeof(result));
  return result;
}

inline Floats load(const uint16_t* from) {
  Halves half;
  std::memcpy(&half, from, sizeof(half));
#if defined(__AVX512BW__)
  // Each into the upper half of its word, zeros into the lower, in one instruction.
  const __m512i source = _mm512_castsi256_si512(reinterpret_cast<__m256i>(half));
  const __m512i places = _mm512_set_epi16(15, 0, 14, 0, 13, 0, 12, 0, 11, 0, 10, 0, 9, 0, 8, 0, 7,
                                          0, 6, 0, 5, 0, 4, 0, 3, 0, 2, 0, 1, 0, 0, 0);
  return reinterpret_cast<Floats>(_mm512_maskz_permutexvar_epi16(0xAAAAAAAA, places, source));
#else
  return floats(__builtin_convertvector(half, Words) << 16);
#endif
}

inline void store(float* to, Floats x) { std::memcpy(to, &x, sizeof(x)); }

// To the nearest, ties to even.
inline void store(uint16_t* to, Floats x) {
#if defined(__AVX512BF16__)
  const __m256bh half = _mm512_cvtneps_pbh(reinterpret_cast<__m512>(x));
#else
  const Words word = bits(x), rounded = word + 0x7fff + ((word >> 16) & 1);
  // Rounding could carry a NaN into the sign bit.
  const Halves half = __builtin_convertvector((x == x ? rounded : word) >> 16, Halves);
#endif
  std::memcpy(to, &half, sizeof(half));
}

// The first `count` lanes, of memory that ends there; the others are zero.
template <typename T>
Floats load_some(const T* from, int64_t count) {
  if (count >= LANES) return load(from);
  T lanes[LANES] = {};
  std::memcpy(lanes, from, count * sizeof(T));
  return load(lanes);
}

template <typename T>
void store_some(T* to, Floats x, int64_t count) {
  if (count >= LANES) return store(to, x);
  T lanes[LANES];
  store(lanes, x);
  std::memcpy(to, lanes, count * sizeof(T));
}

// Quarters of a vector, each `stride` floats from the one before it.
inline Floats load_quarters(const float* from, int64_t stride) {
#if defined(__AVX512F__)
  __m512 result = _mm512_castps128_ps512(_mm_loadu_ps(from));
  result = _mm512_insertf32x4(result, _mm_loadu_ps(from + stride), 1);
  result = _mm512_insertf32x4(result, _mm_loadu_ps(from + 2 * stride), 2);
  return reinterpret_cast<Floats>(
      _mm512_insertf32x4(result, _mm_loadu_ps(from + 3 * stride), 3));
#else
  float lanes[LANES];
  for (int i = 0; i < 4; ++i) std::memcpy(lanes + 4 * i, from + i * stride, 16);
  return load(lanes);
#endif
}

inline void store_quarters(float* to, int64_t stride, Floats x) {
  float lanes[LANES];
  store(lanes, x);
  for (int i = 0; i < 4; ++i) std::memcpy(to + i * stride, lanes + 4 * i, 16);
}

// Lanes of x and, from LANES on, of y.
#if defined(__clang__)
#define TEN_DIST_SHUFFLE(x, y, ...) __builtin_shufflevector(x, y, __VA_ARGS__)
#else
#define TEN_DIST_SHUFFLE(x, y, ...) __builtin_shuffle(x, y, Ints{__VA_ARGS__})
#endif

// Sums over two lanes each: in every quarter two of x, each followed by one of y.
inline Floats sums_of_pairs(Floats x, Floats y) {
  return TEN_DIST_SHUFFLE(x, y, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29) +
         TEN_DIST_SHUFFLE(x, y, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
}

// In every quarter, the sums over that quarter of a, b, c and d.
inline Floats sums_of_quarters(Floats a, Floats b, Floats c, Floats d) {
  const Floats ab = sums_of_pairs(a, b), cd = sums_of_pairs(c, d);
  return TEN_DIST_SHUFFLE(ab, cd, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
         TEN_DIST_SHUFFLE(ab, cd, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
}

// Sums of two neighbouring quarters: those of x, then those of y.
inline Floats added_quarters(Floats x, Floats y) {
  return TEN_DIST_SHUFFLE(x, y, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
         TEN_DIST_SHUFFLE(x, y, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
}

// x between -limit and limit; a NaN stays one.
inline Floats cut(Floats x, float limit) {
#if defined(__AVX512F__)
  const __m512 most = _mm512_set1_ps(limit), least = _mm512_set1_ps(-limit);
  return reinterpret_cast<Floats>(
      _mm512_max_ps(least, _mm512_min_ps(most, reinterpret_cast<__m512>(x))));
#else
  x = choose(x > limit, all(limit), x);
  return choose(x < -limit, all(-limit), x);
#endif
}

// The larger of x and a limit; a NaN stays one.
inline Floats at_least(Floats x, float limit) {
#if defined(__AVX512F__)
  return reinterpret_cast<Floats>(
      _mm512_max_ps(_mm512_set1_ps(limit), reinterpret_cast<__m512>(x)));
#else
  return choose(x < limit, all(limit), x);
#endif
}

// 2^(scale x) for |scale x| < 126: 2^n p(r), n the nearest whole number, |r| <= 1/2 and p the
// polynomial with the least relative error, 8e-8.
inline Floats power_of_two(Floats x, float scale) {
  // Adding 1.5 * 2^23 rounds to a whole number, which then stands in the lowest bits.
  const Floats shifted = x * scale + 12582912.0f;
  const Floats r = x * scale - (shifted - 12582912.0f);
  Floats p = all(1.327647263e-3f);
  p = p * r + 9.675541343e-3f;
  p = p * r + 5.550713272e-2f;
  p = p * r + 2.402211972e-1f;
  p = p * r + 6.931469671e-1f;
  p = p * r + 1.000000072f;
  return floats(bits(p) + (bits(shifted) << 23));
}

constexpr float LOG2_E = 1.44269504f;

inline Floats exponential(Floats x) { return power_of_two(cut(x, 87.0f), LOG2_E); }

// 1 / x and, for x > 0, 1 / sqrt x, to two units in the last place. A Newton step after the
// processor's estimate takes a third of the time of its division and its root.
inline Floats inverse(Floats x) {
#if defined(__AVX512F__)
  const Floats y = reinterpret_cast<Floats>(_mm512_rcp14_ps(reinterpret_cast<__m512>(x)));
  return y + y * (1.0f - x * y);
#else
  return 1.0f / x;
#endif
}

inline Floats inverse_root(Floats x) {
#if defined(__AVX512F__)
  const Floats y = reinterpret_cast<Floats>(_mm512_rsqrt14_ps(reinterpret_cast<__m512>(x)));
  return y + y * (0.5f - 0.5f * x * y * y);
#else
  Floats result;
  for (int i = 0; i < LANES; ++i) result[i] = 1.0f / std::sqrt(x[i]);
  return result;
#endif
}

}  // namespace ten_dist
