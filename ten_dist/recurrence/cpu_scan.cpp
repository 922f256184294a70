// The eigenstate scan on CPUs: DESIGN 2.1 forward, and its reverse recurrence backward.
//
// A task is one row of the batch and one vector of eigenstates; it walks through time with
// the state in registers. Eigenvalues are computed again from the modulation wherever they
// are needed, so that nothing of size T x K exists that the caller does not hold.
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

namespace {

constexpr int LANES = 16;
typedef float Floats __attribute__((vector_size(LANES * 4)));
typedef int32_t Ints __attribute__((vector_size(LANES * 4)));
typedef uint32_t Words __attribute__((vector_size(LANES * 4)));
typedef uint16_t Halves __attribute__((vector_size(LANES * 2)));

enum class Gain { none, fixed, dynamic };

inline Floats all(float value) { return Floats{} + value; }
inline Words bits(Floats x) { return reinterpret_cast<Words>(x); }
inline Floats floats(Words x) { return reinterpret_cast<Floats>(x); }
inline Floats choose(Ints condition, Floats yes, Floats no) { return condition ? yes : no; }

// Rows further ahead are asked for early: the stride between rows defeats the processor's
// own guesses.
constexpr int64_t AHEAD = 8;

// bfloat16 is stored as its 16 bits, the upper half of a float.
template <typename T>
inline Floats load(const T* from, int count) {
  Floats result{};
  if constexpr (sizeof(T) == 4) {
    if (count == LANES)
      std::memcpy(&result, from, sizeof(result));
    else
      std::memcpy(&result, from, count * sizeof(T));
  } else {
    Halves half{};
    if (count == LANES)
      std::memcpy(&half, from, sizeof(half));
    else
      std::memcpy(&half, from, count * sizeof(T));
    result = floats(__builtin_convertvector(half, Words) << 16);
  }
  return result;
}

template <typename T>
inline void store(T* to, Floats x, int count) {
  if constexpr (sizeof(T) == 4) {
    std::memcpy(to, &x, (count == LANES ? LANES : count) * sizeof(T));
  } else {
    // To the nearest, ties to even. States and gradients are finite; a NaN stays one.
    const Words w = bits(x);
    const Halves half = __builtin_convertvector((w + 0x7fff + ((w >> 16) & 1)) >> 16, Halves);
    std::memcpy(to, &half, (count == LANES ? LANES : count) * sizeof(T));
  }
}

// e^x by 2^n e^r, |r| <= ln(2)/2; relative error below 2e-7. x is cut to +-87.
inline Floats exponential(Floats x) {
  x = choose(x > 87.0f, all(87.0f), x);
  x = choose(x < -87.0f, all(-87.0f), x);
  // Adding 1.5 * 2^23 rounds to a whole number, which then stands in the lowest bits.
  const Floats shifted = x * 1.44269504f + 12582912.0f;
  const Floats n = shifted - 12582912.0f;
  const Floats r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Floats p = all(1.0f / 720);
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  return floats(bits(p) + (bits(shifted) << 23));
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

// What belongs to a vector of eigenstates and does not change in time.
struct Base {
  Floats alpha, cosine, sine, decay_range, rotation_range;

  Base(const float* alpha_, const float* omega, const float* ranges, int64_t width,
       int64_t k, int count) {
    alpha = load(alpha_ + k, count);
    decay_range = load(ranges + k, count);
    rotation_range = load(ranges + width + k, count);
    for (int i = 0; i < LANES; ++i) {
      const double angle = i < count ? omega[k + i] : 0.0;
      cosine[i] = std::cos(angle);
      sine[i] = std::sin(angle);
    }
  }
};

// lambda = rho e^(i phi) of one step, with what backward needs of it.
struct Eigenvalue {
  Floats real, imaginary;
  Floats decay, complement;     // rho and 1 - rho
  Floats bounded_p, bounded_q;  // tanh p, tanh q

  explicit Eigenvalue(const Base& base)
      : bounded_p{}, bounded_q{} {
    set_decay(base.alpha);
    real = decay * base.cosine;
    imaginary = decay * base.sine;
  }

  Eigenvalue(const Base& base, Floats p, Floats q) {
    // tanh x = 1 - 2 / (e^2x + 1), both with one division. Cut to +-9, where tanh is 1 to
    // the last bit, the product of the denominators stays finite.
    const Floats a = exponential(2.0f * cut(p)) + 1.0f, b = exponential(2.0f * cut(q)) + 1.0f;
    const Floats twice_inverse = 2.0f / (a * b);
    bounded_p = 1.0f - b * twice_inverse;
    bounded_q = 1.0f - a * twice_inverse;
    set_decay(base.alpha + base.decay_range * bounded_p);
    Floats sine, cosine;
    sine_cosine(base.rotation_range * bounded_q, sine, cosine);
    real = decay * (base.cosine * cosine - base.sine * sine);
    imaginary = decay * (base.sine * cosine + base.cosine * sine);
  }

  // sqrt(1 - rho^2) without the difference of numbers near 1.
  Floats gain() const { return root(complement * (1.0f + decay)); }
  // d gain / d logit = -rho^2 sqrt((1 - rho) / (1 + rho)).
  Floats gain_slope() const { return -decay * decay * root(complement / (1.0f + decay)); }

 private:
  static Floats cut(Floats x) {
    x = choose(x > 9.0f, all(9.0f), x);
    return choose(x < -9.0f, all(-9.0f), x);
  }

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
  Floats first(int64_t b, int64_t t, int64_t k, int n) const { return load(at(b, t, k), n); }
  Floats second(int64_t b, int64_t t, int64_t k, int n) const {
    return load(at(b, t, k + width), n);
  }
  void set(int64_t b, int64_t t, int64_t k, Floats x, Floats y, int n) const {
    store(at(b, t, k), x, n);
    store(at(b, t, k + width), y, n);
  }
};

// Sums over time are kept in float for this many steps, then added up in double.
constexpr int64_t FLUSH = 64;

struct Sum {
  Floats recent{};
  double total[LANES] = {};

  void flush() {
    for (int i = 0; i < LANES; ++i) total[i] += recent[i];
    recent = Floats{};
  }
};

template <typename Body>
void for_each_task(int64_t batch, int64_t width, const Body& body) {
  const int64_t blocks = (width + LANES - 1) / LANES;
  at::parallel_for(0, batch * blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t k = task % blocks * LANES;
      body(task / blocks, k, static_cast<int>(std::min<int64_t>(LANES, width - k)));
    }
  });
}

template <typename T, bool MODULATED, Gain GAIN>
void forward(const at::Tensor& beta_, const float* alpha, const float* omega,
             const at::Tensor& modulation_, const float* ranges, const float* initial,
             const at::Tensor& states_, float* final, float* energy) {
  const Sequence<T> beta(beta_), states(states_);
  const Sequence<T> modulation = MODULATED ? Sequence<T>(modulation_) : Sequence<T>();
  const int64_t batch = beta_.size(0), steps = beta_.size(1), width = beta.width;
  for_each_task(batch, width, [&](int64_t b, int64_t k, int n) {
    const Base base(alpha, omega, ranges, width, k, n);
    const Eigenvalue fixed(base);
    const Floats fixed_gain = fixed.gain();
    const int64_t row = b * 2 * width + k;
    Floats real{}, imaginary{};
    if (initial != nullptr) {
      real = load(initial + row, n);
      imaginary = load(initial + row + width, n);
    }
    Sum squares;
    for (int64_t t = 0; t < steps; ++t) {
      beta.ask(b, std::min(t + AHEAD, steps - 1), k);
      Eigenvalue value = fixed;
      if constexpr (MODULATED) {
        modulation.ask(b, std::min(t + AHEAD, steps - 1), k);
        value = Eigenvalue(base, modulation.first(b, t, k, n), modulation.second(b, t, k, n));
      }
      Floats drive_real = beta.first(b, t, k, n), drive_imaginary = beta.second(b, t, k, n);
      if constexpr (GAIN != Gain::none) {
        const Floats gain = GAIN == Gain::fixed ? fixed_gain : value.gain();
        drive_real *= gain;
        drive_imaginary *= gain;
      }
      const Floats before = real;
      real = value.real * before - value.imaginary * imaginary + drive_real;
      imaginary = value.real * imaginary + value.imaginary * before + drive_imaginary;
      states.set(b, t, k, real, imaginary, n);
      squares.recent += real * real + imaginary * imaginary;
      if (t % FLUSH == FLUSH - 1) squares.flush();
    }
    squares.flush();
    for (int i = 0; i < n; ++i) energy[b * width + k + i] = squares.total[i];
    store(final + row, real, n);
    store(final + row + width, imaginary, n);
  });
}

// With w the gradient of the states, G_t = w_t + conj(lambda_{t+1}) G_{t+1} and
// z_t = conj(G_t) lambda_t c_{t-1}; the energy adds 2 c_t times its gradient to w_t.
template <typename T, bool MODULATED, Gain GAIN>
void backward(const at::Tensor& beta_, const float* alpha, const float* omega,
              const at::Tensor& modulation_, const float* ranges, const float* initial,
              const at::Tensor& states_, const at::Tensor& grad_states_,
              const float* grad_final, const float* grad_energy,
              const at::Tensor& grad_beta_, const at::Tensor& grad_modulation_,
              float* grad_base, float* grad_initial) {
  const Sequence<T> beta(beta_), states(states_), grad_states(grad_states_);
  const Sequence<T> grad_beta(grad_beta_);
  const Sequence<T> modulation = MODULATED ? Sequence<T>(modulation_) : Sequence<T>();
  const Sequence<T> grad_modulation =
      MODULATED ? Sequence<T>(grad_modulation_) : Sequence<T>();
  const int64_t batch = beta_.size(0), steps = beta_.size(1), width = beta.width;
  for_each_task(batch, width, [&](int64_t b, int64_t k, int n) {
    const Base base(alpha, omega, ranges, width, k, n);
    const Eigenvalue fixed(base);
    const Floats fixed_gain = fixed.gain(), fixed_slope = fixed.gain_slope();
    const int64_t row = b * 2 * width + k;
    const Floats energy_weight = 2.0f * load(grad_energy + b * width + k, n);
    // conj(lambda_{t+1}) G_{t+1}; after the last step, the gradient of the final state.
    Floats carried_real = load(grad_final + row, n);
    Floats carried_imaginary = load(grad_final + row + width, n);
    Sum sums[4];  // of d logit, d rotation, and their products with tanh p and tanh q
    Floats real = states.first(b, steps - 1, k, n);
    Floats imaginary = states.second(b, steps - 1, k, n);
    for (int64_t t = steps - 1; t >= 0; --t) {
      const int64_t soon = std::max<int64_t>(t - AHEAD, 0);
      grad_states.ask(b, soon, k);
      states.ask(b, soon, k);
      Eigenvalue value = fixed;
      if constexpr (MODULATED) {
        modulation.ask(b, soon, k);
        value = Eigenvalue(base, modulation.first(b, t, k, n), modulation.second(b, t, k, n));
      }
      Floats before_real{}, before_imaginary{};
      if (t > 0) {
        before_real = states.first(b, t - 1, k, n);
        before_imaginary = states.second(b, t - 1, k, n);
      } else if (initial != nullptr) {
        before_real = load(initial + row, n);
        before_imaginary = load(initial + row + width, n);
      }
      const Floats adjoint_real =
          grad_states.first(b, t, k, n) + energy_weight * real + carried_real;
      const Floats adjoint_imaginary =
          grad_states.second(b, t, k, n) + energy_weight * imaginary + carried_imaginary;
      // lambda_t c_{t-1}, then z_t.
      const Floats moved_real = value.real * before_real - value.imaginary * before_imaginary;
      const Floats moved_imaginary =
          value.real * before_imaginary + value.imaginary * before_real;
      Floats grad_logit =
          value.complement * (adjoint_real * moved_real + adjoint_imaginary * moved_imaginary);
      const Floats grad_rotation =
          adjoint_imaginary * moved_real - adjoint_real * moved_imaginary;
      if constexpr (GAIN == Gain::none) {
        grad_beta.set(b, t, k, adjoint_real, adjoint_imaginary, n);
      } else {
        beta.ask(b, soon, k);
        const Floats gain = GAIN == Gain::fixed ? fixed_gain : value.gain();
        const Floats slope = GAIN == Gain::fixed ? fixed_slope : value.gain_slope();
        const Floats grad_gain = adjoint_real * beta.first(b, t, k, n) +
                                 adjoint_imaginary * beta.second(b, t, k, n);
        grad_beta.set(b, t, k, gain * adjoint_real, gain * adjoint_imaginary, n);
        // The fixed gain depends on alpha alone, not on the modulated logit.
        if constexpr (GAIN == Gain::fixed)
          sums[0].recent += slope * grad_gain;
        else
          grad_logit += slope * grad_gain;
      }
      sums[0].recent += grad_logit;
      sums[1].recent += grad_rotation;
      if constexpr (MODULATED) {
        sums[2].recent += value.bounded_p * grad_logit;
        sums[3].recent += value.bounded_q * grad_rotation;
        grad_modulation.set(
            b, t, k,
            base.decay_range * (1.0f - value.bounded_p * value.bounded_p) * grad_logit,
            base.rotation_range * (1.0f - value.bounded_q * value.bounded_q) * grad_rotation,
            n);
      }
      if (t % FLUSH == 0)
        for (Sum& sum : sums) sum.flush();
      carried_real = value.real * adjoint_real + value.imaginary * adjoint_imaginary;
      carried_imaginary = value.real * adjoint_imaginary - value.imaginary * adjoint_real;
      real = before_real;
      imaginary = before_imaginary;
    }
    for (int s = 0; s < 4; ++s)
      for (int i = 0; i < n; ++i)
        grad_base[(b * 4 + s) * width + k + i] = sums[s].total[i];
    store(grad_initial + row, carried_real, n);
    store(grad_initial + row + width, carried_imaginary, n);
  });
}

// Calls `body` with the element type, whether there is modulation, and the gain, each as
// a type, so that the loops over time are compiled for every combination.
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
  const auto with_modulation = [&](auto element) {
    if (modulated)
      with_gain(element, std::true_type());
    else
      with_gain(element, std::false_type());
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

std::tuple<at::Tensor, at::Tensor, at::Tensor> scan_forward(
    const at::Tensor& beta, const at::Tensor& alpha, const at::Tensor& omega,
    const at::Tensor& ranges, const std::optional<at::Tensor>& modulation,
    const std::optional<at::Tensor>& initial, const std::string& input_norm) {
  const auto options = beta.options().dtype(at::kFloat);
  const int64_t batch = beta.size(0), width = beta.size(2) / 2;
  at::Tensor states = at::empty(beta.sizes(), beta.options());
  at::Tensor final = at::empty({batch, 2 * width}, options);
  at::Tensor energy = at::empty({batch, width}, options);
  dispatch(beta, modulation.has_value(), input_norm, [&](auto element, auto modulated, auto gain) {
    forward<decltype(element), decltype(modulated)::value, decltype(gain)::value>(
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
  at::Tensor grad_beta = at::empty(beta.sizes(), beta.options());
  at::Tensor grad_modulation =
      modulation ? at::empty(beta.sizes(), beta.options()) : at::empty({0}, beta.options());
  // Of alpha, omega and the two ranges, a row of the batch each: added up in one order,
  // whatever the number of threads.
  at::Tensor grad_base = at::empty({batch, 4, width}, options);
  at::Tensor grad_initial = at::empty({batch, 2 * width}, options);
  dispatch(beta, modulation.has_value(), input_norm, [&](auto element, auto modulated, auto gain) {
    backward<decltype(element), decltype(modulated)::value, decltype(gain)::value>(
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
