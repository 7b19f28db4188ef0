// Random numbers that depend on a seed and a position alone: Philox 4x32-10, its uniforms and normals.
// Definition of the mapping: kernels/_philox.py.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "native/vector_math.h"

namespace {

// Passed by value everywhere: in a loop to be vectorised GCC keeps what has an address in memory.
struct Words {
  uint32_t a, b, c, d;
};

// Word for word that of Salmon et al. (SC 2011): key = seed, counter = (block, stream).
inline Words philox(uint64_t seed, uint64_t block, uint32_t stream) {
  uint32_t key_a = static_cast<uint32_t>(seed), key_b = static_cast<uint32_t>(seed >> 32);
  uint32_t a = static_cast<uint32_t>(block), b = static_cast<uint32_t>(block >> 32);
  uint32_t c = stream, d = 0;
  for (int round = 0; round < 10; ++round) {
    const uint64_t first = static_cast<uint64_t>(a) * 0xD2511F53u;
    const uint64_t second = static_cast<uint64_t>(c) * 0xCD9E8D57u;
    a = static_cast<uint32_t>(second >> 32) ^ b ^ key_a;
    b = static_cast<uint32_t>(second);
    c = static_cast<uint32_t>(first >> 32) ^ d ^ key_b;
    d = static_cast<uint32_t>(first);
    key_a += 0x9E3779B9u;
    key_b += 0xBB67AE85u;
  }
  return {a, b, c, d};
}

// floor(word * n / 2^32): an integer in [0, n).
inline uint32_t below(uint32_t word, uint32_t n) {
  return static_cast<uint32_t>((static_cast<uint64_t>(word) * n) >> 32);
}

inline int32_t top_bits(uint32_t word) { return static_cast<int32_t>(word >> 8); }

inline float uniform(uint32_t word) {  // in [0, 1), a multiple of 2^-24
  return static_cast<float>(top_bits(word)) * 5.9604644775390625e-8f;
}

struct Four {
  float a, b, c, d;
};

inline Four four_uniforms(Words w) {
  return {uniform(w.a), uniform(w.b), uniform(w.c), uniform(w.d)};
}

struct Normals {
  float a, b;
};

// Box-Muller. The angle is taken in 2^-24 of a turn: its quadrant and the rest, in [-pi/4, pi/4], are
// exact, and Cephes' polynomials for sine and cosine see the rest.
inline Normals two_normals(uint32_t first, uint32_t second) {
  const float radius = std::sqrt(-2.0f * vector_log(1.0f - uniform(first)));
  const int32_t angle = top_bits(second);
  const int32_t quadrant = (angle + (1 << 21)) >> 22;
  const float x = static_cast<float>(angle - (quadrant << 22)) * 3.74507028e-7f;  // 2 pi / 2^24
  const float z = x * x;
  float sine = -1.9515295891e-4f;
  sine = sine * z + 8.3321608736e-3f;
  sine = sine * z - 1.6666654611e-1f;
  sine = sine * z * x + x;
  float cosine = 2.443315711809948e-5f;
  cosine = cosine * z - 1.388731625493765e-3f;
  cosine = cosine * z + 4.166664568298827e-2f;
  cosine = cosine * z * z - 0.5f * z + 1.0f;
  const bool odd = (quadrant & 1) != 0;
  const float along = odd ? sine : cosine;
  const float across = odd ? cosine : sine;
  return {((quadrant + 1) & 2) != 0 ? -radius * along : radius * along,
          (quadrant & 2) != 0 ? -radius * across : radius * across};
}

inline Four four_normals(Words w) {
  const Normals ab = two_normals(w.a, w.b), cd = two_normals(w.c, w.d);
  return {ab.a, ab.b, cd.a, cd.b};
}

// Fills a sample: element j is number j / quarter of the block sample * quarter + j % quarter. Blocks are
// made in multiples of a vector, so that no quarter has a scalar rest; what is beyond it is dropped.
template <class Numbers>
inline void fill_sample(uint64_t seed, int64_t sample, int64_t columns, const Numbers& numbers,
                        float* out) {
  constexpr int64_t most = 256, vector = 16;
  const int64_t quarter = (columns + 3) / 4;
  for (int64_t m = 0; m < quarter; m += most) {
    const int64_t blocks = (std::min(most, quarter - m) + vector - 1) / vector * vector;
    const uint64_t first = static_cast<uint64_t>(sample * quarter + m);
    float made[4][most];
#pragma omp simd
    for (int64_t l = 0; l < blocks; ++l) {
      const Four x = numbers(philox(seed, first + static_cast<uint64_t>(l), 0));
      made[0][l] = x.a;
      made[1][l] = x.b;
      made[2][l] = x.c;
      made[3][l] = x.d;
    }
    for (int64_t part = 0; part < 4; ++part) {
      const int64_t begin = part * quarter + m;
      const int64_t end = std::min({begin + most, (part + 1) * quarter, columns});
      if (begin < end) std::copy(made[part], made[part] + (end - begin), out + begin);
    }
  }
}

inline void fill_uniforms(uint64_t seed, int64_t sample, int64_t columns, float* out) {
  fill_sample(seed, sample, columns, [](Words w) { return four_uniforms(w); }, out);
}

inline void fill_normals(uint64_t seed, int64_t sample, int64_t columns, float* out) {
  fill_sample(seed, sample, columns, [](Words w) { return four_normals(w); }, out);
}

}  // namespace
