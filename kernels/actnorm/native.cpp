// Mean and variance of each channel in one pass over memory.
//
// x is rows of channels * inner columns. A chunk of rows, small enough for the cache, gives each of its
// columns a mean and a sum of squared deviations; chunks and columns of a channel are then merged by
// the rule of Chan, Golub and LeVeque (1979), in a fixed order.
#include <cstddef>
#include <vector>

#include "native/native.h"

namespace {

constexpr int64_t kBlock = 16384;  // values of a chunk: they stay in the cache between two passes
constexpr int64_t kGroups = 16;    // of chunks: a fixed number, so that sums never depend on threads

struct Moments {
  double count = 0.0, mean = 0.0, deviation = 0.0;  // deviation: sum of (x - mean)^2

  void merge(double other_count, double other_mean, double other_deviation) {
    const double total = count + other_count, delta = other_mean - mean;
    if (total == 0.0) return;
    mean += delta * (other_count / total);
    deviation += other_deviation + delta * delta * (count * other_count / total);
    count = total;
  }
};

// Mean and squared deviations of every column over rows [begin, end). The mean is relative to the first
// row: of values far from zero it keeps the digits, and of constant ones it is exactly zero.
void columns_of_chunk(const float* x, int64_t begin, int64_t end, int64_t n,
                      float* HYBRIDFLOW_RESTRICT mean, float* HYBRIDFLOW_RESTRICT deviation) {
  const float scale = 1.0f / static_cast<float>(end - begin);
  const float* HYBRIDFLOW_RESTRICT pivot = x + begin * n;
  for (int64_t j = 0; j < n; ++j) mean[j] = deviation[j] = 0.0f;
  for (int64_t i = begin + 1; i < end; ++i) {
    const float* HYBRIDFLOW_RESTRICT row = x + i * n;
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) mean[j] += (row[j] - pivot[j]) * scale;
  }
  for (int64_t i = begin; i < end; ++i) {
    const float* HYBRIDFLOW_RESTRICT row = x + i * n;
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) {
      const float delta = (row[j] - pivot[j]) - mean[j];
      deviation[j] += delta * delta;
    }
  }
}

// The columns of one channel as one: they all have the same count.
void merge_channel(const float* HYBRIDFLOW_RESTRICT pivot, const float* HYBRIDFLOW_RESTRICT mean,
                   const float* HYBRIDFLOW_RESTRICT deviation, int64_t inner, double count,
                   Moments& into) {
  float sum = 0.0f, within = 0.0f, between = 0.0f;
#pragma omp simd reduction(+ : sum, within)
  for (int64_t j = 0; j < inner; ++j) {
    sum += (pivot[j] - pivot[0]) + mean[j];
    within += deviation[j];
  }
  const float centre = sum / static_cast<float>(inner);
#pragma omp simd reduction(+ : between)
  for (int64_t j = 0; j < inner; ++j) {
    const float delta = (pivot[j] - pivot[0]) + mean[j] - centre;
    between += delta * delta;
  }
  into.merge(count * static_cast<double>(inner), static_cast<double>(pivot[0]) + centre,
             within + count * between);
}

}  // namespace

HYBRIDFLOW_KERNEL(moments)
(const float* x, int64_t rows, int64_t channels, int64_t inner, float* mean, float* variance,
 int64_t threads) {
  const int64_t n = channels * inner;
  const int64_t height = n < kBlock / 16 ? kBlock / n : 16;
  const int64_t chunks = (rows + height - 1) / height;
  const int64_t groups = chunks < kGroups ? chunks : kGroups;
  std::vector<Moments> partial(static_cast<std::size_t>(groups * channels));
#pragma omp parallel num_threads(team(rows * n, threads))
  {
    std::vector<float> scratch(static_cast<std::size_t>(2 * n));
    float* const means = scratch.data();
    float* const deviations = means + n;
#pragma omp for schedule(static)
    for (int64_t group = 0; group < groups; ++group) {
      Moments* mine = partial.data() + group * channels;
      for (int64_t chunk = group * chunks / groups; chunk < (group + 1) * chunks / groups; ++chunk) {
        const int64_t begin = chunk * height;
        const int64_t end = begin + height < rows ? begin + height : rows;
        columns_of_chunk(x, begin, end, n, means, deviations);
        for (int64_t c = 0; c < channels; ++c)
          merge_channel(x + begin * n + c * inner, means + c * inner, deviations + c * inner, inner,
                        static_cast<double>(end - begin), mine[c]);
      }
    }
  }
  for (int64_t c = 0; c < channels; ++c) {
    Moments total;
    for (int64_t group = 0; group < groups; ++group) {
      const Moments& part = partial[static_cast<std::size_t>(group * channels + c)];
      total.merge(part.count, part.mean, part.deviation);
    }
    mean[c] = static_cast<float>(total.mean);
    variance[c] = static_cast<float>(total.deviation / total.count);
  }
}
