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
#if defined(__AVX512F__)
  const __m512i longer = _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(half));
  const Words word = reinterpret_cast<Words>(longer);
#else
  const Words word = __builtin_convertvector(half, Words);
#endif
  return floats(word << 16);
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

// How near functions of the modulation come: to a few units in the last place of a float, or,
// for modulations in bfloat16, to 1e-4, a fortieth of what their own rounding leaves open.
enum class Accuracy { full, rough };

template <typename T>
constexpr Accuracy accuracy_for = sizeof(T) == 2 ? Accuracy::rough : Accuracy::full;

// 2^(scale x) for |scale x| < 126: 2^n p(r), n the nearest whole number, |r| <= 1/2 and p the
// polynomial with the least relative error: 8e-8, or 1e-4 and exact at 0.
template <Accuracy ACCURACY>
inline Floats power_of_two(Floats x, float scale) {
  // Adding 1.5 * 2^23 rounds to a whole number, which then stands in the lowest bits.
  const Floats shifted = x * scale + 12582912.0f;
  const Floats r = x * scale - (shifted - 12582912.0f);
  Floats p;
  if constexpr (ACCURACY == Accuracy::rough) {
    p = all(5.500877e-2f);
    p = p * r + 2.4221062e-1f;
    p = p * r + 6.9328291e-1f;
    p = p * r + 1.0f;
  } else {
    p = all(1.327647263e-3f);
    p = p * r + 9.675541343e-3f;
    p = p * r + 5.550713272e-2f;
    p = p * r + 2.402211972e-1f;
    p = p * r + 6.931469671e-1f;
    p = p * r + 1.000000072f;
  }
  return floats(bits(p) + (bits(shifted) << 23));
}

constexpr float LOG2_E = 1.44269504f;

inline Floats exponential(Floats x) {
  return power_of_two<Accuracy::full>(cut(x, 87.0f), LOG2_E);
}

// 1 / x and, for x > 0, 1 / sqrt x: the processor's estimate, to 6e-5, and for two units in the
// last place a Newton step, which takes a third of the time of its division and its root.
template <Accuracy ACCURACY>
inline Floats inverse(Floats x) {
#if defined(__AVX512F__)
  const Floats y = reinterpret_cast<Floats>(_mm512_rcp14_ps(reinterpret_cast<__m512>(x)));
  return ACCURACY == Accuracy::rough ? y : y + y * (1.0f - x * y);
#else
  return 1.0f / x;
#endif
}

template <Accuracy ACCURACY>
inline Floats inverse_root(Floats x) {
#if defined(__AVX512F__)
  const Floats y = reinterpret_cast<Floats>(_mm512_rsqrt14_ps(reinterpret_cast<__m512>(x)));
  return ACCURACY == Accuracy::rough ? y : y + y * (0.5f - 0.5f * x * y * y);
#else
  Floats result;
  for (int i = 0; i < LANES; ++i) result[i] = 1.0f / std::sqrt(x[i]);
  return result;
#endif
}

}  // namespace ten_dist
