/* Inner loops of the CPU backend, one table per variant. Everything here works on one thread and on plain memory; the
 * files of cpu/ split the work. A result depends on its own inputs only, never on how much was computed beside it. */
#ifndef SKV_KERNELS_H
#define SKV_KERNELS_H

#include <stddef.h>
#include <stdint.h>

#include "../../backend.h"

/* The part of an attention result that comes from some slots: out = acc / sum. */
typedef struct skv_partial {
    float max; /* largest logit */
    float sum; /* Σ e^(logit − max) */
} skv_partial;

/* The first n slots of a page: keys and values [SKV_PAGE, stride] in the cache's type, with a scale for each if it has
 * some. */
typedef struct skv_page {
    const char *keys, *values;
    const char *next_keys, *next_values;    /* of the page that will be met next: fetched from memory meanwhile */
    const float *key_scales, *value_scales; /* [SKV_PAGE] */
    size_t n;
} skv_page;

enum { SKV_COLUMNS = 16 };   /* keys of a panel of products */
enum { SKV_QUERY_TILE = 6 }; /* that a page is met by at a time */

/* How a variant lays out and multiplies weights of one type. A matrix is panels of `panel` outputs, each [n_in] groups
 * of their weights for one input; a last panel is filled up with zeros. A row without functions is no type of weights.
 */
typedef struct skv_weight_type {
    size_t (*panel_bytes)(size_t n_in);

    /* Panel p of w->data ← source [n_out, n_in] of any dtype. */
    void (*pack)(const skv_matrix *w, size_t p, const void *source, skv_dtype type);

    /* x [n_in] ← the weights of one output. */
    void (*row)(const skv_matrix *w, size_t output, float *x);

    /* y[t, o] = bias[o] + Σ_k x[t, k] W[o, k] for the outputs of panels first … end−1, each sum along k in order.
     * x [n_tokens, n_in], or n_tokens results of `quantise`; y [n_tokens, n_out], bias [n_out] or NULL. */
    void (*linear)(const skv_matrix *w, size_t first, size_t end, const void *x, size_t n_tokens, const float *bias,
                   float *y);

    /* to [input_bytes(n_in)] ← x [n_in], a token's inputs as `linear` wants them; NULL where those are floats. */
    size_t (*input_bytes)(size_t n_in);
    void (*quantise)(const float *x, size_t n_in, void *to);

    /* Benchmarks: n rounds of what `linear` multiplies with, in registers; returns the multiply-accumulates. */
    double (*peak)(size_t n, float *sink);
} skv_weight_type;

typedef struct skv_kernels {
    const char *name;
    size_t panel; /* outputs */
    skv_weight_type weights[SKV_N_DTYPES];

    /* y = x / √(mean x² + eps) · w; all [n]. y may be x. */
    void (*rmsnorm)(const float *x, const float *w, float eps, size_t n, float *y);

    /* gate = gate / (1 + e^−gate) · up; both [n] */
    void (*silu_mul)(float *gate, const float *up, size_t n);

    /* x [n_heads, head_dim]: pairs (i, i + head_dim/2) turned by the angle with this cosine and sine [head_dim / 2] */
    void (*rope)(float *x, size_t n_heads, size_t head_dim, const float *cosine, const float *sine);

    /* out[i] = bf16[i] widened; n a multiple of 16 */
    void (*widen)(const uint16_t *bf16, size_t n, float *out);

    /* n_q ≤ SKV_QUERY_TILE queries against the slots of a page, by its type: q, acc [n_q, stride], parts [n_q]. The
     * stride is a multiple of 16, zero beyond head_dim. Keys are read beyond n up to a whole vector, whatever lies
     * there.
     */
    void (*attend[SKV_N_DTYPES])(const skv_page *page, size_t stride, const float *q, size_t n_q, float scale,
                                 skv_partial *parts, float *acc);

    /* (total, total_acc) ← both together; acc [stride] */
    void (*merge)(skv_partial *total, float *total_acc, skv_partial part, const float *acc, size_t stride);

    /* panel [stride, SKV_COLUMNS] ← n ≤ SKV_COLUMNS rows [n, stride] as its columns, zero beyond */
    void (*columns)(const float *rows, size_t stride, size_t n, float *panel);

    /* out[r, j] = rows[r] · column j of a panel [dim, SKV_COLUMNS] */
    void (*products)(const float *panel, const float *const *rows, size_t n, size_t dim, float *out);

    /* found[r] = whether one of products [n, SKV_COLUMNS] of row r exceeds `least` */
    void (*exceed)(const float *products, size_t n, float least, bool *found);

    /* out[j] = q · keys[j]; q [stride], keys [n, stride] */
    void (*inner)(const float *q, const float *keys, size_t n, size_t stride, float *out);

    /* unit = keys, each divided by its length + 1e−8; sum [stride] = Σ unit; keys, unit [n, stride] */
    void (*normalise)(const float *keys, size_t n, size_t stride, float *unit, float *sum);

    /* sum[j] += softmax(z)[j]; both [n] with room for 16 more; z becomes e^(z − max) */
    void (*add_softmax)(float *z, size_t n, float *sum);

    /* Benchmarks: a sum over n floats (read bandwidth) */
    float (*stream)(const float *x, size_t n);
} skv_kernels;

extern const skv_kernels skv_kernels_generic;
#if defined(__x86_64__)
extern const skv_kernels skv_kernels_avx2, skv_kernels_avx512, skv_kernels_avx512vnni, skv_kernels_avx512bf16;
#endif

#endif
