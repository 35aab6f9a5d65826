#if defined(__x86_64__)

#include "includes.h"

#if defined(__clang__)
#pragma clang attribute push(                                                                              \
    __attribute__((target("avx512bf16,avx512vnni,avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c"))), \
    apply_to = function)
#else
#pragma GCC target("avx512bf16,avx512vnni,avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")
#endif

#define KEYSIFT_ISA avx512bf16
#define KEYSIFT_HAS_BF16_DOT
#define KEYSIFT_HAS_INT_DOT
#include "simd_avx512.h"
#include "kernels.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif

const keysift::Kernels keysift::kAvx512Bf16 = keysift::avx512bf16::kTable;

#endif
