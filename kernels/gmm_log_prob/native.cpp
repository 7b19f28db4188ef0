// Log-density of a Gaussian mixture with unit covariances, fp32; the formulas are those of
// reference.py, but ‖z - μ‖² is summed directly: one subtraction and one fused multiply-add per
// element and class, and no cancellation.
#include <cmath>
#include <vector>

#include "native/lanes.h"
#include "native/native.h"
#include "native/vector_math.h"

namespace {

constexpr int64_t kTaskRows = 16;    // samples of a task of the forward
constexpr int64_t kSumColumns = 512; // longest run that is summed in float; runs add up in double
constexpr int64_t kTaskColumns = 128;  // columns of a task of the backward
constexpr double kLogTwoPi = 1.8378770664093454836;

int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// Eight classes cost about as much as one of PyTorch's operations.
int thread_count(int64_t samples, int64_t classes, int64_t size, int64_t threads) {
  return team(samples * size * classes / 8, threads);
}

// squared[c][r] += ‖z_r - mean_c‖² over so many columns of four samples and C classes.
template <int C>
void add_squared_distances(const float* const z[4], const float* mean, int64_t size, int64_t columns,
                           double* squared) {
  Lanes sums[C][4];
  for (int c = 0; c < C; ++c)
    for (int r = 0; r < 4; ++r) sums[c][r] = Lanes{};
  int64_t j = 0;
  for (; j + kLanes <= columns; j += kLanes) {
    const Lanes values[4] = {load(z[0] + j), load(z[1] + j), load(z[2] + j), load(z[3] + j)};
    for (int c = 0; c < C; ++c) {
      const Lanes centre = load(mean + c * size + j);
      for (int r = 0; r < 4; ++r) {
        const Lanes difference = values[r] - centre;
        sums[c][r] += difference * difference;
      }
    }
  }
  for (int c = 0; c < C; ++c)
    for (int r = 0; r < 4; ++r) squared[c * kTaskRows + r] += fold(sums[c][r]);
  for (; j < columns; ++j)
    for (int c = 0; c < C; ++c)
      for (int r = 0; r < 4; ++r) {
        const double difference = z[r][j] - mean[c * size + j];
        squared[c * kTaskRows + r] += difference * difference;
      }
}

// ‖z - μ_k‖² of at most kTaskRows samples: squared is (classes, kTaskRows).
void squared_distances(const float* z, const float* means, int64_t rows, int64_t classes,
                       int64_t size, double* squared) {
  for (int64_t i = 0; i < classes * kTaskRows; ++i) squared[i] = 0.0;
  for (int64_t begin = 0; begin < size; begin += kSumColumns) {
    const int64_t columns = least(kSumColumns, size - begin);
    for (int64_t i = 0; i < rows; i += 4) {  // past the last sample: the last one again
      const float* four[4];
      for (int64_t r = 0; r < 4; ++r) four[r] = z + least(i + r, rows - 1) * size + begin;
      const float* mean = means + begin;
      double* out = squared + i;
      int64_t k = 0;
      for (; k + 2 <= classes; k += 2)
        add_squared_distances<2>(four, mean + k * size, size, columns, out + k * kTaskRows);
      if (k < classes)
        add_squared_distances<1>(four, mean + k * size, size, columns, out + k * kTaskRows);
    }
  }
}

// The joint and what follows from it, for one task. squared and spread are (classes, kTaskRows), so
// that loops run along the samples; past the last sample they hold finite rubbish. The largest joint
// is subtracted in double: the posterior does not see the rounding of a joint in the thousands.
void finish_rows(double* HYBRIDFLOW_RESTRICT squared, float* HYBRIDFLOW_RESTRICT spread,
                 const float* log_prior, const int64_t* labels, int64_t rows, int64_t classes,
                 int64_t size, float* joint, float* log_prob, float* posterior) {
  const double constant = kLogTwoPi * static_cast<double>(size);
  double largest[kTaskRows];
  float sum[kTaskRows], inverse[kTaskRows], evidence[kTaskRows];
  for (int64_t i = 0; i < kTaskRows; ++i) largest[i] = -HUGE_VAL;
  for (int64_t k = 0; k < classes; ++k)
#pragma omp simd
    for (int64_t i = 0; i < kTaskRows; ++i) {
      const double value = log_prior[k] - 0.5 * (squared[k * kTaskRows + i] + constant);
      squared[k * kTaskRows + i] = value;
      largest[i] = value > largest[i] ? value : largest[i];
    }
  for (int64_t i = 0; i < kTaskRows; ++i) sum[i] = 0.0f;
  for (int64_t k = 0; k < classes; ++k)
#pragma omp simd
    for (int64_t i = 0; i < kTaskRows; ++i) {
      const double value = squared[k * kTaskRows + i];
      const float power = vector_exp(static_cast<float>(value - largest[i]));
      spread[k * kTaskRows + i] = power;
      sum[i] += power;
    }
#pragma omp simd
  for (int64_t i = 0; i < kTaskRows; ++i) {
    inverse[i] = 1.0f / sum[i];
    evidence[i] = static_cast<float>(largest[i] + vector_log(sum[i]));
  }
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t k = 0; k < classes; ++k) {
      joint[i * classes + k] = static_cast<float>(squared[k * kTaskRows + i]);
      posterior[i * classes + k] = spread[k * kTaskRows + i] * inverse[i];
    }
    const bool labelled = labels != nullptr && labels[i] >= 0;
    log_prob[i] = labelled ? joint[i * classes + labels[i]] : evidence[i];
  }
}

// G of a row: what reaches the joint from all three outputs.
void joint_gradient(const float* grad_joint, const float* grad_log_prob, const float* grad_posterior,
                    const float* posterior, const int64_t* labels, int64_t row, int64_t classes,
                    float* HYBRIDFLOW_RESTRICT out) {
  const float* HYBRIDFLOW_RESTRICT share = posterior + row * classes;
  const bool labelled = labels != nullptr && labels[row] >= 0;
  const float down = grad_log_prob == nullptr ? 0.0f : grad_log_prob[row];
  for (int64_t k = 0; k < classes; ++k) out[k] = labelled ? 0.0f : down * share[k];
  if (labelled) out[labels[row]] = down;
  if (grad_joint != nullptr)
    for (int64_t k = 0; k < classes; ++k) out[k] += grad_joint[row * classes + k];
  if (grad_posterior == nullptr) return;
  const float* HYBRIDFLOW_RESTRICT grad = grad_posterior + row * classes;
  float mean = 0.0f;
  for (int64_t k = 0; k < classes; ++k) mean += share[k] * grad[k];
  for (int64_t k = 0; k < classes; ++k) out[k] += share[k] * (grad[k] - mean);
}

// Adds G·(μ - z) to grad_z and G·(z - μ) to grad_means for R samples, C classes, so many columns.
template <int R, int C>
void add_gradients(const float* total, const float* z, const float* means, int64_t classes,
                   int64_t size, int64_t columns, float* grad_z, float* grad_means) {
  float weight[R][C];
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) weight[r][c] = total[r * classes + c];
#pragma omp simd
  for (int64_t j = 0; j < columns; ++j) {
    float down[R];
    for (int r = 0; r < R; ++r) down[r] = grad_z[r * size + j];
    for (int c = 0; c < C; ++c) {
      const float mean = means[c * size + j];
      float up = 0.0f;
      for (int r = 0; r < R; ++r) {
        const float weighted = weight[r][c] * (z[r * size + j] - mean);
        up += weighted;
        down[r] -= weighted;
      }
      grad_means[c * size + j] += up;
    }
    for (int r = 0; r < R; ++r) grad_z[r * size + j] = down[r];
  }
}

template <int R>
void add_gradients(const float* total, const float* z, const float* means, int64_t classes,
                   int64_t size, int64_t columns, float* grad_z, float* grad_means) {
  for (int r = 0; r < R; ++r)
    for (int64_t j = 0; j < columns; ++j) grad_z[r * size + j] = 0.0f;
  int64_t k = 0;
  for (; k + 2 <= classes; k += 2)
    add_gradients<R, 2>(total + k, z, means + k * size, classes, size, columns, grad_z,
                        grad_means + k * size);
  if (k < classes)
    add_gradients<R, 1>(total + k, z, means + k * size, classes, size, columns, grad_z,
                        grad_means + k * size);
}

// out[n] = Σ over chunks of partials[chunk][n], in their order.
void sum_chunks(const float* partials, int64_t chunks, int64_t begin, int64_t end, int64_t stride,
                float* HYBRIDFLOW_RESTRICT out) {
  for (int64_t n = begin; n < end; ++n) out[n] = 0.0f;
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    const float* HYBRIDFLOW_RESTRICT part = partials + chunk * stride;
#pragma omp simd
    for (int64_t n = begin; n < end; ++n) out[n] += part[n];
  }
}

}  // namespace

HYBRIDFLOW_KERNEL(gmm_log_prob)
(const float* z, const float* means, const float* log_prior, const int64_t* labels, int64_t samples,
 int64_t classes, int64_t size, float* joint, float* log_prob, float* posterior, int64_t threads) {
  const int64_t tasks = (samples + kTaskRows - 1) / kTaskRows;
#pragma omp parallel num_threads(thread_count(samples, classes, size, threads))
  {
    std::vector<double> squared(static_cast<size_t>(classes * kTaskRows));
    std::vector<float> spread(squared.size());
#pragma omp for schedule(static)
    for (int64_t task = 0; task < tasks; ++task) {
      const int64_t i = task * kTaskRows, rows = least(kTaskRows, samples - i);
      squared_distances(z + i * size, means, rows, classes, size, squared.data());
      finish_rows(squared.data(), spread.data(), log_prior, labels == nullptr ? nullptr : labels + i,
                  rows, classes, size, joint + i * classes, log_prob + i, posterior + i * classes);
    }
  }
}

// Sums over samples are formed chunk by chunk of chunk_rows. scratch holds G (samples, classes), then
// per chunk the sums for means (classes, size), then those for log_prior (classes).
HYBRIDFLOW_KERNEL(gmm_log_prob_backward)
(const float* grad_joint, const float* grad_log_prob, const float* grad_posterior, const float* z,
 const float* means, const float* posterior, const int64_t* labels, int64_t samples, int64_t classes,
 int64_t size, int64_t chunk_rows, float* scratch, float* grad_z, float* grad_means,
 float* grad_log_prior, int64_t threads) {
  const int64_t chunks = (samples + chunk_rows - 1) / chunk_rows, elements = classes * size;
  const int64_t blocks = (size + kTaskColumns - 1) / kTaskColumns;
  float* total = scratch;
  float* partials = total + samples * classes;
  float* prior_partials = partials + chunks * elements;
#pragma omp parallel num_threads(thread_count(samples, classes, size, threads))
  {
#pragma omp for schedule(static)
    for (int64_t i = 0; i < samples; ++i)
      joint_gradient(grad_joint, grad_log_prob, grad_posterior, posterior, labels, i, classes,
                     total + i * classes);
#pragma omp for schedule(static)
    for (int64_t task = 0; task < chunks * blocks; ++task) {
      const int64_t chunk = task / blocks, begin = task % blocks * kTaskColumns;
      const int64_t columns = least(kTaskColumns, size - begin);
      const int64_t end = least((chunk + 1) * chunk_rows, samples);
      float* sums = partials + chunk * elements + begin;
      for (int64_t k = 0; k < classes; ++k)
        for (int64_t j = 0; j < columns; ++j) sums[k * size + j] = 0.0f;
      int64_t i = chunk * chunk_rows;
      for (; i + 4 <= end; i += 4)
        add_gradients<4>(total + i * classes, z + i * size + begin, means + begin, classes, size,
                         columns, grad_z + i * size + begin, sums);
      for (; i < end; ++i)
        add_gradients<1>(total + i * classes, z + i * size + begin, means + begin, classes, size,
                         columns, grad_z + i * size + begin, sums);
      if (begin == 0)
        sum_chunks(total + chunk * chunk_rows * classes, end - chunk * chunk_rows, 0, classes,
                   classes, prior_partials + chunk * classes);
    }
#pragma omp for schedule(static)
    for (int64_t k = 0; k < classes; ++k)
      sum_chunks(partials, chunks, k * size, (k + 1) * size, elements, grad_means);
  }
  sum_chunks(prior_partials, chunks, 0, classes, classes, grad_log_prior);
}
