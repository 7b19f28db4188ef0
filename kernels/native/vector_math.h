// Elementary functions and 16-bit conversions without branches, tables or calls, so that loops over
// them vectorise.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace {

inline float as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint32_t as_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float power_of_two(int32_t k) {  // 2^k for k in the exponents of normal numbers
  return as_float((static_cast<uint32_t>(k) + 127u) << 23);
}

// x = k·ln 2 + r with |r| at most half of ln 2; ln 2 in two parts, the first with trailing zeros.
struct Reduced {
  int32_t k;
  float r;
};

inline Reduced reduce_by_ln2(float x) {
  const float rounder = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer in the low bits
  const float shifted = x * 1.44269504088896341f + rounder;
  const float k = shifted - rounder;
  const float r = (x - k * 0.693359375f) + k * 2.12194440e-4f;
  return {static_cast<int32_t>(as_bits(shifted) - 0x4B400000u), r};
}

inline float expm1_polynomial(float r) {  // e^r - 1 on the interval of `Reduced`: Cephes
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  return p * (r * r) + r;
}

// value · 2^k, in two factors for k beyond the exponents of normal numbers.
inline float scale_by_power(float value, int32_t k) {
  const int32_t half = k >> 1;
  return value * power_of_two(half) * power_of_two(k - half);
}

// Within 2 ulp everywhere; infinities, NaN and gradual underflow as std::exp.
inline float vector_exp(float x) {
  x = x < -104.0f ? -104.0f : x;
  x = x > 89.0f ? 89.0f : x;
  const Reduced reduced = reduce_by_ln2(x);
  return scale_by_power(1.0f + expm1_polynomial(reduced.r), reduced.k);
}

struct ExpPair {
  float value;
  float inverse;  // exp(-x)
};

// Both within 2 ulp, over the same range as vector_exp. cosh and sinh of r share what they can.
inline ExpPair vector_exp_pair(float x) {
  x = x < -104.0f ? -104.0f : x;
  x = x > 104.0f ? 104.0f : x;
  const Reduced reduced = reduce_by_ln2(x);
  const float r = reduced.r, z = r * r;
  float sinh = 1.0f / 5040.0f;
  sinh = sinh * z + 1.0f / 120.0f;
  sinh = sinh * z + 1.0f / 6.0f;
  sinh = sinh * (z * r) + r;
  float cosh = 1.0f / 40320.0f;
  cosh = cosh * z + 1.0f / 720.0f;
  cosh = cosh * z + 1.0f / 24.0f;
  cosh = cosh * z + 0.5f;
  cosh = cosh * z + 1.0f;
  return {scale_by_power(cosh + sinh, reduced.k), scale_by_power(cosh - sinh, -reduced.k)};
}

// Within 2 ulp for normal numbers and gradual underflow; 0, infinity and negative numbers as std::log.
// Cephes' polynomial on [sqrt(1/2), sqrt(2)).
inline float vector_log(float x) {
  const bool tiny = x < 1.17549435e-38f;
  const uint32_t bits = as_bits(tiny ? x * 8388608.0f : x);  // 2^23
  float exponent = static_cast<float>(static_cast<int32_t>(bits >> 23) - 126) - (tiny ? 23.0f : 0.0f);
  float m = as_float((bits & 0x007FFFFFu) | 0x3F000000u);  // in [1/2, 1)
  const bool small = m < 0.70710678118654752f;
  exponent -= small ? 1.0f : 0.0f;
  m = (small ? m + m : m) - 1.0f;
  const float z = m * m;
  float p = 7.0376836292e-2f;
  p = p * m - 1.1514610310e-1f;
  p = p * m + 1.1676998740e-1f;
  p = p * m - 1.2420140846e-1f;
  p = p * m + 1.4249322787e-1f;
  p = p * m - 1.6668057665e-1f;
  p = p * m + 2.0000714765e-1f;
  p = p * m - 2.4999993993e-1f;
  p = p * m + 3.3333331174e-1f;
  float y = m * z * p;
  y = y - exponent * 2.12194440e-4f;
  y = y - 0.5f * z;
  const float finite = (m + y) + exponent * 0.693359375f;
  const float infinity = as_float(0x7F800000u), nan = as_float(0x7FC00000u);
  const float edge = x == 0.0f ? -infinity : (x == infinity ? infinity : nan);
  return x > 0.0f && x < infinity ? finite : edge;
}

// e^-m and e^-m - 1 for m >= 0. e^-m stops at e^-86, which stands for 0: it saves the care that
// numbers below 2^-126 take.
struct Decay {
  float value;
  float minus_one;
};

inline Decay vector_decay(float m) {
  const Reduced reduced = reduce_by_ln2(m > 86.0f ? -86.0f : -m);
  const float p = expm1_polynomial(reduced.r), scale = power_of_two(reduced.k);
  return {scale + scale * p, scale * p + (scale - 1.0f)};
}

inline float absolute(float x) { return as_float(as_bits(x) & 0x7FFFFFFFu); }

inline float with_sign_of(float magnitude, float x) {
  return as_float(as_bits(magnitude) | (as_bits(x) & 0x80000000u));
}

struct Tanh {
  float value;
  float derivative;  // 1 - value^2, without its cancellation
};

// Through q = e^-2|x|, which cannot overflow: tanh |x| = (1 - q) / (1 + q). Within 3 and 6 ulp.
inline Tanh vector_tanh(float x) {
  const Decay q = vector_decay(2.0f * absolute(x));
  const float inverse = 1.0f / (2.0f + q.minus_one);
  return {with_sign_of(-q.minus_one * inverse, x), 4.0f * q.value * inverse * inverse};
}

struct Sigmoid {
  float value;
  float other;  // 1 - value, without its cancellation
};

// Within 3 ulp, down to e^-86.
inline Sigmoid vector_sigmoid(float x) {
  const float q = vector_decay(absolute(x)).value;
  const float large = 1.0f / (1.0f + q), small = q * large;
  return x < 0.0f ? Sigmoid{small, large} : Sigmoid{large, small};
}

struct LogSigmoid {
  float value;
  float derivative;  // sigmoid(-x)
};

// ln sigmoid(x) = min(x, 0) - ln(1 + q), q = e^-|x|, and ln(1 + q) = 2 artanh(q / (2 + q)).
// Within 5 and 4 ulp, the derivative down to e^-86.
inline LogSigmoid vector_log_sigmoid(float x) {
  const float q = vector_decay(absolute(x)).value;
  const float inverse = 1.0f / ((1.0f + q) * (2.0f + q));
  const float w = q * (1.0f + q) * inverse, z = w * w;  // w at most 1/3
  float p = 1.0f / 13.0f;
  p = p * z + 1.0f / 11.0f;
  p = p * z + 1.0f / 9.0f;
  p = p * z + 1.0f / 7.0f;
  p = p * z + 1.0f / 5.0f;
  p = p * z + 1.0f / 3.0f;
  const float log1p = 2.0f * (p * (z * w) + w);
  const float large = (2.0f + q) * inverse;
  return {(x < 0.0f ? x : 0.0f) - log1p, x < 0.0f ? large : q * large};
}

// Within 3 ulp. Cephes: beyond tan(3π/8) and tan(π/8) the argument becomes -1/x and (x - 1)/(x + 1).
inline float vector_atan(float x) {
  const float a = absolute(x);
  const bool far = a > 2.414213562373095f, middle = a > 0.4142135623730950f;
  const float numerator = far ? -1.0f : (middle ? a - 1.0f : a);
  const float denominator = far ? a : (middle ? a + 1.0f : 1.0f);
  const float base = far ? 1.5707963267948966f : (middle ? 0.7853981633974483f : 0.0f);
  const float t = numerator / denominator, z = t * t;
  float p = 8.05374449538e-2f;
  p = p * z - 1.38776856032e-1f;
  p = p * z + 1.99777106478e-1f;
  p = p * z - 3.33329491539e-1f;
  return with_sign_of(base + (p * (z * t) + t), x);
}

// --- 16-bit floats -------------------------------------------------------------------------------

inline float from_bfloat16(uint16_t bits) { return as_float(static_cast<uint32_t>(bits) << 16); }

inline uint16_t to_bfloat16(float value) {  // nearest, ties to even
  const uint32_t bits = as_bits(value);
  const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>(value == value ? rounded : 0x7FC0u);
}

inline float from_float16(uint16_t half) {
  const uint32_t magnitude = (half & 0x7FFFu) << 13, sign = (half & 0x8000u) << 16;
  const uint32_t finite = as_bits(as_float(magnitude) * power_of_two(112));  // subnormals included
  return as_float(sign | (magnitude < 0x0F800000u ? finite : magnitude | 0x7F800000u));
}

inline uint16_t to_float16(float value) {  // nearest, ties to even
  const uint32_t bits = as_bits(value), magnitude = bits & 0x7FFFFFFFu;
  const uint32_t normal = (magnitude + 0xFFFu + ((magnitude >> 13) & 1u) - 0x38000000u) >> 13;
  const uint32_t tiny = as_bits(as_float(magnitude) + 0.5f) - 0x3F000000u;  // below 2^-14
  uint32_t half = magnitude < 0x38800000u ? tiny : normal;
  half = magnitude >= 0x477FF000u ? 0x7C00u : half;  // 65520 and above
  half = magnitude > 0x7F800000u ? 0x7E00u : half;
  return static_cast<uint16_t>(half | ((bits >> 16) & 0x8000u));
}

inline void from_bfloat16(const uint16_t* from, int64_t count, float* to) {
#pragma omp simd
  for (int64_t j = 0; j < count; ++j) to[j] = from_bfloat16(from[j]);
}

inline void to_bfloat16(const float* from, int64_t count, uint16_t* to) {
#pragma omp simd
  for (int64_t j = 0; j < count; ++j) to[j] = to_bfloat16(from[j]);
}

inline void from_float16(const uint16_t* from, int64_t count, float* to) {
  int64_t done = 0;
#if defined(__F16C__)
  for (; done + 8 <= count; done += 8) {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + done));
    _mm256_storeu_ps(to + done, _mm256_cvtph_ps(half));
  }
#endif
#pragma omp simd
  for (int64_t j = done; j < count; ++j) to[j] = from_float16(from[j]);
}

inline void to_float16(const float* from, int64_t count, uint16_t* to) {
  int64_t done = 0;
#if defined(__F16C__)
  for (; done + 8 <= count; done += 8) {
    const __m128i half = _mm256_cvtps_ph(_mm256_loadu_ps(from + done), _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + done), half);
  }
#endif
#pragma omp simd
  for (int64_t j = done; j < count; ++j) to[j] = to_float16(from[j]);
}

}  // namespace
