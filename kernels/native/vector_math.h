// exp and tanh without branches, tables or calls, so that loops over them vectorise.
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
