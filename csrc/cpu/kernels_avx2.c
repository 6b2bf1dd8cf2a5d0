/* Compiled with -mavx2 -mfma -mf16c; entered only after the CPU has been asked (cpu.c). */
#define SKV_AVX2
#define VARIANT avx2
#define KERNELS skv_kernels_avx2
#include "kernels.inc.h"
