// The cosine loss on CPUs, one row at a time; the formulas and factors are in cosine_loss.py. Threads share out whole
// rows, so results do not depend on their number. Masked-out rows are not read.

#pragma once

#include <algorithm>
#include <cmath>
#include <optional>

#include "rows.h"

namespace distilspeed {

// Write row losses, student factors and teacher factors, each float32 [rows].
void cosine_loss_forward(const Tensor& student, const Tensor& teacher, const std::optional<Tensor>& mask, double eps,
                         const Tensor& row_losses, const Tensor& student_factors, const Tensor& teacher_factors) {
  const bool* counts = mask ? mask->const_data_ptr<bool>() : nullptr;
  const float smallest = static_cast<float>(eps);
  float* losses = row_losses.mutable_data_ptr<float>();
  float* of_student = student_factors.mutable_data_ptr<float>();
  float* of_teacher = teacher_factors.mutable_data_ptr<float>();
  for_type(student, [&](auto type) {
    using scalar_t = decltype(type);
    at::parallel_for(0, student.size(0), ROWS_PER_THREAD, [&](int64_t begin, int64_t end) {
      alignas(64) float buffers[2][BLOCK];
      for (int64_t row = begin; row < end; ++row) {
        if (counts != nullptr && !counts[row]) {
          losses[row] = of_student[row] = of_teacher[row] = 0;
          continue;
        }
        Vec products(0), student_squares(0), teacher_squares(0);
        for_blocks(student.size(1), [&](int64_t block, int64_t width) {
          const float* s = as_float(row_of<scalar_t>(student, row) + block, width, buffers[0]);
          const float* t = as_float(row_of<scalar_t>(teacher, row) + block, width, buffers[1]);
          for_vectors(width, [&](int64_t first, int64_t count) C10_ALWAYS_INLINE_ATTRIBUTE {
            const Vec s_values = Vec::loadu(s + first, count), t_values = Vec::loadu(t + first, count);
            const auto add = [&](Vec& sum, const Vec& left, const Vec& right) {
              const Vec added = at::vec::fmadd(left, right, sum);
              sum = count == Vec::size() ? added : Vec::set(sum, added, count);
            };
            add(products, s_values, t_values);
            add(student_squares, s_values, s_values);
            add(teacher_squares, t_values, t_values);
          });
        });
        const float student_norm = std::sqrt(sum_of_lanes(student_squares));
        const float teacher_norm = std::sqrt(sum_of_lanes(teacher_squares));
        // Not std::max, which may drop a NaN.
        const float factor = 1 / ((student_norm < smallest ? smallest : student_norm) *
                                  (teacher_norm < smallest ? smallest : teacher_norm));
        const float cosine = sum_of_lanes(products) * factor;
        losses[row] = 1 - cosine;
        of_teacher[row] = factor;
        // A norm below eps is clamped to a constant, so its derivative is 0.
        of_student[row] = student_norm <= smallest ? 0 : cosine / (student_norm * student_norm);
      }
    });
  });
}

// Write the gradient with respect to the student's hidden states [rows, hidden size].
void cosine_loss_backward(const Tensor& student, const Tensor& teacher, const std::optional<Tensor>& mask,
                          const Tensor& student_factors, const Tensor& teacher_factors, const Tensor& scale,
                          const Tensor& gradient) {
  const bool* counts = mask ? mask->const_data_ptr<bool>() : nullptr;
  const float* of_student = student_factors.const_data_ptr<float>();
  const float* of_teacher = teacher_factors.const_data_ptr<float>();
  const float factor = *scale.const_data_ptr<float>();
  for_type(student, [&](auto type) {
    using scalar_t = decltype(type);
    scalar_t* gradients = gradient.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, student.size(0), ROWS_PER_THREAD, [&](int64_t begin, int64_t end) {
      alignas(64) float buffers[2][BLOCK], result[BLOCK];
      for (int64_t row = begin; row < end; ++row) {
        scalar_t* of_row = gradients + row * gradient.stride(0);
        if (counts != nullptr && !counts[row]) {
          std::fill(of_row, of_row + gradient.size(1), scalar_t(0));
          continue;
        }
        const Vec student_factor(factor * of_student[row]), teacher_factor(factor * of_teacher[row]);
        for_blocks(student.size(1), [&](int64_t block, int64_t width) {
          const float* s = as_float(row_of<scalar_t>(student, row) + block, width, buffers[0]);
          const float* t = as_float(row_of<scalar_t>(teacher, row) + block, width, buffers[1]);
          for_vectors(width, [&](int64_t first, int64_t count) C10_ALWAYS_INLINE_ATTRIBUTE {
            const Vec of_s = student_factor * Vec::loadu(s + first, count);
            at::vec::fnmadd(teacher_factor, Vec::loadu(t + first, count), of_s).store(result + first, count);
          });
          at::vec::convert(result, of_row + block, width);
        });
      }
    });
  });
}

}  // namespace distilspeed
