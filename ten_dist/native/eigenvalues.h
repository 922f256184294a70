// Eigenvalues and input gains of a vector of eigenstates (docs/model.md#scan).

#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "vectors.h"

namespace ten_dist {

// How the modulation enters the eigenvalues of a vector. Where a range is small, what it
// modulates is a short Taylor series in tanh p or tanh q: that of the rotation, or of both.
enum class Modulation { none, narrow, narrow_rotation, wide };
enum class Gain { none, fixed, dynamic };

inline Gain gain_named(const std::string& input_norm) {
  if (input_norm == "none") return Gain::none;
  return input_norm == "static" ? Gain::fixed : Gain::dynamic;
}

// tanh x = 1 - 2 / (e^2x + 1), of two arguments with one division. Cut to +-9, where tanh is
// 1 to the last bit, the product of the denominators stays finite.
inline void tanh_of_both(Floats x, Floats y, Floats& tanh_x, Floats& tanh_y) {
  const Floats a = power_of_two(cut(x, 9.0f), 2 * LOG2_E) + 1.0f;
  const Floats b = power_of_two(cut(y, 9.0f), 2 * LOG2_E) + 1.0f;
  const Floats twice_inverse = 2.0f * inverse(a * b);
  tanh_x = 1.0f - b * twice_inverse;
  tanh_y = 1.0f - a * twice_inverse;
}

// sin and cos: x = n pi/2 + r, |r| <= pi/4, polynomials in r, then the quadrant.
inline void sine_cosine(Floats x, Floats& sine, Floats& cosine) {
  const Floats shifted = x * 0.636619772f + 12582912.0f;
  const Floats n = shifted - 12582912.0f;
  const Floats r = (x - n * 1.5707963705062866f) + n * 4.37113883e-8f;
  const Floats r2 = r * r;
  Floats s = all(2.7557319e-6f);
  s = s * r2 - 1.98412698e-4f;
  s = s * r2 + 8.33333333e-3f;
  s = s * r2 - 1.66666667e-1f;
  s = s * r2 * r + r;
  Floats c = all(-2.7557319e-7f);
  c = c * r2 + 2.48015873e-5f;
  c = c * r2 - 1.38888889e-3f;
  c = c * r2 + 4.16666667e-2f;
  c = c * r2 - 0.5f;
  c = c * r2 + 1.0f;
  const Words quadrant = bits(shifted);
  const Ints odd = (quadrant & 1) != 0;
  sine = floats(bits(choose(odd, c, s)) ^ ((quadrant & 2) << 30));
  cosine = floats(bits(choose(odd, s, c)) ^ (((quadrant + 1) & 2) << 30));
}

// A polynomial of its own for every lane, of x between -1 and 1.
constexpr int TERMS = 5;

struct Series {
  Floats terms[TERMS];

  Floats operator()(Floats x) const {
    Floats value = terms[TERMS - 1];
    for (int i = TERMS - 2; i >= 0; --i) value = value * x + terms[i];
    return value;
  }

  // From the Taylor coefficients of a function of range * x. Of the one too many, x^5 is
  // replaced by what is nearest to it, (20 x^3 - 5 x) / 16, which is off by 1/16 at most.
  void set(int lane, const double (&taylor)[TERMS + 1], double range) {
    static_assert(TERMS == 5);
    double scaled[TERMS + 1], power = 1;
    for (int n = 0; n <= TERMS; ++n, power *= range) scaled[n] = taylor[n] * power;
    scaled[3] += 20.0 / 16 * scaled[5];
    scaled[1] -= 5.0 / 16 * scaled[5];
    for (int n = 0; n < TERMS; ++n) terms[n][lane] = scaled[n];
  }
};

// The largest range of a series. What it leaves out, r^5 / 5! / 16 + r^6 / 6!, is 3e-7 there
// and 7e-9 at the usual 0.1.
constexpr float LARGEST_NARROW_RANGE = 0.2f;

// What belongs to a vector of eigenstates and does not change in time.
struct Base {
  int64_t k;  // of its first lane
  Modulation modulation;
  Floats alpha, cosine, sine, decay_range, rotation_range;
  // Of tanh p: 1 - rho. Of tanh q: real and imaginary part of e^(i phi).
  Series complement, real, imaginary;

  Base() = default;
  Base(const float* alpha_, const float* omega, const float* ranges, int64_t width, int64_t k_)
      : k(k_),
        modulation(!is_narrow(ranges + width + k_) ? Modulation::wide
                   : !is_narrow(ranges + k_)       ? Modulation::narrow_rotation
                                                   : Modulation::narrow),
        alpha(load(alpha_ + k)),
        decay_range(load(ranges + k)),
        rotation_range(load(ranges + width + k)) {
    for (int i = 0; i < LANES; ++i) {
      const double angle = omega[k + i];
      cosine[i] = std::cos(angle);
      sine[i] = std::sin(angle);
      expand_complement(i);
      expand_rotation(i, std::cos(angle), std::sin(angle));
    }
  }

 private:
  static bool is_narrow(const float* ranges) {
    return std::all_of(ranges, ranges + LANES,
                       [](float range) { return std::abs(range) <= LARGEST_NARROW_RANGE; });
  }

  void expand_complement(int lane) {
    // y = 1 - sigmoid(alpha + d) has the derivative y^2 - y, from which follow its
    // coefficients, one after the other.
    double y[TERMS + 1] = {1 / (1 + std::exp(static_cast<double>(alpha[lane])))};
    for (int n = 0; n < TERMS; ++n) {
      double square = 0;
      for (int i = 0; i <= n; ++i) square += y[i] * y[n - i];
      y[n + 1] = (square - y[n]) / (n + 1);
    }
    complement.set(lane, y, decay_range[lane]);
  }

  void expand_rotation(int lane, double x, double y) {
    double real_terms[TERMS + 1], imaginary_terms[TERMS + 1];
    for (int n = 0; n <= TERMS; ++n) {
      real_terms[n] = x;
      imaginary_terms[n] = y;
      // The derivative of e^(i phi) is itself, turned by a right angle.
      const double turned = -y / (n + 1);
      y = x / (n + 1);
      x = turned;
    }
    real.set(lane, real_terms, rotation_range[lane]);
    imaginary.set(lane, imaginary_terms, rotation_range[lane]);
  }
};

// lambda = rho e^(i phi) of one step, with what backward needs of it.
struct Eigenvalue {
  Floats real, imaginary;
  Floats decay, complement;     // rho and 1 - rho
  Floats bounded_p, bounded_q;  // tanh p, tanh q

  Eigenvalue() = default;
  explicit Eigenvalue(const Base& base) : bounded_p{}, bounded_q{} {
    set_decay(base.alpha);
    real = decay * base.cosine;
    imaginary = decay * base.sine;
  }

  Eigenvalue(const Base& base, Floats p, Floats q, Modulation modulation) {
    tanh_of_both(p, q, bounded_p, bounded_q);
    if (modulation == Modulation::narrow) {
      complement = base.complement(bounded_p);
      decay = 1.0f - complement;
    } else {
      set_decay(base.alpha + base.decay_range * bounded_p);
    }
    if (modulation != Modulation::wide) {
      real = decay * base.real(bounded_q);
      imaginary = decay * base.imaginary(bounded_q);
    } else {
      Floats sine, cosine;
      sine_cosine(base.rotation_range * bounded_q, sine, cosine);
      real = decay * (base.cosine * cosine - base.sine * sine);
      imaginary = decay * (base.sine * cosine + base.cosine * sine);
    }
  }

  // g = sqrt(1 - rho^2) without the difference of numbers near 1, and
  // d g / d logit = -rho^2 (1 - rho) / g.
  void gain(Floats& value, Floats& slope) const {
    const Floats square = complement * (1.0f + decay);
    // Of a decay that cannot be told from 1 the gain is 0, and so is its slope.
    const Floats inverse_gain = inverse_root(at_least(square, SMALLEST));
    value = square * inverse_gain;
    slope = -decay * decay * complement * inverse_gain;
  }

 private:
  static constexpr float SMALLEST = std::numeric_limits<float>::min();

  void set_decay(Floats logit) {
    const Floats e = exponential(-logit);
    decay = inverse(1.0f + e);
    complement = e * decay;
  }
};

// What belongs to all eigenstates. Where K is no multiple of LANES the last vector overlaps
// the one before it: what both compute is the same.
inline std::vector<Base> make_bases(const float* alpha, const float* omega,
                                    const float* ranges, int64_t width) {
  std::vector<Base> bases((width + LANES - 1) / LANES);
  at::parallel_for(0, bases.size(), 4, [&](int64_t begin, int64_t end) {
    for (int64_t v = begin; v < end; ++v)
      bases[v] = Base(alpha, omega, ranges, width, std::min(v * LANES, width - LANES));
  });
  return bases;
}

}  // namespace ten_dist
