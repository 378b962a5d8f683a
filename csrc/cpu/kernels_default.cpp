// The kernels for any processor: 16-byte vectors (SSE2 on x86-64, NEON on 64-bit Arm).
#include "kernels.h"
#include "pack_kernels.h"

#define D2_DEFORM_ISA isa_default
#define D2_DEFORM_VECTOR_BYTES 16
#define D2_DEFORM_GEMM_ROWS 4
#include "kernels_impl.h"
#include "pack_kernels_impl.h"
