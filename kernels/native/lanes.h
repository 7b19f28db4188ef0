// The lanes of one vector register, as a type: what the sources write by hand where a loop would not
// become what is wanted. Sums over columns stay in lanes and are folded at the end: OpenMP's own
// reductions add the lanes one after another through memory, which for short rows takes longer than the
// row.
#pragma once

#include <cstdint>
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
typedef int32_t IntLanes __attribute__((vector_size(sizeof(float) * kLanes)));
typedef uint32_t BitLanes __attribute__((vector_size(sizeof(float) * kLanes)));

inline Lanes load(const float* from) {
  Lanes value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

inline void store(Lanes value, float* to) { std::memcpy(to, &value, sizeof value); }

template <class F>
F every(float value);  // in each lane
template <>
inline float every<float>(float value) {
  return value;
}
template <>
inline Lanes every<Lanes>(float value) {
  return value - Lanes{};
}

typedef float Quad __attribute__((vector_size(16)));

inline float fold(Lanes lanes) {
  Quad quads[kLanes / 4];
  std::memcpy(quads, &lanes, sizeof lanes);
  Quad total = quads[0];
  for (int q = 1; q < kLanes / 4; ++q) total += quads[q];
  return (total[0] + total[1]) + (total[2] + total[3]);
}

// Lanes first ... last - 1 of the value, zero in the others.
struct Some {
  BitLanes mask;

  Some(int64_t first, int64_t last) {
    IntLanes lane;
    for (int l = 0; l < kLanes; ++l) lane[l] = l;
    const int32_t from = static_cast<int32_t>(first), to = static_cast<int32_t>(last);
    mask = (BitLanes)((lane >= from) & (lane < to));
  }

  Lanes of(Lanes value) const { return (Lanes)((BitLanes)value & mask); }
};

}  // namespace
