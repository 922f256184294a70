// The matrix scan on CPUs, forward and backward (docs/model.md#matrix-states).
//
// One task is one head of one row of the batch: its state stays in the cache. A task goes
// through time in chunks of CHUNK steps. For a chunk it computes eigenvalues and gains once an
// eigenstate, in vectors of eigenstates, and then runs through the chunk tile after tile of the
// state (matrix_tile.h), in vectors of the numbers that eigenstates carry.
//
// The forward operator keeps for backward, beside the arguments, the state before every chunk
// but the first: 2 K N / CHUNK floats a step, none up to CHUNK steps. From there backward
// computes the states of one tile and one chunk again, into a buffer of CHUNK tiles, which is a
// fifth of its arithmetic. The states themselves would be N times the keys.
//
// Every task adds up in one order: results are the same to the last bit for any number of
// threads.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include "eigenvalues.h"
#include "matrix_tile.h"
#include "sequences.h"
#include "vectors.h"

namespace {

using namespace ten_dist;

constexpr int64_t CHUNK = 64;
constexpr int64_t AHEAD = 8;  // steps between asking for a place and its use
constexpr int GROUPS = LANES / GROUP;  // of a vector of eigenstates

struct Shape {
  int64_t batch, steps, heads;
  int64_t eigenstates, numbers;  // of a head; that an eigenstate carries
  int64_t vectors, width;        // vectors of eigenstates; `numbers` in whole vectors

  Shape(const at::Tensor& key, const at::Tensor& value, int64_t heads_)
      : batch(key.size(0)),
        steps(key.size(1)),
        heads(heads_),
        eigenstates(key.size(2) / 2 / heads_),
        numbers(value.size(2) / heads_),
        vectors((eigenstates + LANES - 1) / LANES),
        width((numbers + LANES - 1) / LANES * LANES) {}

  int64_t chunks() const { return (steps + CHUNK - 1) / CHUNK; }
  int64_t chunk_steps() const { return std::min(steps, CHUNK); }
  int64_t groups() const { return (eigenstates + GROUP - 1) / GROUP; }
  // Floats of a state of a row of the batch.
  int64_t state_size() const { return 2 * heads * eigenstates * numbers; }
};

// Rows in memory of their own, zero at first, which begin where a vector may.
class Buffer {
 public:
  Buffer(int64_t rows, int64_t width) : lines_(rows * width / LANES), width_(width) {}
  Rows rows() { return {reinterpret_cast<float*>(lines_.data()), width_}; }
  void clear() { std::memset(static_cast<void*>(lines_.data()), 0, lines_.size() * sizeof(Line)); }

 private:
  struct alignas(64) Line {
    float lanes[LANES] = {};
  };
  std::vector<Line> lines_;
  int64_t width_;
};

// Copies the state of a head between a matrix of two rows an eigenstate and a row of a
// [B, 2 K N] tensor.
template <typename Copy>
void each_row_of_state(const Shape& shape, int64_t h, const Rows& matrix, const Copy& copy) {
  const int64_t size = shape.eigenstates * shape.numbers;
  for (int64_t k = 0; k < shape.eigenstates; ++k)
    for (int64_t half = 0; half < 2; ++half)
      copy(matrix(2 * k + half, 0), (half * shape.heads + h) * size + k * shape.numbers);
}

void read_state(const Shape& shape, int64_t h, const Rows& matrix, const float* from) {
  each_row_of_state(shape, h, matrix, [&](float* row, int64_t place) {
    std::copy_n(from + place, shape.numbers, row);
  });
}

void write_state(const Shape& shape, int64_t h, const Rows& matrix, float* to) {
  each_row_of_state(shape, h, matrix, [&](const float* row, int64_t place) {
    std::copy_n(row, shape.numbers, to + place);
  });
}

// Columns of a head of a [B, T, H N] tensor, `scale` times.
template <typename T>
void read_rows(const Shape& shape, const Sequence<const T>& from, int64_t b, int64_t h,
               int64_t begin, int64_t end, float scale, const Rows& rows) {
  for (int64_t t = begin; t < end; ++t) {
    const T* row = from.data + b * from.row + t * from.step + h * shape.numbers;
    for (int64_t n = 0; n < shape.numbers; n += LANES) {
      __builtin_prefetch(row + AHEAD * from.step + n, 0, 2);
      store(rows(t - begin, n), scale * load_some(row + n, shape.numbers - n));
    }
  }
}

template <typename T>
void write_rows(const Shape& shape, const Rows& rows, float scale, int64_t b, int64_t h,
                int64_t begin, int64_t end, const Sequence<T>& to) {
  for (int64_t t = begin; t < end; ++t) {
    T* row = to.data + b * to.row + t * to.step + h * shape.numbers;
    for (int64_t n = 0; n < shape.numbers; n += LANES)
      store_some(row + n, scale * load(rows(t - begin, n)), shape.numbers - n);
  }
}

// A vector of eigenstates of a [B, T, 2 K] tensor, of which the head has `count`.
template <typename T>
struct Lanes {
  Place<T> place;
  int64_t count;

  void ask() const { place.ask(AHEAD); }
  Floats first() const { return load_some(place.at, count); }
  Floats second() const { return load_some(place.at + place.half, count); }
  void set(Floats x, Floats y) const {
    store_some(place.at, x, count);
    store_some(place.at + place.half, y, count);
  }
};

// A vector of eigenstates in the factors of its groups.
Floats get(const Factors* factors, int part) {
  return load_quarters(factors->parts[part], PARTS * GROUP);
}

void set(Factors* factors, int part, Floats x) {
  store_quarters(factors->parts[part], PARTS * GROUP, x);
}

struct Step {
  Eigenvalue value;
  Floats gain, slope;
};

template <typename T>
struct Inputs {
  using Element = T;
  using Read = Sequence<const T>;
  using Written = Sequence<T>;

  Shape shape;
  Read key, query, value, modulation;
  std::vector<Base> bases;  // `shape.vectors` of each head
  Gain gain;
  const float* initial;
  Resets resets;

  // Places of `sequence` for a vector of eigenstates of a head.
  template <typename U>
  Lanes<U> lanes(const Sequence<U>& sequence, int64_t b, int64_t t, int64_t h,
                 int64_t vector) const {
    const int64_t k = vector * LANES;
    return {sequence(b, t, h * shape.eigenstates + k), shape.eigenstates - k};
  }

  // Computes the factors of the steps [begin, end) of a head, and calls
  // `keep(vector, t, step)` with what else backward needs of them.
  template <typename Keep>
  void compute_factors(int64_t b, int64_t h, int64_t begin, int64_t end, Factors* factors,
                       const Keep& keep) const {
    for (int64_t vector = 0; vector < shape.vectors; ++vector) {
      const Base& base = bases[h * shape.vectors + vector];
      Floats gain = all(1.0f), slope{};
      if (this->gain == Gain::fixed) Eigenvalue(base).gain(gain, slope);
      for (int64_t t = begin; t < end; ++t) {
        const auto modulations = lanes(modulation, b, t, h, vector);
        const auto keys = lanes(key, b, t, h, vector), queries = lanes(query, b, t, h, vector);
        modulations.ask();
        keys.ask();
        queries.ask();
        const Eigenvalue value(base, modulations.first(), modulations.second(), base.modulation);
        if (this->gain == Gain::dynamic) value.gain(gain, slope);
        Factors* at = factors + ((t - begin) * shape.vectors + vector) * GROUPS;
        set(at, EIGENVALUE, value.real);
        set(at, EIGENVALUE + 1, value.imaginary);
        set(at, KEY, gain * keys.first());
        set(at, KEY + 1, gain * keys.second());
        set(at, QUERY, queries.first());
        set(at, QUERY + 1, queries.second());
        keep(vector, t, Step{value, gain, slope});
      }
    }
  }

  float scale() const { return 1 / std::sqrt(static_cast<float>(shape.eigenstates)); }
  int64_t stride() const { return shape.vectors * GROUPS; }

  // Calls `body(tile, group, n)` for all tiles of the state of a head, with an empty tile.
  template <typename Body>
  void each_tile(const Body& body) const {
    int64_t n = 0;
    for (; n + 2 * LANES <= shape.width; n += 2 * LANES)
      for (int64_t g = 0; g < shape.groups(); ++g) body(Tile<2>{}, g, n);
    if (n < shape.width)
      for (int64_t g = 0; g < shape.groups(); ++g) body(Tile<1>{}, g, n);
  }
};

template <typename T>
void forward(const Inputs<T>& in, const typename Inputs<T>::Written& outputs, float* final, float* energy,
             float* entering) {
  const Shape& shape = in.shape;
  const int64_t size = shape.state_size(), kept = shape.chunks() - 1;
  at::parallel_for(0, shape.batch * shape.heads, 1, [&](int64_t first, int64_t last) {
    std::vector<Factors> factors(shape.chunk_steps() * in.stride());
    Buffer values(shape.chunk_steps(), shape.width), read(shape.chunk_steps(), shape.width);
    Buffer state(2 * GROUP * shape.groups(), shape.width);
    for (int64_t task = first; task < last; ++task) {
      const int64_t b = task / shape.heads, h = task % shape.heads;
      state.clear();
      if (in.initial != nullptr) read_state(shape, h, state.rows(), in.initial + b * size);
      std::vector<double> squares(GROUP * shape.groups());
      for (int64_t begin = 0; begin < shape.steps; begin += CHUNK) {
        const int64_t end = std::min(begin + CHUNK, shape.steps);
        if (begin > 0)
          write_state(shape, h, state.rows(), entering + (b * kept + begin / CHUNK - 1) * size);
        in.compute_factors(b, h, begin, end, factors.data(), [](auto...) {});
        read_rows(shape, in.value, b, h, begin, end, 1.0f, values.rows());
        read.clear();
        in.each_tile([&](auto tile, int64_t g, int64_t n) {
          tile.load_from(state.rows(), g * GROUP, n);
          Floats sums[GROUP] = {};
          in.resets.forward(b, begin, end, [&](int64_t from, int64_t to) {
            if (in.resets.at(b, from)) tile = {};
            read_forward(tile, factors.data() + g, in.stride(), values.rows(), read.rows(), n,
                         from - begin, to - begin, sums);
          });
          tile.store_to(state.rows(), g * GROUP, n);
          const Floats quarters = sums_of_quarters(sums[0], sums[1], sums[2], sums[3]);
          for (int lane = 0; lane < LANES; ++lane)
            squares[g * GROUP + lane % GROUP] += quarters[lane];
        });
        write_rows(shape, read.rows(), in.scale(), b, h, begin, end, outputs);
      }
      write_state(shape, h, state.rows(), final + b * size);
      std::copy_n(squares.begin(), shape.eigenstates, energy + task * shape.eigenstates);
    }
  });
}

template <typename T>
struct Gradients {
  Sequence<T> key, query, value, modulation;
  float *base, *initial;  // [B, 4, K], of alpha, omega and the two ranges, and [B, 2 K N]
};

// From the gradients of the factors of a chunk to those of key, query and modulation. Adds
// those of alpha and omega, and their products with tanh p and tanh q, to `base_sums`.
template <typename T>
void write_gradients(const Inputs<T>& in, int64_t b, int64_t h, int64_t begin, int64_t end,
                     const Step* steps, const Factors* factors, const Gradients<T>& gradients,
                     Doubles (*base_sums)[4]) {
  for (int64_t vector = 0; vector < in.shape.vectors; ++vector) {
    const Base& base = in.bases[h * in.shape.vectors + vector];
    Floats sums[4] = {};
    for (int64_t t = begin; t < end; ++t) {
      const auto lanes = [&](const auto& sequence) { return in.lanes(sequence, b, t, h, vector); };
      const auto& [value, gain, slope] = steps[(t - begin) * in.shape.vectors + vector];
      const Factors* at = factors + (t - begin) * in.stride() + vector * GROUPS;
      const Floats real = get(at, EIGENVALUE), imaginary = get(at, EIGENVALUE + 1);
      const Floats driven_real = get(at, KEY), driven_imaginary = get(at, KEY + 1);
      const auto key = lanes(in.key);
      Floats grad_logit = value.complement * (real * value.real + imaginary * value.imaginary);
      const Floats grad_rotation = imaginary * value.real - real * value.imaginary;
      const Floats by_gain = slope * (driven_real * key.first() + driven_imaginary * key.second());
      // The fixed gain depends on alpha alone, not on the modulated logit.
      if (in.gain == Gain::fixed)
        sums[0] += by_gain;
      else
        grad_logit += by_gain;
      const Floats by_p = value.bounded_p * grad_logit, by_q = value.bounded_q * grad_rotation;
      sums[0] += grad_logit;
      sums[1] += grad_rotation;
      sums[2] += by_p;
      sums[3] += by_q;
      lanes(gradients.key).set(gain * driven_real, gain * driven_imaginary);
      lanes(gradients.query).set(get(at, QUERY), get(at, QUERY + 1));
      lanes(gradients.modulation)
          .set(base.decay_range * (grad_logit - value.bounded_p * by_p),
               base.rotation_range * (grad_rotation - value.bounded_q * by_q));
    }
    for (int s = 0; s < 4; ++s) base_sums[vector][s] += wide(sums[s]);
  }
}

template <typename T>
void backward(const Inputs<T>& in, const float* entering,
              const typename Inputs<T>::Read& grad_outputs, const float* grad_final,
              const float* grad_energy, const Gradients<T>& out) {
  const Shape& shape = in.shape;
  const int64_t size = shape.state_size(), kept = shape.chunks() - 1;
  const int64_t width = shape.heads * shape.eigenstates;

  at::parallel_for(0, shape.batch * shape.heads, 1, [&](int64_t first, int64_t last) {
    std::vector<Factors> factors(shape.chunk_steps() * in.stride()), gradients(factors.size());
    Buffer values(shape.chunk_steps(), shape.width), grad_read(shape.chunk_steps(), shape.width);
    Buffer grad_values(shape.chunk_steps(), shape.width);
    Buffer state(2 * GROUP * shape.groups(), shape.width);
    Buffer carried(2 * GROUP * shape.groups(), shape.width);
    // Of alpha, omega, and their products with tanh p and tanh q.
    std::vector<Step> kept_steps(shape.vectors * shape.chunk_steps());
    const std::unique_ptr<Doubles[][4]> base_sums(new Doubles[shape.vectors][4]);
    std::vector<Tile<2>> buffer(shape.chunk_steps() + 1);
    for (int64_t task = first; task < last; ++task) {
      const int64_t b = task / shape.heads, h = task % shape.heads;
      carried.clear();
      read_state(shape, h, carried.rows(), grad_final + b * size);
      std::vector<float> weights(GROUP * shape.groups());
      for (int64_t k = 0; k < shape.eigenstates; ++k)
        weights[k] = 2 * grad_energy[task * shape.eigenstates + k];
      std::fill_n(&base_sums[0][0], 4 * shape.vectors, Doubles{});
      for (int64_t chunk = kept; chunk >= 0; --chunk) {
        const int64_t begin = chunk * CHUNK, end = std::min(begin + CHUNK, shape.steps);
        const float* before =
            chunk > 0 ? entering + (b * kept + chunk - 1) * size
                      : (in.initial == nullptr ? nullptr : in.initial + b * size);
        state.clear();
        if (before != nullptr) read_state(shape, h, state.rows(), before);
        in.compute_factors(b, h, begin, end, factors.data(),
                           [&](int64_t vector, int64_t t, const Step& step) {
                             kept_steps[(t - begin) * shape.vectors + vector] = step;
                           });
        std::fill(gradients.begin(), gradients.end(), Factors{});
        read_rows(shape, in.value, b, h, begin, end, 1.0f, values.rows());
        read_rows(shape, grad_outputs, b, h, begin, end, in.scale(), grad_read.rows());
        grad_values.clear();
        in.each_tile([&](auto tile, int64_t g, int64_t n) {
          using T_ = decltype(tile);
          const T_ zero{};
          T_* states = reinterpret_cast<T_*>(buffer.data());
          tile.load_from(state.rows(), g * GROUP, n);
          states[0] = tile;
          in.resets.forward(b, begin, end, [&](int64_t from, int64_t to) {
            if (in.resets.at(b, from)) tile = {};
            states_forward(tile, factors.data() + g, in.stride(), values.rows(), n, from - begin,
                           to - begin, states);
          });
          tile.load_from(carried.rows(), g * GROUP, n);
          in.resets.backward(b, begin, end, [&](int64_t from, int64_t to) {
            const bool reset = in.resets.at(b, from);
            backward_tile(tile, factors.data() + g, gradients.data() + g, in.stride(),
                          values.rows(), grad_read.rows(), grad_values.rows(), n, from - begin,
                          to - begin, reset ? zero : states[from - begin], states,
                          weights.data() + g * GROUP);
            if (reset) tile = {};
          });
          tile.store_to(carried.rows(), g * GROUP, n);
        });
        write_gradients(in, b, h, begin, end, kept_steps.data(), gradients.data(), out,
                        base_sums.get());
        write_rows(shape, grad_values.rows(), 1.0f, b, h, begin, end, out.value);
      }
      write_state(shape, h, carried.rows(), out.initial + b * size);
      for (int s = 0; s < 4; ++s)
        for (int64_t k = 0; k < shape.eigenstates; ++k)
          out.base[(b * 4 + s) * width + h * shape.eigenstates + k] =
              base_sums[k / LANES][s][k % LANES];
    }
  });
}

// [.., K] with the eigenstates of each head filled up to whole vectors.
at::Tensor filled_up(const at::Tensor& tensor, const Shape& shape) {
  return at::constant_pad_nd(tensor.unflatten(-1, {shape.heads, shape.eigenstates}),
                             {0, shape.vectors * LANES - shape.eigenstates})
      .flatten(-2);
}

// Calls `body` with the inputs, in their element type.
template <typename Body>
void with_inputs(const at::Tensor& key, const at::Tensor& query, const at::Tensor& value,
                 const at::Tensor& alpha, const at::Tensor& omega, const at::Tensor& ranges,
                 const at::Tensor& modulation, int64_t num_heads,
                 const std::optional<at::Tensor>& initial,
                 const std::optional<at::Tensor>& resets, const std::string& input_norm,
                 const Body& body) {
  const Shape shape(key, value, num_heads);
  const at::Tensor padded_alpha = filled_up(alpha, shape), padded_omega = filled_up(omega, shape);
  const at::Tensor padded_ranges = filled_up(ranges, shape);
  const auto run = [&](auto element) {
    using T = decltype(element);
    body(Inputs<T>{shape, key, query, value, modulation,
                   make_bases(pointer(padded_alpha), pointer(padded_omega),
                              pointer(padded_ranges), padded_alpha.size(0)),
                   gain_named(input_norm), pointer(initial), Resets(resets)});
  };
  if (key.scalar_type() == at::kBFloat16)
    run(uint16_t());
  else
    run(float());
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> matrix_scan_forward(
    const at::Tensor& key, const at::Tensor& query, const at::Tensor& value,
    const at::Tensor& alpha, const at::Tensor& omega, const at::Tensor& ranges,
    const at::Tensor& modulation, int64_t num_heads, const std::optional<at::Tensor>& initial,
    const std::optional<at::Tensor>& resets, const std::string& input_norm) {
  const auto options = key.options().dtype(at::kFloat);
  const Shape shape(key, value, num_heads);
  at::Tensor outputs = at::empty(value.sizes(), value.options());
  at::Tensor final = at::empty({shape.batch, shape.state_size()}, options);
  at::Tensor energy = at::empty({shape.batch, alpha.size(0)}, options);
  at::Tensor entering = at::empty({shape.batch, shape.chunks() - 1, shape.state_size()}, options);
  with_inputs(key, query, value, alpha, omega, ranges, modulation, num_heads, initial, resets,
              input_norm, [&](const auto& inputs) {
                forward(inputs, outputs, final.mutable_data_ptr<float>(),
                        energy.mutable_data_ptr<float>(), entering.mutable_data_ptr<float>());
              });
  return {outputs, final, energy, entering};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>
matrix_scan_backward(const at::Tensor& grad_outputs, const at::Tensor& grad_final,
                     const at::Tensor& grad_energy, const at::Tensor& entering,
                     const at::Tensor& key, const at::Tensor& query, const at::Tensor& value,
                     const at::Tensor& alpha, const at::Tensor& omega, const at::Tensor& ranges,
                     const at::Tensor& modulation, int64_t num_heads,
                     const std::optional<at::Tensor>& initial,
                     const std::optional<at::Tensor>& resets, const std::string& input_norm) {
  const auto options = key.options().dtype(at::kFloat);
  at::Tensor grad_key = at::empty(key.sizes(), key.options());
  at::Tensor grad_query = at::empty(key.sizes(), key.options());
  at::Tensor grad_modulation = at::empty(key.sizes(), key.options());
  at::Tensor grad_value = at::empty(value.sizes(), value.options());
  // Of alpha, omega and the two ranges, a row of the batch each.
  at::Tensor grad_base = at::empty({key.size(0), 4, alpha.size(0)}, options);
  at::Tensor grad_initial = at::empty(grad_final.sizes(), options);
  with_inputs(key, query, value, alpha, omega, ranges, modulation, num_heads, initial, resets,
              input_norm, [&](const auto& inputs) {
                using T = typename std::decay_t<decltype(inputs)>::Element;
                backward<T>(inputs, pointer(entering), grad_outputs, pointer(grad_final),
                            pointer(grad_energy),
                            {grad_key, grad_query, grad_value, grad_modulation,
                             grad_base.mutable_data_ptr<float>(),
                             grad_initial.mutable_data_ptr<float>()});
              });
  return {grad_key, grad_query, grad_value, grad_modulation, grad_base.sum(0), grad_initial};
}

// Autograd in C++, as that of the eigenstate scan: both directions call the registered
// operators, so that a compiled graph holds them.
class Differentiable : public torch::autograd::Function<Differentiable> {
 public:
  using Variables = torch::autograd::variable_list;

  static Variables forward(torch::autograd::AutogradContext* context, const at::Tensor& key,
                           const at::Tensor& query, const at::Tensor& value,
                           const at::Tensor& alpha, const at::Tensor& omega,
                           const at::Tensor& ranges, const at::Tensor& modulation,
                           int64_t num_heads, const std::optional<at::Tensor>& initial,
                           const std::optional<at::Tensor>& resets,
                           const std::string& input_norm) {
    at::AutoDispatchBelowADInplaceOrView guard;
    static const auto operation = c10::Dispatcher::singleton()
                                      .findSchemaOrThrow("ten_dist_cpu::matrix_scan_forward", "")
                                      .typed<decltype(matrix_scan_forward)>();
    const auto [outputs, final, energy, entering] =
        operation.call(key, query, value, alpha, omega, ranges, modulation, num_heads, initial,
                       resets, input_norm);
    context->save_for_backward({key, query, value, alpha, omega, ranges, modulation,
                                initial.value_or(at::Tensor()), resets.value_or(at::Tensor()),
                                entering});
    context->saved_data["num_heads"] = num_heads;
    context->saved_data["input_norm"] = input_norm;
    context->mark_non_differentiable({entering});
    return {outputs, final, energy, entering};
  }

  static Variables backward(torch::autograd::AutogradContext* context, const Variables& grads) {
    static const auto operation = c10::Dispatcher::singleton()
                                      .findSchemaOrThrow("ten_dist_cpu::matrix_scan_backward", "")
                                      .typed<decltype(matrix_scan_backward)>();
    const Variables saved = context->get_saved_variables();
    const auto optional = [](const at::Tensor& tensor) {
      return tensor.defined() ? std::optional(tensor) : std::nullopt;
    };
    // Rows of the outputs are read in vectors.
    const at::Tensor grad_outputs =
        grads[0].sym_stride(-1) == 1 ? grads[0] : grads[0].contiguous();
    const auto [grad_key, grad_query, grad_value, grad_modulation, grad_base, grad_initial] =
        operation.call(grad_outputs, grads[1].contiguous(), grads[2].contiguous(), saved[9],
                       saved[0], saved[1], saved[2], saved[3], saved[4], saved[5], saved[6],
                       context->saved_data["num_heads"].toInt(), optional(saved[7]),
                       optional(saved[8]), context->saved_data["input_norm"].toStringRef());
    const at::Tensor none;
    return {grad_key,
            grad_query,
            grad_value,
            grad_base.select(0, 0),
            grad_base.select(0, 1),
            grad_base.narrow(0, 2, 2),
            grad_modulation,
            none,
            saved[7].defined() ? grad_initial : none,
            none,
            none};
  }
};

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> differentiable_matrix_scan(
    const at::Tensor& key, const at::Tensor& query, const at::Tensor& value,
    const at::Tensor& alpha, const at::Tensor& omega, const at::Tensor& ranges,
    const at::Tensor& modulation, int64_t num_heads, const std::optional<at::Tensor>& initial,
    const std::optional<at::Tensor>& resets, const std::string& input_norm) {
  const auto results = Differentiable::apply(key, query, value, alpha, omega, ranges, modulation,
                                             num_heads, initial, resets, input_norm);
  return {results[0], results[1], results[2], results[3]};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(ten_dist_cpu, library) {
  library.def(
      "matrix_scan_forward(Tensor key, Tensor query, Tensor value, Tensor alpha, Tensor omega, "
      "Tensor ranges, Tensor modulation, int num_heads, Tensor? initial, Tensor? resets, "
      "str input_norm) -> (Tensor, Tensor, Tensor, Tensor)");
  library.def(
      "matrix_scan_backward(Tensor grad_outputs, Tensor grad_final, Tensor grad_energy, "
      "Tensor entering, Tensor key, Tensor query, Tensor value, Tensor alpha, Tensor omega, "
      "Tensor ranges, Tensor modulation, int num_heads, Tensor? initial, Tensor? resets, "
      "str input_norm) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(ten_dist_cpu, CPU, library) {
  library.impl("matrix_scan_forward", &matrix_scan_forward);
  library.impl("matrix_scan_backward", &matrix_scan_backward);
}

TORCH_LIBRARY_IMPL(ten_dist_cpu, Autograd, library) {
  library.impl("matrix_scan_forward", &differentiable_matrix_scan);
}
