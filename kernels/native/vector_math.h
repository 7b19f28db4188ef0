// Elementary functions and 16-bit conversions without branches, tables or calls: of a float, so that
// loops over them vectorise, and of Lanes. What bounds them is latency, so polynomials are summed in
// pairs of terms (Estrin's scheme) and limits are minima and maxima.
#pragma once

#include <cstdint>
#include <cstring>

#include "native/lanes.h"

#if defined(__AVX__)
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

inline Lanes as_float(BitLanes bits) { return (Lanes)bits; }
inline BitLanes as_bits(Lanes value) { return (BitLanes)value; }

inline int32_t as_signed(uint32_t bits) { return static_cast<int32_t>(bits); }
inline IntLanes as_signed(BitLanes bits) { return (IntLanes)bits; }
inline uint32_t as_unsigned(int32_t value) { return static_cast<uint32_t>(value); }
inline BitLanes as_unsigned(IntLanes value) { return (BitLanes)value; }
inline float to_float(int32_t value) { return static_cast<float>(value); }
inline Lanes to_float(IntLanes value) { return __builtin_convertvector(value, Lanes); }

// The larger and the smaller of a and b; b if either is NaN.
inline float larger(float a, float b) { return a > b ? a : b; }
inline float smaller(float a, float b) { return a < b ? a : b; }
#if defined(__AVX__) && !defined(__AVX512F__)
inline Lanes larger(Lanes a, Lanes b) { return _mm256_max_ps(a, b); }
inline Lanes smaller(Lanes a, Lanes b) { return _mm256_min_ps(a, b); }
#else
inline Lanes larger(Lanes a, Lanes b) { return a > b ? a : b; }
inline Lanes smaller(Lanes a, Lanes b) { return a < b ? a : b; }
#endif

template <class F>
using Int = decltype(as_signed(as_bits(F{})));

template <class I>
inline auto power_of_two(I k) {  // 2^k for k in the exponents of normal numbers
  return as_float((as_unsigned(k) + 127u) << 23);
}

// x = k·ln 2 + r with |r| at most half of ln 2; ln 2 in two parts, the first with trailing zeros.
template <class F>
struct Reduced {
  Int<F> k;
  F r;
};

template <class F>
inline Reduced<F> reduce_by_ln2(F x) {
  const float rounder = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer in the low bits
  const F shifted = x * 1.44269504088896341f + rounder;
  const F k = shifted - rounder;
  const F r = (x - k * 0.693359375f) + k * 2.12194440e-4f;
  return {as_signed(as_bits(shifted) - 0x4B400000u), r};
}

template <class F>
inline F expm1_polynomial(F r) {  // e^r - 1 on the interval of `Reduced`: Cephes
  const F z = r * r;
  const F high = 1.9875691500e-4f * r + 1.3981999507e-3f;
  const F middle = 8.3334519073e-3f * r + 4.1665795894e-2f;
  const F low = 1.6666665459e-1f * r + 5.0000001201e-1f;
  return ((high * z + middle) * z + low) * z + r;
}

// value · 2^k, in two factors for k beyond the exponents of normal numbers.
template <class F>
inline F scale_by_power(F value, Int<F> k) {
  const Int<F> half = k >> 1;
  return value * power_of_two(half) * power_of_two(k - half);
}

// Within 2 ulp everywhere; infinities, NaN and gradual underflow as std::exp.
template <class F>
inline F vector_exp(F x) {
  x = smaller(every<F>(89.0f), larger(every<F>(-104.0f), x));
  const Reduced<F> reduced = reduce_by_ln2(x);
  return scale_by_power(1.0f + expm1_polynomial(reduced.r), reduced.k);
}

template <class F>
struct ExpPair {
  F value;
  F inverse;  // exp(-x)
};

// Both within 2 ulp, over the same range as vector_exp. cosh and sinh of r share what they can.
template <class F>
inline ExpPair<F> vector_exp_pair(F x) {
  x = smaller(every<F>(104.0f), larger(every<F>(-104.0f), x));
  const Reduced<F> reduced = reduce_by_ln2(x);
  const F r = reduced.r, z = r * r;
  F sinh = (1.0f / 5040.0f) * z + 1.0f / 120.0f;
  sinh = sinh * z + 1.0f / 6.0f;
  sinh = sinh * (z * r) + r;
  F cosh = (1.0f / 40320.0f) * z + 1.0f / 720.0f;
  cosh = cosh * z + 1.0f / 24.0f;
  cosh = cosh * z + 0.5f;
  cosh = cosh * z + 1.0f;
  return {scale_by_power(cosh + sinh, reduced.k), scale_by_power(cosh - sinh, -reduced.k)};
}

// Within 2 ulp for normal numbers and gradual underflow; 0, infinity and negative numbers as std::log.
// Cephes' polynomial on [sqrt(1/2), sqrt(2)).
template <class F>
inline F vector_log(F x) {
  const auto tiny = x < 1.17549435e-38f;
  const auto bits = as_bits(tiny ? x * 8388608.0f : x);  // 2^23
  F exponent = to_float(as_signed(bits >> 23) - 126) - (tiny ? every<F>(23.0f) : every<F>(0.0f));
  F m = as_float((bits & 0x007FFFFFu) | 0x3F000000u);  // in [1/2, 1)
  const auto small = m < 0.70710678118654752f;
  exponent -= small ? every<F>(1.0f) : every<F>(0.0f);
  m = (small ? m + m : m) - 1.0f;
  const F z = m * m;
  F p = 7.0376836292e-2f * m - 1.1514610310e-1f;
  p = p * m + 1.1676998740e-1f;
  p = p * m - 1.2420140846e-1f;
  p = p * m + 1.4249322787e-1f;
  p = p * m - 1.6668057665e-1f;
  p = p * m + 2.0000714765e-1f;
  p = p * m - 2.4999993993e-1f;
  p = p * m + 3.3333331174e-1f;
  F y = m * z * p;
  y = y - exponent * 2.12194440e-4f;
  y = y - 0.5f * z;
  const F finite = (m + y) + exponent * 0.693359375f;
  const float infinity = as_float(0x7F800000u);
  const F nan = every<F>(as_float(0x7FC00000u));
  const F edge =
      x == 0.0f ? every<F>(-infinity) : (x == infinity ? every<F>(infinity) : nan);
  return (x > 0.0f) & (x < infinity) ? finite : edge;
}

// e^-m and e^-m - 1 for m >= 0. e^-m stops at e^-86, which stands for 0: it saves the care that
// numbers below 2^-126 take.
template <class F>
struct Decay {
  F value;
  F minus_one;
};

template <class F>
inline Decay<F> vector_decay(F m) {
  const Reduced<F> reduced = reduce_by_ln2(larger(every<F>(-86.0f), -m));
  const F p = expm1_polynomial(reduced.r), scale = power_of_two(reduced.k);
  return {scale + scale * p, scale * p + (scale - 1.0f)};
}

template <class F>
inline F absolute(F x) {
  return as_float(as_bits(x) & 0x7FFFFFFFu);
}

template <class F>
inline F with_sign_of(F magnitude, F x) {
  return as_float(as_bits(magnitude) | (as_bits(x) & 0x80000000u));
}

template <class F>
struct Tanh {
  F value;
  F derivative;  // 1 - value^2, without its cancellation
};

// Through q = e^-2|x|, which cannot overflow: tanh |x| = (1 - q) / (1 + q). Within 3 and 6 ulp.
template <class F>
inline Tanh<F> vector_tanh(F x) {
  const Decay<F> q = vector_decay(2.0f * absolute(x));
  const F inverse = 1.0f / (2.0f + q.minus_one);
  return {with_sign_of(-q.minus_one * inverse, x), 4.0f * q.value * inverse * inverse};
}

template <class F>
struct Sigmoid {
  F value;
  F other;  // 1 - value, without its cancellation
};

// Within 3 ulp, down to e^-86.
template <class F>
inline Sigmoid<F> vector_sigmoid(F x) {
  const F q = vector_decay(absolute(x)).value;
  const F large = 1.0f / (1.0f + q), small = q * large;
  return {x < 0.0f ? small : large, x < 0.0f ? large : small};
}

template <class F>
struct LogSigmoid {
  F value;
  F derivative;  // sigmoid(-x)
};

// ln sigmoid(x) = min(x, 0) - ln(1 + q), q = e^-|x|, and ln(1 + q) = 2 artanh(q / (2 + q)).
// Within 5 and 4 ulp, the derivative down to e^-86.
template <class F>
inline LogSigmoid<F> vector_log_sigmoid(F x) {
  const F q = vector_decay(absolute(x)).value;
  const F inverse = 1.0f / ((1.0f + q) * (2.0f + q));
  const F w = q * (1.0f + q) * inverse, z = w * w;  // w at most 1/3
  F p = (1.0f / 13.0f) * z + 1.0f / 11.0f;
  p = p * z + 1.0f / 9.0f;
  p = p * z + 1.0f / 7.0f;
  p = p * z + 1.0f / 5.0f;
  p = p * z + 1.0f / 3.0f;
  const F log1p = 2.0f * (p * (z * w) + w);
  const F large = (2.0f + q) * inverse;
  return {(x < 0.0f ? x : every<F>(0.0f)) - log1p, x < 0.0f ? large : q * large};
}

// Within 3 ulp. Cephes: beyond tan(3π/8) and tan(π/8) the argument becomes -1/x and (x - 1)/(x + 1).
template <class F>
inline F vector_atan(F x) {
  const F a = absolute(x);
  const auto far = a > 2.414213562373095f, middle = a > 0.4142135623730950f;
  const F numerator = far ? every<F>(-1.0f) : (middle ? a - 1.0f : a);
  const F denominator = far ? a : (middle ? a + 1.0f : every<F>(1.0f));
  const F rest = middle ? every<F>(0.7853981633974483f) : every<F>(0.0f);
  const F base = far ? every<F>(1.5707963267948966f) : rest;
  const F t = numerator / denominator, z = t * t;
  F p = 8.05374449538e-2f * z - 1.38776856032e-1f;
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
