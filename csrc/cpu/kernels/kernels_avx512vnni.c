/* Compiled with the flags of AVX-512 and -mavx512vnni; entered only after the CPU has been asked (device.c). */
#define SKV_AVX512
#define SKV_VNNI
#define VARIANT avx512vnni
#define KERNELS skv_kernels_avx512vnni
#include "kernels.inc.h"
