// Any processor: vectors of 4 floats in the compiler's own notation.
#pragma once

#include "types.h"

namespace keysift::KEYSIFT_ISA {

constexpr int kLanes = 4;
constexpr int kColumns = 2;

typedef float Vec __attribute__((vector_size(16)));
using Quad = Vec;

KEYSIFT_INLINE Vec load(const float* p) {
  Vec v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
KEYSIFT_INLINE void store(float* p, Vec v) { __builtin_memcpy(p, &v, sizeof v); }
KEYSIFT_INLINE Vec splat(float x) { return Vec{x, x, x, x}; }
KEYSIFT_INLINE Vec fma(Vec a, Vec b, Vec sum) { return a * b + sum; }
KEYSIFT_INLINE Vec maximum(Vec a, Vec b) { return a > b ? a : b; }
KEYSIFT_INLINE float highest(Vec v) { return std::max(std::max(v[0], v[1]), std::max(v[2], v[3])); }
KEYSIFT_INLINE float total(Vec v) { return (v[0] + v[1]) + (v[2] + v[3]); }
KEYSIFT_INLINE void store_totals(float* p, const Vec (&v)[4]) {
  for (int i = 0; i < 4; ++i) p[i] = total(v[i]);
}

KEYSIFT_INLINE Vec widen(const float* p) { return load(p); }
template <class Element>
KEYSIFT_INLINE Vec widen(const Element* p) {
  return Vec{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])};
}
KEYSIFT_INLINE void narrow(Vec v, float16* p) {
  for (int i = 0; i < 4; ++i) p[i] = to_float16(v[i]);
}

KEYSIFT_INLINE Quad load_quad(const void* p) { return load(static_cast<const float*>(p)); }
KEYSIFT_INLINE void store_quad(float* p, Quad v) { store(p, v); }
template <class Element>
KEYSIFT_INLINE Quad widen_quad(const Element* p) {
  return widen(p);
}
KEYSIFT_INLINE void transpose(Quad (&rows)[4]) {
  for (int i = 0; i < 4; ++i)
    for (int j = 0; j < i; ++j) {
      const float above = rows[j][i];
      rows[j][i] = rows[i][j];
      rows[i][j] = above;
    }
}

// Integers: a vector of kLanes pairs of int16, or of int32.
typedef std::int32_t Words __attribute__((vector_size(16)));
typedef std::int16_t Int16s __attribute__((vector_size(16)));

KEYSIFT_INLINE Words widen_bytes(const std::int8_t* p) {
  return (Words)Int16s{p[0], p[1], p[2], p[3], p[4], p[5], p[6], p[7]};
}
// Bytes `at` and on, times 256, of p in the order of `zipped`.
KEYSIFT_INLINE Words zip_bytes(const std::int8_t* p, int at, int half) {
  Int16s out;
  for (int i = 0; i < 8; ++i) out[i] = static_cast<std::int16_t>(p[zipped(at + i, half)] * 256);
  return (Words)out;
}
KEYSIFT_INLINE Words add_products(Words a, Words b, Words sum) {
  const Int16s x = (Int16s)a, y = (Int16s)b;
  for (int i = 0; i < 4; ++i) sum[i] += x[2 * i] * y[2 * i] + x[2 * i + 1] * y[2 * i + 1];
  return sum;
}
// a * b / 2^15, rounded
KEYSIFT_INLINE Words scale_down(Words a, Words b) {
  Int16s x = (Int16s)a, y = (Int16s)b;
  for (int i = 0; i < 8; ++i) x[i] = static_cast<std::int16_t>((x[i] * y[i] + 0x4000) >> 15);
  return (Words)x;
}

}  // namespace keysift::KEYSIFT_ISA
