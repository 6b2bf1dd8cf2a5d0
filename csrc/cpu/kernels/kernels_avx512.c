/* Compiled with -mavx512f -mavx512bw -mavx512vl -mavx512dq; entered only after the CPU has been asked (device.c). */
#define SKV_AVX512
#define VARIANT avx512
#define KERNELS skv_kernels_avx512
#include "kernels.inc.h"
