// AVX2, FMA and F16C: vectors of 8 floats.
#pragma once

#include <immintrin.h>

#include "types.h"

namespace keysift::KEYSIFT_ISA {

constexpr int kLanes = 8;
constexpr int kColumns = 2;  // with 6 rows: 12 sums, 2 columns and a broadcast in 16 registers

using Vec = __m256;
using Quad = __m128;

KEYSIFT_INLINE Vec load(const float* p) { return _mm256_loadu_ps(p); }
KEYSIFT_INLINE void store(float* p, Vec v) { _mm256_storeu_ps(p, v); }
KEYSIFT_INLINE Vec splat(float x) { return _mm256_set1_ps(x); }
KEYSIFT_INLINE Vec fma(Vec a, Vec b, Vec sum) { return _mm256_fmadd_ps(a, b, sum); }
KEYSIFT_INLINE Vec maximum(Vec a, Vec b) { return _mm256_max_ps(a, b); }

// The sums of four vectors, each over its lanes.
KEYSIFT_INLINE void store_totals(float* p, const Vec (&v)[4]) {
  const __m256 both = _mm256_hadd_ps(_mm256_hadd_ps(v[0], v[1]), _mm256_hadd_ps(v[2], v[3]));
  _mm_storeu_ps(p, _mm_add_ps(_mm256_castps256_ps128(both), _mm256_extractf128_ps(both, 1)));
}

KEYSIFT_INLINE float highest(Vec v) {
  __m128 top = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  top = _mm_max_ps(top, _mm_movehl_ps(top, top));
  return _mm_cvtss_f32(_mm_max_ss(top, _mm_movehdup_ps(top)));
}
KEYSIFT_INLINE float total(Vec v) {
  __m128 sum = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
  return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
}

KEYSIFT_INLINE Vec widen(const float* p) { return load(p); }
KEYSIFT_INLINE Vec widen(const bfloat16* p) {
  const __m256i bits = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return _mm256_castsi256_ps(_mm256_slli_epi32(bits, 16));
}
KEYSIFT_INLINE Vec widen(const float16* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
KEYSIFT_INLINE Vec widen(const std::int8_t* p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}

KEYSIFT_INLINE void narrow(Vec v, float16* p) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

// Integers: a vector of kLanes pairs of int16, or of int32.
using Words = __m256i;

KEYSIFT_INLINE Words widen_bytes(const std::int8_t* p) {
  return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
// Bytes `at` and on, times 256, of p in the order of `zipped`.
KEYSIFT_INLINE Words zip_bytes(const std::int8_t* p, int at, int half) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + at));
  const __m128i order = half == 8 ? _mm_set_epi8(15, 7, 14, 6, 13, 5, 12, 4, 11, 3, 10, 2, 9, 1, 8, 0)
                                  : _mm_set_epi8(15, 11, 14, 10, 13, 9, 12, 8, 7, 3, 6, 2, 5, 1, 4, 0);
  return _mm256_slli_epi16(_mm256_cvtepi8_epi16(_mm_shuffle_epi8(bytes, order)), 8);
}
KEYSIFT_INLINE Words add_products(Words a, Words b, Words sum) {
  return _mm256_add_epi32(sum, _mm256_madd_epi16(a, b));
}
// a * b / 2^15, rounded
KEYSIFT_INLINE Words scale_down(Words a, Words b) { return _mm256_mulhrs_epi16(a, b); }

}  // namespace keysift::KEYSIFT_ISA

#include "simd_quad_f16c.h"
