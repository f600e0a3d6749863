// Rows of float32, bfloat16 or float16, read in vectors of float32 with PyTorch's at::vec.

#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <type_traits>

namespace distilspeed {

using at::Tensor;
using Vec = at::vec::Vectorized<float>;

// Values that are converted and summed at once; their float32 copies stay in the first-level cache.
constexpr int64_t BLOCK = 1024;
constexpr int64_t CACHE_LINE = 64;
// Fewer short rows are not worth another thread.
constexpr int64_t ROWS_PER_THREAD = 16;

template <typename scalar_t>
const scalar_t* row_of(const Tensor& logits, int64_t row) {
  return logits.const_data_ptr<scalar_t>() + row * logits.stride(0);
}

// Return the values as float32: themselves, or copies in the buffer, which has room for whole vectors.
template <typename scalar_t>
const float* as_float(const scalar_t* values, int64_t count, float* buffer) {
  if constexpr (std::is_same_v<scalar_t, float>) {
    return values;
  } else {
    using Narrow = at::vec::Vectorized<scalar_t>;
    for (int64_t first = 0; first < count; first += Narrow::size()) {
      const auto narrow = Narrow::loadu(values + first, std::min<int64_t>(Narrow::size(), count - first));
      const auto [low, high] = at::vec::convert_to_float<scalar_t>(narrow);
      low.store(buffer + first);
      high.store(buffer + first + Vec::size());
    }
    return buffer;
  }
}

// Bring values that are needed soon into the second-level cache.
template <typename scalar_t>
inline void prefetch(const scalar_t* values, int64_t count) {
  for (int64_t first = 0; first < count; first += CACHE_LINE / sizeof(scalar_t)) {
    __builtin_prefetch(values + first, 0, 2);
  }
}

// Call function(first, count) for every vector of a block; count is smaller in the last one.
template <typename Function>
inline void for_vectors(int64_t width, const Function& function) {
  int64_t first = 0;
  for (; first + Vec::size() <= width; first += Vec::size()) {
    function(first, Vec::size());
  }
  if (first < width) {
    function(first, width - first);
  }
}

// Call function(first, width) for every block of a row.
template <typename Function>
inline void for_blocks(int64_t width, const Function& function) {
  for (int64_t first = 0; first < width; first += BLOCK) {
    function(first, std::min(BLOCK, width - first));
  }
}

inline float sum_of_lanes(const Vec& values) {
  float lanes[Vec::size()];
  values.store(lanes);
  float sum = 0;
  for (float lane : lanes) {
    sum += lane;
  }
  return sum;
}

// Call function with a value of the rows' type.
template <typename Function>
void for_type(const Tensor& rows, const Function& function) {
  switch (rows.scalar_type()) {
    case at::kFloat:
      return function(float());
    case at::kBFloat16:
      return function(at::BFloat16());
    case at::kHalf:
      return function(at::Half());
    default:
      TORCH_CHECK(false, "rows must be float32, bfloat16 or float16, not ", rows.scalar_type());
  }
}

}  // namespace distilspeed
