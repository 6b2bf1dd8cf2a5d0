/* SplitMix64: what is random depends on a seed and on what it is for, never on how often it was asked. */
#ifndef SKV_RANDOM_H
#define SKV_RANDOM_H

#include <stdint.h>

#ifdef __CUDACC__ /* on a device, too, where the noise of the CPU is drawn again, bit for bit */
#define SKV_EVERYWHERE __host__ __device__
#else
#define SKV_EVERYWHERE
#endif

/* The output function, one step from state x. */
SKV_EVERYWHERE static inline uint64_t skv_splitmix64(uint64_t x) {
    x += 0x9E3779B97F4A7C15u;
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
    return x ^ (x >> 31);
}

#endif
