// Memory that a thread writes for others to read.
//
// A core that writes a line of which another one holds a copy waits for that copy to go: on Zen 4, 7 ns for
// each line where they share a third-level cache and 28 where they do not. So what is written in every call
// and read by all threads is stored `past` the caches, which takes 3 to 5, in whole lines.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "native/lanes.h"

namespace {

#if defined(__AVX512F__)
constexpr bool kCanStorePast = true;  // a vector is a line
#else
constexpr bool kCanStorePast = false;
#endif

// `to` is where a line begins.
inline void store(Lanes value, float* to, bool past) {
#if defined(__AVX512F__)
  if (past) return _mm512_stream_ps(to, (__m512)value);
#else
  (void)past;
#endif
  store(value, to);
}

inline void copy(const float* from, int64_t count, float* to, bool past) {
  int64_t i = 0;
  if (kCanStorePast && past) {
    for (; i < count && reinterpret_cast<uintptr_t>(to + i) % sizeof(Lanes) != 0; ++i) to[i] = from[i];
    for (; i + kLanes <= count; i += kLanes) store(load(from + i), to + i, true);
  }
  std::memcpy(to + i, from + i, static_cast<size_t>(count - i) * sizeof(float));
}

// The threads of a team wait for each other; what each has stored is there for all.
inline void hand_over() {
#if defined(__AVX512F__)
  _mm_sfence();
#endif
#pragma omp barrier
}

}  // namespace
