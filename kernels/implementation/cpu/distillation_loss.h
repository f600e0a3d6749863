// The distillation loss on CPUs, one row at a time. The formulas are in distillation_loss.py; arguments and results are
// those of distillation_loss_rows.py.
//
// A row of both models comes from memory once: its exponentials stay in the second-level cache, in two buffers of
// float32 [vocabulary] per thread, until the gradient is written. Threads share out whole rows, so results do not depend
// on their number. The arithmetic is float32, with float64 sums over blocks; float16 and bfloat16 logits are converted
// a block at a time.

#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <vector>

#include "rows.h"

namespace distilspeed {

constexpr float INFINITE = std::numeric_limits<float>::infinity();
constexpr float UNDEFINED = std::numeric_limits<float>::quiet_NaN();
constexpr float LOG2_E = 1.44269504f;
constexpr double LN_2 = 0.693147180559945309;

// The rows of RowTable; the first three are the losses.
enum Field { KL, SOFT_CE, HARD_CE, STUDENT_MAX, STUDENT_SUM, TEACHER_MAX, TEACHER_SUM, HARD_SUM };

// How a row gets exp(z - max z), for its hard label.
enum class Hard {
  none,         // it has no label
  squared,      // T = 2: it is the square of exp((z - max z) / 2)
  exponential,  // by an exponential of its own
};

struct Rows {
  const Tensor& student;
  const Tensor& teacher;
  const int64_t* labels;  // nullptr: no row is labelled
  const bool* soft_mask;  // nullptr: every row is soft
  float scale;            // 1 / T
  int64_t ignore_index;
  int64_t width;

  bool is_soft(int64_t row) const { return soft_mask == nullptr || soft_mask[row]; }
  bool is_labelled(int64_t row) const { return labels != nullptr && labels[row] != ignore_index; }
};

// Sums over the vocabulary; z and u are the logits of student and teacher without their maxima, times log2(e) / T.
struct Sums {
  double student = 0;     // 2^z
  double teacher = 0;     // 2^u
  double difference = 0;  // 2^u (u - z)
  double weighted = 0;    // 2^u z
  double hard = 0;        // 2^(z T)
};

struct Maxima {
  float student;
  float teacher;
};

// Factors of the three softmaxes, not yet divided by their sums.
struct Factors {
  float student;
  float teacher;
  float hard;
};

// Return the largest value of a row; NaN if it has one.
template <typename scalar_t>
float largest(const scalar_t* row, int64_t width) {
  // Each maximum waits for the one before it, so there are several chains of them.
  constexpr int64_t CHAINS = 4, STEP = CHAINS * Vec::size();
  alignas(64) float buffer[BLOCK];
  Vec chains[CHAINS] = {-INFINITE, -INFINITE, -INFINITE, -INFINITE};
  float result = -INFINITE;
  const auto include = [&](float value) { result = std::isnan(result) || value <= result ? result : value; };
  for_blocks(width, [&](int64_t block, int64_t block_width) {
    const float* values = as_float(row + block, block_width, buffer);
    int64_t first = 0;
    for (; first + STEP <= block_width; first += STEP) {
      for (int64_t chain = 0; chain < CHAINS; ++chain) {
        chains[chain] = at::vec::maximum(chains[chain], Vec::loadu(values + first + chain * Vec::size()));
      }
    }
    std::for_each(values + first, values + block_width, include);
  });
  for (const Vec& chain : chains) {
    float lanes[Vec::size()];
    chain.store(lanes);
    std::for_each(lanes, lanes + Vec::size(), include);
  }
  return result;
}

// Write the exponentials of a block, and add to the sums if there are any. GUARDED: a teacher's probability of 0
// contributes 0 even where the student's logit is infinite.
template <bool SOFT, Hard HARD, bool GUARDED>
void exponentials(const float* student_logits, const float* teacher_logits, int64_t width, Maxima maxima, float scale,
                  float* student, float* teacher, Sums* sums) {
  const Vec student_max(maxima.student), teacher_max(maxima.teacher), zero(0), log2_e(LOG2_E);
  const Vec scales(SOFT ? scale * LOG2_E : LOG2_E);
  Vec student_sum(0), teacher_sum(0), difference(0), weighted(0), hard_sum(0);
  for_vectors(width, [&](int64_t first, int64_t count) C10_ALWAYS_INLINE_ATTRIBUTE {
    const auto counted = [&](const Vec& values) C10_ALWAYS_INLINE_ATTRIBUTE {
      return count == Vec::size() ? values : Vec::set(zero, values, count);
    };
    const Vec shifted = Vec::loadu(student_logits + first, count) - student_max;
    const Vec z = shifted * scales;
    const Vec exp_z = counted(exp2_of_nonpositive(z));
    exp_z.store(student + first, count);
    student_sum = student_sum + exp_z;
    if constexpr (SOFT) {
      const Vec u = (Vec::loadu(teacher_logits + first, count) - teacher_max) * scales;
      const Vec exp_u = counted(exp2_of_nonpositive(u));
      exp_u.store(teacher + first, count);
      if (sums != nullptr) {
        teacher_sum = teacher_sum + exp_u;
        Vec of_difference = counted(exp_u * (u - z)), of_weighted = counted(exp_u * z);
        if constexpr (GUARDED) {
          const Vec is_zero = exp_u == zero;
          of_difference = Vec::blendv(of_difference, zero, is_zero);
          of_weighted = Vec::blendv(of_weighted, zero, is_zero);
        }
        difference = difference + of_difference;
        weighted = weighted + of_weighted;
      }
      if constexpr (HARD == Hard::squared) {
        hard_sum = at::vec::fmadd(exp_z, exp_z, hard_sum);
      } else if constexpr (HARD == Hard::exponential) {
        hard_sum = hard_sum + counted(exp2_of_nonpositive(shifted * log2_e));
      }
    }
  });
  if (sums != nullptr) {
    sums->student += sum_of_lanes(student_sum);
    sums->teacher += sum_of_lanes(teacher_sum);
    sums->difference += sum_of_lanes(difference);
    sums->weighted += sum_of_lanes(weighted);
    sums->hard += SOFT ? sum_of_lanes(hard_sum) : sum_of_lanes(student_sum);
  }
}

// Write the gradient of a block from its exponentials; the one-hot vector of the label is not part of it.
template <bool SOFT, Hard HARD>
void gradients(const float* student, const float* teacher, const float* student_logits, int64_t width, Maxima maxima,
               Factors factors, float* gradient) {
  const Vec student_factor(SOFT ? factors.student : factors.hard), teacher_factor(factors.teacher);
  const Vec hard_factor(factors.hard), student_max(maxima.student), log2_e(LOG2_E);
  for_vectors(width, [&](int64_t first, int64_t count) C10_ALWAYS_INLINE_ATTRIBUTE {
    const Vec exp_z = Vec::loadu(student + first, count);
    Vec result = student_factor * exp_z;
    if constexpr (SOFT) {
      result = at::vec::fnmadd(teacher_factor, Vec::loadu(teacher + first, count), result);
      if constexpr (HARD == Hard::squared) {
        result = at::vec::fmadd(hard_factor * exp_z, exp_z, result);
      } else if constexpr (HARD == Hard::exponential) {
        const Vec shifted = Vec::loadu(student_logits + first, count) - student_max;
        const Vec exp_hard = exp2_of_nonpositive(shifted * log2_e);
        result = at::vec::fmadd(hard_factor, exp_hard, result);
      }
    }
    result.store(gradient + first, count);
  });
}

// One row. Memory is the limit while its maxima are found and arithmetic afterwards, so the row after it, ``next``, is
// fetched meanwhile.
template <typename scalar_t, bool SOFT, Hard HARD>
class Row {
 public:
  Row(const Rows& rows, int64_t row, int64_t next)
      : student_(row_of<scalar_t>(rows.student, row)),
        teacher_(row_of<scalar_t>(rows.teacher, row)),
        next_student_(row_of<scalar_t>(rows.student, next)),
        next_teacher_(row_of<scalar_t>(rows.teacher, next)),
        label_(HARD == Hard::none ? -1 : rows.labels[row]),
        scale_(rows.scale),
        width_(rows.width) {}

  // Compute the losses and the statistics; keep the exponentials in the two buffers [width] if they are given.
  void forward(float* student_buffer, float* teacher_buffer) {
    maxima_ = {largest(student_, width_), SOFT ? largest(teacher_, width_) : 0};
    sums_ = sums<false>(student_buffer, teacher_buffer);
    if (std::isnan(sums_.difference) || std::isnan(sums_.weighted)) {
      sums_ = sums<true>(student_buffer, teacher_buffer);
    }
    // exp2_of_nonpositive does not return NaN for NaN.
    if (!std::isfinite(maxima_.student)) {
      sums_.student = sums_.hard = UNDEFINED;
    }
    if (!std::isfinite(maxima_.teacher)) {
      sums_.teacher = UNDEFINED;
    }
  }

  template <typename table_t>
  void write(table_t& table, int64_t row) const {
    table[KL][row] = SOFT ? LN_2 * sums_.difference / sums_.teacher + std::log(sums_.student / sums_.teacher) : 0;
    table[SOFT_CE][row] = SOFT ? std::log(sums_.student) - LN_2 * sums_.weighted / sums_.teacher : 0;
    table[HARD_CE][row] = 0;
    if constexpr (HARD != Hard::none) {
      table[HARD_CE][row] = std::log(sums_.hard) - (static_cast<float>(student_[label_]) - maxima_.student);
    }
    if (table.size(0) > STUDENT_MAX) {
      table[STUDENT_MAX][row] = maxima_.student;
      table[STUDENT_SUM][row] = sums_.student;
      table[TEACHER_MAX][row] = maxima_.teacher;
      table[TEACHER_SUM][row] = sums_.teacher;
      table[HARD_SUM][row] = sums_.hard;
    }
  }

  template <typename table_t>
  void read(const table_t& table, int64_t row) {
    maxima_ = {table[STUDENT_MAX][row], table[TEACHER_MAX][row]};
    sums_.student = table[STUDENT_SUM][row];
    sums_.teacher = table[TEACHER_SUM][row];
    sums_.hard = table[HARD_SUM][row];
  }

  // Write the gradient, which may be the student's logits themselves. The buffers hold the exponentials; without
  // buffers they are computed again.
  void backward(const float* student_buffer, const float* teacher_buffer, float soft_coefficient,
                float hard_coefficient, scalar_t* gradient) const {
    const Factors factors{static_cast<float>(soft_coefficient / sums_.student),
                          static_cast<float>(soft_coefficient / sums_.teacher),
                          static_cast<float>(hard_coefficient / sums_.hard)};
    alignas(64) float logits[2][BLOCK], computed[2][BLOCK], result[BLOCK];
    for_blocks(width_, [&](int64_t block, int64_t block_width) {
      const float* student_logits = nullptr;
      if (student_buffer == nullptr || HARD == Hard::exponential) {
        student_logits = as_float(student_ + block, block_width, logits[0]);
      }
      const float* student = student_buffer + block;
      const float* teacher = teacher_buffer + block;
      if (student_buffer == nullptr) {
        const float* teacher_logits = SOFT ? as_float(teacher_ + block, block_width, logits[1]) : nullptr;
        exponentials<SOFT, Hard::none, false>(student_logits, teacher_logits, block_width, maxima_, scale_, computed[0],
                                              computed[1], nullptr);
        student = computed[0];
        teacher = computed[1];
      }
      gradients<SOFT, HARD>(student, teacher, student_logits, block_width, maxima_, factors, result);
      if (block <= label_ && label_ < block + block_width) {
        result[label_ - block] -= hard_coefficient;
      }
      at::vec::convert(result, gradient + block, block_width);
    });
  }

 private:
  template <bool GUARDED>
  Sums sums(float* student_buffer, float* teacher_buffer) const {
    Sums result;
    alignas(64) float logits[2][BLOCK], dropped[2][BLOCK];
    for_blocks(width_, [&](int64_t block, int64_t block_width) {
      const float* student_logits = as_float(student_ + block, block_width, logits[0]);
      const float* teacher_logits = SOFT ? as_float(teacher_ + block, block_width, logits[1]) : nullptr;
      prefetch(next_student_ + block, block_width);
      if (SOFT) {
        prefetch(next_teacher_ + block, block_width);
      }
      float* student = student_buffer == nullptr ? dropped[0] : student_buffer + block;
      float* teacher = teacher_buffer == nullptr ? dropped[1] : teacher_buffer + block;
      exponentials<SOFT, HARD, GUARDED>(student_logits, teacher_logits, block_width, maxima_, scale_, student, teacher,
                                        &result);
    });
    return result;
  }

  const scalar_t* student_;
  const scalar_t* teacher_;
  const scalar_t* next_student_;
  const scalar_t* next_teacher_;
  int64_t label_;
  float scale_;
  int64_t width_;
  Maxima maxima_{};
  Sums sums_{};
};

// Return the calling thread's buffer, which it keeps. Not one of at::get_num_threads(): clang's OpenMP library is another
// one than PyTorch's, and starts its own number of threads.
inline float* thread_buffer(size_t size) {
  thread_local std::vector<float> buffer;
  buffer.resize(std::max(buffer.size(), size));
  return buffer.data();
}

// Call function(Row, row) with the right type of Row for all rows that are soft or labelled, on all threads.
template <typename scalar_t, typename Function>
void for_rows(const Rows& rows, const Function& function) {
  std::vector<int64_t> counted;
  for (int64_t row = 0; row < rows.student.size(0); ++row) {
    if (rows.is_soft(row) || rows.is_labelled(row)) {
      counted.push_back(row);
    }
  }
  at::parallel_for(0, counted.size(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t index = begin; index < end; ++index) {
      const int64_t row = counted[index], next = counted[std::min(index + 1, end - 1)];
      if (!rows.is_soft(row)) {
        function(Row<scalar_t, false, Hard::exponential>(rows, row, next), row);
      } else if (!rows.is_labelled(row)) {
        function(Row<scalar_t, true, Hard::none>(rows, row, next), row);
      } else if (rows.scale == 0.5f) {
        function(Row<scalar_t, true, Hard::squared>(rows, row, next), row);
      } else {
        function(Row<scalar_t, true, Hard::exponential>(rows, row, next), row);
      }
    }
  });
}

// Set to 0 the gradient of rows that do not count and of columns behind the vocabulary. Last: the gradient may be the
// student's logits themselves.
template <typename scalar_t>
void clear_rest(const Rows& rows, const Tensor& gradient) {
  at::parallel_for(0, gradient.size(0), BLOCK, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      scalar_t* of_row = gradient.mutable_data_ptr<scalar_t>() + row * gradient.stride(0);
      const bool counts = rows.is_soft(row) || rows.is_labelled(row);
      std::fill(of_row + (counts ? rows.width : 0), of_row + gradient.size(1), scalar_t(0));
    }
  });
}

Rows make_rows(const Tensor& student, const Tensor& teacher, const std::optional<Tensor>& labels,
               const std::optional<Tensor>& soft_mask, double temperature, int64_t ignore_index, int64_t vocab_size) {
  return {student,
          teacher,
          labels ? labels->const_data_ptr<int64_t>() : nullptr,
          soft_mask ? soft_mask->const_data_ptr<bool>() : nullptr,
          static_cast<float>(1 / temperature),
          ignore_index,
          vocab_size};
}

void distillation_loss_forward(const Tensor& student, const Tensor& teacher, const std::optional<Tensor>& labels,
             const std::optional<Tensor>& soft_mask, double temperature, int64_t ignore_index, int64_t vocab_size,
             const Tensor& table) {
  const Rows rows = make_rows(student, teacher, labels, soft_mask, temperature, ignore_index, vocab_size);
  auto columns = table.accessor<float, 2>();
  for_type(student, [&](auto type) {
    for_rows<decltype(type)>(rows, [&](auto row, int64_t index) {
      row.forward(nullptr, nullptr);
      row.write(columns, index);
    });
  });
}

void distillation_loss_backward(const Tensor& student, const Tensor& teacher, const std::optional<Tensor>& labels,
              const std::optional<Tensor>& soft_mask, double temperature, int64_t ignore_index, int64_t vocab_size,
              const Tensor& table, const Tensor& coefficients, const Tensor& gradient) {
  const Rows rows = make_rows(student, teacher, labels, soft_mask, temperature, ignore_index, vocab_size);
  const auto columns = table.accessor<float, 2>();
  const float* factors = coefficients.const_data_ptr<float>();
  for_type(student, [&](auto type) {
    using scalar_t = decltype(type);
    scalar_t* gradients = gradient.mutable_data_ptr<scalar_t>();
    for_rows<scalar_t>(rows, [&](auto row, int64_t index) {
      row.read(columns, index);
      row.backward(nullptr, nullptr, factors[0], factors[1], gradients + index * gradient.stride(0));
    });
    clear_rest<scalar_t>(rows, gradient);
  });
}

void distillation_loss_forward_backward(const Tensor& student, const Tensor& teacher, const std::optional<Tensor>& labels,
                      const std::optional<Tensor>& soft_mask, double temperature, int64_t ignore_index,
                      int64_t vocab_size, const Tensor& losses, const Tensor& coefficients, const Tensor& gradient) {
  const Rows rows = make_rows(student, teacher, labels, soft_mask, temperature, ignore_index, vocab_size);
  auto columns = losses.accessor<float, 2>();
  const float* factors = coefficients.const_data_ptr<float>();
  const int64_t buffer_width = (vocab_size + BLOCK - 1) / BLOCK * BLOCK;
  for_type(student, [&](auto type) {
    using scalar_t = decltype(type);
    scalar_t* gradients = gradient.mutable_data_ptr<scalar_t>();
    for_rows<scalar_t>(rows, [&](auto row, int64_t index) {
      float* of_thread = thread_buffer(2 * buffer_width);
      row.forward(of_thread, of_thread + buffer_width);
      row.write(columns, index);
      row.backward(of_thread, of_thread + buffer_width, factors[0], factors[1],
                   gradients + index * gradient.stride(0));
    });
    clear_rest<scalar_t>(rows, gradient);
  });
}

}  // namespace distilspeed
