// Sums over columns in the lanes of one vector register, folded at the end. OpenMP's own reductions
// add the lanes one after another through memory, which for short rows takes longer than the row.
#pragma once

#include <cstring>

namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
typedef float Lanes __attribute__((vector_size(sizeof(float) * kLanes)));

inline Lanes load(const float* from) {
  Lanes value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

typedef float Quad __attribute__((vector_size(16)));

inline float fold(Lanes lanes) {
  Quad quads[kLanes / 4];
  std::memcpy(quads, &lanes, sizeof lanes);
  Quad total = quads[0];
  for (int q = 1; q < kLanes / 4; ++q) total += quads[q];
  return (total[0] + total[1]) + (total[2] + total[3]);
}

}  // namespace
