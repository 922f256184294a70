// The eigenstate scan on CPUs: DESIGN 2.1 forward, and its reverse recurrence backward.
//
// Work is shared out as vectors of LANES eigenstates of each row of the batch. A thread goes
// through time in tiles of a few steps, and through a tile once for each of its vectors: the
// state and what belongs to the eigenstates stay in registers, while memory is read and
// written in whole rows. Eigenvalues are computed again from the modulation wherever they
// are needed, so that nothing of size T x K exists that the caller does not hold.
//
// No step of time depends on how the work was shared out: results are the same to the last
// bit for any number of threads.
//
// Vectors are those of GCC and clang, LANES floats each: the compiler maps them to what the
// processor has. Built without -ffast-math: the rounding below depends on exact sums.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>
#if defined(__AVX512F__) && defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace {

constexpr int LANES = 16;
typedef float Floats __attribute__((vector_size(LANES * 4)));
typedef double Doubles __attribute__((vector_size(LANES * 8)));
typedef int32_t Ints __attribute__((vector_size(LANES * 4)));
typedef uint32_t Words __attribute__((vector_size(LANES * 4)));
typedef uint16_t Halves __attribute__((vector_size(LANES * 2)));

// Steps of a tile, and how far ahead of their use rows are asked for. Sums over time are
// kept in float for a tile, then added up in double.
constexpr int64_t TILE = 16;

// How the modulation enters. NARROW: its ranges are so small that the eigenvalue is a short
// Taylor series in tanh p and tanh q.
enum class Modulation { none, narrow, wide };
enum class Gain { none, fixed, dynamic };

inline Floats all(float value) { return Floats{} + value; }
inline Words bits(Floats x) { return reinterpret_cast<Words>(x); }
inline Floats floats(Words x) { return reinterpret_cast<Floats>(x); }
inline Floats choose(Ints condition, Floats yes, Floats no) { return condition ? yes : no; }

inline Doubles wide(Floats x) { return __builtin_convertvector(x, Doubles); }
inline Floats narrow(Doubles x) { return __builtin_convertvector(x, Floats); }

// bfloat16 is stored as its 16 bits, the upper half of a float.
inline Floats load(const float* from) {
  Floats result;
  std::memcpy(&result, from, sizeof(result));
  return result;
}

inline Floats load(const uint16_t* from) {
  Halves half;
  std::memcpy(&half, from, sizeof(half));
  return floats(__builtin_convertvector(half, Words) << 16);
}

inline void store(float* to, Floats x) { std::memcpy(to, &x, sizeof(x)); }

inline void store(uint16_t* to, Floats x) {
  // To the nearest, ties to even.
#if defined(__AVX512F__) && defined(__AVX512BF16__)
  const __m256bh half = _mm512_cvtneps_pbh(reinterpret_cast<__m512>(x));
#else
  const Words w = bits(x);
  const Words rounded = (w + 0x7fff + ((w >> 16) & 1)) >> 16;
  // Rounding could carry a NaN into the sign bit.
  const Halves half = __builtin_convertvector(x == x ? rounded : (w >> 16) | 0x40, Halves);
#endif
  std::memcpy(to, &half, sizeof(half));
}

// x between -limit and limit; a NaN stays one.
inline Floats cut(Floats x, float limit) {
  x = choose(x > limit, all(limit), x);
  return choose(x < -limit, all(-limit), x);
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

// tanh x = 1 - 2 / (e^2x + 1), of two arguments with one division. Cut to +-9, where tanh is
// 1 to the last bit, the product of the denominators stays finite.
inline void tanh_of_both(Floats x, Floats y, Floats& tanh_x, Floats& tanh_y) {
  const Floats a = power_of_two(cut(x, 9.0f), 2 * LOG2_E) + 1.0f;
  const Floats b = power_of_two(cut(y, 9.0f), 2 * LOG2_E) + 1.0f;
  const Floats twice_inverse = 2.0f / (a * b);
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

inline Floats root(Floats x) {
  Floats result;
  for (int i = 0; i < LANES; ++i) result[i] = std::sqrt(x[i]);
  return result;
}

// A polynomial of its own for every lane.
constexpr int TERMS = 6;

struct Series {
  Floats terms[TERMS];

  Floats operator()(Floats x) const {
    Floats value = terms[TERMS - 1];
    for (int i = TERMS - 2; i >= 0; --i) value = value * x + terms[i];
    return value;
  }
};

// The largest range of a series: what it leaves out, 0.2^6 / 6! = 9e-8, is below the
// resolution of float.
constexpr float LARGEST_NARROW_RANGE = 0.2f;

// What belongs to a vector of eigenstates and does not change in time.
struct Base {
  Floats alpha, cosine, sine, decay_range, rotation_range;
  // Of tanh p: 1 - rho. Of tanh q: real and imaginary part of e^(i phi).
  Series complement, real, imaginary;

  Base(const float* alpha_, const float* omega, const float* ranges, int64_t width, int64_t k)
      : alpha(load(alpha_ + k)),
        decay_range(load(ranges + k)),
        rotation_range(load(ranges + width + k)) {
    for (int i = 0; i < LANES; ++i) {
      cosine[i] = std::cos(static_cast<double>(omega[k + i]));
      sine[i] = std::sin(static_cast<double>(omega[k + i]));
      expand_complement(i);
      expand_rotation(i, omega[k + i]);
    }
  }

 private:
  void expand_complement(int lane) {
    // y = 1 - sigmoid(alpha + d) has the derivative y^2 - y, from which follow its
    // coefficients, one after the other.
    double y[TERMS] = {1 / (1 + std::exp(static_cast<double>(alpha[lane])))};
    double power = 1;
    for (int n = 0; n < TERMS; ++n) {
      complement.terms[n][lane] = y[n] * power;
      power *= decay_range[lane];
      if (n + 1 == TERMS) break;
      double square = 0;
      for (int i = 0; i <= n; ++i) square += y[i] * y[n - i];
      y[n + 1] = (square - y[n]) / (n + 1);
    }
  }

  void expand_rotation(int lane, double angle) {
    double power = 1;
    for (int n = 0; n < TERMS; ++n) {
      // Each derivative turns by a right angle.
      real.terms[n][lane] = power * std::cos(angle + n * M_PI_2);
      imaginary.terms[n][lane] = power * std::sin(angle + n * M_PI_2);
      power *= rotation_range[lane] / (n + 1);
    }
  }
};

// lambda = rho e^(i phi) of one step, with what backward needs of it.
struct Eigenvalue {
  Floats real, imaginary;
  Floats decay, complement;     // rho and 1 - rho
  Floats bounded_p, bounded_q;  // tanh p, tanh q

  explicit Eigenvalue(const Base& base) : bounded_p{}, bounded_q{} {
    set_decay(base.alpha);
    real = decay * base.cosine;
    imaginary = decay * base.sine;
  }

  Eigenvalue(const Base& base, Floats p, Floats q, bool narrow) {
    tanh_of_both(p, q, bounded_p, bounded_q);
    if (narrow) {
      complement = base.complement(bounded_p);
      decay = 1.0f - complement;
      real = decay * base.real(bounded_q);
      imaginary = decay * base.imaginary(bounded_q);
    } else {
      set_decay(base.alpha + base.decay_range * bounded_p);
      Floats sine, cosine;
      sine_cosine(base.rotation_range * bounded_q, sine, cosine);
      real = decay * (base.cosine * cosine - base.sine * sine);
      imaginary = decay * (base.sine * cosine + base.cosine * sine);
    }
  }

  // sqrt(1 - rho^2) without the difference of numbers near 1.
  Floats gain() const { return root(complement * (1.0f + decay)); }
  // d gain / d logit = -rho^2 sqrt((1 - rho) / (1 + rho)).
  Floats gain_slope() const { return -decay * decay * root(complement / (1.0f + decay)); }

 private:
  void set_decay(Floats logit) {
    const Floats e = exponential(-logit);
    decay = 1.0f / (1.0f + e);
    complement = e * decay;
  }
};

// A [B, T, 2K] tensor whose last dimension is contiguous.
template <typename T>
struct Sequence {
  T* data = nullptr;
  int64_t batch_stride = 0, step_stride = 0, width = 0;

  Sequence() = default;
  explicit Sequence(const at::Tensor& tensor)
      : data(static_cast<T*>(tensor.data_ptr())),
        batch_stride(tensor.stride(0)),
        step_stride(tensor.stride(1)),
        width(tensor.size(2) / 2) {}

  T* at(int64_t b, int64_t t, int64_t k) const {
    return data + b * batch_stride + t * step_stride + k;
  }
  void ask(int64_t b, int64_t t, int64_t k) const {
    __builtin_prefetch(at(b, t, k));
    __builtin_prefetch(at(b, t, k + width));
  }
  Floats first(int64_t b, int64_t t, int64_t k) const { return load(at(b, t, k)); }
  Floats second(int64_t b, int64_t t, int64_t k) const { return load(at(b, t, k + width)); }
  void set(int64_t b, int64_t t, int64_t k, Floats x, Floats y) const {
    store(at(b, t, k), x);
    store(at(b, t, k + width), y);
  }
};

// Calls `body(b, columns)`: row b of the batch, and the first columns of vectors of its
// eigenstates. Where K is no multiple of LANES the last vector overlaps the one before it,
// whose thread takes both: lanes of both compute and write the same.
template <typename Body>
void share_out(int64_t batch, int64_t width, const Body& body) {
  const int64_t vectors = width / LANES;
  at::parallel_for(0, batch * vectors, 1, [&](int64_t begin, int64_t end) {
    std::vector<int64_t> columns;
    for (int64_t b = begin / vectors; b * vectors < end; ++b) {
      columns.clear();
      const int64_t last = std::min(end - b * vectors, vectors);
      for (int64_t v = std::max<int64_t>(begin - b * vectors, 0); v < last; ++v)
        columns.push_back(v * LANES);
      if (last == vectors && width % LANES != 0) columns.push_back(width - LANES);
      body(b, columns);
    }
  });
}

template <typename T, Modulation MODULATION, Gain GAIN>
void forward(const at::Tensor& beta_, const float* alpha, const float* omega,
             const at::Tensor& modulation_, const float* ranges, const float* initial,
             const at::Tensor& states_, float* final, float* energy) {
  constexpr bool MODULATED = MODULATION != Modulation::none;
  const Sequence<T> beta(beta_), states(states_);
  const Sequence<T> modulation = MODULATED ? Sequence<T>(modulation_) : Sequence<T>();
  const int64_t steps = beta_.size(1), width = beta.width;

  struct Vector {
    int64_t k;
    Base base;
    Floats real{}, imaginary{};
    Doubles squares{};
  };
  const auto run_tile = [&](Vector& vector, int64_t b, int64_t begin, int64_t end) {
    const int64_t k = vector.k;
    const Base base = vector.base;
    const Eigenvalue fixed(base);
    const Floats fixed_gain = fixed.gain();
    Floats real = vector.real, imaginary = vector.imaginary, squares{};
    for (int64_t t = begin; t < end; ++t) {
      const int64_t soon = std::min(t + TILE, steps - 1);
      beta.ask(b, soon, k);
      Eigenvalue value = fixed;
      if constexpr (MODULATED) {
        modulation.ask(b, soon, k);
        value = Eigenvalue(base, modulation.first(b, t, k), modulation.second(b, t, k),
                           MODULATION == Modulation::narrow);
      }
      Floats drive_real = beta.first(b, t, k), drive_imaginary = beta.second(b, t, k);
      if constexpr (GAIN != Gain::none) {
        const Floats gain = GAIN == Gain::fixed ? fixed_gain : value.gain();
        drive_real *= gain;
        drive_imaginary *= gain;
      }
      const Floats before = real;
      real = value.real * before - value.imaginary * imaginary + drive_real;
      imaginary = value.real * imaginary + value.imaginary * before + drive_imaginary;
      states.set(b, t, k, real, imaginary);
      squares += real * real + imaginary * imaginary;
    }
    vector.real = real;
    vector.imaginary = imaginary;
    vector.squares += wide(squares);
  };
  share_out(beta_.size(0), width, [&](int64_t b, const std::vector<int64_t>& columns) {
    const int64_t row = b * 2 * width;
    std::vector<Vector> vectors;
    for (const int64_t k : columns) {
      vectors.push_back({k, Base(alpha, omega, ranges, width, k)});
      if (initial != nullptr) {
        vectors.back().real = load(initial + row + k);
        vectors.back().imaginary = load(initial + row + width + k);
      }
    }
    for (int64_t begin = 0; begin < steps; begin += TILE)
      for (Vector& vector : vectors)
        run_tile(vector, b, begin, std::min(begin + TILE, steps));
    for (const Vector& vector : vectors) {
      store(energy + b * width + vector.k,
            narrow(vector.squares));
      store(final + row + vector.k, vector.real);
      store(final + row + width + vector.k, vector.imaginary);
    }
  });
}

// With w the gradient of the states, G_t = w_t + conj(lambda_{t+1}) G_{t+1} and
// z_t = conj(G_t) lambda_t c_{t-1}; the energy adds 2 c_t times its gradient to w_t.
template <typename T, Modulation MODULATION, Gain GAIN>
void backward(const at::Tensor& beta_, const float* alpha, const float* omega,
              const at::Tensor& modulation_, const float* ranges, const float* initial,
              const at::Tensor& states_, const at::Tensor& grad_states_,
              const float* grad_final, const float* grad_energy,
              const at::Tensor& grad_beta_, const at::Tensor& grad_modulation_,
              float* grad_base, float* grad_initial) {
  constexpr bool MODULATED = MODULATION != Modulation::none;
  const Sequence<T> beta(beta_), states(states_), grad_states(grad_states_);
  const Sequence<T> grad_beta(grad_beta_);
  const Sequence<T> modulation = MODULATED ? Sequence<T>(modulation_) : Sequence<T>();
  const Sequence<T> grad_modulation =
      MODULATED ? Sequence<T>(grad_modulation_) : Sequence<T>();
  const int64_t steps = beta_.size(1), width = beta.width;

  struct Vector {
    int64_t k;
    Base base;
    Floats energy_weight;
    // conj(lambda_{t+1}) G_{t+1}; after the last step, the gradient of the final state.
    Floats carried_real, carried_imaginary;
    Floats real, imaginary;  // c_t
    Doubles sums[4] = {};  // of d logit, d rotation, and their products with tanh p and tanh q
  };
  const auto run_tile = [&](Vector& vector, int64_t b, int64_t begin, int64_t end) {
    const int64_t k = vector.k, row = b * 2 * width + k;
    const Base base = vector.base;
    const Eigenvalue fixed(base);
    const Floats fixed_gain = fixed.gain(), fixed_slope = fixed.gain_slope();
    const Floats energy_weight = vector.energy_weight;
    Floats carried_real = vector.carried_real, carried_imaginary = vector.carried_imaginary;
    Floats real = vector.real, imaginary = vector.imaginary;
    Floats sums[4] = {};
    for (int64_t t = end - 1; t >= begin; --t) {
      const int64_t soon = std::max<int64_t>(t - TILE, 0);
      grad_states.ask(b, soon, k);
      states.ask(b, soon, k);
      Eigenvalue value = fixed;
      if constexpr (MODULATED) {
        modulation.ask(b, soon, k);
        value = Eigenvalue(base, modulation.first(b, t, k), modulation.second(b, t, k),
                           MODULATION == Modulation::narrow);
      }
      Floats before_real{}, before_imaginary{};
      if (t > 0) {
        before_real = states.first(b, t - 1, k);
        before_imaginary = states.second(b, t - 1, k);
      } else if (initial != nullptr) {
        before_real = load(initial + row);
        before_imaginary = load(initial + row + width);
      }
      const Floats adjoint_real =
          grad_states.first(b, t, k) + energy_weight * real + carried_real;
      const Floats adjoint_imaginary =
          grad_states.second(b, t, k) + energy_weight * imaginary + carried_imaginary;
      // lambda_t c_{t-1}, then z_t.
      const Floats moved_real = value.real * before_real - value.imaginary * before_imaginary;
      const Floats moved_imaginary =
          value.real * before_imaginary + value.imaginary * before_real;
      Floats grad_logit =
          value.complement * (adjoint_real * moved_real + adjoint_imaginary * moved_imaginary);
      const Floats grad_rotation =
          adjoint_imaginary * moved_real - adjoint_real * moved_imaginary;
      if constexpr (GAIN == Gain::none) {
        grad_beta.set(b, t, k, adjoint_real, adjoint_imaginary);
      } else {
        beta.ask(b, soon, k);
        const Floats gain = GAIN == Gain::fixed ? fixed_gain : value.gain();
        const Floats slope = GAIN == Gain::fixed ? fixed_slope : value.gain_slope();
        const Floats grad_gain = adjoint_real * beta.first(b, t, k) +
                                 adjoint_imaginary * beta.second(b, t, k);
        grad_beta.set(b, t, k, gain * adjoint_real, gain * adjoint_imaginary);
        // The fixed gain depends on alpha alone, not on the modulated logit.
        if constexpr (GAIN == Gain::fixed)
          sums[0] += slope * grad_gain;
        else
          grad_logit += slope * grad_gain;
      }
      sums[0] += grad_logit;
      sums[1] += grad_rotation;
      if constexpr (MODULATED) {
        sums[2] += value.bounded_p * grad_logit;
        sums[3] += value.bounded_q * grad_rotation;
        grad_modulation.set(
            b, t, k,
            base.decay_range * (1.0f - value.bounded_p * value.bounded_p) * grad_logit,
            base.rotation_range * (1.0f - value.bounded_q * value.bounded_q) * grad_rotation);
      }
      carried_real = value.real * adjoint_real + value.imaginary * adjoint_imaginary;
      carried_imaginary = value.real * adjoint_imaginary - value.imaginary * adjoint_real;
      real = before_real;
      imaginary = before_imaginary;
    }
    vector.carried_real = carried_real;
    vector.carried_imaginary = carried_imaginary;
    vector.real = real;
    vector.imaginary = imaginary;
    for (int s = 0; s < 4; ++s) vector.sums[s] += wide(sums[s]);
  };
  share_out(beta_.size(0), width, [&](int64_t b, const std::vector<int64_t>& columns) {
    const int64_t row = b * 2 * width;
    std::vector<Vector> vectors;
    for (const int64_t k : columns)
      vectors.push_back({k, Base(alpha, omega, ranges, width, k),
                         2.0f * load(grad_energy + b * width + k), load(grad_final + row + k),
                         load(grad_final + row + width + k), states.first(b, steps - 1, k),
                         states.second(b, steps - 1, k)});
    for (int64_t end = steps; end > 0; end -= TILE)
      for (Vector& vector : vectors)
        run_tile(vector, b, std::max<int64_t>(end - TILE, 0), end);
    for (const Vector& vector : vectors) {
      for (int s = 0; s < 4; ++s)
        store(grad_base + (b * 4 + s) * width + vector.k,
              narrow(vector.sums[s]));
      store(grad_initial + row + vector.k, vector.carried_real);
      store(grad_initial + row + width + vector.k, vector.carried_imaginary);
    }
  });
}

// Calls `body` with the element type, the kind of modulation and of gain, each as a type, so
// that the loops over time are compiled for every combination.
template <typename Body>
void dispatch(const at::Tensor& beta, bool modulated, const at::Tensor& ranges,
              const std::string& input_norm, const Body& body) {
  const auto with_gain = [&](auto element, auto modulation) {
    if (input_norm == "none")
      body(element, modulation, std::integral_constant<Gain, Gain::none>());
    else if (input_norm == "static")
      body(element, modulation, std::integral_constant<Gain, Gain::fixed>());
    else
      body(element, modulation, std::integral_constant<Gain, Gain::dynamic>());
  };
  const auto with_modulation = [&](auto element) {
    if (!modulated)
      with_gain(element, std::integral_constant<Modulation, Modulation::none>());
    else if (ranges.abs().max().item<float>() <= LARGEST_NARROW_RANGE)
      with_gain(element, std::integral_constant<Modulation, Modulation::narrow>());
    else
      with_gain(element, std::integral_constant<Modulation, Modulation::wide>());
  };
  if (beta.scalar_type() == at::kBFloat16)
    with_modulation(uint16_t());
  else
    with_modulation(float());
}

const float* pointer(const at::Tensor& tensor) { return tensor.const_data_ptr<float>(); }
const float* pointer(const std::optional<at::Tensor>& tensor) {
  return tensor ? tensor->const_data_ptr<float>() : nullptr;
}

// Fewer eigenstates than a vector has lanes are filled up with zeros, and cut off again.
at::Tensor filled_up(const at::Tensor& tensor, int64_t parts) {
  const int64_t width = tensor.size(-1) / parts;
  return at::constant_pad_nd(tensor.unflatten(-1, {parts, width}), {0, LANES - width})
      .flatten(-2);
}

std::optional<at::Tensor> filled_up(const std::optional<at::Tensor>& tensor, int64_t parts) {
  if (!tensor) return tensor;
  return filled_up(*tensor, parts);
}

at::Tensor cut_off(const at::Tensor& tensor, int64_t parts, int64_t width) {
  return tensor.unflatten(-1, {parts, LANES}).narrow(-1, 0, width).flatten(-2).clone();
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> scan_forward(
    const at::Tensor& beta, const at::Tensor& alpha, const at::Tensor& omega,
    const at::Tensor& ranges, const std::optional<at::Tensor>& modulation,
    const std::optional<at::Tensor>& initial, const std::string& input_norm) {
  const auto options = beta.options().dtype(at::kFloat);
  const int64_t batch = beta.size(0), width = beta.size(2) / 2;
  if (width < LANES) {
    const auto [states, final, energy] = scan_forward(
        filled_up(beta, 2), filled_up(alpha, 1), filled_up(omega, 1), filled_up(ranges, 1),
        filled_up(modulation, 2), filled_up(initial, 2), input_norm);
    return {cut_off(states, 2, width), cut_off(final, 2, width), cut_off(energy, 1, width)};
  }
  at::Tensor states = at::empty(beta.sizes(), beta.options());
  at::Tensor final = at::empty({batch, 2 * width}, options);
  at::Tensor energy = at::empty({batch, width}, options);
  dispatch(beta, modulation.has_value(), ranges, input_norm, [&](auto element, auto kind, auto gain) {
    forward<decltype(element), decltype(kind)::value, decltype(gain)::value>(
        beta, pointer(alpha), pointer(omega), modulation.value_or(at::Tensor()),
        pointer(ranges), pointer(initial), states, final.mutable_data_ptr<float>(),
        energy.mutable_data_ptr<float>());
  });
  return {states, final, energy};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> scan_backward(
    const at::Tensor& grad_states, const at::Tensor& grad_final,
    const at::Tensor& grad_energy, const at::Tensor& states, const at::Tensor& beta,
    const at::Tensor& alpha, const at::Tensor& omega, const at::Tensor& ranges,
    const std::optional<at::Tensor>& modulation, const std::optional<at::Tensor>& initial,
    const std::string& input_norm) {
  const auto options = beta.options().dtype(at::kFloat);
  const int64_t batch = beta.size(0), width = beta.size(2) / 2;
  if (width < LANES) {
    const auto [grad_beta, grad_modulation, grad_base, grad_initial] = scan_backward(
        filled_up(grad_states, 2), filled_up(grad_final, 2), filled_up(grad_energy, 1),
        filled_up(states, 2), filled_up(beta, 2), filled_up(alpha, 1), filled_up(omega, 1),
        filled_up(ranges, 1), filled_up(modulation, 2), filled_up(initial, 2), input_norm);
    return {cut_off(grad_beta, 2, width),
            modulation ? cut_off(grad_modulation, 2, width) : grad_modulation,
            cut_off(grad_base, 1, width), cut_off(grad_initial, 2, width)};
  }
  at::Tensor grad_beta = at::empty(beta.sizes(), beta.options());
  at::Tensor grad_modulation =
      modulation ? at::empty(beta.sizes(), beta.options()) : at::empty({0}, beta.options());
  // Of alpha, omega and the two ranges, a row of the batch each: added up in one order,
  // whatever the number of threads.
  at::Tensor grad_base = at::empty({batch, 4, width}, options);
  at::Tensor grad_initial = at::empty({batch, 2 * width}, options);
  dispatch(beta, modulation.has_value(), ranges, input_norm, [&](auto element, auto kind, auto gain) {
    backward<decltype(element), decltype(kind)::value, decltype(gain)::value>(
        beta, pointer(alpha), pointer(omega), modulation.value_or(at::Tensor()),
        pointer(ranges), pointer(initial), states, grad_states, pointer(grad_final),
        pointer(grad_energy), grad_beta, grad_modulation,
        grad_base.mutable_data_ptr<float>(), grad_initial.mutable_data_ptr<float>());
  });
  return {grad_beta, grad_modulation, grad_base.sum(0), grad_initial};
}

}  // namespace

TORCH_LIBRARY(ten_dist_cpu, library) {
  library.def(
      "scan_forward(Tensor beta, Tensor alpha, Tensor omega, Tensor ranges, "
      "Tensor? modulation, Tensor? initial, str input_norm) -> (Tensor, Tensor, Tensor)");
  library.def(
      "scan_backward(Tensor grad_states, Tensor grad_final, Tensor grad_energy, "
      "Tensor states, Tensor beta, Tensor alpha, Tensor omega, Tensor ranges, "
      "Tensor? modulation, Tensor? initial, str input_norm) "
      "-> (Tensor, Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(ten_dist_cpu, CPU, library) {
  library.impl("scan_forward", &scan_forward);
  library.impl("scan_backward", &scan_backward);
}
