/* Element types, one row each: of stored tensors, of packed weights, of keys and values. bf16a16 is a type of weights:
 * bf16 that meet activations rounded to bf16, too. */
#ifndef SKV_DTYPES_H
#define SKV_DTYPES_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

typedef enum skv_dtype { SKV_F32, SKV_BF16, SKV_F16, SKV_Q8, SKV_BF16A16, SKV_N_DTYPES } skv_dtype;

typedef struct skv_dtype_info {
    const char *name;
    size_t size;                                           /* bytes of one value */
    bool of_weights, of_cache;                             /* whether matrices, keys and values may have it */
    void (*widen)(const void *from, size_t n, float *to);  /* exact; NULL where no tensor is stored so */
    void (*narrow)(const float *from, size_t n, void *to); /* to nearest even; NULL where nothing is stored so */
} skv_dtype_info;

extern const skv_dtype_info skv_dtypes[SKV_N_DTYPES];

/* bf16 ← the nearest to each float, ties to even; NaN stays NaN. Inline and without a branch: a CPU variant that
 * includes it has it over its own vectors. */
static inline void skv_narrow(const float *from, size_t n, uint16_t *bf16) {
    for (size_t i = 0; i < n; i++) {
        uint32_t bits;
        memcpy(&bits, from + i, sizeof bits);
        const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16, nan = bits >> 16 | 64;
        bf16[i] = (uint16_t)((bits & 0x7fffffff) > 0x7f800000 ? nan : rounded);
    }
}

/* q8: q [n] ← x / scale to nearest even; returns scale = largest |x| / 127, NaN where one is not finite. */
float skv_quantise(const float *x, size_t n, int8_t *q);

/* x [n] ← scale · q */
void skv_dequantise(const int8_t *q, float scale, size_t n, float *x);

/* What a device reaches in a second. */
typedef struct skv_limits {
    double bytes;       /* read from memory */
    double macs;        /* multiply-accumulates of float32 */
    double weight_macs; /* of the type of the weights */
} skv_limits;

#endif
