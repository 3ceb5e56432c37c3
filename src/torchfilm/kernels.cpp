// FiLM, FiLM + ReLU, and group, layer and RMS norm + FiLM of float32 features, forward and backward: one pass each
// over memory that is there, a block at a time. kernels.h says what comes in; nothing of torch is needed.
//
// ReLU keeps a NaN, and its gradient passes where the value is a NaN, as torch's does.

#include "kernels.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "vectors.h"

namespace {

using namespace torchfilm;

constexpr int64_t kColumns = 2048;   // channels that one task takes: their sums stay in the first cache
constexpr int64_t kPositions = 128;  // positions summed in one go; then their sums are added
constexpr int64_t kShortRow = 512;   // weights of a row; of longer ones the processor foresees what comes
constexpr int64_t kRows = 64;        // rows, one for each channel, that are made ready in one go

template <bool relu>
inline float activated(float value) {
  return relu && value < 0.0f ? 0.0f : value;
}

template <bool relu>
inline float before_activation(float grad, float value) {
  return relu && value <= 0.0f ? 0.0f : grad;
}

template <bool relu>
void rows(const float* x, const float* gamma, const float* beta, float* y, int64_t batch, int64_t channels,
          int64_t inner, Strides strides, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t row = 0; row < batch * channels; ++row) {
    const int64_t sample = row / channels, channel = row % channels;
    const float g = gamma[sample * strides.gamma + channel], b = beta[sample * strides.beta + channel];
    const float* from = x + row * inner;
    float* to = y + row * inner;
#pragma omp simd
    for (int64_t i = 0; i < inner; ++i) to[i] = activated<relu>(g * from[i] + b);
  }
}

template <bool relu>
void columns(const float* x, const float* gamma, const float* beta, float* y, int64_t batch, int64_t channels,
             int64_t positions, Strides strides, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t row = 0; row < batch * positions; ++row) {
    const float* g = gamma + row / positions * strides.gamma;
    const float* b = beta + row / positions * strides.beta;
    const float* from = x + row * channels;
    float* to = y + row * channels;
#pragma omp simd
    for (int64_t c = 0; c < channels; ++c) to[c] = activated<relu>(g[c] * from[c] + b[c]);
  }
}

template <bool relu, int lanes, int known>
void rows_backward(const float* dy, const float* x, const float* gamma, const float* beta, float* dx, float* dgamma,
                   float* dbeta, int64_t batch, int64_t channels, int64_t given, Strides strides, int threads) {
  const int64_t inner = known ? known : given;
  const int64_t together = inner > kBlock ? 1 : lanes, parts = (channels + together - 1) / together;
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t task = 0; task < batch * parts; ++task) {
    const int64_t sample = task / parts, first = task % parts * together, place = sample * channels + first;
    const float* g = gamma + sample * strides.gamma + first;
    const float* b = beta + sample * strides.beta + first;
    row_sums<lanes>(std::min(together, channels - first), inner, dgamma + place, dbeta + place,
                    [=](int64_t row, int64_t i) __attribute__((always_inline)) {
                      const int64_t at = (place + row) * inner + i;
                      const Numbers<lanes> own = loaded<lanes>(x + at), before = g[row] * own + b[row];
                      const Numbers<lanes> grad = loaded<lanes>(dy + at);
                      const Numbers<lanes> d = relu ? (before <= 0.0f ? Numbers<lanes>{} : grad) : grad;
                      stored<lanes>(d * g[row], dx + at);
                      return Two<lanes>{d * own, d};
                    });
  }
}

// One position after the other, as they lie in memory: of several at once some processors foresee none.
template <bool relu>
void columns_backward(const float* dy, const float* x, const float* gamma, const float* beta, float* dx,
                      float* dgamma, float* dbeta, int64_t batch, int64_t channels, int64_t positions,
                      Strides strides, int threads) {
  const int64_t parts = (channels + kColumns - 1) / kColumns;
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t task = 0; task < batch * parts; ++task) {
    const int64_t sample = task / parts, first = task % parts * kColumns;
    const int64_t size = std::min(kColumns, channels - first);
    const float* g = gamma + sample * strides.gamma + first;
    const float* b = beta + sample * strides.beta + first;
    float* scaled = dgamma + sample * channels + first;
    float* shifted = dbeta + sample * channels + first;
    std::fill_n(scaled, size, 0.0f);
    std::fill_n(shifted, size, 0.0f);
    float sums[2 * kColumns];  // close together: arrays at a distance of 4 KiB are slower
    float *scale = sums, *shift = sums + size;
    for (int64_t start = 0; start < positions; start += kPositions) {
      std::fill_n(sums, 2 * size, 0.0f);
      const int64_t end = std::min(positions, start + kPositions);
      for (int64_t p = start; p < end; ++p) {
        const int64_t at = (sample * positions + p) * channels + first;
        const float *grad = dy + at, *from = x + at;
        float* to = dx + at;
#pragma omp simd
        for (int64_t c = 0; c < size; ++c) {
          const float own = from[c], d = before_activation<relu>(grad[c], g[c] * own + b[c]);
          scale[c] += d * own;
          shift[c] += d;
          to[c] = d * g[c];
        }
      }
#pragma omp simd
      for (int64_t c = 0; c < size; ++c) {
        scaled[c] += scale[c];
        shifted[c] += shift[c];
      }
    }
  }
}

// Mean and one over the standard deviation of `size` neighbours; where they are not centred, 0 and one over the root
// of the mean square.
struct Statistics {
  float mean, rstd;
};

inline Statistics statistics(const float* from, int64_t size, bool centred, double eps) {
  const double total = centred ? summed(from, size, [](auto own) { return own; }) : 0.0;
  const float middle = static_cast<float>(total / size);
  const double square = summed(from, size, [=](auto own) { return (own - middle) * (own - middle); }) / size;
  return {middle, static_cast<float>(1.0 / std::sqrt(square + eps))};
}

// y = gamma * (weight * n + bias) + beta, n the features of a group with mean 0 and variance 1. Weight and bias
// [channels] may be null: 1 and 0. mean and rstd (one over the standard deviation) are [batch, groups].
template <int known>
void normalised(const float* x, const float* gamma, const float* beta, const float* weight, const float* bias,
                float* y, float* mean, float* rstd, int64_t batch, int64_t channels, int64_t given, int64_t groups,
                Strides strides, double eps, int threads) {
  const int64_t inner = known ? known : given;
  const int64_t width = channels / groups, size = width * inner;
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t group = 0; group < batch * groups; ++group) {
    const float* from = x + group * size;
    float* to = y + group * size;
    const Statistics own = statistics(from, size, true, eps);
    const float middle = own.mean, scale = own.rstd;
    mean[group] = middle;
    rstd[group] = scale;
    const int64_t sample = group / groups, channel = group % groups * width;
    for (int64_t start = 0; start < width; start += kRows) {
      const int64_t here = std::min(kRows, width - start), first = channel + start;
      const float* g = gamma + sample * strides.gamma + first;
      const float* b = beta + sample * strides.beta + first;
      float factors[kRows], offsets[kRows];
#pragma omp simd
      for (int64_t c = 0; c < here; ++c) {
        factors[c] = g[c] * (weight ? weight[first + c] : 1.0f) * scale;
        offsets[c] = g[c] * (bias ? bias[first + c] : 0.0f) + b[c];
      }
      for (int64_t c = 0; c < here; ++c) {
        const float factor = factors[c], offset = offsets[c];
        const int64_t at = (start + c) * inner;
#pragma omp simd
        for (int64_t i = at; i < at + inner; ++i) to[i] = (from[i] - middle) * factor + offset;
      }
    }
  }
}

// From the gradients of gamma * weight and of gamma * bias + beta, [batch, channels], to those of gamma, beta, weight
// and bias; the first two take their place.
void affine_gradients(const float* gamma, const float* weight, const float* bias, float* dgamma, const float* dbeta,
                      float* dweight, float* dbias, int64_t batch, int64_t channels, int64_t stride) {
  for (int64_t sample = 0; sample < batch; ++sample) {
    const float* g = gamma + sample * stride;
    float* scaled = dgamma + sample * channels;
    const float* shifted = dbeta + sample * channels;
    if (dweight)
#pragma omp simd
      for (int64_t c = 0; c < channels; ++c) dweight[c] += scaled[c] * g[c];
    if (dbias)
#pragma omp simd
      for (int64_t c = 0; c < channels; ++c) dbias[c] += shifted[c] * g[c];
    if (weight || bias)
#pragma omp simd
      for (int64_t c = 0; c < channels; ++c)
        scaled[c] = scaled[c] * (weight ? weight[c] : 1.0f) + (bias ? shifted[c] * bias[c] : 0.0f);
  }
}

// Of one row: its gradient, and what it adds to the sums of its sample.
void token_gradients(const float* dy, const float* x, const float* factor, float middle, float rstd, float* dx,
                     float* scale, float* shift, int64_t channels, int64_t centred) {
  double along = 0.0, sum = 0.0;
  for (int64_t start = 0; start < channels; start += kBlock) {
    const int64_t end = std::min(channels, start + kBlock);
    float part = 0.0f, own = 0.0f;
#pragma omp simd reduction(+ : part, own)
    for (int64_t c = start; c < end; ++c) {
      const float n = (x[c] - middle) * rstd, grad = dy[c], d = grad * factor[c];
      part += d * n;
      own += d;
      scale[c] += grad * n;
      shift[c] += grad;
    }
    along += part;
    sum += own;
  }
  const float slope = static_cast<float>(along / channels);
  const float level = centred ? static_cast<float>(sum / channels) : 0.0f;
#pragma omp simd
  for (int64_t c = 0; c < channels; ++c)
    dx[c] = rstd * (dy[c] * factor[c] - level - (x[c] - middle) * rstd * slope);
}

inline float product(const float* a, const float* b, int64_t size) {
  float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < size; ++i) sum += a[i] * b[i];
  return sum;
}

// Of four rows at once: one alone waits for each of its sums.
void row_products(const float* rows, const float* z, float* sums, int64_t columns) {
  const float *second = rows + columns, *third = second + columns, *fourth = third + columns;
  float a = 0.0f, b = 0.0f, c = 0.0f, d = 0.0f;
#pragma omp simd reduction(+ : a, b, c, d)
  for (int64_t i = 0; i < columns; ++i) {
    a += rows[i] * z[i];
    b += second[i] * z[i];
    c += third[i] * z[i];
    d += fourth[i] * z[i];
  }
  sums[0] = a, sums[1] = b, sums[2] = c, sums[3] = d;
}

// Gradients: dgamma, dbeta [batch, channels]; dweight, dbias [channels], or null where weight and bias are.
template <int lanes, int known>
void normalised_backward(const float* dy, const float* x, const float* gamma, const float* weight, const float* bias,
                         const float* mean, const float* rstd, float* dx, float* dgamma, float* dbeta,
                         float* dweight, float* dbias, int64_t batch, int64_t channels, int64_t given,
                         int64_t groups, int64_t stride, int threads) {
  const int64_t inner = known ? known : given;
  const int64_t width = channels / groups, size = width * inner;
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t group = 0; group < batch * groups; ++group) {
    const int64_t sample = group / groups, channel = group % groups * width;
    const float* grad = dy + group * size;
    const float* from = x + group * size;
    float* to = dx + group * size;
    const float middle = mean[group], scale = rstd[group];
    const float* g = gamma + sample * stride + channel;
    float* scaled = dgamma + group * width;
    const float* shifted = dbeta + group * width;
    row_sums<lanes>(width, inner, scaled, dbeta + group * width,
                    [=](int64_t row, int64_t i) __attribute__((always_inline)) {
                      const Numbers<lanes> own = loaded<lanes>(grad + row * inner + i);
                      return Two<lanes>{own * (loaded<lanes>(from + row * inner + i) - middle), own};
                    });
    double along = 0.0, sum = 0.0;
    for (int64_t start = 0; start < width; start += kRows) {
      float part = 0.0f, plain = 0.0f;
      for (int64_t c = start; c < std::min(width, start + kRows); ++c) {
        const float factor = g[c] * (weight ? weight[channel + c] : 1.0f), own = scaled[c];
        part += factor * own;
        plain += factor * shifted[c];
        scaled[c] = own * scale;  // the gradient of gamma * weight; shifted is that of gamma * bias + beta
      }
      along += part;
      sum += plain;
    }
    const float slope = static_cast<float>(-along * scale * scale * scale / size);
    const float level = static_cast<float>(-sum * scale / size);
    for (int64_t start = 0; start < width; start += kRows) {
      const int64_t here = std::min(kRows, width - start);
      float factors[kRows];
#pragma omp simd
      for (int64_t c = 0; c < here; ++c)
        factors[c] = g[start + c] * (weight ? weight[channel + start + c] : 1.0f) * scale;
      for (int64_t c = 0; c < here; ++c) {
        const float factor = factors[c];
        const int64_t at = (start + c) * inner;
#pragma omp simd
        for (int64_t i = at; i < at + inner; ++i) to[i] = factor * grad[i] + (slope * (from[i] - middle) + level);
      }
    }
  }
  affine_gradients(gamma, weight, bias, dgamma, dbeta, dweight, dbias, batch, channels, stride);
}

// y = gamma * (weight * n + bias) + beta of rows [batch, positions, channels], n a row with mean 0 (`centred`) and
// mean square 1; all else as `normalised`. mean and rstd are [batch, positions].
void tokens_normalised(const float* x, const float* gamma, const float* beta, const float* weight, const float* bias,
                       float* y, float* mean, float* rstd, int64_t batch, int64_t channels, int64_t positions,
                       int64_t centred, Strides strides, double eps, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t row = 0; row < batch * positions; ++row) {
    const float* from = x + row * channels;
    float* to = y + row * channels;
    const float* g = gamma + row / positions * strides.gamma;
    const float* b = beta + row / positions * strides.beta;
    const Statistics all = statistics(from, channels, centred, eps);
    const float middle = all.mean, scale = all.rstd;
    mean[row] = middle;
    rstd[row] = scale;
#pragma omp simd
    for (int64_t c = 0; c < channels; ++c) {
      const float n = (from[c] - middle) * scale;
      const float own = (weight ? weight[c] * n : n) + (bias ? bias[c] : 0.0f);
      to[c] = g[c] * own + b[c];
    }
  }
}

void tokens_normalised_backward(const float* dy, const float* x, const float* gamma, const float* weight,
                                const float* bias, const float* mean, const float* rstd, float* dx, float* dgamma,
                                float* dbeta, float* dweight, float* dbias, int64_t batch, int64_t channels,
                                int64_t positions, int64_t centred, int64_t stride, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t sample = 0; sample < batch; ++sample) {
    float* scaled = dgamma + sample * channels;  // the gradient of gamma * weight; shifted that of the rest
    float* shifted = dbeta + sample * channels;
    std::vector<float> factors(channels), scales(channels), shifts(channels);
    float *factor = factors.data(), *scale = scales.data(), *shift = shifts.data();
    for (int64_t c = 0; c < channels; ++c) factor[c] = gamma[sample * stride + c] * (weight ? weight[c] : 1.0f);
    std::fill_n(scaled, channels, 0.0f);
    std::fill_n(shifted, channels, 0.0f);
    for (int64_t start = 0; start < positions; start += kPositions) {
      const int64_t end = std::min(positions, start + kPositions);
      std::fill_n(scale, channels, 0.0f);
      std::fill_n(shift, channels, 0.0f);
      for (int64_t row = sample * positions + start; row < sample * positions + end; ++row) {
        token_gradients(dy + row * channels, x + row * channels, factor, mean[row], rstd[row], dx + row * channels,
                        scale, shift, channels, centred);
      }
#pragma omp simd
      for (int64_t c = 0; c < channels; ++c) {
        scaled[c] += scale[c];
        shifted[c] += shift[c];
      }
    }
  }
  affine_gradients(gamma, weight, bias, dgamma, dbeta, dweight, dbias, batch, channels, stride);
}

}  // namespace

namespace torchfilm {

void film_forward(const float* x, const float* gamma, const float* beta, float* y, const Layout& at, bool relu,
                  int threads) {
  const auto run = at.in_columns ? (relu ? columns<true> : columns<false>) : (relu ? rows<true> : rows<false>);
  run(x, gamma, beta, y, at.batch, at.channels, at.others, at.strides, threads);
}

void film_backward(const float* dy, const float* x, const float* gamma, const float* beta, float* dx, float* dgamma,
                   float* dbeta, const Layout& at, bool relu, int threads) {
  by_lanes(at.others, [&]<int lanes, int known>() {
    const auto run = at.in_columns ? (relu ? columns_backward<true> : columns_backward<false>)
                                   : (relu ? rows_backward<true, lanes, known> : rows_backward<false, lanes, known>);
    run(dy, x, gamma, beta, dx, dgamma, dbeta, at.batch, at.channels, at.others, at.strides, threads);
  });
}

void norm_forward(const float* x, const float* gamma, const float* beta, const float* weight, const float* bias,
                  float* y, float* mean, float* rstd, const Layout& at, int64_t number, double eps, int threads) {
  by_lanes(at.others, [&]<int lanes, int known>() {
    const auto run = at.in_columns ? tokens_normalised : normalised<known>;
    run(x, gamma, beta, weight, bias, y, mean, rstd, at.batch, at.channels, at.others, number, at.strides, eps,
        threads);
  });
}

void norm_backward(const float* dy, const float* x, const float* gamma, const float* weight, const float* bias,
                   const float* mean, const float* rstd, float* dx, float* dgamma, float* dbeta, float* dweight,
                   float* dbias, const Layout& at, int64_t number, int threads) {
  by_lanes(at.others, [&]<int lanes, int known>() {
    const auto run = at.in_columns ? tokens_normalised_backward : normalised_backward<lanes, known>;
    run(dy, x, gamma, weight, bias, mean, rstd, dx, dgamma, dbeta, dweight, dbias, at.batch, at.channels, at.others,
        number, at.strides.gamma, threads);
  });
}

void linear(const float* z, const float* weight, const float* bias, const float* offsets, float* y, int64_t rows,
            int64_t columns, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t first = 0; first < rows; first += 4) {
    const int64_t end = std::min(first + 4, rows);
    const float* own = weight + first * columns;
    float sums[4];
    if (columns <= kShortRow)
      for (int64_t i = 0; i < 4 * columns; i += 16) __builtin_prefetch(own + 4 * kShortRow + i);
    if (end - first == 4) {
      row_products(own, z, sums, columns);
    } else {
      for (int64_t row = first; row < end; ++row) sums[row - first] = product(weight + row * columns, z, columns);
    }
    for (int64_t row = first; row < end; ++row) y[row] = sums[row - first] + bias[row] + offsets[row];
  }
}

}  // namespace torchfilm
