/* The ops of a backend on plain arrays, for ctypes: a device, and a world of a few rows with a cache around it. Built
 * by library.py with the core's own sources; a NULL array is left out. */
#include <math.h>
#include <string.h>

#include "cache.h"
#include "skipkv.h"

#define API __attribute__((visibility("default")))

enum { WIDEST = 1544 }; /* of the matrices given to ops_linear, either way */

typedef struct ops_row {
    skv_head *heads; /* [n_layers, n_kv_heads] */
    char **pages;
    float *ring, *sum, *vector; /* device */
    int32_t n_tokens;
} ops_row;

typedef struct ops_world {
    skv_heap heap;
    skv_device *device;
    skv_config config;
    skv_workload work;
    skv_cache cache;
    float *inv_freq;
    ops_row *rows;
    skv_token *tokens;
    skv_part *parts;
    skv_batch batch;
    float **vectors; /* device, of the sentences that the batch closes */
    size_t n_vectors;
} ops_world;

static size_t n_heads_of(const ops_world *w) { return (size_t)w->config.n_layers * (size_t)w->config.n_kv_heads; }

static size_t width_of(const ops_world *w) { return (size_t)(w->config.hidden + 15) / 16 * 16; }

/* n floats of device memory that hold `from`. */
static float *put(ops_world *w, const float *from, size_t n) {
    if (!from) return NULL;
    float *to = w->device->backend->alloc(w->device, n, sizeof *to);
    w->device->backend->write(w->device, to, from, n * sizeof *to);
    return to;
}

/* `to` ← n floats of device memory, which is freed. */
static void take(ops_world *w, float *to, float *from, size_t n) {
    skv_error error;
    if (!from) return;
    if (to) w->device->backend->read(w->device, to, from, n * sizeof *to);
    w->device->backend->sync(w->device, &error);
    w->device->backend->free(w->device, from);
}

/* library: a backend's shared object, NULL: the CPU's. shape: n_layers, n_heads, n_kv_heads, head_dim, hidden, window,
 * rows, tokens of a forward, slots of a head. NULL where the variant does not run here. */
API ops_world *ops_open(const char *library, const char *variant, int n_threads, const int32_t *shape, int cache_type,
                        unsigned needs) {
    skv_error error;
    skv_heap heap = {0};
    const skv_backend *backend = library ? skv_backend_load(library, &error) : NULL;
    if (library && !backend) return NULL;
    skv_device *device = skv_device_open(backend, variant, n_threads, &error);
    if (!device) return NULL;
    ops_world *w = skv_alloc(&heap, 1, sizeof *w);
    w->device = device;
    w->config = (skv_config){.n_layers = shape[0],
                             .n_heads = shape[1],
                             .n_kv_heads = shape[2],
                             .head_dim = shape[3],
                             .hidden = shape[4],
                             .ffn = WIDEST,
                             .vocab = WIDEST,
                             .rope_theta = 1e4,
                             .rope_attention_factor = 1};
    w->inv_freq = skv_alloc(&w->heap, (size_t)shape[3] / 2, sizeof *w->inv_freq);
    skv_config_frequencies(&w->config, w->inv_freq);
    const size_t n_rows = (size_t)shape[6], slots = (size_t)shape[8], n_pages = skv_cache_pages(slots);
    w->work = (skv_workload){.config = &w->config,
                             .weights = (skv_dtype)shape[9],
                             .inv_freq = w->inv_freq,
                             .cache = skv_cache_shape_of(shape[3], (skv_dtype)cache_type, needs & 1u << SKV_SUMS),
                             .n_rows = n_rows,
                             .n_tokens = (size_t)shape[7],
                             .head_slots = slots,
                             .n_due = n_rows,
                             .scored_slots = slots,
                             .due_slots = slots * n_heads_of(w),
                             .window = shape[5],
                             .needs = needs,
                             .keep = needs & ((1 << SKV_N_TERMS) - 1)};
    w->cache = (skv_cache){.shape = w->work.cache, .device = device, .heap = &w->heap, .limit_bytes = SIZE_MAX};
    device->backend->reserve(device, &w->work, &error);
    skv_cache_reserve(&w->cache, n_rows * n_heads_of(w) * n_pages, &error);
    w->rows = skv_alloc(&w->heap, n_rows, sizeof *w->rows);
    w->parts = skv_alloc(&w->heap, n_rows, sizeof *w->parts);
    w->tokens = skv_alloc(&w->heap, (size_t)shape[7], sizeof *w->tokens);
    w->vectors = skv_alloc(&w->heap, (size_t)shape[7], sizeof *w->vectors);
    for (ops_row *r = w->rows; r < w->rows + n_rows; r++) {
        const size_t ring = (size_t)shape[0] * (size_t)shape[5] * (size_t)shape[1] * (size_t)shape[3];
        r->heads = skv_alloc(&w->heap, n_heads_of(w), sizeof *r->heads);
        r->pages = skv_alloc(&w->heap, n_heads_of(w) * n_pages, sizeof *r->pages);
        for (size_t h = 0; h < n_heads_of(w); h++) r->heads[h].pages = r->pages + h * n_pages;
        r->ring = device->backend->alloc(device, ring, sizeof *r->ring);
        r->sum = device->backend->alloc(device, width_of(w), sizeof *r->sum);
        r->vector = device->backend->alloc(device, width_of(w), sizeof *r->vector);
    }
    return w;
}

/* What the device failed at, empty if nothing. */
API const char *ops_error(const ops_world *w) { return w->device->error.text; }

API void ops_close(ops_world *w) {
    for (size_t i = 0; i < w->work.n_rows; i++) {
        ops_row *r = w->rows + i;
        float *const floats[] = {r->ring, r->sum, r->vector};
        for (size_t k = 0; k < 3; k++) w->device->backend->free(w->device, floats[k]);
        skv_free(&w->heap, r->heads);
        skv_free(&w->heap, r->pages);
    }
    for (size_t i = 0; i < w->n_vectors; i++) w->device->backend->free(w->device, w->vectors[i]);
    skv_cache_free(&w->cache);
    w->device->backend->close(w->device);
    void *const blocks[] = {w->inv_freq, w->rows, w->parts, w->tokens, w->vectors};
    for (size_t i = 0; i < sizeof blocks / sizeof *blocks; i++) skv_free(&w->heap, blocks[i]);
    skv_heap heap = {0};
    skv_free(&heap, w);
}

/* y [n, n_out] = x [n, n_in] · (first half and second half of the outputs as two jobs)ᵀ + bias; host: through
 * `project`, with best [n] if that is not NULL. */
API void ops_linear(ops_world *w, int type, int32_t n_out, int32_t n_in, const float *weights, const float *bias,
                    const float *x, size_t n, float *y, int host, int32_t *best) {
    const skv_backend *ops = w->device->backend;
    skv_matrix m = {.n_out = n_out, .n_in = n_in, .type = (skv_dtype)type};
    ops->pack(w->device, &m, weights, SKV_F32);
    float *dx = put(w, x, n * (size_t)n_in), *dbias = put(w, bias, (size_t)n_out), *dy = put(w, y, n * (size_t)n_out);
    float *twice = put(w, y, n * (size_t)n_out);
    skv_error error;
    if (host) {
        ops->project(w->device, &m, dx, n, y, best);
        ops->sync(w->device, &error);
    } else {
        ops->linear(w->device, (skv_linear[]){{&m, NULL, twice}, {&m, dbias, dy}}, 2, dx, n);
    }
    take(w, host ? NULL : y, dy, n * (size_t)n_out);
    take(w, NULL, twice, 0);
    take(w, NULL, dx, 0);
    take(w, NULL, dbias, 0);
    ops->free(w->device, m.data);
}

API void ops_rmsnorm(ops_world *w, const float *x, const float *weight, float eps, size_t n, size_t dim, float *y) {
    float *dx = put(w, x, n * dim), *dw = put(w, weight, dim);
    w->device->backend->rmsnorm(w->device, dx, dw, eps, n, dim, dx);
    take(w, y, dx, n * dim);
    take(w, NULL, dw, 0);
}

API void ops_silu_mul(ops_world *w, float *gate, const float *up, size_t n) {
    float *dg = put(w, gate, n), *du = put(w, up, n);
    w->device->backend->silu_mul(w->device, dg, du, n);
    take(w, gate, dg, n);
    take(w, NULL, du, 0);
}

API void ops_add(ops_world *w, float *x, const float *y, size_t n) {
    float *dx = put(w, x, n), *dy = put(w, y, n);
    w->device->backend->add(w->device, dx, dy, n);
    take(w, x, dx, n);
    take(w, NULL, dy, 0);
}

/* Feeds counts[p] tokens to row rows[p]: alphas NaN where a token is not steered, marks and lengths as in skv_token. */
API void ops_begin(ops_world *w, size_t n_parts, const int32_t *rows, const int32_t *counts, const int32_t *ids,
                   const float *alphas, const int32_t *marks, const int32_t *lengths) {
    size_t t = 0;
    for (size_t p = 0; p < n_parts; p++) {
        ops_row *r = w->rows + rows[p];
        w->parts[p] = (skv_part){.row = rows[p],
                                 .first = t,
                                 .n = (size_t)counts[p],
                                 .position = r->n_tokens,
                                 .heads = r->heads,
                                 .ring = r->ring,
                                 .sum = r->sum,
                                 .vector = r->vector};
        for (size_t h = 0; h < n_heads_of(w); h++) skv_cache_extend(&w->cache, r->heads + h, (size_t)counts[p]);
        r->n_tokens += counts[p];
        for (int32_t i = 0; i < counts[p]; i++, t++) {
            w->tokens[t] = (skv_token){.id = ids[t],
                                       .mark = (skv_mark)marks[t],
                                       .length = lengths[t],
                                       .alpha = alphas[t],
                                       .steered = !isnan(alphas[t])};
            if (marks[t] != SKV_MARK_CLOSE) continue;
            w->tokens[t].vector = w->device->backend->alloc(w->device, width_of(w), sizeof(float));
            w->vectors[w->n_vectors++] = w->tokens[t].vector;
        }
    }
    w->batch = (skv_batch){w->tokens, w->parts, t, n_parts};
    w->device->backend->begin(w->device, &w->batch);
}

API void ops_embed(ops_world *w, int type, int32_t n_out, const float *weights, float *x) {
    skv_matrix m = {.n_out = n_out, .n_in = w->config.hidden, .type = (skv_dtype)type};
    const size_t n = w->batch.n_tokens * (size_t)m.n_in;
    w->device->backend->pack(w->device, &m, weights, SKV_F32);
    float *dx = put(w, x, n);
    w->device->backend->embed(w->device, &m, dx);
    take(w, x, dx, n);
    w->device->backend->free(w->device, m.data);
}

API void ops_rope(ops_world *w, float *x, size_t n_heads) {
    const size_t n = w->batch.n_tokens * n_heads * (size_t)w->config.head_dim;
    float *dx = put(w, x, n);
    w->device->backend->rope(w->device, dx, n_heads);
    take(w, x, dx, n);
}

/* One layer's keys, values and queries; out [n_tokens, n_heads, head_dim]. */
API void ops_attend(ops_world *w, size_t layer, const float *q, const float *k, const float *v, float *out) {
    const skv_backend *ops = w->device->backend;
    const size_t dim = (size_t)w->config.head_dim, n_q = w->batch.n_tokens * (size_t)w->config.n_heads * dim;
    const size_t n_kv = w->batch.n_tokens * (size_t)w->config.n_kv_heads * dim;
    float *dq = put(w, q, n_q), *dk = put(w, k, n_kv), *dv = put(w, v, n_kv), *dout = put(w, out, n_q);
    ops->append(w->device, layer, dk, dv);
    ops->keep_queries(w->device, layer, dq);
    ops->attention(w->device, layer, dq, dout);
    if (w->work.cache.sums) ops->receive(w->device, layer, dq);
    take(w, out, dout, n_q);
    take(w, NULL, dq, 0);
    take(w, NULL, dk, 0);
    take(w, NULL, dv, 0);
}

/* x [n_tokens, hidden] steered before `layer`, every row by `vector` before `at`. */
API void ops_steer(ops_world *w, size_t layer, int32_t at, const float *vector, float *x) {
    const size_t hidden = (size_t)w->config.hidden, n = w->batch.n_tokens * hidden;
    float *dx = put(w, x, n);
    for (size_t p = 0; p < w->batch.n_parts; p++) {
        w->parts[p].steered_layer = at;
        w->device->backend->write(w->device, (float *)w->parts[p].vector, vector, hidden * sizeof *vector);
    }
    w->device->backend->begin(w->device, &w->batch); /* which may have kept what it was told */
    w->device->backend->steer(w->device, layer, dx);
    take(w, x, dx, n);
}

API void ops_last(ops_world *w, const float *x, float *y) {
    const size_t hidden = (size_t)w->config.hidden;
    float *dx = put(w, x, w->batch.n_tokens * hidden);
    w->device->backend->last(w->device, dx, dx);
    take(w, y, dx, w->batch.n_parts * hidden);
}

/* vectors [closed, width] ← those of the sentences closed since the world was opened. */
API size_t ops_sum_sentences(ops_world *w, const float *x, float *vectors) {
    skv_error error;
    float *dx = put(w, x, w->batch.n_tokens * (size_t)w->config.hidden);
    w->device->backend->sum_sentences(w->device, dx);
    for (size_t i = 0; i < w->n_vectors; i++)
        w->device->backend->read(w->device, vectors + i * width_of(w), w->vectors[i], width_of(w) * sizeof *vectors);
    w->device->backend->sync(w->device, &error);
    take(w, NULL, dx, 0);
    return w->n_vectors;
}

/* Of those vectors, `missing` left out (−1: none); out [n_vectors − first, n_vectors]. */
API void ops_similarities(ops_world *w, size_t first, int missing, float *out) {
    skv_error error;
    float *left_out = NULL;
    if (missing >= 0) left_out = w->vectors[missing], w->vectors[missing] = NULL;
    w->device->backend->similarities(w->device, w->vectors, width_of(w), first, w->n_vectors, out);
    w->device->backend->sync(w->device, &error);
    if (missing >= 0) w->vectors[missing] = left_out;
}

/* A head's slots as float32; returns how many. keys, values [n, head_dim]. */
API size_t ops_slots(ops_world *w, int32_t row, size_t head, float *keys, float *values, int32_t *positions,
                     float *sums) {
    const skv_cache_shape *c = &w->work.cache;
    const skv_head *from = w->rows[row].heads + head;
    const size_t dim = (size_t)c->head_dim;
    skv_error error;
    char *page = skv_alloc(&w->heap, 1, c->page_bytes);
    for (size_t i = 0; i < (size_t)from->n_slots; i++) {
        const size_t at = i % SKV_PAGE;
        w->device->backend->read(w->device, page, from->pages[i / SKV_PAGE], c->page_bytes);
        w->device->backend->sync(w->device, &error);
        for (size_t part = 0; part < 2; part++) {
            const char *slot = page + part * c->values_at + at * c->slot_bytes;
            const float *scales = (const float *)(const void *)(page + c->scales_at) + part * SKV_PAGE;
            float *to = (part ? values : keys) + i * dim;
            if (c->type == SKV_Q8)
                skv_dequantise((const int8_t *)slot, scales[at], dim, to);
            else
                skv_dtypes[c->type].widen(slot, dim, to);
        }
        memcpy(positions + i, page + c->positions_at + at * sizeof *positions, sizeof *positions);
        if (c->sums) memcpy(sums + i, page + c->sums_at + at * sizeof *sums, sizeof *sums);
    }
    skv_free(&w->heap, page);
    return (size_t)from->n_slots;
}

/* How ops_evict scores and selects. */
typedef struct ops_eviction {
    float weights[SKV_N_TERMS];
    int32_t kernel, first, n_penalties, n_sentences;
    double seed;
    unsigned compat;
    const int32_t *budgets, *newest; /* [n_layers, n_kv_heads] */
    const skv_penalty *penalties;
    const skv_range *sentences;
    const float *put; /* [jobs, slots] scores in place of the computed ones, or NULL */
    const int32_t
        *held; /* [slots] a virtual set: the first n_held slots of every head, then those from `end` on; or NULL */
    int32_t n_held, end;
} ops_eviction;

/* All heads of all rows, [jobs] = [rows, n_layers, n_kv_heads]: terms [jobs, SKV_N_TERMS, slots], score, kept, keys,
 * queries [jobs, slots · …] as fetched; n_kept, alive [rows, n_sentences]. */
API void ops_evict(ops_world *w, const ops_eviction *e, float *terms, float *score, float *keys, float *queries,
                   int32_t *kept, int32_t *n_kept, uint8_t *alive, int32_t *virtual) {
    const skv_backend *ops = w->device->backend;
    const size_t n_rows = w->work.n_rows, per_row = n_heads_of(w), n = n_rows * per_row, slots = w->work.scored_slots;
    const size_t dim = (size_t)w->config.head_dim, n_kv = (size_t)w->config.n_kv_heads;
    const size_t ring = (size_t)w->config.n_heads / n_kv * (size_t)w->work.window * dim;
    const skv_method method = {.kernel = e->kernel, .seed = e->seed, .compat = e->compat, .window = w->work.window};
    skv_scoring scoring = {.method = &method, .needs = w->work.needs, .keep = w->work.keep};
    memcpy(scoring.weights, e->weights, sizeof scoring.weights);
    skv_due *due = skv_alloc(&w->heap, n_rows, sizeof *due);
    skv_job *jobs = skv_alloc(&w->heap, n, sizeof *jobs);
    int32_t *held = ops->alloc(w->device, n * slots, sizeof *held);
    skv_error error;
    for (size_t r = 0; r < n_rows; r++)
        due[r] = (skv_due){.ring = w->rows[r].ring,
                           .n_tokens = w->rows[r].n_tokens,
                           .first = e->first,
                           .sequence = {(int64_t)r, 7},
                           .penalties = e->penalties,
                           .n_penalties = (size_t)e->n_penalties,
                           .sentences = e->sentences,
                           .n_sentences = (size_t)e->n_sentences,
                           .alive = alive + r * (size_t)e->n_sentences};
    for (size_t i = 0; i < n; i++) {
        const size_t h = i % per_row;
        skv_head *head = w->rows[i / per_row].heads + h;
        jobs[i] = (skv_job){.due = due + i / per_row,
                            .head = head,
                            .layer = (int32_t)(h / n_kv),
                            .kv_head = (int32_t)(h % n_kv),
                            .n_slots = head->n_slots,
                            .n_newest = e->newest[h],
                            .budget = e->budgets[h],
                            .scored = true,
                            .penalised = true};
        if (!e->held) continue;
        ops->write(w->device, held + i * slots, e->held, (size_t)e->n_held * sizeof *held);
        jobs[i].held = held + i * slots, jobs[i].n_held = e->n_held, jobs[i].end = e->end;
        jobs[i].n_slots = e->n_held + head->n_slots - e->end;
    }
    ops->score(w->device, &scoring, jobs, n);
    for (size_t i = 0; i < n; i++) {
        skv_fetched f = {.score = score + i * slots, .keys = keys + i * slots * dim, .queries = queries + i * ring};
        for (size_t t = 0; t < SKV_N_TERMS; t++)
            if (scoring.keep & 1u << t) f.terms[t] = terms + (i * SKV_N_TERMS + t) * slots;
        if (e->put) ops->put_score(w->device, jobs + i, e->put + i * slots);
        ops->fetch(w->device, &scoring, jobs + i, &f);
    }
    ops->select(w->device, &scoring, jobs, n);
    ops->sync(w->device, &error);
    for (size_t i = 0; i < n; i++) {
        ops->fetch(w->device, &scoring, jobs + i, &(skv_fetched){.kept = kept + i * slots});
        n_kept[i] = jobs[i].n_kept;
    }
    ops->compact(w->device, &scoring, jobs, n);
    for (size_t i = 0; i < n; i++) {
        if (e->held)
            ops->read(w->device, virtual + i * slots, jobs[i].held, (size_t)jobs[i].n_kept * sizeof *virtual);
        else
            skv_cache_truncate(&w->cache, jobs[i].head, (size_t)jobs[i].n_kept);
    }
    ops->sync(w->device, &error);
    ops->free(w->device, held);
    skv_free(&w->heap, due);
    skv_free(&w->heap, jobs);
}
