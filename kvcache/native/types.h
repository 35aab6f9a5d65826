// Element types, and the conversions that no instruction set has to offer.
#pragma once

#include <cstdint>
#include <cstring>

#define KEYSIFT_INLINE inline __attribute__((always_inline))

namespace keysift {

struct bfloat16 {
  std::uint16_t bits;
};
struct float16 {
  std::uint16_t bits;
};

template <class To, class From>
KEYSIFT_INLINE To bit_copy(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof to);
  return to;
}

// Of 2 * half channels in the order 0, half, 1, half + 1, ...: which one is the i-th, and so on in every 2 * half.
KEYSIFT_INLINE int zipped(int i, int half) { return i / (2 * half) * 2 * half + i % (2 * half) / 2 + i % 2 * half; }

KEYSIFT_INLINE float to_float(float x) { return x; }
KEYSIFT_INLINE float to_float(std::int8_t x) { return x; }
KEYSIFT_INLINE float to_float(bfloat16 x) { return bit_copy<float>(std::uint32_t{x.bits} << 16); }
KEYSIFT_INLINE float to_float(float16 x) {
  const std::uint32_t sign = std::uint32_t{x.bits & 0x8000u} << 16, magnitude = x.bits & 0x7fffu;
  // Scaling by 2^112 moves the exponent's bias, subnormals included; infinity and NaN need all exponent bits set.
  const float scaled = bit_copy<float>(magnitude << 13) * 0x1p112f;
  const std::uint32_t bits = magnitude < 0x7c00u ? bit_copy<std::uint32_t>(scaled) : 0x7f800000u | magnitude << 13;
  return bit_copy<float>(sign | bits);
}

// Rounds to nearest, ties to even; a NaN stays one.
KEYSIFT_INLINE bfloat16 to_bfloat16(float x) {
  const auto bits = bit_copy<std::uint32_t>(x);
  const std::uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  return {static_cast<std::uint16_t>(x == x ? rounded : 0x7fc0u)};
}
KEYSIFT_INLINE float16 to_float16(float x) {
  const auto bits = bit_copy<std::uint32_t>(x);
  const std::uint32_t sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  if (magnitude >= 0x47800000u)
    return {static_cast<std::uint16_t>(sign | (magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u))};
  if (magnitude < 0x38800000u) {  // subnormal: adding 0.5 makes the processor round at the right bit
    const float moved = bit_copy<float>(magnitude) + 0.5f;
    return {static_cast<std::uint16_t>(sign | (bit_copy<std::uint32_t>(moved) - 0x3f000000u))};
  }
  return {static_cast<std::uint16_t>(sign | (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13)};
}

}  // namespace keysift
