// The recurrence of a matrix scan and its adjoint, for one tile of the state.
//
// A tile fits into the registers: GROUP eigenstates of one head, V vectors of the numbers that
// they carry.
//
//     S_t = lambda_t S_{t-1} + key_t value_t^T        o_t = Re sum_k conj(query_t) S_t
//
// Nothing here knows of decays, gains and tensors: factors and rows are floats.

#pragma once

#include <cstdint>

#include "vectors.h"

namespace ten_dist {

constexpr int GROUP = 4;

// What multiplies the eigenstates of a group at one step, or the gradients of that. Each part
// has a real and, after it, an imaginary half.
enum Part { EIGENVALUE = 0, KEY = 2, QUERY = 4, PARTS = 6 };
struct alignas(16) Factors {
  float parts[PARTS][GROUP];

  // The sums over the lanes of a vector for each of them.
  void add_sums(const Floats (&x)[PARTS][GROUP]) {
    Floats quarters[PARTS];
#pragma GCC unroll 6
    for (int part = 0; part < PARTS; ++part)
      quarters[part] = sums_of_quarters(x[part][0], x[part][1], x[part][2], x[part][3]);
    const Floats first = added_quarters(added_quarters(quarters[0], quarters[1]),
                                        added_quarters(quarters[2], quarters[3]));
    const Floats rest = added_quarters(quarters[4], quarters[5]);
    float* to = &parts[0][0];
    store(to, load(to) + first);
    for (int part = 0; part < 2; ++part)
      for (int e = 0; e < GROUP; ++e)
        parts[4 + part][e] += rest[8 * part + e] + rest[8 * part + e + 4];
  }
};

// Rows of `width` floats, one for each step.
struct Rows {
  float* data;
  int64_t width;

  float* operator()(int64_t t, int64_t n) const { return data + t * width + n; }
};

template <int V>
struct Tile {
  Floats real[GROUP][V], imaginary[GROUP][V];

  // Of a matrix with the real and the imaginary row of each eigenstate in turn.
  void load_from(const Rows& matrix, int64_t k, int64_t n) {
    for (int e = 0; e < GROUP; ++e)
      for (int v = 0; v < V; ++v) {
        real[e][v] = load(matrix(2 * (k + e), n + v * LANES));
        imaginary[e][v] = load(matrix(2 * (k + e) + 1, n + v * LANES));
      }
  }

  void store_to(const Rows& matrix, int64_t k, int64_t n) const {
    for (int e = 0; e < GROUP; ++e)
      for (int v = 0; v < V; ++v) {
        store(matrix(2 * (k + e), n + v * LANES), real[e][v]);
        store(matrix(2 * (k + e) + 1, n + v * LANES), imaginary[e][v]);
      }
  }

  inline void advance(const Factors& factors, int e, const Floats (&value)[V]) {
    const auto& f = factors.parts;
    for (int v = 0; v < V; ++v) {
      const Floats before = real[e][v];
      real[e][v] = f[EIGENVALUE][e] * before - f[EIGENVALUE + 1][e] * imaginary[e][v] +
                   f[KEY][e] * value[v];
      imaginary[e][v] = f[EIGENVALUE][e] * imaginary[e][v] + f[EIGENVALUE + 1][e] * before +
                        f[KEY + 1][e] * value[v];
    }
  }
};

template <int V>
void load_row(Floats (&row)[V], const float* from) {
  for (int v = 0; v < V; ++v) row[v] = load(from + v * LANES);
}

// Steps [from, to): adds what is read to `outputs`, and the squares of the states to `squares`.
// `factors` are those of the group, `stride` apart from step to step; rows are those of n.
template <int V>
void read_forward(Tile<V>& state_, const Factors* factors, int64_t stride, const Rows& values,
                  const Rows& outputs, int64_t n, int64_t from, int64_t to,
                  Floats (&squares_)[GROUP]) {
  Tile<V> state = state_;
  Floats squares[GROUP];
  for (int e = 0; e < GROUP; ++e) squares[e] = squares_[e];
  for (int64_t t = from; t < to; ++t) {
    const Factors& factor = factors[t * stride];
    Floats value[V], output[V];
    load_row(value, values(t, n));
    load_row(output, outputs(t, n));
    for (int e = 0; e < GROUP; ++e) {
      state.advance(factor, e, value);
      for (int v = 0; v < V; ++v) {
        const Floats real = state.real[e][v], imaginary = state.imaginary[e][v];
        output[v] += factor.parts[QUERY][e] * real;
        output[v] += factor.parts[QUERY + 1][e] * imaginary;
        squares[e] += real * real;
        squares[e] += imaginary * imaginary;
      }
    }
    for (int v = 0; v < V; ++v) store(outputs(t, n + v * LANES), output[v]);
  }
  state_ = state;
  for (int e = 0; e < GROUP; ++e) squares_[e] = squares[e];
}

// Steps [from, to): writes the state after step t into states[t + 1].
template <int V>
void states_forward(Tile<V>& state_, const Factors* factors, int64_t stride, const Rows& values,
                    int64_t n, int64_t from, int64_t to, Tile<V>* states) {
  Tile<V> state = state_;
  for (int64_t t = from; t < to; ++t) {
    Floats value[V];
    load_row(value, values(t, n));
#pragma GCC unroll 4
    for (int e = 0; e < GROUP; ++e) {
      state.advance(factors[t * stride], e, value);
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) {
        states[t + 1].real[e][v] = state.real[e][v];
        states[t + 1].imaginary[e][v] = state.imaginary[e][v];
      }
    }
  }
  state_ = state;
}

// The adjoint against time, from step to - 1 down to step from:
//
//     A_t = query_t grad_o_t^T + w S_t + conj(lambda_{t+1}) A_{t+1}
//
// with w the weight of the squares. `carried` is conj(lambda_{t+1}) A_{t+1} of the last step,
// and that of the step before `from` afterwards. `entering` is the state before `from`, the
// others are those of states_forward. Gradients are added to `gradients` and `grad_values`.
template <int V>
void backward_tile(Tile<V>& carried_, const Factors* factors, Factors* gradients, int64_t stride,
                   const Rows& values, const Rows& grad_outputs, const Rows& grad_values,
                   int64_t n, int64_t from, int64_t to, const Tile<V>& entering,
                   const Tile<V>* states, const float* weights) {
  Tile<V> carried = carried_;
  for (int64_t t = to - 1; t >= from; --t) {
    const auto& f = factors[t * stride].parts;
    const Tile<V>& now = states[t + 1];
    const Tile<V>& before = t == from ? entering : states[t];
    Floats value[V], grad_output[V], grad_value[V];
    load_row(value, values(t, n));
    load_row(grad_output, grad_outputs(t, n));
    load_row(grad_value, grad_values(t, n));
    Floats sums[PARTS][GROUP] = {};
#pragma GCC unroll 4
    for (int e = 0; e < GROUP; ++e)
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) {
        const Floats state_real = now.real[e][v], state_imaginary = now.imaginary[e][v];
        const Floats before_real = before.real[e][v], before_imaginary = before.imaginary[e][v];
        const Floats real = carried.real[e][v] + f[QUERY][e] * grad_output[v] +
                            weights[e] * state_real;
        const Floats imaginary = carried.imaginary[e][v] + f[QUERY + 1][e] * grad_output[v] +
                                 weights[e] * state_imaginary;
        sums[QUERY][e] += state_real * grad_output[v];
        sums[QUERY + 1][e] += state_imaginary * grad_output[v];
        sums[KEY][e] += real * value[v];
        sums[KEY + 1][e] += imaginary * value[v];
        grad_value[v] += f[KEY][e] * real;
        grad_value[v] += f[KEY + 1][e] * imaginary;
        sums[EIGENVALUE][e] += real * before_real;
        sums[EIGENVALUE][e] += imaginary * before_imaginary;
        sums[EIGENVALUE + 1][e] += imaginary * before_real;
        sums[EIGENVALUE + 1][e] -= real * before_imaginary;
        carried.real[e][v] = f[EIGENVALUE][e] * real + f[EIGENVALUE + 1][e] * imaginary;
        carried.imaginary[e][v] = f[EIGENVALUE][e] * imaginary - f[EIGENVALUE + 1][e] * real;
      }
    for (int v = 0; v < V; ++v) store(grad_values(t, n + v * LANES), grad_value[v]);
    gradients[t * stride].add_sums(sums);
  }
  carried_ = carried;
}

}  // namespace ten_dist
