// The 16-bit floats of CUDA's headers, as far as kernels use them: stored as bits, converted as GPUs do, to
// nearest even.
#pragma once
#include <cstdint>
#include <cstring>

namespace emulation {

inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// `bits` without its last `count`, rounded to nearest, ties to even.
inline uint32_t rounded(uint32_t bits, unsigned count) {
  const uint32_t kept = bits >> count, rest = bits & ((1u << count) - 1), tie = 1u << (count - 1);
  return kept + (rest > tie || (rest == tie && (kept & 1)));
}

}  // namespace emulation

// Visible, as a kernel that is made for a type is no more visible than the type.
struct __attribute__((visibility("default"))) __half {
  uint16_t bits;
};

struct __attribute__((visibility("default"))) __nv_bfloat16 {
  uint16_t bits;
};

inline float __bfloat162float(__nv_bfloat16 x) { return emulation::float_of(uint32_t{x.bits} << 16); }

inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  if (x != x) return {0x7fff};
  return {static_cast<uint16_t>(emulation::rounded(emulation::bits_of(x), 16))};
}

inline float __half2float(__half x) {
  const uint32_t sign = uint32_t{x.bits & 0x8000u} << 16;
  const uint32_t exponent = x.bits >> 10 & 31, fraction = x.bits & 1023;
  if (exponent == 31) return emulation::float_of(sign | 0x7f800000u | fraction << 13);
  if (exponent == 0) {  // fraction * 2^-24
    const float magnitude = static_cast<float>(fraction) * 0x1p-24f;
    return sign ? -magnitude : magnitude;
  }
  return emulation::float_of(sign | (exponent + 112) << 23 | fraction << 13);
}

inline __half __float2half_rn(float x) {
  const uint32_t bits = emulation::bits_of(x), sign = bits >> 16 & 0x8000u, size = bits & 0x7fffffffu;
  const auto with_sign = [&](uint32_t half) { return __half{static_cast<uint16_t>(sign | half)}; };
  if (size > 0x7f800000u) return {0x7fff};
  if (size >= 0x477ff000u) return with_sign(0x7c00);  // rounds to 65536 or more
  if (size >= 0x38800000u) return with_sign(emulation::rounded(size - (112u << 23), 13));
  if (size < 0x33000000u) return with_sign(0);  // below half of the smallest subnormal
  const uint32_t exponent = size >> 23, fraction = (size & 0x7fffffu) | 0x800000u;
  return with_sign(emulation::rounded(fraction, 126 - exponent));
}
