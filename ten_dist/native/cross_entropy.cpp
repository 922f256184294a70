// Cross-entropy of rows of logits, and its gradient in their place.
//
// A row is read three times, for its largest value, for the sum of the exponentials and for
// the gradient, while it is in the cache; what torch does in six operators is memory traffic
// that takes as long as the products around it. Everything but the logits is in float32.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <tuple>

#include "vectors.h"

namespace {

using namespace ten_dist;

// Vectors that are added up in float before they are in double.
constexpr int64_t STRETCH = 64;

inline Floats larger(Floats x, Floats y) {
#if defined(__AVX512F__)
  return reinterpret_cast<Floats>(
      _mm512_max_ps(reinterpret_cast<__m512>(x), reinterpret_cast<__m512>(y)));
#else
  return choose(x > y, x, y);
#endif
}

template <typename T>
float load_one(const T* from) {
  const T lanes[LANES] = {*from};
  return load(lanes)[0];
}

template <typename T>
void store_one(T* to, float x) {
  T lanes[LANES];
  store(lanes, all(x));
  *to = lanes[0];
}

// Calls `body(values, place)` for a row in vectors. The last one is filled up with minus
// infinity, which adds nothing to a largest value or a sum; its place is a copy.
template <typename T, typename Body>
void through(T* row, int64_t width, const Body& body) {
  int64_t i = 0;
  for (; i + LANES <= width; i += LANES) body(load(row + i), row + i);
  if (i == width) return;
  T rest[LANES];
  store(rest, all(-std::numeric_limits<float>::infinity()));
  std::copy(row + i, row + width, rest);
  body(load(rest), rest);
  std::copy(rest, rest + (width - i), row + i);
}

template <typename T>
float largest_of(T* row, int64_t width) {
  Floats largest = all(-std::numeric_limits<float>::infinity());
  through(row, width, [&](Floats x, T*) { largest = larger(x, largest); });
  float result = largest[0];
  for (int lane = 1; lane < LANES; ++lane) result = std::max(result, largest[lane]);
  return result;
}

template <typename T>
double sum_of_exponentials(T* row, int64_t width, float largest) {
  Doubles total{};
  Floats sum{};
  int64_t count = 0;
  through(row, width, [&](Floats x, T*) {
    sum += exponential(x - largest);
    if (++count % STRETCH == 0) {
      total += wide(sum);
      sum = Floats{};
    }
  });
  total += wide(sum);
  double result = 0;
  for (int lane = 0; lane < LANES; ++lane) result += total[lane];
  return result;
}

// With p = softmax of the row and y the target, the gradient is w ((1 + 2 z lse) p - 1[y]).
template <typename T>
void write_gradient(T* row, int64_t width, int64_t target, float log_partition, float weight,
                    float z_loss_weight) {
  const float factor = weight * (1 + 2 * z_loss_weight * log_partition);
  // One of nearly equal numbers from the other: rounded afterwards, not before.
  const float at_target =
      factor * exponential(all(load_one(row + target) - log_partition))[0] - weight;
  through(row, width, [&](Floats x, T* place) {
    store(place, factor * exponential(x - log_partition));
  });
  store_one(row + target, at_target);
}

std::tuple<at::Tensor, at::Tensor> cross_entropy_(const at::Tensor& logits,
                                                  const at::Tensor& targets,
                                                  const at::Tensor& weights,
                                                  double z_loss_weight, bool need_gradient) {
  TORCH_CHECK(logits.dim() == 2 && (logits.size(1) == 0 || logits.stride(1) == 1),
              "cross_entropy_: rows of logits must be contiguous");
  TORCH_CHECK(targets.is_contiguous() && targets.numel() == logits.size(0) &&
                  weights.is_contiguous() && weights.numel() == logits.size(0),
              "cross_entropy_: one target and one weight for each row, contiguous");
  const int64_t rows = logits.size(0), width = logits.size(1), stride = logits.stride(0);
  at::Tensor losses = at::empty({rows}, logits.options().dtype(at::kFloat));
  at::Tensor log_partitions = at::empty_like(losses);
  const int64_t* target = targets.const_data_ptr<int64_t>();
  for (int64_t n = 0; n < rows; ++n)
    TORCH_CHECK_INDEX(0 <= target[n] && target[n] < width, "target ", target[n],
                      " is not in a vocabulary of ", width);
  const float* weight = weights.const_data_ptr<float>();
  float* loss = losses.mutable_data_ptr<float>();
  float* log_partition = log_partitions.mutable_data_ptr<float>();
  const auto run = [&](auto* data) {
    at::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) {
        auto* row = data + n * stride;
        const float largest = largest_of(row, width);
        const double sum = sum_of_exponentials(row, width, largest);
        log_partition[n] = static_cast<float>(largest + std::log(sum));
        loss[n] = log_partition[n] - load_one(row + target[n]);
        if (need_gradient)
          write_gradient(row, width, target[n], log_partition[n], weight[n],
                         static_cast<float>(z_loss_weight));
      }
    });
  };
  if (logits.scalar_type() == at::kBFloat16)
    run(static_cast<uint16_t*>(logits.mutable_data_ptr()));
  else
    run(logits.mutable_data_ptr<float>());
  return {losses, log_partitions};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(ten_dist_cpu, library) {
  library.def(
      "cross_entropy_(Tensor(a!) logits, Tensor targets, Tensor weights, float z_loss_weight, "
      "bool need_gradient) -> (Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(ten_dist_cpu, CPU, library) {
  library.impl("cross_entropy_", &cross_entropy_);
}
