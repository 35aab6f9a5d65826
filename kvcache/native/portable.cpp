#include "includes.h"

#define KEYSIFT_ISA portable
#include "simd_portable.h"
#include "kernels.h"

const keysift::Kernels keysift::kPortable = keysift::portable::kTable;
