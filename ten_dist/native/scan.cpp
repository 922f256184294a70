// The eigenstate scan on CPUs, forward, and its reverse recurrence backward (docs/model.md#scan).
//
// Work is shared out as vectors of LANES eigenstates of each row of the batch. A thread goes
// through time in tiles of a few steps, and through a tile once for each of its vectors: the
// state and what belongs to the eigenstates stay in registers, while memory is read and
// written in whole rows. Eigenvalues are computed again from the modulation wherever they
// are needed, so that nothing of size T x K exists that the caller does not hold.
//
// No step of time depends on how the work was shared out: results are the same to the last
// bit for any number of threads.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include "vectors.h"

namespace {

using namespace ten_dist;

// Steps of a tile, and how far ahead of their use rows are asked for. Sums over time are
// kept in float for a tile, then added up in double.
constexpr int64_t TILE = 16;

// How the modulation enters the eigenvalues of a vector. Where a range is small, what it
// modulates is a short Taylor series in tanh p or tanh q: that of the rotation, or of both.
enum class Modulation { none, narrow, narrow_rotation, wide };
enum class Gain { none, fixed, dynamic };

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

// A vector of eigenstates of a [B, T, 2K] tensor whose last dimension is contiguous: real
// and imaginary parts at one step, or what else stands in the two halves of the row.
template <typename T>
struct Place {
  static constexpr int WRITE = !std::is_const_v<T>;
  T* at;
  int64_t step, half;

  void move(int64_t steps) { at += steps * step; }
  // Asks for a place of the future, to read or to write it; one outside the tensor does no
  // harm. What is to be read comes into the second cache only: two tiles of all tensors are
  // more than the first one holds.
  void ask(int64_t steps) const {
    __builtin_prefetch(at + steps * step, WRITE, 2);
    __builtin_prefetch(at + steps * step + half, WRITE, 2);
  }
  Floats first() const { return load(at); }
  Floats second() const { return load(at + half); }
  void set(Floats x, Floats y) const {
    store(at, x);
    store(at + half, y);
  }
};

// The tensor itself, or one that is not there.
template <typename T>
struct Sequence {
  T* data = nullptr;
  int64_t batch = 0, steps = 0, half = 0;
  int64_t row = 0, step = 0;  // strides

  Sequence(const at::Tensor& tensor) {
    if (!tensor.defined()) return;
    data = static_cast<T*>(tensor.data_ptr());
    batch = tensor.size(0);
    steps = tensor.size(1);
    half = tensor.size(2) / 2;
    row = tensor.stride(0);
    step = tensor.stride(1);
  }

  Place<T> operator()(int64_t b, int64_t t, int64_t k) const {
    return {data + b * row + t * step + k, step, half};
  }
};

// What belongs to all eigenstates. Where K is no multiple of LANES the last vector overlaps
// the one before it: what both compute is the same.
std::vector<Base> make_bases(const float* alpha, const float* omega, const float* ranges,
                             int64_t width) {
  std::vector<Base> bases((width + LANES - 1) / LANES);
  at::parallel_for(0, bases.size(), 4, [&](int64_t begin, int64_t end) {
    for (int64_t v = begin; v < end; ++v)
      bases[v] = Base(alpha, omega, ranges, width, std::min(v * LANES, width - LANES));
  });
  return bases;
}

// Calls `body(b, first, last)` for all rows of the batch and vectors of eigenstates, with a
// range of `bases`. Vectors that overlap are in the same range: one thread writes both.
template <typename Body>
void share_out(int64_t batch, int64_t width, const std::vector<Base>& bases,
               const Body& body) {
  const int64_t shares = width / LANES;
  at::parallel_for(0, batch * shares, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin / shares; b * shares < end; ++b) {
      const int64_t first = std::max<int64_t>(begin - b * shares, 0);
      const int64_t last = std::min(end - b * shares, shares);
      body(b, bases.begin() + first, last == shares ? bases.end() : bases.begin() + last);
    }
  });
}

// Steps before which the state is dropped, [B, T], or none. The loops over time know nothing
// of them: they run over the stretches between two of them.
struct Resets {
  const bool* data;
  int64_t steps;

  explicit Resets(const std::optional<at::Tensor>& tensor)
      : data(tensor ? tensor->const_data_ptr<bool>() : nullptr),
        steps(tensor ? tensor->size(1) : 0) {}

  bool at(int64_t b, int64_t t) const { return data != nullptr && data[b * steps + t]; }

  // Calls `body(from, to)` for the stretches of [begin, end), in the order of time: each
  // begins with a reset, but perhaps the first.
  template <typename Body>
  void forward(int64_t b, int64_t begin, int64_t end, const Body& body) const {
    for (int64_t from = begin, to; from < end; from = to) {
      to = data == nullptr ? end : from + 1;
      while (to < end && !at(b, to)) ++to;
      body(from, to);
    }
  }

  // The same against time.
  template <typename Body>
  void backward(int64_t b, int64_t begin, int64_t end, const Body& body) const {
    for (int64_t from, to = end; to > begin; to = from) {
      from = data == nullptr ? begin : to - 1;
      while (from > begin && !at(b, from)) --from;
      body(from, to);
    }
  }
};

// Calls `body` with how the eigenvalues of a vector are modulated, as a type: the loop over
// time is compiled for each.
template <bool MODULATED, typename Body>
void with_modulation(const Base& base, const Body& body) {
  if constexpr (!MODULATED)
    body(std::integral_constant<Modulation, Modulation::none>());
  else if (base.modulation == Modulation::narrow)
    body(std::integral_constant<Modulation, Modulation::narrow>());
  else if (base.modulation == Modulation::narrow_rotation)
    body(std::integral_constant<Modulation, Modulation::narrow_rotation>());
  else
    body(std::integral_constant<Modulation, Modulation::wide>());
}

template <typename T, bool MODULATED, Gain GAIN>
void forward(const Sequence<const T>& beta_, const std::vector<Base>& bases,
             const Sequence<const T>& modulation_, const float* initial, const Resets& resets,
             const Sequence<T>& states_, float* final, float* energy) {
  const int64_t steps = beta_.steps, width = beta_.half;

  struct Vector {
    const Base* base;
    Floats real{}, imaginary{};
    Doubles squares{};
  };
  const auto run_tile = [&](auto kind, Vector& vector, int64_t b, int64_t begin, int64_t end) {
    constexpr Modulation MODULATION = kind;
    const Base base = *vector.base;
    Place<const T> beta = beta_(b, begin, base.k);
    Place<const T> modulation = modulation_(b, begin, base.k);
    Place<T> states = states_(b, begin, base.k);
    const Eigenvalue fixed(base);
    Floats gain, slope;
    fixed.gain(gain, slope);
    Floats real = vector.real, imaginary = vector.imaginary, squares{};
    // Vectors that share a cache line need not ask for it each.
    const bool asks = base.k * sizeof(T) % 64 == 0;
    for (int64_t t = begin; t < end; ++t) {
      if (asks) {
        beta.ask(TILE);
        states.ask(TILE);
        if constexpr (MODULATION != Modulation::none) modulation.ask(TILE);
      }
      Eigenvalue value = fixed;
      if constexpr (MODULATION != Modulation::none) {
        value = Eigenvalue(base, modulation.first(), modulation.second(), MODULATION);
        modulation.move(1);
      }
      Floats drive_real = beta.first(), drive_imaginary = beta.second();
      if constexpr (GAIN == Gain::dynamic) value.gain(gain, slope);
      if constexpr (GAIN != Gain::none) {
        drive_real *= gain;
        drive_imaginary *= gain;
      }
      const Floats before = real;
      real = value.real * before - value.imaginary * imaginary + drive_real;
      imaginary = value.real * imaginary + value.imaginary * before + drive_imaginary;
      states.set(real, imaginary);
      squares += real * real + imaginary * imaginary;
      beta.move(1);
      states.move(1);
    }
    vector.real = real;
    vector.imaginary = imaginary;
    vector.squares += wide(squares);
  };
  share_out(beta_.batch, width, bases, [&](int64_t b, auto first, auto last) {
    const int64_t row = b * 2 * width;
    std::vector<Vector> vectors;
    for (auto base = first; base != last; ++base) {
      vectors.push_back({&*base});
      if (initial != nullptr) {
        vectors.back().real = load(initial + row + base->k);
        vectors.back().imaginary = load(initial + row + width + base->k);
      }
    }
    for (int64_t begin = 0; begin < steps; begin += TILE)
      for (Vector& vector : vectors)
        with_modulation<MODULATED>(*vector.base, [&](auto kind) {
          resets.forward(b, begin, std::min(begin + TILE, steps), [&](int64_t from, int64_t to) {
            if (resets.at(b, from)) vector.real = vector.imaginary = Floats{};
            run_tile(kind, vector, b, from, to);
          });
        });
    for (const Vector& vector : vectors) {
      store(energy + b * width + vector.base->k, __builtin_convertvector(vector.squares, Floats));
      store(final + row + vector.base->k, vector.real);
      store(final + row + width + vector.base->k, vector.imaginary);
    }
  });
}

// With w the gradient of the states, G_t = w_t + conj(lambda_{t+1}) G_{t+1} and
// z_t = conj(G_t) lambda_t c_{t-1}; the energy adds 2 c_t times its gradient to w_t. Where
// there is a reset at t, lambda_t is zero in both.
template <typename T, bool MODULATED, Gain GAIN>
void backward(const Sequence<const T>& beta_, const std::vector<Base>& bases,
              const Sequence<const T>& modulation_, const float* initial,
              const Resets& resets, const Sequence<const T>& states_,
              const Sequence<const T>& grad_states_,
              const float* grad_final, const float* grad_energy,
              const Sequence<T>& grad_beta_, const Sequence<T>& grad_modulation_,
              float* grad_base, float* grad_initial) {
  const int64_t steps = beta_.steps, width = beta_.half;

  struct Vector {
    const Base* base;
    Floats energy_weight;
    // conj(lambda_{t+1}) G_{t+1}; after the last step, the gradient of the final state.
    // Before a reset it is zero.
    Floats carried_real, carried_imaginary;
    Floats real, imaginary;  // c_t
    Doubles sums[4] = {};  // of d logit, d rotation, and their products with tanh p and tanh q
  };
  const auto run_tile = [&](auto kind, Vector& vector, int64_t b, int64_t begin, int64_t end) {
    constexpr Modulation MODULATION = kind;
    const Base base = *vector.base;
    const int64_t k = base.k, row = b * 2 * width + k;
    const bool reset = resets.at(b, begin);
    const int64_t first = reset ? begin : 0;  // no state comes before it
    Place<const T> beta = beta_(b, end - 1, k);
    Place<const T> modulation = modulation_(b, end - 1, k);
    Place<const T> states_before = states_(b, end - 2, k);
    Place<const T> grad_states = grad_states_(b, end - 1, k);
    Place<T> grad_beta = grad_beta_(b, end - 1, k);
    Place<T> grad_modulation = grad_modulation_(b, end - 1, k);
    const Eigenvalue fixed(base);
    Floats gain, slope;
    fixed.gain(gain, slope);
    const Floats energy_weight = vector.energy_weight;
    Floats carried_real = vector.carried_real, carried_imaginary = vector.carried_imaginary;
    Floats real = vector.real, imaginary = vector.imaginary;
    Floats sums[4] = {};
    for (int64_t t = end - 1; t >= begin; --t) {
      grad_states.ask(-TILE);
      states_before.ask(-TILE);
      Eigenvalue value = fixed;
      if constexpr (MODULATION != Modulation::none) {
        modulation.ask(-TILE);
        value = Eigenvalue(base, modulation.first(), modulation.second(), MODULATION);
        modulation.move(-1);
      }
      Floats before_real{}, before_imaginary{};
      if (t > first) {
        before_real = states_before.first();
        before_imaginary = states_before.second();
      } else if (initial != nullptr && !reset) {
        before_real = load(initial + row);
        before_imaginary = load(initial + row + width);
      }
      const Floats adjoint_real = grad_states.first() + energy_weight * real + carried_real;
      const Floats adjoint_imaginary =
          grad_states.second() + energy_weight * imaginary + carried_imaginary;
      // lambda_t c_{t-1}, then z_t.
      const Floats moved_real = value.real * before_real - value.imaginary * before_imaginary;
      const Floats moved_imaginary =
          value.real * before_imaginary + value.imaginary * before_real;
      Floats grad_logit =
          value.complement * (adjoint_real * moved_real + adjoint_imaginary * moved_imaginary);
      const Floats grad_rotation =
          adjoint_imaginary * moved_real - adjoint_real * moved_imaginary;
      if constexpr (GAIN == Gain::none) {
        grad_beta.set(adjoint_real, adjoint_imaginary);
      } else {
        beta.ask(-TILE);
        if constexpr (GAIN == Gain::dynamic) value.gain(gain, slope);
        const Floats grad_gain =
            adjoint_real * beta.first() + adjoint_imaginary * beta.second();
        grad_beta.set(gain * adjoint_real, gain * adjoint_imaginary);
        // The fixed gain depends on alpha alone, not on the modulated logit.
        if constexpr (GAIN == Gain::fixed)
          sums[0] += slope * grad_gain;
        else
          grad_logit += slope * grad_gain;
        beta.move(-1);
      }
      sums[0] += grad_logit;
      sums[1] += grad_rotation;
      if constexpr (MODULATION != Modulation::none) {
        const Floats by_p = value.bounded_p * grad_logit, by_q = value.bounded_q * grad_rotation;
        sums[2] += by_p;
        sums[3] += by_q;
        grad_modulation.set(base.decay_range * (grad_logit - value.bounded_p * by_p),
                            base.rotation_range * (grad_rotation - value.bounded_q * by_q));
        grad_modulation.move(-1);
      }
      carried_real = value.real * adjoint_real + value.imaginary * adjoint_imaginary;
      carried_imaginary = value.real * adjoint_imaginary - value.imaginary * adjoint_real;
      real = before_real;
      imaginary = before_imaginary;
      states_before.move(-1);
      grad_states.move(-1);
      grad_beta.move(-1);
    }
    vector.carried_real = carried_real;
    vector.carried_imaginary = carried_imaginary;
    vector.real = real;
    vector.imaginary = imaginary;
    if (reset) {
      vector.carried_real = vector.carried_imaginary = Floats{};
      if (begin > 0) {
        const Place<const T> state = states_(b, begin - 1, k);
        vector.real = state.first();
        vector.imaginary = state.second();
      }
    }
    for (int s = 0; s < 4; ++s) vector.sums[s] += wide(sums[s]);
  };
  share_out(beta_.batch, width, bases, [&](int64_t b, auto first, auto last) {
    const int64_t row = b * 2 * width;
    std::vector<Vector> vectors;
    for (auto base = first; base != last; ++base) {
      const int64_t k = base->k;
      const Place<const T> state = states_(b, steps - 1, k);
      vectors.push_back({&*base, 2.0f * load(grad_energy + b * width + k),
                         load(grad_final + row + k), load(grad_final + row + width + k),
                         state.first(), state.second()});
    }
    for (int64_t end = steps; end > 0; end -= TILE)
      for (Vector& vector : vectors)
        with_modulation<MODULATED>(*vector.base, [&](auto kind) {
          resets.backward(b, std::max<int64_t>(end - TILE, 0), end,
                          [&](int64_t from, int64_t to) { run_tile(kind, vector, b, from, to); });
        });
    for (const Vector& vector : vectors) {
      for (int s = 0; s < 4; ++s)
        store(grad_base + (b * 4 + s) * width + vector.base->k,
              __builtin_convertvector(vector.sums[s], Floats));
      store(grad_initial + row + vector.base->k, vector.carried_real);
      store(grad_initial + row + width + vector.base->k, vector.carried_imaginary);
    }
  });
}

const float* pointer(const at::Tensor& tensor) { return tensor.const_data_ptr<float>(); }
const float* pointer(const std::optional<at::Tensor>& tensor) {
  return tensor ? tensor->const_data_ptr<float>() : nullptr;
}

// Calls `body` with the element type, whether there is a modulation, and the kind of gain,
// each as a type: loops over time are compiled for every combination.
template <typename Body>
void dispatch(const at::Tensor& beta, bool modulated, const std::string& input_norm,
              const Body& body) {
  const auto with_gain = [&](auto element, auto is_modulated) {
    if (input_norm == "none")
      body(element, is_modulated, std::integral_constant<Gain, Gain::none>());
    else if (input_norm == "static")
      body(element, is_modulated, std::integral_constant<Gain, Gain::fixed>());
    else
      body(element, is_modulated, std::integral_constant<Gain, Gain::dynamic>());
  };
  const auto with_element = [&](auto element) {
    if (modulated)
      with_gain(element, std::true_type());
    else
      with_gain(element, std::false_type());
  };
  if (beta.scalar_type() == at::kBFloat16)
    with_element(uint16_t());
  else
    with_element(float());
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
    const std::optional<at::Tensor>& initial, const std::optional<at::Tensor>& resets,
    const std::string& input_norm) {
  const auto options = beta.options().dtype(at::kFloat);
  const int64_t batch = beta.size(0), width = beta.size(2) / 2;
  if (width < LANES) {
    const auto [states, final, energy] = scan_forward(
        filled_up(beta, 2), filled_up(alpha, 1), filled_up(omega, 1), filled_up(ranges, 1),
        filled_up(modulation, 2), filled_up(initial, 2), resets, input_norm);
    return {cut_off(states, 2, width), cut_off(final, 2, width), cut_off(energy, 1, width)};
  }
  at::Tensor states = at::empty(beta.sizes(), beta.options());
  at::Tensor final = at::empty({batch, 2 * width}, options);
  at::Tensor energy = at::empty({batch, width}, options);
  const auto bases = make_bases(pointer(alpha), pointer(omega), pointer(ranges), width);
  dispatch(beta, modulation.has_value(), input_norm, [&](auto element, auto modulated, auto gain) {
    forward<decltype(element), modulated, gain>(
        beta, bases, modulation.value_or(at::Tensor()), pointer(initial), Resets(resets), states,
        final.mutable_data_ptr<float>(), energy.mutable_data_ptr<float>());
  });
  return {states, final, energy};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> scan_backward(
    const at::Tensor& grad_states, const at::Tensor& grad_final,
    const at::Tensor& grad_energy, const at::Tensor& states, const at::Tensor& beta,
    const at::Tensor& alpha, const at::Tensor& omega, const at::Tensor& ranges,
    const std::optional<at::Tensor>& modulation, const std::optional<at::Tensor>& initial,
    const std::optional<at::Tensor>& resets, const std::string& input_norm) {
  const auto options = beta.options().dtype(at::kFloat);
  const int64_t batch = beta.size(0), width = beta.size(2) / 2;
  if (width < LANES) {
    const auto [grad_beta, grad_modulation, grad_base, grad_initial] = scan_backward(
        filled_up(grad_states, 2), filled_up(grad_final, 2), filled_up(grad_energy, 1),
        filled_up(states, 2), filled_up(beta, 2), filled_up(alpha, 1), filled_up(omega, 1),
        filled_up(ranges, 1), filled_up(modulation, 2), filled_up(initial, 2), resets, input_norm);
    return {cut_off(grad_beta, 2, width),
            modulation ? cut_off(grad_modulation, 2, width) : grad_modulation,
            cut_off(grad_base, 1, width), cut_off(grad_initial, 2, width)};
  }
  at::Tensor grad_beta = at::empty(beta.sizes(), beta.options());
  at::Tensor grad_modulation;
  if (modulation) grad_modulation = at::empty(beta.sizes(), beta.options());
  // Of alpha, omega and the two ranges, a row of the batch each: added up in one order,
  // whatever the number of threads.
  at::Tensor grad_base = at::empty({batch, 4, width}, options);
  at::Tensor grad_initial = at::empty({batch, 2 * width}, options);
  const auto bases = make_bases(pointer(alpha), pointer(omega), pointer(ranges), width);
  dispatch(beta, modulation.has_value(), input_norm, [&](auto element, auto modulated, auto gain) {
    backward<decltype(element), modulated, gain>(
        beta, bases, modulation.value_or(at::Tensor()), pointer(initial), Resets(resets), states,
        grad_states, pointer(grad_final), pointer(grad_energy), grad_beta, grad_modulation,
        grad_base.mutable_data_ptr<float>(), grad_initial.mutable_data_ptr<float>());
  });
  // An operator cannot return a tensor that is none.
  if (!modulation) grad_modulation = at::empty({0}, beta.options());
  return {grad_beta, grad_modulation, grad_base.sum(0), grad_initial};
}

// Autograd in C++: that of an operator registered from Python takes longer, twice a layer,
// than a scan of a short sequence. Both directions call the registered operators, so that a
// compiled graph holds them.
class Differentiable : public torch::autograd::Function<Differentiable> {
 public:
  using Variables = torch::autograd::variable_list;

  static Variables forward(torch::autograd::AutogradContext* context, const at::Tensor& beta,
                           const at::Tensor& alpha, const at::Tensor& omega,
                           const at::Tensor& ranges, const std::optional<at::Tensor>& modulation,
                           const std::optional<at::Tensor>& initial,
                           const std::optional<at::Tensor>& resets,
                           const std::string& input_norm) {
    at::AutoDispatchBelowADInplaceOrView guard;
    static const auto operation = c10::Dispatcher::singleton()
                                      .findSchemaOrThrow("ten_dist_cpu::scan_forward", "")
                                      .typed<decltype(scan_forward)>();
    const auto [states, final, energy] =
        operation.call(beta, alpha, omega, ranges, modulation, initial, resets, input_norm);
    context->save_for_backward({beta, alpha, omega, ranges, modulation.value_or(at::Tensor()),
                                initial.value_or(at::Tensor()), resets.value_or(at::Tensor()),
                                states});
    context->saved_data["input_norm"] = input_norm;
    return {states, final, energy};
  }

  static Variables backward(torch::autograd::AutogradContext* context, const Variables& grads) {
    static const auto operation = c10::Dispatcher::singleton()
                                      .findSchemaOrThrow("ten_dist_cpu::scan_backward", "")
                                      .typed<decltype(scan_backward)>();
    const Variables saved = context->get_saved_variables();
    const auto optional = [](const at::Tensor& tensor) {
      return tensor.defined() ? std::optional(tensor) : std::nullopt;
    };
    const at::Tensor& modulation = saved[4];
    const at::Tensor& initial = saved[5];
    // Rows of the states are read in vectors.
    const at::Tensor grad_states =
        grads[0].sym_stride(-1) == 1 ? grads[0] : grads[0].contiguous();
    const auto [grad_beta, grad_modulation, grad_base, grad_initial] = operation.call(
        grad_states, grads[1].contiguous(), grads[2].contiguous(), saved[7], saved[0], saved[1],
        saved[2], saved[3], optional(modulation), optional(initial), optional(saved[6]),
        context->saved_data["input_norm"].toStringRef());
    const at::Tensor none;
    return {grad_beta,
            grad_base.select(0, 0),
            grad_base.select(0, 1),
            grad_base.narrow(0, 2, 2),
            modulation.defined() ? grad_modulation : none,
            initial.defined() ? grad_initial : none,
            none,
            none};
  }
};

std::tuple<at::Tensor, at::Tensor, at::Tensor> differentiable_scan(
    const at::Tensor& beta, const at::Tensor& alpha, const at::Tensor& omega,
    const at::Tensor& ranges, const std::optional<at::Tensor>& modulation,
    const std::optional<at::Tensor>& initial, const std::optional<at::Tensor>& resets,
    const std::string& input_norm) {
  const auto results = Differentiable::apply(beta, alpha, omega, ranges, modulation, initial,
                                             resets, input_norm);
  return {results[0], results[1], results[2]};
}

}  // namespace

TORCH_LIBRARY(ten_dist_cpu, library) {
  library.def(
      "scan_forward(Tensor beta, Tensor alpha, Tensor omega, Tensor ranges, "
      "Tensor? modulation, Tensor? initial, Tensor? resets, str input_norm) "
      "-> (Tensor, Tensor, Tensor)");
  library.def(
      "scan_backward(Tensor grad_states, Tensor grad_final, Tensor grad_energy, "
      "Tensor states, Tensor beta, Tensor alpha, Tensor omega, Tensor ranges, "
      "Tensor? modulation, Tensor? initial, Tensor? resets, str input_norm) "
      "-> (Tensor, Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(ten_dist_cpu, CPU, library) {
  library.impl("scan_forward", &scan_forward);
  library.impl("scan_backward", &scan_backward);
}

TORCH_LIBRARY_IMPL(ten_dist_cpu, Autograd, library) {
  library.impl("scan_forward", &differentiable_scan);
}
