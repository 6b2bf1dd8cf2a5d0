/* The CPU backend: splits every op of backend.h over threads and calls the kernels of one variant. Threads split outputs, heads and pages,
 * never a sum, so results do not depend on their number.
 *
 * Weights are packed in panels of 2·lanes outputs, [panel][n_in][2·lanes]: f32 in order, bf16 as pairs (o, o + lanes), which one shift and
 * one mask widen. A last panel is filled up with zeros. */
#include <math.h>
#include <omp.h>
#include <string.h>

#include "../policies.h"
#include "pages.h"
#include "score.h"

static const skv_kernels *kernels_of(const skv_exec *exec) { return exec->backend->kernels; }

/* Below this many elements a parallel region costs more than it saves. */
enum { SMALL = 1 << 14 };

#define OMP(text) _Pragma(#text)
#define PARALLEL(...) OMP(omp parallel for schedule(static) num_threads(exec->n_threads) if (__VA_ARGS__))

static float widen_one(const void *source, skv_dtype type, size_t i) {
    if (type == SKV_F32) return ((const float *)source)[i];
    const uint16_t half = ((const uint16_t *)source)[i];
    uint32_t bits;
    if (type == SKV_BF16) {
        bits = (uint32_t)half << 16;
    } else { /* f16: 1 sign, 5 exponent, 10 mantissa bits; subnormals are scaled from an integer */
        const uint32_t sign = (uint32_t)(half & 0x8000) << 16, exponent = (half >> 10) & 31, mantissa = half & 1023;
        if (exponent == 0) {
            const float value = (float)mantissa * 0x1p-24f;
            return sign ? -value : value;
        }
        bits = sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | mantissa << 13;
    }
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static uint16_t to_bf16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    if ((bits & 0x7fffffff) > 0x7f800000) return (uint16_t)(bits >> 16 | 64); /* NaN stays NaN */
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

/* Index of output o of a panel among its 2·lanes values. */
static size_t place(const skv_matrix *w, size_t lanes, size_t o) {
    return w->type == SKV_F32 ? o : o < lanes ? 2 * o : 2 * (o - lanes) + 1;
}

static void cpu_pack(const skv_backend *backend, skv_heap *heap, skv_matrix *w, const void *source, skv_dtype type, int n_threads) {
    const size_t lanes = ((const skv_kernels *)backend->kernels)->lanes, panel = 2 * lanes, n_in = (size_t)w->n_in,
                 n_out = (size_t)w->n_out;
    const size_t n_panels = (n_out + panel - 1) / panel;
    w->data = skv_alloc(heap, skv_mul(n_panels * panel, n_in), skv_dtype_size(w->type));
    if (!w->data) return;
    const size_t block = 64; /* inputs at a time: both sides stay in the first-level cache */
#pragma omp parallel for schedule(static) num_threads(n_threads)
    for (size_t p = 0; p < n_panels; p++)
        for (size_t k0 = 0; k0 < n_in; k0 += block)
            for (size_t o = 0; o < panel && p * panel + o < n_out; o++) {
                const size_t row = (p * panel + o) * n_in, to = p * panel * n_in + place(w, lanes, o);
                const size_t end = k0 + block < n_in ? k0 + block : n_in;
                for (size_t k = k0; k < end; k++) {
                    if (w->type == SKV_F32)
                        ((float *)w->data)[to + k * panel] = widen_one(source, type, row + k);
                    else if (type == SKV_BF16)
                        ((uint16_t *)w->data)[to + k * panel] = ((const uint16_t *)source)[row + k];
                    else
                        ((uint16_t *)w->data)[to + k * panel] = to_bf16(widen_one(source, type, row + k));
                }
            }
}

static void cpu_embed(const skv_exec *exec, const skv_matrix *table, const int32_t *tokens, size_t n, float *x) {
    const size_t lanes = kernels_of(exec)->lanes, panel = 2 * lanes, n_in = (size_t)table->n_in;
    PARALLEL(n * n_in > SMALL)
    for (size_t t = 0; t < n; t++) {
        const size_t token = (size_t)tokens[t], from = token / panel * panel * n_in + place(table, lanes, token % panel);
        for (size_t k = 0; k < n_in; k++) x[t * n_in + k] = widen_one(table->data, table->type, from + k * panel);
    }
}

static void cpu_rmsnorm(const skv_exec *exec, const float *x, const float *w, float eps, size_t n, size_t dim, float *y) {
    PARALLEL(n * dim > SMALL)
    for (size_t t = 0; t < n; t++) kernels_of(exec)->rmsnorm(x + t * dim, w, eps, dim, y + t * dim);
}

/* The panels of all matrices, one after another, are split evenly: every thread takes a contiguous run. */
static void cpu_linear(const skv_exec *exec, const skv_linear *jobs, size_t n_jobs, const float *x, size_t n) {
    const size_t panel = 2 * kernels_of(exec)->lanes, n_threads = (size_t)exec->n_threads;
    size_t total = 0;
    for (size_t i = 0; i < n_jobs; i++) total += ((size_t)jobs[i].w->n_out + panel - 1) / panel;
    PARALLEL(total * panel * (size_t)jobs[0].w->n_in * n > 4 * SMALL)
    for (size_t part = 0; part < n_threads; part++) {
        const size_t begin = total * part / n_threads, stop = total * (part + 1) / n_threads;
        for (size_t i = 0, before = 0, n_panels; i < n_jobs; i++, before += n_panels) {
            n_panels = ((size_t)jobs[i].w->n_out + panel - 1) / panel;
            const size_t first = begin > before ? begin - before : 0, end = stop < before + n_panels ? stop - before : n_panels;
            if (stop > before && first < end) kernels_of(exec)->linear(jobs[i].w, first, end, x, n, jobs[i].bias, jobs[i].y);
        }
    }
}

static void cpu_rope(const skv_exec *exec, float *x, size_t n, size_t n_heads, size_t head_dim, const float *cosine, const float *sine) {
    PARALLEL(n * n_heads * head_dim > SMALL)
    for (size_t t = 0; t < n; t++)
        kernels_of(exec)->rope(x + t * n_heads * head_dim, n_heads, head_dim, cosine + t * (head_dim / 2), sine + t * (head_dim / 2));
}

/* One slot's vector ← x [head_dim], zero up to the stride. */
static void store(const skv_cache_shape *cache, char *page, size_t slot, const float *x) {
    const size_t stride = (size_t)cache->stride, dim = (size_t)cache->head_dim;
    if (cache->type == SKV_F32) {
        float *to = (float *)(void *)page + slot * stride;
        memcpy(to, x, dim * sizeof *to);
        memset(to + dim, 0, (stride - dim) * sizeof *to);
    } else {
        uint16_t *to = (uint16_t *)(void *)page + slot * stride;
        for (size_t i = 0; i < dim; i++) to[i] = to_bf16(x[i]);
        memset(to + dim, 0, (stride - dim) * sizeof *to);
    }
}

static void cpu_append(const skv_exec *exec, const skv_cache_shape *cache, const skv_span_view *spans, size_t n_spans, size_t n_kv_heads,
                       const float *k, const float *v) {
    const size_t dim = (size_t)cache->head_dim;
    for (size_t s = 0; s < n_spans; s++) {
        const skv_span_view *span = spans + s;
        PARALLEL(span->n * n_kv_heads * dim > SMALL)
        for (size_t i = 0; i < span->n; i++)
            for (size_t h = 0; h < n_kv_heads; h++) {
                const skv_head *head = span->heads + h;
                const size_t slot = (size_t)head->n_slots - span->n + i, page = slot / SKV_PAGE;
                const size_t from = ((span->first + i) * n_kv_heads + h) * dim;
                store(cache, page_keys(head, page), slot % SKV_PAGE, k + from);
                store(cache, page_values(cache, head, page), slot % SKV_PAGE, v + from);
                page_positions(cache, head, page)[slot % SKV_PAGE] = span->position + (int32_t)i;
                if (cache->sums) page_sums(cache, head, page)[slot % SKV_PAGE] = 0;
            }
    }
}

/* Attention of one KV head: a block of tokens against a run of pages. The queries of the block share each page, widened once. */
enum { BLOCK_TOKENS = 16 };

typedef struct attention_block {
    const skv_span_view *span;
    size_t kv_head, first, n; /* tokens of the span */
    size_t first_page, end_page;
} attention_block;

/* scratch: keys, values [SKV_PAGE, stride] (bf16 only), queries and sums [BLOCK_TOKENS, group, stride], acc [stride], logits [SKV_PAGE +
 * 16], totals [BLOCK_TOKENS, group] */
static size_t cpu_scratch(const skv_cache_shape *cache, int32_t group) {
    const size_t stride = (size_t)cache->stride, n = BLOCK_TOKENS * (size_t)group;
    return 2 * SKV_PAGE * stride + 2 * n * stride + stride + SKV_PAGE + 16 + 2 * n + 16;
}

/* With partials (a block of one token) every page's result goes there unmerged; otherwise the merged result goes to out. */
static void attend_block(const skv_exec *exec, const skv_cache_shape *cache, const attention_block *b, size_t n_heads, size_t n_kv_heads,
                         const float *q, float *scratch, float *partials, float *out) {
    const skv_kernels *kernels = kernels_of(exec);
    const size_t group = n_heads / n_kv_heads, stride = (size_t)cache->stride, dim = (size_t)cache->head_dim, n_q = b->n * group;
    const skv_head *head = b->span->heads + b->kv_head;
    const size_t before = (size_t)head->n_slots - b->span->n; /* slots older than the span */
    const float scale = 1.0f / sqrtf((float)dim);
    float *keys = scratch, *values = keys + SKV_PAGE * stride, *queries = values + SKV_PAGE * stride,
          *sums = queries + BLOCK_TOKENS * group * stride;
    float *acc = sums + BLOCK_TOKENS * group * stride, *logits = acc + stride;
    skv_partial *totals = (skv_partial *)(void *)(logits + SKV_PAGE + 16);
    for (size_t i = 0; i < n_q; i++) {
        memcpy(queries + i * stride, q + ((b->span->first + b->first + i / group) * n_heads + b->kv_head * group + i % group) * dim,
               dim * sizeof *q);
        memset(queries + i * stride + dim, 0, (stride - dim) * sizeof *q);
        totals[i] = (skv_partial){0};
    }
    for (size_t page = b->first_page; page < b->end_page; page++) {
        const size_t filled = (size_t)head->n_slots - page * SKV_PAGE, n_page = filled < SKV_PAGE ? filled : SKV_PAGE;
        const float *k = page_f32(kernels, cache, page_keys(head, page), n_page, keys);
        const float *v = page_f32(kernels, cache, page_values(cache, head, page), n_page, values);
        for (size_t i = 0; i < n_q; i++) {
            const size_t visible = before + b->first + i / group + 1;
            if (visible <= page * SKV_PAGE) continue;
            const size_t n = visible - page * SKV_PAGE < SKV_PAGE ? visible - page * SKV_PAGE : SKV_PAGE;
            float *part_acc = partials ? partials + ((b->kv_head * group + i) * exec->n_partial_pages + page) * (stride + 2) : acc;
            const skv_partial part = kernels->attend(queries + i * stride, k, v, n, stride, scale, logits, part_acc);
            if (partials)
                memcpy(part_acc + stride, &part, sizeof part);
            else
                kernels->merge(totals + i, sums + i * stride, part, acc, stride);
        }
    }
    if (partials) return;
    for (size_t i = 0; i < n_q; i++) {
        float *to = out + ((b->span->first + b->first + i / group) * n_heads + b->kv_head * group + i % group) * dim;
        const float inverse = 1.0f / totals[i].sum;
        for (size_t c = 0; c < dim; c++) to[c] = sums[i * stride + c] * inverse;
    }
}

/* A single decode row has too few heads to occupy the threads evenly, so its pages are spread over them and merged afterwards, in the same
 * order. */
static void attend_pages(const skv_exec *exec, const skv_cache_shape *cache, const skv_span_view *span, size_t n_heads, size_t n_kv_heads,
                         const float *q, float *out) {
    enum { PAGES = 4 };
    const size_t n_pages = (size_t)span->heads[0].n_pages, runs = (n_pages + PAGES - 1) / PAGES, group = n_heads / n_kv_heads;
    const size_t stride = (size_t)cache->stride, dim = (size_t)cache->head_dim;
#pragma omp parallel num_threads(exec->n_threads)
    {
        float *scratch = exec->scratch + (size_t)omp_get_thread_num() * exec->scratch_per_thread;
#pragma omp for schedule(static)
        for (size_t task = 0; task < runs * n_kv_heads; task++) {
            const size_t kv_head = task / runs, first = task % runs * PAGES, pages = (size_t)span->heads[kv_head].n_pages;
            const attention_block block = {span, kv_head, 0, 1, first, first + PAGES < pages ? first + PAGES : pages};
            attend_block(exec, cache, &block, n_heads, n_kv_heads, q, scratch, exec->partials, out);
        }
#pragma omp for schedule(static)
        for (size_t h = 0; h < n_heads; h++) {
            const float *parts = exec->partials + h * exec->n_partial_pages * (stride + 2);
            skv_partial total = {0}, part;
            for (size_t page = 0; page < (size_t)span->heads[h / group].n_pages; page++) {
                const float *acc = parts + page * (stride + 2);
                memcpy(&part, acc + stride, sizeof part);
                kernels_of(exec)->merge(&total, scratch, part, acc, stride);
            }
            const float inverse = 1.0f / total.sum;
            for (size_t c = 0; c < dim; c++) out[(span->first * n_heads + h) * dim + c] = scratch[c] * inverse;
        }
    }
}

static void cpu_attention(const skv_exec *exec, const skv_cache_shape *cache, const skv_span_view *spans, size_t n_spans, size_t n_heads,
                          size_t n_kv_heads, const float *q, float *out) {
    bool even = true; /* per-head budgets: page counts differ, then heads are taken whole */
    for (size_t h = 1; h < n_kv_heads; h++) even &= spans[0].heads[h].n_pages == spans[0].heads[0].n_pages;
    if (n_spans == 1 && spans[0].n == 1 && exec->n_threads > 1 && even && spans[0].heads[0].n_pages > 8) {
        attend_pages(exec, cache, spans, n_heads, n_kv_heads, q, out);
        return;
    }
    size_t n_tasks = 0;
    for (size_t s = 0; s < n_spans; s++) n_tasks += (spans[s].n + BLOCK_TOKENS - 1) / BLOCK_TOKENS * n_kv_heads;
#pragma omp parallel num_threads(exec->n_threads) if (n_tasks > 1)
    {
        float *scratch = exec->scratch + (size_t)omp_get_thread_num() * exec->scratch_per_thread;
        size_t s = 0, before = 0; /* tasks come in ascending order, so the span is found by walking on */
#pragma omp for schedule(monotonic : dynamic)
        for (size_t task = 0; task < n_tasks; task++) {
            for (;; s++) {
                const size_t tasks = (spans[s].n + BLOCK_TOKENS - 1) / BLOCK_TOKENS * n_kv_heads;
                if (task < before + tasks) break;
                before += tasks;
            }
            const size_t kv_head = (task - before) % n_kv_heads, first = (task - before) / n_kv_heads * BLOCK_TOKENS;
            const size_t n = spans[s].n - first < BLOCK_TOKENS ? spans[s].n - first : BLOCK_TOKENS;
            const attention_block block = {spans + s, kv_head, first, n, 0, (size_t)spans[s].heads[kv_head].n_pages};
            attend_block(exec, cache, &block, n_heads, n_kv_heads, q, scratch, NULL, out);
        }
    }
}

static void cpu_silu_mul(const skv_exec *exec, float *gate, const float *up, size_t n) {
    const size_t block = 4096;
    PARALLEL(n > SMALL)
    for (size_t i = 0; i < n; i += block) kernels_of(exec)->silu_mul(gate + i, up + i, n - i < block ? n - i : block);
}

static void cpu_add(const skv_exec *exec, float *x, const float *y, size_t n) {
    PARALLEL(n > SMALL)
    for (size_t i = 0; i < n; i++) x[i] += y[i];
}

static void cpu_add_scaled(const skv_exec *exec, float *x, const float *y, float alpha, size_t n) {
    (void)exec;
    for (size_t i = 0; i < n; i++) x[i] += alpha * y[i];
}

static float cpu_dot(const skv_backend *backend, const float *a, const float *b, size_t n) {
    float dot;
    ((const skv_kernels *)backend->kernels)->inner(a, b, 1, n, &dot);
    return dot;
}

/* The best of a few passes with all threads. */
static void cpu_limits(const skv_exec *exec, const float *memory, size_t n, double *bytes, double *macs) {
    *bytes = *macs = 0;
    const size_t parts = (size_t)exec->n_threads, share = n / parts;
    volatile float sink = 0;
    for (int pass = 0; pass < 6; pass++) {
        float sum = 0;
        double done = 0, begin = omp_get_wtime();
#pragma omp parallel for num_threads(exec->n_threads) reduction(+ : sum)
        for (size_t part = 0; part < parts; part++) sum += kernels_of(exec)->stream(memory + part * share, share);
        double rate = (double)(share * parts * sizeof *memory) / (omp_get_wtime() - begin);
        if (rate > *bytes) *bytes = rate;
        begin = omp_get_wtime();
#pragma omp parallel for num_threads(exec->n_threads) reduction(+ : done, sum)
        for (size_t part = 0; part < parts; part++) done += kernels_of(exec)->peak(10000000, &sum);
        rate = done / (omp_get_wtime() - begin);
        if (rate > *macs) *macs = rate;
        sink = sink + sum;
    }
}

#define CPU_BACKEND(variant)                                                                                                               \
    {                                                                                                                                      \
        .name = #variant, .kernels = &skv_kernels_##variant, .scratch = cpu_scratch, .pack = cpu_pack, .embed = cpu_embed,                 \
        .rmsnorm = cpu_rmsnorm, .linear = cpu_linear, .rope = cpu_rope, .append = cpu_append, .attention = cpu_attention,                  \
        .silu_mul = cpu_silu_mul, .add = cpu_add, .add_scaled = cpu_add_scaled, .receive = cpu_receive, .gather = cpu_gather,              \
        .compact = cpu_compact, .score_work = cpu_score_work, .importance = cpu_importance, .redundancy = cpu_redundancy, .dot = cpu_dot,  \
        .limits = cpu_limits                                                                                                               \
    }

const skv_backend skv_cpu_generic = CPU_BACKEND(generic);
#if defined(__x86_64__)
const skv_backend skv_cpu_avx2 = CPU_BACKEND(avx2);
const skv_backend skv_cpu_avx512 = CPU_BACKEND(avx512);
#endif
