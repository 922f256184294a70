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

#include "eigenvalues.h"
#include "sequences.h"
#include "vectors.h"

namespace {

using namespace ten_dist;

// Steps of a tile, and how far ahead of their use rows are asked for. Sums over time are
// kept in float for a tile, then added up in double.
constexpr int64_t TILE = 16;

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

// Calls `body` with the element type, whether there is a modulation, and the kind of gain,
// each as a type: loops over time are compiled for every combination.
template <typename Body>
void dispatch(const at::Tensor& beta, bool modulated, const std::string& input_norm,
              const Body& body) {
  const auto with_gain = [&](auto element, auto is_modulated) {
    const Gain kind = gain_named(input_norm);
    if (kind == Gain::none)
      body(element, is_modulated, std::integral_constant<Gain, Gain::none>());
    else if (kind == Gain::fixed)
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
