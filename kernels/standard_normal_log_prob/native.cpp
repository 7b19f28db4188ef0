// Log-density of the standard normal, in fp32 for z of 32 or 16 bits; the formulas are those of
// reference.py.
#include "native/lanes.h"
#include "native/native.h"
#include "native/vector_math.h"

namespace {

enum Type : int64_t { kFloat32, kBFloat16, kFloat16 };  // native_impl.py: _TYPES

constexpr int64_t kRun = 2048;  // columns taken at a time: summed in float, and runs in double
constexpr double kLogTwoPi = 1.8378770664093454836;

int64_t run_length(int64_t begin, int64_t size) { return size - begin < kRun ? size - begin : kRun; }

// So many elements as float32: where they are if they are that, else in the buffer.
const float* load_run(const void* z, int64_t type, int64_t begin, int64_t count, float* buffer) {
  if (type == kFloat32) return static_cast<const float*>(z) + begin;
  const uint16_t* from = static_cast<const uint16_t*>(z) + begin;
  if (type == kBFloat16)
    from_bfloat16(from, count, buffer);
  else
    from_float16(from, count, buffer);
  return buffer;
}

void store_run(const float* buffer, int64_t type, int64_t begin, int64_t count, void* out) {
  if (type == kBFloat16) to_bfloat16(buffer, count, static_cast<uint16_t*>(out) + begin);
  if (type == kFloat16) to_float16(buffer, count, static_cast<uint16_t*>(out) + begin);
}

void scale(float weight, const float* HYBRIDFLOW_RESTRICT from, int64_t count,
           float* HYBRIDFLOW_RESTRICT to) {
#pragma omp simd
  for (int64_t j = 0; j < count; ++j) to[j] = weight * from[j];
}

double squared_norm(const float* z, int64_t columns) {
  Lanes sums[4];
  for (int s = 0; s < 4; ++s) sums[s] = Lanes{};
  int64_t j = 0;
  for (; j + 4 * kLanes <= columns; j += 4 * kLanes)
    for (int s = 0; s < 4; ++s) {
      const Lanes value = load(z + j + s * kLanes);
      sums[s] += value * value;
    }
  for (; j + kLanes <= columns; j += kLanes) {
    const Lanes value = load(z + j);
    sums[0] += value * value;
  }
  double total = fold((sums[0] + sums[1]) + (sums[2] + sums[3]));
  for (; j < columns; ++j) total += static_cast<double>(z[j]) * z[j];
  return total;
}

}  // namespace

HYBRIDFLOW_KERNEL(standard_normal_log_prob)
(const void* z, const float* log_det, int64_t type, int64_t samples, int64_t size, float* log_prob,
 int64_t threads) {
  const double constant = kLogTwoPi * static_cast<double>(size);
#pragma omp parallel for num_threads(team(samples * size, threads)) schedule(static)
  for (int64_t i = 0; i < samples; ++i) {
    float buffer[kRun];
    double squared = 0.0;
    for (int64_t begin = 0; begin < size; begin += kRun) {
      const int64_t count = run_length(begin, size);
      squared += squared_norm(load_run(z, type, i * size + begin, count, buffer), count);
    }
    const double value = -0.5 * (squared + constant);
    log_prob[i] = static_cast<float>(log_det == nullptr ? value : value + log_det[i]);
  }
}

HYBRIDFLOW_KERNEL(standard_normal_log_prob_backward)
(const float* grad, const void* z, int64_t type, int64_t samples, int64_t size, void* grad_z,
 int64_t threads) {
#pragma omp parallel for num_threads(team(samples * size, threads)) schedule(static)
  for (int64_t i = 0; i < samples; ++i) {
    float values[kRun], products[kRun];
    for (int64_t begin = 0; begin < size; begin += kRun) {
      const int64_t at = i * size + begin, count = run_length(begin, size);
      const float* from = load_run(z, type, at, count, values);
      scale(-grad[i], from, count, type == kFloat32 ? static_cast<float*>(grad_z) + at : products);
      store_run(products, type, at, count, grad_z);
    }
  }
}
