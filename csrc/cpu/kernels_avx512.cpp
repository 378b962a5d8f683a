// The kernels for x86-64 processors with AVX-512 (F, BW, DQ, VL).
#include "kernels.h"
#include "pack_kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>

// To the end of the file: templates are compiled there, for the set that is in force at that point.
#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
#endif
#define D2_DEFORM_ISA isa_avx512
#define D2_DEFORM_VECTOR_BYTES 64
#define D2_DEFORM_GEMM_ROWS 12
#include "kernels_impl.h"
#include "pack_kernels_impl.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
