// Sums of products. A cell is 32 bits: one float, or two bfloat16 neighbours that one instruction multiplies and
// adds. All algorithms are written over cells and so do not know which of the two they use.
#pragma once

namespace keysift::KEYSIFT_ISA {

// Widens every element to a float.
template <class T>
struct Single {
  using Element = T;
  static constexpr int kPair = 1;  // elements of a cell

  static KEYSIFT_INLINE Vec cells(const T* p) { return widen(p); }
  static KEYSIFT_INLINE Vec bytes(const std::int8_t* p) { return widen(p); }
  static KEYSIFT_INLINE Quad four_cells(const T* p) { return widen_quad(p); }
  static KEYSIFT_INLINE Vec multiply_add(Vec a, Vec b, Vec sum) { return fma(a, b, sum); }
  static KEYSIFT_INLINE void store_weights(float* cells, int vector, Vec v) { store(cells + vector * kLanes, v); }
  // Cells of kPair tokens' values at the same channel: kPair vectors, channels in order.
  static KEYSIFT_INLINE void zip(const T* const* tokens, std::int64_t channel, Vec (&out)[1]) {
    out[0] = widen(tokens[0] + channel);
  }
};

template <class T>
struct ArithmeticOf {
  using type = Single<T>;
};

#if defined(KEYSIFT_HAS_BF16_DOT)
struct Pairs {
  using Element = bfloat16;
  static constexpr int kPair = 2;

  static KEYSIFT_INLINE Vec cells(const bfloat16* p) { return _mm512_loadu_ps(p); }
  // Exact: a byte has fewer digits than a bfloat16.
  static KEYSIFT_INLINE Vec bytes(const std::int8_t* p) {
    return (Vec)_mm512_cvtne2ps_pbh(widen(p + kLanes), widen(p));
  }
  static KEYSIFT_INLINE Quad four_cells(const bfloat16* p) { return load_quad(p); }
  static KEYSIFT_INLINE Vec multiply_add(Vec a, Vec b, Vec sum) {
    return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
  }
  static KEYSIFT_INLINE void store_weights(float* cells, int vector, Vec v) {
    const __m256i rounded = (__m256i)_mm512_cvtneps_pbh(v);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(cells + vector * (kLanes / 2)), rounded);
  }
  static KEYSIFT_INLINE void zip(const bfloat16* const* tokens, std::int64_t channel, Vec (&out)[2]) {
    const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    // In 16-bit indices 0, 32, 1, 33, ...: channel i of the first token, then of the second.
    const __m512i low = _mm512_or_si512(lane, _mm512_slli_epi32(_mm512_add_epi32(lane, _mm512_set1_epi32(32)), 16));
    const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    const __m512i a = _mm512_loadu_si512(tokens[0] + channel), b = _mm512_loadu_si512(tokens[1] + channel);
    out[0] = _mm512_castsi512_ps(_mm512_permutex2var_epi16(a, low, b));
    out[1] = _mm512_castsi512_ps(_mm512_permutex2var_epi16(a, high, b));
  }
};

template <>
struct ArithmeticOf<bfloat16> {
  using type = Pairs;
};
#endif

}  // namespace keysift::KEYSIFT_ISA
