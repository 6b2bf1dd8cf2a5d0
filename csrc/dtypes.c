#include "dtypes.h"

#include <float.h>
#include <math.h>
#include <string.h>

static void copy_f32(const void *from, size_t n, float *to) { memcpy(to, from, n * sizeof *to); }

static void store_f32(const float *from, size_t n, void *to) { memcpy(to, from, n * sizeof *from); }

static void widen_bf16(const void *from, size_t n, float *to) {
    const uint16_t *halves = from;
    for (size_t i = 0; i < n; i++) {
        const uint32_t bits = (uint32_t)halves[i] << 16;
        memcpy(to + i, &bits, sizeof bits);
    }
}

static void narrow_bf16(const float *from, size_t n, void *to) { skv_narrow(from, n, to); }

/* 1 sign, 5 exponent, 10 mantissa bits; subnormals are scaled from an integer. */
static void widen_f16(const void *from, size_t n, float *to) {
    const uint16_t *halves = from;
    for (size_t i = 0; i < n; i++) {
        const uint32_t sign = (uint32_t)(halves[i] & 0x8000) << 16, exponent = (halves[i] >> 10) & 31;
        const uint32_t mantissa = halves[i] & 1023;
        if (exponent == 0) {
            const float value = (float)mantissa * 0x1p-24f;
            to[i] = sign ? -value : value;
            continue;
        }
        const uint32_t bits = sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | mantissa << 13;
        memcpy(to + i, &bits, sizeof bits);
    }
}

const skv_dtype_info skv_dtypes[SKV_N_DTYPES] = {
    [SKV_F32] = {"f32", 4, true, true, copy_f32, store_f32},
    [SKV_BF16] = {"bf16", 2, true, true, widen_bf16, narrow_bf16},
    [SKV_F16] = {"f16", 2, false, false, widen_f16, NULL},
    [SKV_Q8] = {"q8", 1, true, true, NULL, NULL},
    [SKV_BF16A16] = {"bf16a16", 2, true, false, NULL, NULL},
};

float skv_quantise(const float *x, size_t n, int8_t *q) {
    uint32_t most = 0; /* of the numbers without their signs: as integers they have the same order, NaN on top */
    for (size_t i = 0; i < n; i++) {
        uint32_t bits;
        memcpy(&bits, x + i, sizeof bits);
        bits &= 0x7fffffff;
        most = bits > most ? bits : most;
    }
    float scale;
    memcpy(&scale, &most, sizeof scale);
    scale /= 127;
    if (!(scale >= FLT_MIN && most < 0x7f800000)) { /* too small to divide by, or not finite */
        memset(q, 0, n);
        return most < 0x7f800000 ? 0 : NAN;
    }
    for (size_t i = 0; i < n; i++) q[i] = (int8_t)(x[i] / scale + 0x1.8p23f - 0x1.8p23f);
    return scale;
}

void skv_dequantise(const int8_t *q, float scale, size_t n, float *x) {
    for (size_t i = 0; i < n; i++) x[i] = scale * (float)q[i];
}
