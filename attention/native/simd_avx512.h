// AVX-512 F, BW, VL and DQ: vectors of 16 floats.
#pragma once

#include <immintrin.h>

#include "types.h"

namespace keysift::KEYSIFT_ISA {

constexpr int kLanes = 16;
constexpr int kColumns = 4;  // with 6 rows: 24 sums, 4 columns and a broadcast in 32 registers

using Vec = __m512;
using Quad = __m128;

KEYSIFT_INLINE Vec load(const float* p) { return _mm512_loadu_ps(p); }
KEYSIFT_INLINE void store(float* p, Vec v) { _mm512_storeu_ps(p, v); }
KEYSIFT_INLINE Vec splat(float x) { return _mm512_set1_ps(x); }
KEYSIFT_INLINE Vec fma(Vec a, Vec b, Vec sum) { return _mm512_fmadd_ps(a, b, sum); }
KEYSIFT_INLINE Vec maximum(Vec a, Vec b) { return _mm512_max_ps(a, b); }
KEYSIFT_INLINE float highest(Vec v) { return _mm512_reduce_max_ps(v); }
KEYSIFT_INLINE float total(Vec v) { return _mm512_reduce_add_ps(v); }

KEYSIFT_INLINE __m256 halves_added(Vec v) {
  return _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
}

// The sums of four vectors, each over its lanes.
KEYSIFT_INLINE void store_totals(float* p, const Vec (&v)[4]) {
  const __m256 low = _mm256_hadd_ps(halves_added(v[0]), halves_added(v[1]));
  const __m256 high = _mm256_hadd_ps(halves_added(v[2]), halves_added(v[3]));
  const __m256 both = _mm256_hadd_ps(low, high);
  _mm_storeu_ps(p, _mm_add_ps(_mm256_castps256_ps128(both), _mm256_extractf128_ps(both, 1)));
}

KEYSIFT_INLINE Vec widen(const float* p) { return load(p); }
KEYSIFT_INLINE Vec widen(const bfloat16* p) {
  const __m512i bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
}
KEYSIFT_INLINE Vec widen(const float16* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}

KEYSIFT_INLINE void narrow(Vec v, float16* p) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

}  // namespace keysift::KEYSIFT_ISA

#include "simd_quad_f16c.h"
