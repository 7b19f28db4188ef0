// Actnorm followed by affine coupling, fp32; the formulas are those of reference.py.
//
// A sample is a row of channels * positions columns. Per-channel parameters are first spread over the
// columns, so that every loop runs along a row whatever the number of positions.
#include <cmath>

#include "native/native.h"
#include "native/vector_math.h"

namespace {

struct Columns {  // per-column parameters, and then one block of partial sums per chunk
  float* scale;   // exp(±log_scale)
  float* bias;
  float* gain;  // of the transformed half
  float* partials;
};

int thread_count(const Shape& shape) {
  // PyTorch's own grain. A team has to wait for its slowest thread, which on a busy machine costs far
  // more than a small operation on one core.
  const int64_t useful = 1 + shape.samples * shape.columns() / 32768;
  return static_cast<int>(useful < shape.threads ? useful : shape.threads);
}

void spread(const float* values, int64_t channels, int64_t positions, float* out) {
  for (int64_t c = 0; c < channels; ++c)
    for (int64_t p = 0; p < positions; ++p) out[c * positions + p] = values[c];
}

Columns spread_parameters(const Shape& shape, const float* log_scale, const float* bias,
                          const float* gain, float sign, float* scratch) {
  const int64_t n = shape.columns();
  const Columns columns{scratch, scratch + n, scratch + 2 * n, scratch + 3 * n};
  for (int64_t c = 0; c < shape.channels; ++c) {
    const float scale = std::exp(sign * log_scale[c]);
    spread(&scale, 1, shape.positions, columns.scale + c * shape.positions);
  }
  spread(bias, shape.channels, shape.positions, columns.bias);
  if (gain != nullptr) spread(gain, shape.channels / 2, shape.positions, columns.gain);
  return columns;
}

float actnorm_log_det(const Shape& shape, const float* log_scale) {
  double sum = 0.0;
  for (int64_t c = 0; c < shape.channels; ++c) sum += log_scale[c];
  return static_cast<float>(sum * static_cast<double>(shape.positions));
}

// Runs row(sample, partials of its chunk) for every sample, each chunk in order on one thread.
template <class Row>
void for_each_row_in_chunks(const Shape& shape, float* partials, const Row& row) {
  const int64_t rows = chunk_rows(shape.samples), chunks = chunk_count(shape.samples);
  const int64_t width = 3 * shape.columns();
#pragma omp parallel for num_threads(thread_count(shape)) schedule(static)
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    float* mine = partials + chunk * width;
    for (int64_t j = 0; j < width; ++j) mine[j] = 0.0f;
    const int64_t end = (chunk + 1) * rows < shape.samples ? (chunk + 1) * rows : shape.samples;
    for (int64_t i = chunk * rows; i < end; ++i) row(i, mine);
  }
}

// Adds the chunks, then the positions of a channel, in a fixed order.
void sum_partials(const Shape& shape, float* partials, int64_t begin, int64_t channels, float* out) {
  const int64_t chunks = chunk_count(shape.samples), width = 3 * shape.columns();
  const int64_t n = channels * shape.positions;
  float* total = partials + begin;
  for (int64_t c = 0; c < channels; ++c) out[c] = 0.0f;
  if (chunks == 0) return;
  for (int64_t chunk = 1; chunk < chunks; ++chunk) {
    const float* HYBRIDFLOW_RESTRICT part = partials + chunk * width + begin;
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) total[j] += part[j];
  }
  for (int64_t c = 0; c < channels; ++c) {
    double sum = 0.0;
    for (int64_t p = 0; p < shape.positions; ++p) sum += total[c * shape.positions + p];
    out[c] = static_cast<float>(sum);
  }
}

void sum_actnorm_partials(const Shape& shape, float* partials, double grad_log_det,
                          float* grad_log_scale, float* grad_bias) {
  sum_partials(shape, partials, 0, shape.channels, grad_log_scale);
  sum_partials(shape, partials, shape.columns(), shape.channels, grad_bias);
  for (int64_t c = 0; c < shape.channels; ++c)
    grad_log_scale[c] += static_cast<float>(grad_log_det * static_cast<double>(shape.positions));
}

double sum(const float* values, int64_t count) {
  double total = 0.0;
  for (int64_t i = 0; i < count; ++i) total += values[i];
  return total;
}

}  // namespace

HYBRIDFLOW_KERNEL(actnorm_identity)
(const Shape* shape, const float* x, const float* log_scale, const float* bias, float* scratch,
 float* a) {
  const Columns columns = spread_parameters(*shape, log_scale, bias, nullptr, 1.0f, scratch);
  const int64_t n = shape->columns(), kept = shape->kept(), begin = shape->kept_begin();
#pragma omp parallel for num_threads(thread_count(*shape)) schedule(static)
  for (int64_t i = 0; i < shape->samples; ++i) {
    const float* HYBRIDFLOW_RESTRICT from = x + i * n + begin;
    const float* HYBRIDFLOW_RESTRICT scale = columns.scale + begin;
    const float* HYBRIDFLOW_RESTRICT shift = columns.bias + begin;
    float* HYBRIDFLOW_RESTRICT to = a + i * kept;
#pragma omp simd
    for (int64_t j = 0; j < kept; ++j) to[j] = from[j] * scale[j] + shift[j];
  }
}

HYBRIDFLOW_KERNEL(actnorm_identity_backward)
(const Shape* shape, const float* grad_a, const float* a, const float* log_scale, const float* bias,
 float* scratch, float* grad_x, float* grad_log_scale, float* grad_bias) {
  const Columns columns = spread_parameters(*shape, log_scale, bias, nullptr, 1.0f, scratch);
  const int64_t n = shape->columns(), kept = shape->kept(), moved = shape->moved();
  const int64_t begin = shape->kept_begin(), zero_begin = shape->moved_begin();
  for_each_row_in_chunks(*shape, columns.partials, [&](int64_t i, float* partials) {
    const float* HYBRIDFLOW_RESTRICT grad = grad_a + i * kept;
    const float* HYBRIDFLOW_RESTRICT out = a + i * kept;
    const float* HYBRIDFLOW_RESTRICT scale = columns.scale + begin;
    const float* HYBRIDFLOW_RESTRICT shift = columns.bias + begin;
    float* HYBRIDFLOW_RESTRICT gx = grad_x + i * n + begin;
    float* HYBRIDFLOW_RESTRICT sum_log_scale = partials + begin;
    float* HYBRIDFLOW_RESTRICT sum_bias = partials + n + begin;
#pragma omp simd
    for (int64_t j = 0; j < kept; ++j) {
      gx[j] = grad[j] * scale[j];
      sum_bias[j] += grad[j];
      sum_log_scale[j] += grad[j] * (out[j] - shift[j]);
    }
    for (int64_t j = 0; j < moved; ++j) grad_x[i * n + zero_begin + j] = 0.0f;
  });
  sum_actnorm_partials(*shape, columns.partials, 0.0, grad_log_scale, grad_bias);
}

HYBRIDFLOW_KERNEL(actnorm_coupling)
(const Shape* shape, const float* x, const float* params, const float* log_scale, const float* bias,
 const float* gain, const float* log_det_in, float* scratch, float* y, float* log_det) {
  const Columns columns = spread_parameters(*shape, log_scale, bias, gain, 1.0f, scratch);
  const float own = actnorm_log_det(*shape, log_scale);
  const int64_t n = shape->columns(), kept = shape->kept(), moved = shape->moved();
  const int64_t k0 = shape->kept_begin(), m0 = shape->moved_begin();
#pragma omp parallel for num_threads(thread_count(*shape)) schedule(static)
  for (int64_t i = 0; i < shape->samples; ++i) {
    const float* HYBRIDFLOW_RESTRICT from = x + i * n;
    const float* HYBRIDFLOW_RESTRICT raw = params + i * 2 * moved;
    const float* HYBRIDFLOW_RESTRICT shift = raw + moved;
    const float* HYBRIDFLOW_RESTRICT scale = columns.scale;
    const float* HYBRIDFLOW_RESTRICT offset = columns.bias;
    const float* HYBRIDFLOW_RESTRICT bound = columns.gain;
    float* HYBRIDFLOW_RESTRICT to = y + i * n;
#pragma omp simd
    for (int64_t j = k0; j < k0 + kept; ++j) to[j] = from[j] * scale[j] + offset[j];
    float sum_s = 0.0f;
#pragma omp simd reduction(+ : sum_s)
    for (int64_t j = 0; j < moved; ++j) {
      const float s = bound[j] * vector_tanh(raw[j]).value;
      const float u = from[m0 + j] * scale[m0 + j] + offset[m0 + j];
      to[m0 + j] = u * vector_exp(s) + shift[j];
      sum_s += s;
    }
    log_det[i] = (log_det_in == nullptr ? 0.0f : log_det_in[i]) + (sum_s + own);
  }
}

HYBRIDFLOW_KERNEL(actnorm_coupling_inverse)
(const Shape* shape, const float* y, const float* params, const float* log_scale, const float* bias,
 const float* gain, const float* log_det_in, float* scratch, float* x, float* log_det) {
  const Columns columns = spread_parameters(*shape, log_scale, bias, gain, -1.0f, scratch);
  const float own = actnorm_log_det(*shape, log_scale);
  const int64_t n = shape->columns(), kept = shape->kept(), moved = shape->moved();
  const int64_t k0 = shape->kept_begin(), m0 = shape->moved_begin();
#pragma omp parallel for num_threads(thread_count(*shape)) schedule(static)
  for (int64_t i = 0; i < shape->samples; ++i) {
    const float* HYBRIDFLOW_RESTRICT from = y + i * n;
    const float* HYBRIDFLOW_RESTRICT raw = params + i * 2 * moved;
    const float* HYBRIDFLOW_RESTRICT shift = raw + moved;
    const float* HYBRIDFLOW_RESTRICT scale = columns.scale;
    const float* HYBRIDFLOW_RESTRICT offset = columns.bias;
    const float* HYBRIDFLOW_RESTRICT bound = columns.gain;
    float* HYBRIDFLOW_RESTRICT to = x + i * n;
#pragma omp simd
    for (int64_t j = k0; j < k0 + kept; ++j) to[j] = (from[j] - offset[j]) * scale[j];
    float sum_s = 0.0f;
#pragma omp simd reduction(+ : sum_s)
    for (int64_t j = 0; j < moved; ++j) {
      const float s = bound[j] * vector_tanh(raw[j]).value;
      const float u = (from[m0 + j] - shift[j]) * vector_exp(-s);
      to[m0 + j] = (u - offset[m0 + j]) * scale[m0 + j];
      sum_s += s;
    }
    log_det[i] = (log_det_in == nullptr ? 0.0f : log_det_in[i]) - (sum_s + own);
  }
}

HYBRIDFLOW_KERNEL(actnorm_coupling_backward)
(const Shape* shape, const float* grad_y, const float* grad_log_det, const float* y,
 const float* params, const float* log_scale, const float* bias, const float* gain, float* scratch,
 float* grad_x, float* grad_params, float* grad_log_scale, float* grad_bias, float* grad_gain) {
  const Columns columns = spread_parameters(*shape, log_scale, bias, gain, 1.0f, scratch);
  const int64_t n = shape->columns(), kept = shape->kept(), moved = shape->moved();
  const int64_t k0 = shape->kept_begin(), m0 = shape->moved_begin();
  for_each_row_in_chunks(*shape, columns.partials, [&](int64_t i, float* partials) {
    const float* HYBRIDFLOW_RESTRICT grad = grad_y + i * n;
    const float* HYBRIDFLOW_RESTRICT out = y + i * n;
    const float* HYBRIDFLOW_RESTRICT raw = params + i * 2 * moved;
    const float* HYBRIDFLOW_RESTRICT shift = raw + moved;
    const float* HYBRIDFLOW_RESTRICT scale = columns.scale;
    const float* HYBRIDFLOW_RESTRICT offset = columns.bias;
    const float* HYBRIDFLOW_RESTRICT bound = columns.gain;
    float* HYBRIDFLOW_RESTRICT gx = grad_x + i * n;
    float* HYBRIDFLOW_RESTRICT graw = grad_params + i * 2 * moved;
    float* HYBRIDFLOW_RESTRICT gshift = graw + moved;
    float* HYBRIDFLOW_RESTRICT sum_log_scale = partials;
    float* HYBRIDFLOW_RESTRICT sum_bias = partials + n;
    float* HYBRIDFLOW_RESTRICT sum_gain = partials + 2 * n;
    const float g_log_det = grad_log_det[i];
#pragma omp simd
    for (int64_t j = k0; j < k0 + kept; ++j) {
      gx[j] = grad[j] * scale[j];
      sum_bias[j] += grad[j];
      sum_log_scale[j] += grad[j] * (out[j] - offset[j]);
    }
#pragma omp simd
    for (int64_t j = 0; j < moved; ++j) {
      const int64_t m = m0 + j;
      const Tanh tanh = vector_tanh(raw[j]);
      const float e = vector_exp(bound[j] * tanh.value);
      const float scaled = out[m] - shift[j];  // u * e
      const float gu = grad[m] * e;
      const float gs = grad[m] * scaled + g_log_det;
      gx[m] = gu * scale[m];
      graw[j] = gs * bound[j] * tanh.derivative;
      gshift[j] = grad[m];
      sum_bias[m] += gu;
      sum_log_scale[m] += gu * (scaled / e - offset[m]);
      sum_gain[j] += gs * tanh.value;
    }
  });
  sum_actnorm_partials(*shape, columns.partials, sum(grad_log_det, shape->samples), grad_log_scale,
                       grad_bias);
  sum_partials(*shape, columns.partials, 2 * n, shape->channels / 2, grad_gain);
}

HYBRIDFLOW_KERNEL(actnorm_coupling_inverse_backward)
(const Shape* shape, const float* grad_x, const float* grad_log_det, const float* x,
 const float* params, const float* log_scale, const float* bias, const float* gain, float* scratch,
 float* grad_y, float* grad_params, float* grad_log_scale, float* grad_bias, float* grad_gain) {
  const Columns columns = spread_parameters(*shape, log_scale, bias, gain, -1.0f, scratch);
  const int64_t n = shape->columns(), kept = shape->kept(), moved = shape->moved();
  const int64_t k0 = shape->kept_begin(), m0 = shape->moved_begin();
  for_each_row_in_chunks(*shape, columns.partials, [&](int64_t i, float* partials) {
    const float* HYBRIDFLOW_RESTRICT grad = grad_x + i * n;
    const float* HYBRIDFLOW_RESTRICT out = x + i * n;
    const float* HYBRIDFLOW_RESTRICT raw = params + i * 2 * moved;
    const float* HYBRIDFLOW_RESTRICT scale = columns.scale;
    const float* HYBRIDFLOW_RESTRICT offset = columns.bias;
    const float* HYBRIDFLOW_RESTRICT bound = columns.gain;
    float* HYBRIDFLOW_RESTRICT gy = grad_y + i * n;
    float* HYBRIDFLOW_RESTRICT graw = grad_params + i * 2 * moved;
    float* HYBRIDFLOW_RESTRICT gshift = graw + moved;
    float* HYBRIDFLOW_RESTRICT sum_log_scale = partials;
    float* HYBRIDFLOW_RESTRICT sum_bias = partials + n;
    float* HYBRIDFLOW_RESTRICT sum_gain = partials + 2 * n;
    const float g_log_det = grad_log_det[i];
#pragma omp simd
    for (int64_t j = k0; j < k0 + kept; ++j) {
      gy[j] = grad[j] * scale[j];
      sum_bias[j] -= gy[j];
      sum_log_scale[j] -= grad[j] * out[j];
    }
#pragma omp simd
    for (int64_t j = 0; j < moved; ++j) {
      const int64_t m = m0 + j;
      const Tanh tanh = vector_tanh(raw[j]);
      const float u = out[m] / scale[m] + offset[m];
      const float gu = grad[m] * scale[m];
      const float gy_moved = gu * vector_exp(-bound[j] * tanh.value);
      const float gs = -gu * u - g_log_det;
      gy[m] = gy_moved;
      graw[j] = gs * bound[j] * tanh.derivative;
      gshift[j] = -gy_moved;
      sum_bias[m] -= gu;
      sum_log_scale[m] -= grad[m] * out[m];
      sum_gain[j] += gs * tanh.value;
    }
  });
  sum_actnorm_partials(*shape, columns.partials, -sum(grad_log_det, shape->samples), grad_log_scale,
                       grad_bias);
  sum_partials(*shape, columns.partials, 2 * n, shape->channels / 2, grad_gain);
}
