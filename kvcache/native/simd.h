// Functions of the vectors of simd_<isa>.h.
#pragma once

namespace keysift::KEYSIFT_ISA {

typedef std::int32_t Int __attribute__((vector_size(sizeof(Vec))));

typedef std::uint16_t Half __attribute__((vector_size(sizeof(Vec) / 2)));

constexpr float kNothing = -__builtin_inff();

// 2^x for x <= 127, relative error 2e-7; exactly 0 below 2^-126; NaN stays NaN.
KEYSIFT_INLINE Vec exp2(Vec x) {
  x = maximum(splat(-127.0f), x);  // of a NaN and a number, the second operand is taken
  const Vec shifted = x + splat(0x1.8p23f);  // its low bits hold x, rounded
  const Vec rest = x - (shifted - splat(0x1.8p23f));
  Vec power = fma(splat(1.327647e-3f), rest, splat(9.675541e-3f));
  power = fma(power, rest, splat(5.550713e-2f));
  power = fma(power, rest, splat(2.402212e-1f));
  power = fma(power, rest, splat(6.931470e-1f));
  power = fma(power, rest, splat(1.0f));
  return power * (Vec)(((Int)shifted + 127) << 23);
}

// The logarithm of x >= 2^-126, absolute error 2e-7 besides rounding; NaN stays NaN.
KEYSIFT_INLINE Vec log2(Vec x) {
  const Int exponent = ((Int)x - 0x3f3504f3) >> 23;  // of the mantissa between sqrt(1/2) and sqrt(2)
  const Vec mantissa = (Vec)((Int)x - (exponent << 23));
  const Vec ratio = (mantissa - splat(1.0f)) / (mantissa + splat(1.0f)), square = ratio * ratio;
  Vec sum = fma(square, splat(3.205989e-1f), splat(4.121986e-1f));  // 2 / (n ln 2), n = 9, 7, 5, 3, 1
  sum = fma(square, sum, splat(5.770780e-1f));
  sum = fma(square, sum, splat(9.617967e-1f));
  sum = fma(square, sum, splat(2.885390f));
  return x == x ? fma(ratio, sum, __builtin_convertvector(exponent, Vec)) : x;
}

// The scores of positions in (after, last]; -inf elsewhere.
KEYSIFT_INLINE Vec only_between(Vec scores, const std::int32_t* positions, std::int32_t after, std::int32_t last) {
  Int where;
  __builtin_memcpy(&where, positions, sizeof where);
  return (where > after) & (where <= last) ? scores : splat(kNothing);
}

KEYSIFT_INLINE float rounded(float x, float) { return x; }
KEYSIFT_INLINE bfloat16 rounded(float x, bfloat16) { return to_bfloat16(x); }

KEYSIFT_INLINE void narrow(Vec v, float* p) { store(p, v); }
KEYSIFT_INLINE void narrow(Vec v, bfloat16* p) {
  const Int bits = (Int)v;
  const Int rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const Half half = __builtin_convertvector(v == v ? rounded : Int{} + 0x7fc0, Half);
  __builtin_memcpy(p, &half, sizeof half);
}

}  // namespace keysift::KEYSIFT_ISA
