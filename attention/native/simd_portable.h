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

}  // namespace keysift::KEYSIFT_ISA
