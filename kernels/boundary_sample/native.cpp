// Samples between two classes and their soft labels on the CPU, as in reference.py: contiguous float32
// arrays, means (classes, size), z (count, size), labels (count, classes), pair (count, 2).
#include <algorithm>
#include <cmath>
#include <cstdint>

#include "native/native.h"
#include "native/philox.h"
#include "native/vector_math.h"

namespace {

constexpr int64_t WIDTH = 256;  // columns at a time

// Adds the squared distances of z to every mean over so many columns, four means at a time: one sum
// alone would wait for its own additions.
inline void add_squared_distances(int64_t classes, int64_t size, int64_t width,
                                  const float* HYBRIDFLOW_RESTRICT z,
                                  const float* HYBRIDFLOW_RESTRICT means,
                                  float* HYBRIDFLOW_RESTRICT out) {
  int64_t k = 0;
  for (; k + 4 <= classes; k += 4) {
    const float* HYBRIDFLOW_RESTRICT mean = means + k * size;
    float a = 0.0f, b = 0.0f, c = 0.0f, d = 0.0f;
#pragma omp simd reduction(+ : a, b, c, d)
    for (int64_t j = 0; j < width; ++j) {
      const float from_a = z[j] - mean[j], from_b = z[j] - mean[size + j];
      const float from_c = z[j] - mean[2 * size + j], from_d = z[j] - mean[3 * size + j];
      a += from_a * from_a;
      b += from_b * from_b;
      c += from_c * from_c;
      d += from_d * from_d;
    }
    out[k] += a;
    out[k + 1] += b;
    out[k + 2] += c;
    out[k + 3] += d;
  }
  for (; k < classes; ++k) {
    const float* HYBRIDFLOW_RESTRICT mean = means + k * size;
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < width; ++j) sum += (z[j] - mean[j]) * (z[j] - mean[j]);
    out[k] += sum;
  }
}

// In strips: shorter sums lose less to rounding.
inline void squared_distances(int64_t classes, int64_t size, const float* z, const float* means,
                              float* out) {
  std::fill_n(out, classes, 0.0f);
  for (int64_t j = 0; j < size; j += WIDTH)
    add_squared_distances(classes, size, std::min(WIDTH, size - j), z + j, means + j, out);
}

// Rows of squared distances to rows of softmax(-distance/2).
inline void soft_labels(int64_t rows, int64_t classes, float* values) {
  for (int64_t i = 0; i < rows; ++i) {
    float* row = values + i * classes;
    float least = row[0];
    for (int64_t k = 1; k < classes; ++k) least = row[k] < least ? row[k] : least;
    for (int64_t k = 0; k < classes; ++k) row[k] = 0.5f * (least - row[k]);
  }
#pragma omp simd
  for (int64_t k = 0; k < rows * classes; ++k) values[k] = vector_exp(values[k]);
  for (int64_t i = 0; i < rows; ++i) {
    float* row = values + i * classes;
    float sum = 0.0f;
    for (int64_t k = 0; k < classes; ++k) sum += row[k];
    const float inverse = 1.0f / sum;
    for (int64_t k = 0; k < classes; ++k) row[k] *= inverse;
  }
}

constexpr int64_t ROWS = 32;  // samples at a time: one loop over the exponentials of all of them

}  // namespace

HYBRIDFLOW_KERNEL(boundary_sample)
(const float* means, const int64_t* seed, float* z, float* labels, int64_t* pair, int64_t count,
 int64_t classes, int64_t size, double beta, double spread, int64_t threads) {
  const uint64_t key = static_cast<uint64_t>(*seed);
  const uint32_t choices = static_cast<uint32_t>(classes);
  const float share_a = static_cast<float>(beta), share_b = static_cast<float>(1.0 - beta);
  const float deviation = static_cast<float>(spread);
#pragma omp parallel for num_threads(team(count * size, threads)) schedule(static)
  for (int64_t begin = 0; begin < count; begin += ROWS) {
    const int64_t rows = std::min(ROWS, count - begin);
    for (int64_t i = begin; i < begin + rows; ++i) {
      const Words w = philox(key, static_cast<uint64_t>(i), 1);
      const int64_t a = below(w.a, choices), further = a + 1 + below(w.b, choices - 1);
      const int64_t b = further < classes ? further : further - classes;
      pair[2 * i] = a;
      pair[2 * i + 1] = b;
      float* HYBRIDFLOW_RESTRICT to = z + i * size;
      fill_normals(key, i, size, to);
      const float* HYBRIDFLOW_RESTRICT mean_a = means + a * size;
      const float* HYBRIDFLOW_RESTRICT mean_b = means + b * size;
#pragma omp simd
      for (int64_t j = 0; j < size; ++j)
        to[j] = share_a * mean_a[j] + share_b * mean_b[j] + deviation * to[j];
      squared_distances(classes, size, to, means, labels + i * classes);
    }
    soft_labels(rows, classes, labels + begin * classes);
  }
}

namespace {

// A sample, from some column on; `pull` has the gradients of its logits.
struct Sample {
  const float* grad_z;
  const float* z;
  const float* pull;
  int64_t a, b;
};

// Adds what the sample gives to the means' gradients, over so many columns.
inline void add_sample(const Sample& sample, const float* means, int64_t classes, int64_t size,
                       int64_t width, float share_a, float share_b, float* grads) {
  const float* HYBRIDFLOW_RESTRICT z = sample.z;
  float grad[WIDTH];
  std::copy(sample.grad_z, sample.grad_z + width, grad);
  for (int64_t k = 0; k < classes; ++k) {
    const float g = sample.pull[k];
    if (g == 0.0f) continue;  // most of them, where classes lie far apart
    const float* HYBRIDFLOW_RESTRICT mean = means + k * size;
    float* HYBRIDFLOW_RESTRICT own = grads + k * size;
#pragma omp simd
    for (int64_t j = 0; j < width; ++j) {
      const float term = g * (mean[j] - z[j]);
      grad[j] += term;
      own[j] -= term;
    }
  }
  float* HYBRIDFLOW_RESTRICT grad_a = grads + sample.a * size;
  float* HYBRIDFLOW_RESTRICT grad_b = grads + sample.b * size;
#pragma omp simd
  for (int64_t j = 0; j < width; ++j) {
    grad_a[j] += share_a * grad[j];
    grad_b[j] += share_b * grad[j];
  }
}

}  // namespace

// partials: (chunks, classes, size); `pulls` (count, classes) is scratch memory.
HYBRIDFLOW_KERNEL(boundary_sample_backward)
(const float* grad_z, const float* grad_labels, const float* z, const float* labels,
 const int64_t* pair, const float* means, float* pulls, float* partials, float* grad_means,
 int64_t count, int64_t classes, int64_t size, int64_t chunk, double beta, int64_t threads) {
  const float share_a = static_cast<float>(beta), share_b = static_cast<float>(1.0 - beta);
  const int64_t chunks = (count + chunk - 1) / chunk;
  const int64_t strips = (size + WIDTH - 1) / WIDTH;
  const int workers = team(count * size, threads);
  for (int64_t i = 0; i < count; ++i) {
    const float* HYBRIDFLOW_RESTRICT p = labels + i * classes;
    const float* HYBRIDFLOW_RESTRICT g = grad_labels + i * classes;
    float mean = 0.0f;
    for (int64_t k = 0; k < classes; ++k) mean += p[k] * g[k];
    for (int64_t k = 0; k < classes; ++k) pulls[i * classes + k] = p[k] * (g[k] - mean);
  }
#pragma omp parallel for num_threads(workers) schedule(static)
  for (int64_t task = 0; task < chunks * strips; ++task) {
    const int64_t c = task / strips, begin = task % strips * WIDTH;
    const int64_t width = std::min(WIDTH, size - begin);
    float* own = partials + c * classes * size + begin;
    for (int64_t k = 0; k < classes; ++k) std::fill_n(own + k * size, width, 0.0f);
    for (int64_t i = c * chunk; i < std::min(count, (c + 1) * chunk); ++i)
      add_sample({grad_z + i * size + begin, z + i * size + begin, pulls + i * classes, pair[2 * i],
                  pair[2 * i + 1]},
                 means + begin, classes, size, width, share_a, share_b, own);
  }
#pragma omp parallel for num_threads(team(chunks * classes * size, threads)) schedule(static)
  for (int64_t k = 0; k < classes; ++k) {
    float* HYBRIDFLOW_RESTRICT to = grad_means + k * size;
    std::fill_n(to, size, 0.0f);
    for (int64_t c = 0; c < chunks; ++c) {
      const float* HYBRIDFLOW_RESTRICT from = partials + (c * classes + k) * size;
#pragma omp simd
      for (int64_t j = 0; j < size; ++j) to[j] += from[j];
    }
  }
}
