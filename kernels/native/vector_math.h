// exp, log and tanh without branches, tables or calls, so that loops over them vectorise.
#pragma once

#include <cstdint>
#include <cstring>

namespace {

inline float power_of_two(uint32_t k) {  // 2^k for k in the exponents of normal numbers
  const uint32_t bits = (k + 127u) << 23;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// Within 2 ulp everywhere; infinities, NaN and gradual underflow as std::exp. Range reduction by
// ln 2 in two parts and Cephes' polynomial; 2^k is applied in two factors, for k beyond the
// exponents of normal numbers.
inline float vector_exp(float x) {
  const float rounder = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer in the low bits
  x = x < -104.0f ? -104.0f : x;
  x = x > 89.0f ? 89.0f : x;
  const float shifted = x * 1.44269504088896341f + rounder;
  const float k = shifted - rounder;
  uint32_t bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  const int32_t exponent = static_cast<int32_t>(bits - 0x4B400000u);
  float r = x - k * 0.693359375f;
  r = r + k * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const int32_t half = exponent >> 1;
  return p * power_of_two(static_cast<uint32_t>(half)) *
         power_of_two(static_cast<uint32_t>(exponent - half));
}

// Within 2 ulp for normal numbers and gradual underflow; 0, infinity and negative numbers as std::log.
// Cephes' polynomial on [sqrt(1/2), sqrt(2)).
inline float vector_log(float x) {
  const bool tiny = x < 1.17549435e-38f;
  const float scaled = tiny ? x * 8388608.0f : x;  // 2^23
  uint32_t bits;
  std::memcpy(&bits, &scaled, sizeof bits);
  float exponent = static_cast<float>(static_cast<int32_t>(bits >> 23) - 126) - (tiny ? 23.0f : 0.0f);
  bits = (bits & 0x007FFFFFu) | 0x3F000000u;
  float m;  // in [1/2, 1)
  std::memcpy(&m, &bits, sizeof m);
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
  const float infinity = __builtin_inff();
  const float edge = x == 0.0f ? -infinity : (x == infinity ? infinity : __builtin_nanf(""));
  return x > 0.0f && x < infinity ? finite : edge;
}

struct Tanh {
  float value;
  float derivative;  // 1 - value^2, without its cancellation
};

// tanh through q = exp(-2|x|), which cannot overflow; near zero 1 - q cancels and Cephes' odd
// polynomial takes over.
inline Tanh vector_tanh(float x) {
  const float magnitude = x < 0.0f ? -x : x;
  const float q = vector_exp(-2.0f * magnitude);
  const float inverse = 1.0f / (1.0f + q);
  const float large = (1.0f - q) * inverse;
  const float z = x * x;
  float p = -5.70498872745e-3f;
  p = p * z + 2.06390887954e-2f;
  p = p * z - 5.37397155531e-2f;
  p = p * z + 1.33314422036e-1f;
  p = p * z - 3.33332819422e-1f;
  const float small = x + x * z * p;
  const float value = magnitude < 0.625f ? small : (x < 0.0f ? -large : large);
  return {value, 4.0f * q * inverse * inverse};
}

}  // namespace
