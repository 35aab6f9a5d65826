// Four floats at a time, for transposing keys.
#pragma once

namespace keysift::KEYSIFT_ISA {

KEYSIFT_INLINE Quad load_quad(const void* p) { return _mm_loadu_ps(static_cast<const float*>(p)); }
KEYSIFT_INLINE void store_quad(float* p, Quad v) { _mm_storeu_ps(p, v); }
KEYSIFT_INLINE Quad widen_quad(const float* p) { return load_quad(p); }
KEYSIFT_INLINE Quad widen_quad(const bfloat16* p) {
  const __m128i bits = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  return _mm_castsi128_ps(_mm_unpacklo_epi16(_mm_setzero_si128(), bits));
}
KEYSIFT_INLINE Quad widen_quad(const float16* p) {
  return _mm_cvtph_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
}
KEYSIFT_INLINE void transpose(Quad (&rows)[4]) { _MM_TRANSPOSE4_PS(rows[0], rows[1], rows[2], rows[3]); }

}  // namespace keysift::KEYSIFT_ISA
