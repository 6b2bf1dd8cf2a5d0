/* Compiled with -mavx2 -mfma; entered only after the CPU has been asked (device.c). */
#define SKV_AVX2
#define VARIANT avx2
#define KERNELS skv_kernels_avx2
#include "kernels.inc.h"
