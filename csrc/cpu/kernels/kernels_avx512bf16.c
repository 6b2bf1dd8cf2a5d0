/* Compiled with the flags of AVX-512, -mavx512vnni and -mavx512bf16; entered only after the CPU has been asked
 * (device.c). */
#define SKV_AVX512
#define SKV_VNNI
#define SKV_DPBF16
#define VARIANT avx512bf16
#define KERNELS skv_kernels_avx512bf16
#include "kernels.inc.h"
