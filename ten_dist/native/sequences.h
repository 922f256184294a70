// Tensors of the operators of scans: sequences, resets, and what may be missing.

#pragma once

#include <ATen/ATen.h>

#include <cstdint>
#include <optional>
#include <type_traits>

#include "vectors.h"

namespace ten_dist {

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

inline const float* pointer(const at::Tensor& tensor) { return tensor.const_data_ptr<float>(); }
inline const float* pointer(const std::optional<at::Tensor>& tensor) {
  return tensor ? tensor->const_data_ptr<float>() : nullptr;
}

}  // namespace ten_dist
