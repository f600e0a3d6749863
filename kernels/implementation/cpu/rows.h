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
C10_ALWAYS_INLINE void for_vectors(int64_t width, const Function& function) {
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

// Return 2^t for t <= 0, and 0 where that is below float32's smallest normal number. For t = NaN it may be any number. A
// polynomial for the fraction, with a relative error of 1e-7; the whole part is added to the exponent's bits. Shorter than
// at::vec's exp_u20, which knows nothing of its argument's sign.
inline Vec exp2_of_nonpositive(const Vec& t) {
  const Vec smallest(-126);
  const Vec clamped = at::vec::clamp_min(t, smallest);
  const Vec whole = clamped.round();
  const Vec fraction = clamped - whole;
  Vec power = at::vec::fmadd(fraction, Vec(0.001326472731307149f), Vec(0.009671512991189957f));
  power = at::vec::fmadd(power, fraction, Vec(0.05550733581185341f));
  power = at::vec::fmadd(power, fraction, Vec(0.24022242426872253f));
  power = at::vec::fmadd(power, fraction, Vec(0.6931470036506653f));
  power = at::vec::fmadd(power, fraction, Vec(1));
  using Integers = at::vec::Vectorized<int32_t>;
  const Integers exponent = at::vec::convert_to_int_of_same_size(whole) << Integers(23);
  return at::vec::cast<float>(at::vec::cast<int32_t>(power) + exponent) & (t >= smallest);
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
