/* The kernels of one CPU variant, on the vectors of vec.h. The including file defines KERNELS, the name of its table,
 * and VARIANT. */
#include "kernels.h"
#include "vec.h"

enum { PANEL = 2 * VW };

INLINE size_t least(size_t a, size_t b) { return a < b ? a : b; }

/* Steps along the inputs of a matrix, each of one input but of bf16a16 two, and their bytes for one output. */
INLINE size_t steps(const skv_dtype type, size_t n_in) { return type == SKV_BF16A16 ? (n_in + 1) / 2 : n_in; }

INLINE size_t step_bytes(const skv_dtype type) { return type == SKV_BF16 ? 2 : 4; }

/* T tokens × P panels: acc[t, o] (+)= Σ_k x[t, k] w[k, o] along n_k steps, in order. `stride` is the distance
 * between panels in bytes; a step of bf16a16 has two inputs, in x as well. */
INLINE void tile(const int T, const int P, const skv_dtype type, const char *w, size_t stride, size_t n_k,
                 const float *x, size_t ld_x, float *y, size_t ld_y, int resume) {
    vf acc[MAX_TILE > 8 ? 2 * MAX_TILE : 16];
    UNROLL for (int t = 0; t < T; t++) {
        UNROLL for (int p = 0; p < 2 * P; p++) acc[t * 2 * P + p] =
            resume ? v_load(y + (size_t)t * ld_y + (size_t)p * VW) : v_set(0);
    }
    for (size_t k = 0; k < n_k; k++) {
        UNROLL for (int p = 0; p < P; p++) {
            vf low, high;
            if (type != SKV_BF16) {
                const float *row = (const float *)(const void *)(w + (size_t)p * stride) + k * PANEL;
                low = v_load(row), high = v_load(row + VW);
            } else {
                const uint16_t *row = (const uint16_t *)(const void *)(w + (size_t)p * stride) + k * PANEL;
                if (T > 1)
                    __builtin_prefetch(row +
                                       1024); /* a lone token reads fast enough for the CPU to see the stream itself */
                v_split(vi_load(row), &low, &high);
            }
            UNROLL for (int t = 0; t < T; t++) {
                const vf broadcast = v_set(x[(size_t)t * ld_x + k]);
                vf *sum = acc + (t * P + p) * 2;
                sum[0] = type == SKV_BF16A16 ? v_dot_bf16(sum[0], broadcast, low) : v_fma(broadcast, low, sum[0]);
                sum[1] = type == SKV_BF16A16 ? v_dot_bf16(sum[1], broadcast, high) : v_fma(broadcast, high, sum[1]);
            }
        }
    }
    UNROLL for (int t = 0; t < T; t++) {
        UNROLL for (int p = 0; p < 2 * P; p++) v_store(y + (size_t)t * ld_y + (size_t)p * VW, acc[t * 2 * P + p]);
    }
}

/* Picks the tile for n ≤ MAX_TILE tokens and returns how many panels it took, of n_panels: a single token needs four
 * to fill the multiply-add pipes. Every tile sums in the same order. */
INLINE size_t tiles(const skv_dtype type, size_t n, size_t n_panels, const char *w, size_t stride, size_t n_k,
                    const float *x, size_t ld_x, float *y, size_t ld_y, int resume) {
    if (n == 1 && n_panels >= 4) {
        tile(1, 4, type, w, stride, n_k, x, ld_x, y, ld_y, resume);
        return 4;
    }
#define CASE(T)                                                                                                        \
    case T:                                                                                                            \
        if (T <= MAX_TILE) tile(T, 1, type, w, stride, n_k, x, ld_x, y, ld_y, resume);                                 \
        break
    switch (n) {
        CASE(1);
        CASE(2);
        CASE(3);
        CASE(4);
        CASE(5);
        CASE(6);
#if defined(SKV_AVX512)
        CASE(7);
        CASE(8);
        CASE(9);
        CASE(10);
        CASE(11);
        CASE(12);
#endif
    default:
        break;
    }
#undef CASE
    return 1;
}

/* A group of panels meets all tokens of a block before the next one, so weights are read from memory in order, once for
 * each block of tokens. Blocks of inputs keep the group in the second-level cache and a tile's part of x in the first:
 * a sum is stored and resumed between blocks, which changes no bit of it. The last panel of a matrix may be narrower:
 * it is computed in a buffer of full width. */
enum { GROUP = 4, BLOCK_K = 512, BLOCK_T = 96 };

INLINE void linear(const skv_dtype type, const skv_matrix *m, size_t first, size_t end, const float *x, size_t n_tokens,
                   const float *bias, float *y) {
    const size_t n_in = steps(type, (size_t)m->n_in), n_out = (size_t)m->n_out, step = PANEL * step_bytes(type);
    const size_t block_k = n_tokens > MAX_TILE ? BLOCK_K : n_in;
    float edge[BLOCK_T * PANEL];
    for (size_t t0 = 0; t0 < n_tokens; t0 += BLOCK_T) {
        const size_t n_t = least(n_tokens - t0, BLOCK_T);
        for (size_t p0 = first, n_p; p0 < end; p0 += n_p) {
            const size_t full = n_out / PANEL - p0; /* panels of full width from here on */
            float *out = full ? y + t0 * n_out + p0 * PANEL : edge;
            const size_t ld_y = full ? n_out : PANEL;
            n_p = full ? least(least(full, end - p0), GROUP) : 1;
            for (size_t k0 = 0; k0 < n_in; k0 += block_k)
                for (size_t t = 0; t < n_t; t += MAX_TILE)
                    for (size_t p = 0; p < n_p;) {
                        const char *w = (const char *)m->data + ((p0 + p) * n_in + k0) * step;
                        const float *in = x + (t0 + t) * n_in + k0;
                        const size_t n = least(n_t - t, MAX_TILE), n_k = least(n_in - k0, block_k);
                        float *to = out + t * ld_y + p * PANEL;
                        p += tiles(type, n, n_p - p, w, n_in * step, n_k, in, n_in, to, ld_y, k0 > 0);
                    }
            if (full) continue;
            for (size_t t = 0; t < n_t; t++)
                memcpy(y + (t0 + t) * n_out + p0 * PANEL, edge + t * PANEL, (n_out - p0 * PANEL) * sizeof *y);
        }
    }
    if (!bias) return;
    const size_t last = end * PANEL < n_out ? end * PANEL : n_out;
    for (size_t t = 0; t < n_tokens; t++)
        for (size_t o = first * PANEL; o < last; o++) y[t * n_out + o] += bias[o];
}

/* Where weight k of output o of a panel stands. f32 weights are in order of output; bf16 as pairs (o, o + VW), which
 * are split; of bf16a16 an output's for two inputs lie side by side. */
INLINE size_t place(const skv_dtype type, size_t o, size_t k) {
    if (type == SKV_BF16A16) return k / 2 * 2 * PANEL + 2 * o + k % 2;
    return k * PANEL + (type == SKV_F32 ? o : o < VW ? 2 * o : 2 * (o - VW) + 1);
}

INLINE char *panel_of(const skv_dtype type, const skv_matrix *m, size_t p) {
    return (char *)m->data + p * steps(type, (size_t)m->n_in) * PANEL * step_bytes(type);
}

INLINE void pack(const skv_dtype type, const skv_matrix *m, size_t p, const void *source, skv_dtype stored) {
    enum { BLOCK = 64 }; /* inputs at a time: both sides stay in the first-level cache */
    const size_t n_in = (size_t)m->n_in, size = skv_dtypes[stored].size;
    char *panel = panel_of(type, m, p);
    float values[BLOCK];
    uint16_t halves[BLOCK];
    for (size_t k0 = 0; k0 < n_in; k0 += BLOCK)
        for (size_t o = 0; o < least((size_t)m->n_out - p * PANEL, PANEL); o++) {
            const char *from = (const char *)source + ((p * PANEL + o) * n_in + k0) * size;
            const size_t n = least(n_in - k0, BLOCK);
            if (type != SKV_F32 && stored == SKV_BF16) {
                memcpy(halves, from, n * sizeof *halves);
            } else {
                skv_dtypes[stored].widen(from, n, values);
                if (type != SKV_F32) skv_narrow(values, n, halves);
            }
            for (size_t k = 0; k < n; k++) {
                if (type == SKV_F32)
                    ((float *)(void *)panel)[place(type, o, k0 + k)] = values[k];
                else
                    ((uint16_t *)(void *)panel)[place(type, o, k0 + k)] = halves[k];
            }
        }
}

INLINE void row(const skv_dtype type, const skv_matrix *m, size_t output, float *x) {
    const char *panel = panel_of(type, m, output / PANEL);
    for (size_t k = 0; k < (size_t)m->n_in; k++) {
        const size_t at = place(type, output % PANEL, k);
        if (type == SKV_F32)
            x[k] = ((const float *)(const void *)panel)[at];
        else
            skv_dtypes[SKV_BF16].widen(panel + 2 * at, 1, x + k);
    }
}

#define WEIGHT_TYPE(name, type)                                                                                        \
    static size_t panel_bytes_##name(size_t n_in) { return steps(type, n_in) * PANEL * step_bytes(type); }             \
    static void pack_##name(const skv_matrix *w, size_t p, const void *source, skv_dtype stored) {                     \
        pack(type, w, p, source, stored);                                                                              \
    }                                                                                                                  \
    static void row_##name(const skv_matrix *w, size_t output, float *x) { row(type, w, output, x); }                  \
    static void linear_##name(const skv_matrix *w, size_t first, size_t end, const void *x, size_t n_tokens,           \
                              const float *bias, float *y) {                                                           \
        linear(type, w, first, end, x, n_tokens, bias, y);                                                             \
    }
WEIGHT_TYPE(f32, SKV_F32)
WEIGHT_TYPE(bf16, SKV_BF16)
WEIGHT_TYPE(bf16a16, SKV_BF16A16)

static size_t input_bytes_bf16a16(size_t n_in) { return steps(SKV_BF16A16, n_in) * 2 * sizeof(uint16_t); }

static void quantise_bf16a16(const float *x, size_t n_in, void *to) {
    uint16_t *halves = to;
    skv_narrow(x, n_in, halves);
    if (n_in % 2) halves[n_in] = 0;
}

/* Loads n < VW values, zero beyond. */
INLINE vf load_some(const float *p, size_t n) {
    float lane[VW] = {0};
    memcpy(lane, p, n * sizeof *p);
    return v_load(lane);
}

static void rmsnorm(const float *x, const float *w, float eps, size_t n, float *y) {
    vf squares = v_set(0);
    size_t i = 0;
    for (; i + VW <= n; i += VW) squares = v_fma(v_load(x + i), v_load(x + i), squares);
    if (i < n) {
        const vf rest = load_some(x + i, n - i);
        squares = v_fma(rest, rest, squares);
    }
    const float scale = 1.0f / sqrtf(v_sum(squares) / (float)n + eps);
    for (i = 0; i < n; i++) y[i] = x[i] * scale * w[i];
}

INLINE vf silu(vf x) { return v_div(x, v_add(v_set(1), v_exp(v_sub(v_set(0), x)))); }

static void silu_mul(float *gate, const float *up, size_t n) {
    size_t i = 0;
    for (; i + VW <= n; i += VW) v_store(gate + i, v_mul(silu(v_load(gate + i)), v_load(up + i)));
    if (i < n) {
        float lane[VW];
        v_store(lane, v_mul(silu(load_some(gate + i, n - i)), load_some(up + i, n - i)));
        memcpy(gate + i, lane, (n - i) * sizeof *gate);
    }
}

static void rope(float *x, size_t n_heads, size_t head_dim, const float *cosine, const float *sine) {
    const size_t half = head_dim / 2;
    for (size_t h = 0; h < n_heads; h++, x += head_dim)
        for (size_t i = 0; i < half; i++) {
            const float a = x[i], b = x[i + half];
            x[i] = a * cosine[i] - b * sine[i];
            x[i + half] = b * cosine[i] + a * sine[i];
        }
}

static void widen(const uint16_t *bf16, size_t n, float *out) {
    for (size_t i = 0; i < n; i += VW) v_store(out + i, v_widen(bf16 + i));
}

static void merge(skv_partial *total, float *total_acc, skv_partial part, const float *acc, size_t stride) {
    if (total->sum == 0) { /* nothing yet */
        *total = part;
        memcpy(total_acc, acc, stride * sizeof *acc);
        return;
    }
    const float max = total->max > part.max ? total->max : part.max;
    const vf old = v_exp(v_set(total->max - max)), new = v_exp(v_set(part.max - max));
    total->max = max;
    total->sum = total->sum * v_first(old) + part.sum * v_first(new);
    for (size_t i = 0; i < stride; i += VW)
        v_store(total_acc + i, v_fma(v_load(acc + i), new, v_mul(v_load(total_acc + i), old)));
}

static float stream(const float *x, size_t n) {
    vf acc[8];
    UNROLL for (int c = 0; c < 8; c++) acc[c] = v_set(0);
    for (size_t i = 0; i + 8 * VW <= n; i += 8 * VW) {
        UNROLL for (int c = 0; c < 8; c++) acc[c] = v_add(acc[c], v_load(x + i + c * VW));
    }
    float sum = 0;
    for (int c = 0; c < 8; c++) sum += v_sum(acc[c]);
    return sum;
}

/* `products` of them in each lane */
#define PEAK(name, products, add)                                                                                      \
    static double peak_##name(size_t n, float *sink) {                                                                 \
        vf sum[12];                                                                                                    \
        UNROLL for (int c = 0; c < 12; c++) sum[c] = v_set((float)c);                                                  \
        const vf a = v_set(0.999f), b = v_set(1e-3f);                                                                  \
        for (size_t i = 0; i < n; i++) {                                                                               \
            UNROLL for (int c = 0; c < 12; c++) sum[c] = add;                                                          \
        }                                                                                                              \
        for (int c = 0; c < 12; c++) *sink += v_sum(sum[c]);                                                           \
        return 12.0 * products * VW * (double)n;                                                                       \
    }
PEAK(f32, 1, v_fma(sum[c], a, b))
PEAK(bf16a16, 2, v_dot_bf16(sum[c], a, b))

#include "attend.inc.h"
#include "q8.inc.h"
#include "score.inc.h"

#define STRING(x) #x
#define NAME(x) STRING(x)
const skv_kernels KERNELS = {
    .name = NAME(VARIANT),
    .panel = PANEL,
    .weights = {[SKV_F32] = {panel_bytes_f32, pack_f32, row_f32, linear_f32, NULL, NULL, peak_f32},
                [SKV_BF16] = {panel_bytes_bf16, pack_bf16, row_bf16, linear_bf16, NULL, NULL, peak_f32},
                [SKV_Q8] = {panel_bytes_q8, pack_q8, row_q8, linear_q8, input_bytes_q8, quantise_q8, peak_q8},
                [SKV_BF16A16] = {panel_bytes_bf16a16, pack_bf16a16, row_bf16a16, linear_bf16a16, input_bytes_bf16a16,
                                 quantise_bf16a16, peak_bf16a16}},
    .rmsnorm = rmsnorm,
    .silu_mul = silu_mul,
    .rope = rope,
    .widen = widen,
    .attend = {[SKV_F32] = attend_f32, [SKV_BF16] = attend_bf16, [SKV_Q8] = attend_q8},
    .merge = merge,
    .columns = columns,
    .products = products,
    .exceed = exceed,
    .inner = inner,
    .normalise = normalise,
    .add_softmax = add_softmax,
    .stream = stream,
};
