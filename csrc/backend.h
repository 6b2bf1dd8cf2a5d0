/* The table of operations that a backend fills. Each op is given as formula and shapes; the CPU's (cpu/) are the specification.
 * All activations are float32, row-major. */
#ifndef SKV_BACKEND_H
#define SKV_BACKEND_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "config.h"
#include "heap.h"

enum { SKV_PAGE = 64 }; /* slots of a page */

/* A weight matrix [n_out, n_in] in the backend's own layout. */
typedef struct skv_matrix {
    int32_t n_out, n_in;
    skv_dtype type;
    void *data;
} skv_matrix;

/* The slots of one (row, layer, KV head): slot i is entry i % SKV_PAGE of pages[i / SKV_PAGE]. A page holds keys [SKV_PAGE, stride], values
 * [SKV_PAGE, stride] in the cache's type, positions [SKV_PAGE] int32 and, with sums, attention received [SKV_PAGE] float; stride is
 * head_dim rounded up to 16, zero beyond head_dim. */
typedef struct skv_head {
    char **pages;
    int32_t n_pages, n_slots;
} skv_head;

typedef struct skv_cache_shape {
    skv_dtype type; /* f32 or bf16 */
    bool sums;      /* pages hold the attention received by every slot, too */
    int32_t head_dim, stride;
    size_t page_bytes;
} skv_cache_shape;

/* n consecutive tokens of one row inside a flat batch, as one layer sees them. */
typedef struct skv_span_view {
    size_t first; /* index of its first token in the batch */
    size_t n;
    skv_head *heads;  /* [n_kv_heads] of this row and layer; slots for the n tokens are there already, the newest ones */
    int32_t position; /* of its first token */
} skv_span_view;

typedef struct skv_linear {
    const skv_matrix *w;
    const float *bias; /* [n_out] or NULL */
    float *y;          /* [n_tokens, n_out] */
} skv_linear;

/* Where an op runs: how many threads, and scratch that the session sized when it was made. */
typedef struct skv_exec {
    const struct skv_backend *backend;
    int n_threads;
    float *scratch; /* [n_threads, scratch_per_thread] */
    size_t scratch_per_thread;
    float *partials; /* [n_heads, n_partial_pages, stride + 2]: one decode row's attention, page by page */
    size_t n_partial_pages;
} skv_exec;

struct skv_scoring;

typedef struct skv_backend {
    const char *name;
    const void *kernels; /* private to the backend */

    /* Bytes of scratch floats a thread needs for attention with this cache. */
    size_t (*scratch)(const skv_cache_shape *cache, int32_t group);

    /* w ← source [n_out, n_in] of any dtype, rounded to w->type (to nearest even) and laid out for `linear`. w->data is set, NULL if memory
     * is out. */
    void (*pack)(const struct skv_backend *backend, skv_heap *heap, skv_matrix *w, const void *source, skv_dtype type, int n_threads);

    /* x[t, :] = table[tokens[t], :]; x [n, n_in] */
    void (*embed)(const skv_exec *exec, const skv_matrix *table, const int32_t *tokens, size_t n, float *x);

    /* y[t, :] = x[t, :] / √(mean x[t, :]² + eps) · w; x, y [n, dim], w [dim]; y may be x */
    void (*rmsnorm)(const skv_exec *exec, const float *x, const float *w, float eps, size_t n, size_t dim, float *y);

    /* y_i = x W_iᵀ + bias_i for several matrices of the same input; x [n, n_in] */
    void (*linear)(const skv_exec *exec, const skv_linear *jobs, size_t n_jobs, const float *x, size_t n);

    /* x [n, n_heads, head_dim] turned by the angles of each token's position; cosine, sine [n, head_dim / 2] */
    void (*rope)(const skv_exec *exec, float *x, size_t n, size_t n_heads, size_t head_dim, const float *cosine, const float *sine);

    /* The newest slots of every head ← k, v [n, n_kv_heads, head_dim] and the positions */
    void (*append)(const skv_exec *exec, const skv_cache_shape *cache, const skv_span_view *spans, size_t n_spans, size_t n_kv_heads,
                   const float *k, const float *v);

    /* out[t, h, :] = Σ_j softmax_j(q[t, h, :] · K[j, :] / √head_dim) V[j, :] over the slots up to the token's own; q, out [n, n_heads,
     * head_dim]. Reduced page by page in slot order. */
    void (*attention)(const skv_exec *exec, const skv_cache_shape *cache, const skv_span_view *spans, size_t n_spans, size_t n_heads,
                      size_t n_kv_heads, const float *q, float *out);

    /* gate = silu(gate) · up; both [n] */
    void (*silu_mul)(const skv_exec *exec, float *gate, const float *up, size_t n);

    /* x += y; both [n] */
    void (*add)(const skv_exec *exec, float *x, const float *y, size_t n);

    /* x += alpha y; both [n] */
    void (*add_scaled)(const skv_exec *exec, float *x, const float *y, float alpha, size_t n);

    /* Every slot's sum += Σ of the probabilities that the spans' queries give it (h2o); q [n, n_heads, head_dim], logits [n_threads, 2, ld]
     * scratch */
    void (*receive)(const skv_exec *exec, const skv_cache_shape *cache, const skv_span_view *spans, size_t n_spans, size_t n_heads,
                    size_t n_kv_heads, const float *q, float *logits, size_t ld);

    /* Compaction works head by head, on one thread each. keys [n, stride] as float32, positions [n], sums [n] ← the slots listed, or the
     * first n with slots NULL; keys and sums may be NULL. */
    void (*gather)(const struct skv_backend *backend, const skv_cache_shape *cache, const skv_head *head, const int32_t *slots, size_t n,
                   float *keys, int32_t *positions, float *sums);

    /* Slots 0 … n − 1 ← the slots keep[0 … n − 1]; scratch [n, stride] floats */
    void (*compact)(const skv_cache_shape *cache, const skv_head *head, const int32_t *keep, size_t n, void *scratch);

    /* scoring->importance, ->redundancy (METHOD.md §2, §3) of one head, with score_work floats at scoring->work */
    size_t (*score_work)(size_t n_slots, size_t stride, size_t window);
    void (*importance)(struct skv_scoring *scoring);
    void (*redundancy)(struct skv_scoring *scoring);

    /* a · b; both [n], n a multiple of 16 */
    float (*dot)(const struct skv_backend *backend, const float *a, const float *b, size_t n);

    /* Largest rates this device reaches with these kernels: bytes/s read from memory, multiply-accumulates/s. */
    void (*limits)(const skv_exec *exec, const float *memory, size_t n, double *bytes, double *macs);
} skv_backend;

extern const skv_backend *const skv_backends[]; /* best first, NULL-terminated */

/* The named backend, or with NULL the best one that this machine can run. */
skv_status skv_backend_find(const char *name, const skv_backend **backend, skv_error *error);
bool skv_backend_runs_here(const skv_backend *backend);

#endif
