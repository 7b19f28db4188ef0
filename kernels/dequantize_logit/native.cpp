// Uniform dequantisation and the logit on the CPU, as in reference.py: contiguous (samples, columns)
// arrays of float32, alpha in [0, 1/2).
#include <algorithm>
#include <cmath>
#include <cstdint>

#include "native/native.h"
#include "native/philox.h"
#include "native/vector_math.h"

namespace {

// Part of a sample: v, and c = 1 - v.
struct Block {
  static constexpr int64_t most = 256;
  float v[most], c[most];
};

// The logits y = ln(v/c) of a block of a multiple of 64 elements; returns the sum of
// -ln v - ln c = |y| - 2 ln max(v, c). The maximum is at least 1/2, so four of them are multiplied and
// share a logarithm.
inline float logit_block(int64_t count, const Block& block, float* y) {
  float larger[Block::most];
#pragma omp simd
  for (int64_t l = 0; l < count; ++l) {
    y[l] = vector_log(block.v[l] / block.c[l]);
    larger[l] = block.v[l] > block.c[l] ? block.v[l] : block.c[l];
  }
  const int64_t quarter = count / 4;
  float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (int64_t l = 0; l < quarter; ++l) {
    const int64_t a = l, b = l + quarter, c = l + 2 * quarter, d = l + 3 * quarter;
    sum += (std::fabs(y[a]) + std::fabs(y[b])) + (std::fabs(y[c]) + std::fabs(y[d]));
    sum -= 2.0f * vector_log((larger[a] * larger[b]) * (larger[c] * larger[d]));
  }
  return sum;
}

// The logits of a sample, whose elements j ... j + count - 1 load(j, count, block) puts in a block.
// Returns the sum of -ln v - ln c.
template <class Load>
inline float logit_sample(int64_t columns, const Load& load, float* y) {
  Block block;
  float sum = 0.0f;
  for (int64_t j = 0; j < columns; j += Block::most) {
    const int64_t count = std::min(Block::most, columns - j);
    const int64_t padded = (count + 63) / 64 * 64;
    load(j, count, block);
    for (int64_t l = count; l < padded; ++l) block.v[l] = block.c[l] = 1.0f;  // a logit of 0, adding 0
    float made[Block::most];
    sum += logit_block(padded, block, made);
    std::copy(made, made + count, y + j);
  }
  return sum;
}

}  // namespace

// Numbers are drawn if `seed` is not null; else `noise` is read (which, empty, may be null too).
HYBRIDFLOW_KERNEL(dequantize_logit)
(const uint8_t* x, const int64_t* seed, const float* noise, const float* log_det_in, float* y,
 float* log_det, int64_t samples, int64_t columns, int64_t levels, double alpha, int64_t threads) {
  const float base = static_cast<float>(alpha);
  const float slope = static_cast<float>((1.0 - 2.0 * alpha) / static_cast<double>(levels));
  const float own = static_cast<float>(static_cast<double>(columns) * std::log1p(-2.0 * alpha));
  const float highest = static_cast<float>(levels - 1);
#pragma omp parallel for num_threads(team(samples * columns, threads)) schedule(static)
  for (int64_t i = 0; i < samples; ++i) {
    const uint8_t* grey = x + i * columns;
    float* to = y + i * columns;
    // Drawn into the sample's own memory: each is read before it is overwritten.
    if (seed != nullptr) fill_uniforms(static_cast<uint64_t>(*seed), i, columns, to);
    const float* u = seed != nullptr ? to : noise + i * columns;
    const auto load = [=](int64_t j, int64_t count, Block& block) {
#pragma omp simd
      for (int64_t l = 0; l < count; ++l) {
        const float level = static_cast<float>(grey[j + l]);
        block.v[l] = base + slope * (level + u[j + l]);
        block.c[l] = base + slope * ((highest - level) + (1.0f - u[j + l]));
      }
    };
    const float sum = logit_sample(columns, load, to);
    log_det[i] = (log_det_in == nullptr ? 0.0f : log_det_in[i]) + (sum + own);
  }
}

HYBRIDFLOW_KERNEL(logit_transform)
(const float* x, const float* log_det_in, float* y, float* log_det, int64_t samples, int64_t columns,
 double alpha, int64_t threads) {
  const float base = static_cast<float>(alpha), slope = static_cast<float>(1.0 - 2.0 * alpha);
  const float own = static_cast<float>(static_cast<double>(columns) * std::log1p(-2.0 * alpha));
#pragma omp parallel for num_threads(team(samples * columns, threads)) schedule(static)
  for (int64_t i = 0; i < samples; ++i) {
    const float* from = x + i * columns;
    const auto load = [=](int64_t j, int64_t count, Block& block) {
#pragma omp simd
      for (int64_t l = 0; l < count; ++l) {
        block.v[l] = base + slope * from[j + l];
        block.c[l] = base + slope * (1.0f - from[j + l]);
      }
    };
    const float sum = logit_sample(columns, load, y + i * columns);
    log_det[i] = (log_det_in == nullptr ? 0.0f : log_det_in[i]) + (sum + own);
  }
}

HYBRIDFLOW_KERNEL(logit_transform_backward)
(const float* grad, const float* grad_log_det, const float* y, float* grad_x, int64_t samples,
 int64_t columns, double alpha, int64_t threads) {
  const float slope = static_cast<float>(1.0 - 2.0 * alpha);
#pragma omp parallel for num_threads(team(samples * columns, threads)) schedule(static)
  for (int64_t i = 0; i < samples; ++i) {
    const float* HYBRIDFLOW_RESTRICT from = y + i * columns;
    const float* HYBRIDFLOW_RESTRICT g = grad + i * columns;
    float* HYBRIDFLOW_RESTRICT to = grad_x + i * columns;
    const float g_log_det = grad_log_det[i];
#pragma omp simd
    for (int64_t j = 0; j < columns; ++j) {
      const float grown = vector_exp(std::fabs(from[j]));
      const float e = 1.0f / grown;
      const float tanh = std::copysign((1.0f - e) / (1.0f + e), from[j]);  // of y/2
      to[j] = slope * (g[j] + g_log_det * tanh) * (2.0f + (grown + e));
    }
  }
}

HYBRIDFLOW_KERNEL(logit_transform_inverse)
(const float* y, float* x, int64_t elements, double alpha, int64_t threads) {
  const float base = static_cast<float>(alpha), slope = static_cast<float>(1.0 / (1.0 - 2.0 * alpha));
#pragma omp parallel for simd num_threads(team(elements, threads)) schedule(static)
  for (int64_t j = 0; j < elements; ++j) x[j] = (1.0f / (1.0f + vector_exp(-y[j])) - base) * slope;
}

HYBRIDFLOW_KERNEL(logit_transform_inverse_backward)
(const float* grad, const float* y, float* grad_y, int64_t elements, double alpha, int64_t threads) {
  const float slope = static_cast<float>(1.0 / (1.0 - 2.0 * alpha));
#pragma omp parallel for simd num_threads(team(elements, threads)) schedule(static)
  for (int64_t j = 0; j < elements; ++j) {
    const float e = vector_exp(-std::fabs(y[j]));
    const float inverse = 1.0f / (1.0f + e);
    grad_y[j] = grad[j] * (e * inverse * inverse * slope);
  }
}
