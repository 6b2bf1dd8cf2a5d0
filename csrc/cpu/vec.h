/* A vector of VW floats with the same few operations in every CPU variant, so that each kernel is written once (kernels.inc.h).
 * The including file selects the variant with SKV_AVX512, SKV_AVX2 or neither (plain C). Fused multiply-add where the CPU has it;
 * plain C multiplies and adds, so results agree bit for bit within one variant, not between variants. */
#ifndef SKV_VEC_H
#define SKV_VEC_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))

#if defined(SKV_AVX512)
#include <immintrin.h>
enum { VW = 16, MAX_TILE = 12 };
typedef __m512 vf;
INLINE vf v_load(const float *p) { return _mm512_loadu_ps(p); }
INLINE void v_store(float *p, vf a) { _mm512_storeu_ps(p, a); }
INLINE vf v_set(float a) { return _mm512_set1_ps(a); }
INLINE vf v_add(vf a, vf b) { return _mm512_add_ps(a, b); }
INLINE vf v_sub(vf a, vf b) { return _mm512_sub_ps(a, b); }
INLINE vf v_mul(vf a, vf b) { return _mm512_mul_ps(a, b); }
INLINE vf v_div(vf a, vf b) { return _mm512_div_ps(a, b); }
INLINE vf v_max(vf a, vf b) { return _mm512_max_ps(a, b); }
INLINE vf v_min(vf a, vf b) { return _mm512_min_ps(a, b); }
INLINE vf v_fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
INLINE vf v_round(vf a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
INLINE vf v_exp2i(vf n) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127)), 23));
}
/* 2·VW bf16 values stored as pairs (i, i + VW) → lanes 0 … VW−1 and VW … 2·VW−1 */
INLINE void v_widen_pairs(const uint16_t *p, vf *low, vf *high) {
    const __m512i both = _mm512_loadu_si512(p);
    *low = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
    *high = _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32((int)0xffff0000)));
}
INLINE vf v_widen(const uint16_t *p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)), 16));
}

#elif defined(SKV_AVX2)
#include <immintrin.h>
enum { VW = 8, MAX_TILE = 6 };
typedef __m256 vf;
INLINE vf v_load(const float *p) { return _mm256_loadu_ps(p); }
INLINE void v_store(float *p, vf a) { _mm256_storeu_ps(p, a); }
INLINE vf v_set(float a) { return _mm256_set1_ps(a); }
INLINE vf v_add(vf a, vf b) { return _mm256_add_ps(a, b); }
INLINE vf v_sub(vf a, vf b) { return _mm256_sub_ps(a, b); }
INLINE vf v_mul(vf a, vf b) { return _mm256_mul_ps(a, b); }
INLINE vf v_div(vf a, vf b) { return _mm256_div_ps(a, b); }
INLINE vf v_max(vf a, vf b) { return _mm256_max_ps(a, b); }
INLINE vf v_min(vf a, vf b) { return _mm256_min_ps(a, b); }
INLINE vf v_fma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
INLINE vf v_round(vf a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
INLINE vf v_exp2i(vf n) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
}
INLINE void v_widen_pairs(const uint16_t *p, vf *low, vf *high) {
    const __m256i both = _mm256_loadu_si256((const __m256i *)p);
    *low = _mm256_castsi256_ps(_mm256_slli_epi32(both, 16));
    *high = _mm256_castsi256_ps(_mm256_and_si256(both, _mm256_set1_epi32((int)0xffff0000)));
}
INLINE vf v_widen(const uint16_t *p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p)), 16));
}

#else
enum { VW = 8, MAX_TILE = 4 };
typedef struct vf {
    float lane[VW];
} vf;
#define EACH(expression)                          \
    vf out;                                       \
    for (int i = 0; i < VW; i++) out.lane[i] = (expression); \
    return out
INLINE vf v_load(const float *p) { EACH(p[i]); }
INLINE void v_store(float *p, vf a) { memcpy(p, a.lane, sizeof a.lane); }
INLINE vf v_set(float a) { EACH(a); }
INLINE vf v_add(vf a, vf b) { EACH(a.lane[i] + b.lane[i]); }
INLINE vf v_sub(vf a, vf b) { EACH(a.lane[i] - b.lane[i]); }
INLINE vf v_mul(vf a, vf b) { EACH(a.lane[i] * b.lane[i]); }
INLINE vf v_div(vf a, vf b) { EACH(a.lane[i] / b.lane[i]); }
INLINE vf v_max(vf a, vf b) { EACH(a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]); }
INLINE vf v_min(vf a, vf b) { EACH(a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i]); }
INLINE vf v_fma(vf a, vf b, vf c) { EACH(a.lane[i] * b.lane[i] + c.lane[i]); }
INLINE vf v_round(vf a) { EACH(rintf(a.lane[i])); }
INLINE float bits_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}
INLINE vf v_exp2i(vf n) { EACH(bits_float((uint32_t)((int32_t)n.lane[i] + 127) << 23)); }
INLINE vf v_widen(const uint16_t *p) { EACH(bits_float((uint32_t)p[i] << 16)); }
INLINE void v_widen_pairs(const uint16_t *p, vf *low, vf *high) {
    for (int i = 0; i < VW; i++) {
        low->lane[i] = bits_float((uint32_t)p[2 * i] << 16);
        high->lane[i] = bits_float((uint32_t)p[2 * i + 1] << 16);
    }
}
#undef EACH
#endif

/* Sum of all lanes, always in the order of a halving tree. */
INLINE float v_sum(vf a) {
    float lane[VW];
    v_store(lane, a);
    for (int half = VW / 2; half; half /= 2)
        for (int i = 0; i < half; i++) lane[i] += lane[i + half];
    return lane[0];
}

/* e^x to about 1 ulp for x in [−87, 88], clamped outside: x = n·ln 2 + r, e^r by a polynomial of degree 6. */
INLINE vf v_exp(vf x) {
    x = v_min(v_max(x, v_set(-87.0f)), v_set(88.0f));
    const vf n = v_round(v_mul(x, v_set(1.44269504088896341f)));
    vf r = v_fma(n, v_set(-0.693359375f), x);
    r = v_fma(n, v_set(2.12194440e-4f), r);
    vf p = v_set(1.9875691500e-4f);
    p = v_fma(p, r, v_set(1.3981999507e-3f));
    p = v_fma(p, r, v_set(8.3334519073e-3f));
    p = v_fma(p, r, v_set(4.1665795894e-2f));
    p = v_fma(p, r, v_set(1.6666665459e-1f));
    p = v_fma(p, r, v_set(5.0000001201e-1f));
    p = v_add(v_fma(p, v_mul(r, r), r), v_set(1.0f));
    return v_mul(p, v_exp2i(n));
}

#endif
