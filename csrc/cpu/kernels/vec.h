/* A vector of VW floats with the same few operations in every CPU variant, so that each kernel is written once
 * (kernels.inc.h). The including file selects the variant with SKV_AVX512, SKV_AVX2 or neither (plain C). Fused
 * multiply-add where the CPU has it; plain C multiplies and adds, so results agree bit for bit within one variant, not
 * between variants. What is an integer, or a sum or a product of two floats, is the same in all. */
#ifndef SKV_VEC_H
#define SKV_VEC_H

#include <float.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))

/* Full unrolling keeps arrays of vectors in registers. */
#define UNROLL _Pragma("GCC unroll 16")

/* A loop over integers that gcc unrolls is one whose sums it then adds up in an order that no registers suffice for. */
#define ROLLED _Pragma("GCC unroll 1")

#if defined(SKV_AVX512)
#include <immintrin.h>
#define V(operation) _mm512_##operation
enum { VW = 16, MAX_TILE = 12 };
typedef __m512 vf;
typedef __m512i vi;
INLINE vi vi_load(const void *p) { return _mm512_loadu_si512(p); }
INLINE vi vi_and(vi a, vi b) { return _mm512_and_si512(a, b); }
INLINE vf v_round(vf a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
INLINE vf v_exp2i(vf n) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127)), 23));
}
INLINE vf v_widen(const uint16_t *p) {
    /* one operation, where to convert and to shift are two on a port of the multiply-adds */
    const __m512i from = _mm512_set_epi16(15, 0, 14, 0, 13, 0, 12, 0, 11, 0, 10, 0, 9, 0, 8, 0, 7, 0, 6, 0, 5, 0, 4, 0,
                                          3, 0, 2, 0, 1, 0, 0, 0);
    const __m512i words = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i *)p));
    return _mm512_castsi512_ps(_mm512_maskz_permutexvar_epi16(0xaaaaaaaa, from, words));
}
INLINE void v_halves(const int half, vf a, vf b, vf *first, vf *second) {
    if (half == 8)
        *first = _mm512_shuffle_f32x4(a, b, 0x44), *second = _mm512_shuffle_f32x4(a, b, 0xee);
    else if (half == 4)
        *first = _mm512_shuffle_f32x4(a, b, 0x88), *second = _mm512_shuffle_f32x4(a, b, 0xdd);
    else if (half == 2)
        *first = _mm512_shuffle_ps(a, b, 0x44), *second = _mm512_shuffle_ps(a, b, 0xee);
    else
        *first = _mm512_shuffle_ps(a, b, 0x88), *second = _mm512_shuffle_ps(a, b, 0xdd);
}
INLINE float v_first(vf a) { return _mm512_cvtss_f32(a); }
INLINE vf v_integers(const int8_t *p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p)));
}

#elif defined(SKV_AVX2)
#include <immintrin.h>
#define V(operation) _mm256_##operation
enum { VW = 8, MAX_TILE = 6 };
typedef __m256 vf;
typedef __m256i vi;
INLINE vi vi_load(const void *p) { return _mm256_loadu_si256(p); }
INLINE vi vi_and(vi a, vi b) { return _mm256_and_si256(a, b); }
INLINE vf v_round(vf a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
INLINE vf v_exp2i(vf n) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
}
INLINE vf v_widen(const uint16_t *p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p)), 16));
}
INLINE void v_halves(const int half, vf a, vf b, vf *first, vf *second) {
    if (half == 4)
        *first = _mm256_permute2f128_ps(a, b, 0x20), *second = _mm256_permute2f128_ps(a, b, 0x31);
    else if (half == 2)
        *first = _mm256_shuffle_ps(a, b, 0x44), *second = _mm256_shuffle_ps(a, b, 0xee);
    else
        *first = _mm256_shuffle_ps(a, b, 0x88), *second = _mm256_shuffle_ps(a, b, 0xdd);
}
INLINE float v_first(vf a) { return _mm256_cvtss_f32(a); }
INLINE vf v_integers(const int8_t *p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p)));
}

#else
/* The vectors of gcc and clang: 128 bits is what every 64-bit processor has. */
enum { VW = 4, MAX_TILE = 4 };
typedef float vf __attribute__((vector_size(16)));
typedef int32_t vi __attribute__((vector_size(16)));
typedef uint32_t vu __attribute__((vector_size(16)));
typedef int16_t vs __attribute__((vector_size(16)));
INLINE vi vi_load(const void *p) {
    vi a;
    memcpy(&a, p, sizeof a);
    return a;
}
INLINE vi vi_set(int32_t a) { return (vi){a, a, a, a}; }
INLINE vi vi_and(vi a, vi b) { return a & b; }
INLINE vi vi_add(vi a, vi b) { return a + b; }
INLINE vi vi_up(vi a) { return (vi)((vu)a << 16); }
INLINE vi vi_odd(vi a) { return (vi)((vu)a >> 8 & 0x00ff00ffu); }
INLINE vi vi_madd(vi a, vi b) { /* products that fit in 16 bits */
    const vi both = (vi)((vs)a * (vs)b);
    return (both << 16 >> 16) + (both >> 16);
}
INLINE vf v_convert(vi a) { return __builtin_convertvector(a, vf); }
INLINE vf v_load(const float *p) {
    vf a;
    memcpy(&a, p, sizeof a);
    return a;
}
INLINE void v_store(float *p, vf a) { memcpy(p, &a, sizeof a); }
INLINE vf v_set(float a) { return (vf){a, a, a, a}; }
INLINE vf v_add(vf a, vf b) { return a + b; }
INLINE vf v_sub(vf a, vf b) { return a - b; }
INLINE vf v_mul(vf a, vf b) { return a * b; }
INLINE vf v_div(vf a, vf b) { return a / b; }
INLINE vf v_pick(vi mask, vf a, vf b) { return (vf)((mask & (vi)a) | (~mask & (vi)b)); }
INLINE vf v_max(vf a, vf b) { return v_pick(a > b, a, b); }
INLINE vf v_min(vf a, vf b) { return v_pick(a < b, a, b); }
INLINE vf v_fma(vf a, vf b, vf c) { return a * b + c; }
INLINE vf v_round(vf a) { return a + 0x1.8p23f - 0x1.8p23f; } /* to nearest even, below 2^22 */
INLINE vf v_exp2i(vf n) { return (vf)((__builtin_convertvector(n, vi) + 127) << 23); }
INLINE vf v_widen(const uint16_t *p) { return (vf)((vu){p[0], p[1], p[2], p[3]} << 16); }
INLINE void v_halves(const int half, vf a, vf b, vf *first, vf *second) {
    if (half == 2)
        *first = (vf){a[0], a[1], b[0], b[1]}, *second = (vf){a[2], a[3], b[2], b[3]};
    else
        *first = (vf){a[0], a[2], b[0], b[2]}, *second = (vf){a[1], a[3], b[1], b[3]};
}
INLINE float v_first(vf a) { return a[0]; }
INLINE vf v_integers(const int8_t *p) { return __builtin_convertvector(((vi){p[0], p[1], p[2], p[3]}), vf); }
#endif

#ifdef V /* what both instruction sets name alike */
INLINE vf v_load(const float *p) { return V(loadu_ps)(p); }
INLINE void v_store(float *p, vf a) { V(storeu_ps)(p, a); }
INLINE vf v_set(float a) { return V(set1_ps)(a); }
INLINE vf v_add(vf a, vf b) { return V(add_ps)(a, b); }
INLINE vf v_sub(vf a, vf b) { return V(sub_ps)(a, b); }
INLINE vf v_mul(vf a, vf b) { return V(mul_ps)(a, b); }
INLINE vf v_div(vf a, vf b) { return V(div_ps)(a, b); }
INLINE vf v_max(vf a, vf b) { return V(max_ps)(a, b); }
INLINE vf v_min(vf a, vf b) { return V(min_ps)(a, b); }
INLINE vf v_fma(vf a, vf b, vf c) { return V(fmadd_ps)(a, b, c); }
INLINE vi vi_set(int32_t a) { return V(set1_epi32)(a); }
INLINE vi vi_add(vi a, vi b) { return V(add_epi32)(a, b); }
INLINE vi vi_up(vi a) { return V(slli_epi32)(a, 16); }
INLINE vi vi_odd(vi a) { return V(srli_epi16)(a, 8); }
INLINE vi vi_madd(vi a, vi b) { return V(madd_epi16)(a, b); }
INLINE vf v_convert(vi a) { return V(cvtepi32_ps)(a); }
#undef V
#endif

/* Two bf16 in each lane, the lower and the higher half → floats. */
INLINE void v_split(vi both, vf *low, vf *high) {
    *low = (vf)vi_up(both);
    *high = (vf)vi_and(both, vi_set((int32_t)0xffff0000));
}

/* sum + the products of two bf16 in each lane, the higher half first, each sum rounded: products are exact, so that all
 * variants agree where nothing is subnormal, which the instruction takes for 0. */
INLINE vf v_dot_bf16(vf sum, vf a, vf b) {
#if defined(SKV_DPBF16)
    return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
#else
    vf a_low, a_high, b_low, b_high;
    v_split((vi)a, &a_low, &a_high);
    v_split((vi)b, &b_low, &b_high);
    return v_fma(a_low, b_low, v_fma(a_high, b_high, sum));
#endif
}

/* v_dot(sum, bytes, four): every lane of sum + its four unsigned bytes, each times one of four factors, −127 … 127:
 * exactly. v_place(k): which byte of a lane meets factor k. */
#if defined(SKV_VNNI)
typedef int8_t v_factor;
typedef vi v_bytes;
INLINE size_t v_place(size_t k) { return k; }
INLINE v_bytes v_load_bytes(const uint8_t *p) { return vi_load(p); }
INLINE vi v_dot(vi sum, v_bytes bytes, const v_factor *four) {
    int32_t all;
    memcpy(&all, four, sizeof all);
    return _mm512_dpbusd_epi32(sum, bytes, vi_set(all));
}
#else
/* Widened to 16 bits once for all that they are multiplied with: two bytes' products may exceed 16 bits. */
typedef int16_t v_factor;
typedef struct v_bytes {
    vi even, odd;
} v_bytes;
INLINE size_t v_place(size_t k) { return k % 2 * 2 + k / 2; }
INLINE v_bytes v_load_bytes(const uint8_t *p) {
    const vi all = vi_load(p);
    return (v_bytes){vi_and(all, vi_set(0x00ff00ff)), vi_odd(all)};
}
INLINE vi v_dot(vi sum, v_bytes bytes, const v_factor *four) {
    int32_t first, second;
    memcpy(&first, four, sizeof first);
    memcpy(&second, four + 2, sizeof second);
    return vi_add(sum, vi_add(vi_madd(bytes.even, vi_set(first)), vi_madd(bytes.odd, vi_set(second))));
}
#endif

/* v_halves(half, a, b) sorts the lanes of two vectors that hold sums still to be added over 2·half lanes: lane i of
 * each such group goes to `first`, lane i + half, its partner, to `second`. */
INLINE vf v_fold(const int half, vf a, vf b) {
    vf first, second;
    v_halves(half, a, b, &first, &second);
    return v_add(first, second);
}

/* Sum of all lanes, always in the order of a halving tree: lane i + half is added to lane i. */
INLINE float v_sum(vf a) {
    if (VW > 8) a = v_fold(8, a, a);
    if (VW > 4) a = v_fold(4, a, a);
    a = v_fold(2, a, a);
    return v_first(v_fold(1, a, a));
}

/* Lane j = v_sum(a[j]), bit for bit. Folding pairs leaves the sums in the order of the index below. */
INLINE vf v_sums(const vf *a) {
    vf s[VW];
    UNROLL for (int j = 0; j < VW; j++) s[j % 4 * (VW / 4) + j / 4] = a[j];
    if (VW > 8) UNROLL for (int j = 0; j < 8; j++) s[j] = v_fold(8, s[2 * j], s[2 * j + 1]);
    if (VW > 4) UNROLL for (int j = 0; j < 4; j++) s[j] = v_fold(4, s[2 * j], s[2 * j + 1]);
    UNROLL for (int j = 0; j < 2; j++) s[j] = v_fold(2, s[2 * j], s[2 * j + 1]);
    return v_fold(1, s[0], s[1]);
}

/* VW vectors as the columns of a matrix in place of its rows: a[i] lane j ← a[j] lane i. As in v_sums, but both
 * halves of a pair go on: which half a vector is, level by level, spells its number. */
INLINE void v_transpose(vf *a) {
    vf s[VW], t[VW];
    UNROLL for (int j = 0; j < VW; j++) s[j % 4 * (VW / 4) + j / 4] = a[j];
    UNROLL for (int half = VW / 2; half; half /= 2) {
        const int pairs = half; /* in each of the VW / (2 half) sets */
        UNROLL for (int i = 0; i < VW / 2; i++) {
            const int set = i / pairs, j = i % pairs;
            v_halves(half, s[set * 2 * pairs + 2 * j], s[set * 2 * pairs + 2 * j + 1], t + 2 * set * pairs + j,
                     t + (2 * set + 1) * pairs + j);
        }
        UNROLL for (int j = 0; j < VW; j++) s[j] = t[j];
    }
    UNROLL for (int j = 0; j < VW; j++) a[j] = s[j];
}

/* Largest lane. */
INLINE float v_most(vf a) {
    vf b;
    for (int half = VW / 2; half; half /= 2) {
        v_halves(half, a, a, &a, &b);
        a = v_max(a, b);
    }
    return v_first(a);
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
