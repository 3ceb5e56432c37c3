// What kernels.cpp computes and binding.cpp calls: pointers to float32 numbers in the processor's memory.
//
// Features lie in one of two ways. In rows, one gamma holds for `inner` neighbours: [batch, channels, inner], as
// images and sequences with the channels first. In columns, neighbours have a gamma each: [batch, positions,
// channels], as tokens and channels-last images. gamma and beta are [batch, channels], `strides` numbers from one row
// to the next, or [channels] for all (0); their gradients are written as [batch, channels] in both cases.

#pragma once

#include <cstdint>

namespace torchfilm {

struct Strides {
  int64_t gamma, beta;
};

struct Layout {
  int64_t batch, channels, others;  // others: `inner` or `positions`
  Strides strides;
  bool in_columns;
};

// y = gamma * x + beta, or its ReLU. y may be x.
void film_forward(const float* x, const float* gamma, const float* beta, float* y, const Layout& layout, bool relu,
                  int threads);

void film_backward(const float* dy, const float* x, const float* gamma, const float* beta, float* dx, float* dgamma,
                   float* dbeta, const Layout& layout, bool relu, int threads);

// A norm of `number` groups of channels in each sample (features in rows); or of each position (features in columns),
// whose mean is taken off where number = 1 and not where number = 0. y = gamma * (weight * n + bias) + beta, n the
// features as the norm leaves them; weight and bias [channels] may be null: 1 and 0. mean and rstd (one over the
// standard deviation) are [batch, groups] or [batch, positions].
void norm_forward(const float* x, const float* gamma, const float* beta, const float* weight, const float* bias,
                  float* y, float* mean, float* rstd, const Layout& layout, int64_t number, double eps, int threads);

// dweight and dbias [channels] come as zeros, or null where weight and bias are.
void norm_backward(const float* dy, const float* x, const float* gamma, const float* weight, const float* bias,
                   const float* mean, const float* rstd, float* dx, float* dgamma, float* dbeta, float* dweight,
                   float* dbias, const Layout& layout, int64_t number, int threads);

// y = weight z + bias + offsets for one z: weight [rows, columns].
void linear(const float* z, const float* weight, const float* bias, const float* offsets, float* y, int64_t rows,
            int64_t columns, int threads);

}  // namespace torchfilm
