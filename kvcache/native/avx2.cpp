#if defined(__x86_64__)

#include "includes.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

#define KEYSIFT_ISA avx2
#include "simd_avx2.h"
#include "kernels.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif

const keysift::Kernels keysift::kAvx2 = keysift::avx2::kTable;

#endif
