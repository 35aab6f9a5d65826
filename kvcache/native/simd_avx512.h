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
KEYSIFT_INLINE Vec widen(const std::int8_t* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}

KEYSIFT_INLINE void narrow(Vec v, float16* p) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

// Integers: a vector of kLanes pairs of int16, or of int32.
using Words = __m512i;

KEYSIFT_INLINE Words widen_bytes(const std::int8_t* p) {
  return _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
// Bytes `at` and on, times 256, of p in the order of `zipped`.
KEYSIFT_INLINE Words zip_bytes(const std::int8_t* p, int at, int half) {
  const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + at));
  const __m128i order = half == 8 ? _mm_set_epi8(15, 7, 14, 6, 13, 5, 12, 4, 11, 3, 10, 2, 9, 1, 8, 0)
                                  : _mm_set_epi8(15, 11, 14, 10, 13, 9, 12, 8, 7, 3, 6, 2, 5, 1, 4, 0);
  return _mm512_slli_epi16(_mm512_cvtepi8_epi16(_mm256_shuffle_epi8(bytes, _mm256_broadcastsi128_si256(order))), 8);
}
KEYSIFT_INLINE Words add_products(Words a, Words b, Words sum) {
#if defined(KEYSIFT_HAS_INT_DOT)
  return _mm512_dpwssd_epi32(sum, a, b);
#else
  return _mm512_add_epi32(sum, _mm512_madd_epi16(a, b));
#endif
}
// a * b / 2^15, rounded
KEYSIFT_INLINE Words scale_down(Words a, Words b) { return _mm512_mulhrs_epi16(a, b); }

}  // namespace keysift::KEYSIFT_ISA

#include "simd_quad_f16c.h"
