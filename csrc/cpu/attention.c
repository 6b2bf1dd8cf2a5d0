/* Keys, values and queries: written, attended to, remembered. */
#include <math.h>
#include <omp.h>
#include <string.h>

#include "cpu.h"

/* The heads of one layer of a part's row. */
static skv_head *heads_of(const cpu_device *d, const skv_part *part, size_t layer) {
    return part->heads + layer * (size_t)d->work.config->n_kv_heads;
}

/* One slot's vector ← x [head_dim], zero up to the stride. */
static void store(const skv_cache_shape *cache, char *to, const float *x) {
    const skv_dtype_info *type = skv_dtypes + cache->type;
    const size_t dim = (size_t)cache->head_dim;
    type->narrow(x, dim, to);
    memset(to + dim * type->size, 0, cache->slot_bytes - dim * type->size);
}

void cpu_append(skv_device *base, size_t layer, const float *k, const float *v) {
    const cpu_device *d = cpu_of(base);
    const skv_cache_shape *cache = &d->work.cache;
    const size_t dim = (size_t)cache->head_dim, n_kv = (size_t)d->work.config->n_kv_heads;
    for (const skv_part *part = d->batch->parts; part < d->batch->parts + d->batch->n_parts; part++) {
        PARALLEL(part->n * n_kv * dim > SMALL)
        for (size_t i = 0; i < part->n; i++)
            for (size_t h = 0; h < n_kv; h++) {
                const skv_head *head = heads_of(d, part, layer) + h;
                const size_t slot = (size_t)head->n_slots - part->n + i, page = slot / SKV_PAGE, at = slot % SKV_PAGE;
                const size_t from = ((part->first + i) * n_kv + h) * dim;
                store(cache, page_keys(head, page) + at * cache->slot_bytes, k + from);
                store(cache, page_values(cache, head, page) + at * cache->slot_bytes, v + from);
                page_positions(cache, head, page)[at] = part->position + (int32_t)i;
                if (cache->sums) page_sums(cache, head, page)[at] = 0;
            }
    }
}

void cpu_keep_queries(skv_device *base, size_t layer, const float *q) {
    const cpu_device *d = cpu_of(base);
    const size_t width = (size_t)d->work.config->n_heads * (size_t)d->work.config->head_dim;
    const size_t window = (size_t)d->work.window;
    for (const skv_part *part = d->batch->parts; part < d->batch->parts + d->batch->n_parts; part++) {
        if (!part->ring) continue;
        for (size_t t = part->n > window ? part->n - window : 0; t < part->n; t++)
            memcpy(part->ring + (layer * window + ((size_t)part->position + t) % window) * width,
                   q + (part->first + t) * width, width * sizeof *q);
    }
}

/* Attention of one KV head: a block of tokens against a run of pages. The queries of the block share each page, widened
 * once. */
enum { BLOCK_TOKENS = 16 };

typedef struct attention_block {
    const skv_part *part;
    const skv_head *head;
    size_t kv_head, first, n; /* tokens of the part */
    size_t first_page, end_page;
} attention_block;

/* keys, values [SKV_PAGE, stride] (bf16 only), queries and sums [BLOCK_TOKENS, group, stride], acc [stride], logits
 * [SKV_PAGE + 16], totals [BLOCK_TOKENS, group] */
size_t cpu_attention_floats(const skv_workload *work) {
    const size_t group = (size_t)(work->config->n_heads / work->config->n_kv_heads);
    const size_t stride = (size_t)work->cache.stride, n = BLOCK_TOKENS * group;
    return (2 * SKV_PAGE * stride + 2 * n * stride + stride + SKV_PAGE + 16 + 2 * n + 31) / 16 * 16;
}

/* Pages of head_slots: the distance between two heads' partials. */
static size_t partial_pages(const cpu_device *d) { return (d->work.head_slots + SKV_PAGE - 1) / SKV_PAGE; }

/* With partials (a block of one token) every page's result goes there unmerged; otherwise the merged result goes to
 * out. */
static void attend_block(const cpu_device *d, const attention_block *b, const float *q, float *scratch, float *partials,
                         float *out) {
    const skv_kernels *kernels = d->kernels;
    const skv_cache_shape *cache = &d->work.cache;
    const size_t n_heads = (size_t)d->work.config->n_heads, group = n_heads / (size_t)d->work.config->n_kv_heads;
    const size_t stride = (size_t)cache->stride, dim = (size_t)cache->head_dim, n_q = b->n * group;
    const size_t before = (size_t)b->head->n_slots - b->part->n; /* slots older than the part */
    const float scale = 1.0f / sqrtf((float)dim);
    float *keys = scratch, *values = keys + SKV_PAGE * stride, *queries = values + SKV_PAGE * stride;
    float *sums = queries + BLOCK_TOKENS * group * stride, *acc = sums + BLOCK_TOKENS * group * stride;
    float *logits = acc + stride;
    skv_partial *totals = (skv_partial *)(void *)(logits + SKV_PAGE + 16);
    const size_t first_query = ((b->part->first + b->first) * n_heads + b->kv_head * group) * dim;
    for (size_t i = 0; i < n_q; i++) {
        memcpy(queries + i * stride, q + first_query + (i / group * n_heads + i % group) * dim, dim * sizeof *q);
        memset(queries + i * stride + dim, 0, (stride - dim) * sizeof *q);
        totals[i] = (skv_partial){0};
    }
    for (size_t page = b->first_page; page < b->end_page; page++) {
        const size_t filled = (size_t)b->head->n_slots - page * SKV_PAGE,
                     n_page = filled < SKV_PAGE ? filled : SKV_PAGE;
        const float *k = page_f32(d, page_keys(b->head, page), n_page, keys);
        const float *v = page_f32(d, page_values(cache, b->head, page), n_page, values);
        for (size_t i = 0; i < n_q; i++) {
            const size_t visible = before + b->first + i / group + 1;
            if (visible <= page * SKV_PAGE) continue;
            const size_t n = visible - page * SKV_PAGE < SKV_PAGE ? visible - page * SKV_PAGE : SKV_PAGE;
            float *to = acc;
            if (partials) to = partials + ((b->kv_head * group + i) * partial_pages(d) + page) * (stride + 2);
            const skv_partial part = kernels->attend(queries + i * stride, k, v, n, stride, scale, logits, to);
            if (partials)
                memcpy(to + stride, &part, sizeof part);
            else
                kernels->merge(totals + i, sums + i * stride, part, acc, stride);
        }
    }
    if (partials) return;
    for (size_t i = 0; i < n_q; i++) {
        float *to = out + first_query + (i / group * n_heads + i % group) * dim;
        const float inverse = 1.0f / totals[i].sum;
        for (size_t c = 0; c < dim; c++) to[c] = sums[i * stride + c] * inverse;
    }
}

/* A single decode row has too few heads to occupy the threads evenly, so its pages are spread over them and merged
 * afterwards, in the same order. */
static void attend_pages(const cpu_device *d, const skv_head *heads, const float *q, float *out) {
    enum { PAGES = 4 };
    const size_t n_heads = (size_t)d->work.config->n_heads, n_kv = (size_t)d->work.config->n_kv_heads;
    const size_t n_pages = (size_t)heads[0].n_pages, runs = (n_pages + PAGES - 1) / PAGES, group = n_heads / n_kv;
    const size_t stride = (size_t)d->work.cache.stride, dim = (size_t)d->work.cache.head_dim;
    const size_t per_thread = cpu_attention_floats(&d->work);
#pragma omp parallel num_threads(d->base.n_threads)
    {
        float *scratch = d->attending + (size_t)omp_get_thread_num() * per_thread;
#pragma omp for schedule(static)
        for (size_t task = 0; task < runs * n_kv; task++) {
            const size_t h = task / runs, first = task % runs * PAGES;
            const size_t end = first + PAGES < n_pages ? first + PAGES : n_pages;
            const attention_block block = {d->batch->parts, heads + h, h, 0, 1, first, end};
            attend_block(d, &block, q, scratch, d->partials, out);
        }
#pragma omp for schedule(static)
        for (size_t h = 0; h < n_heads; h++) {
            const float *parts = d->partials + h * partial_pages(d) * (stride + 2);
            skv_partial total = {0}, part;
            for (size_t page = 0; page < (size_t)heads[h / group].n_pages; page++) {
                const float *acc = parts + page * (stride + 2);
                memcpy(&part, acc + stride, sizeof part);
                d->kernels->merge(&total, scratch, part, acc, stride);
            }
            const float inverse = 1.0f / total.sum;
            for (size_t c = 0; c < dim; c++) out[h * dim + c] = scratch[c] * inverse;
        }
    }
}

/* Blocks of tokens × KV heads that a part is split into. */
static size_t n_blocks(const cpu_device *d, const skv_part *part) {
    return (part->n + BLOCK_TOKENS - 1) / BLOCK_TOKENS * (size_t)d->work.config->n_kv_heads;
}

void cpu_attention(skv_device *base, size_t layer, const float *q, float *out) {
    const cpu_device *d = cpu_of(base);
    const skv_part *parts = d->batch->parts;
    const skv_head *heads = heads_of(d, parts, layer);
    const size_t n_kv = (size_t)d->work.config->n_kv_heads;
    bool even = true; /* heads of one row may hold different numbers of pages: then they are taken whole */
    for (size_t h = 1; h < n_kv; h++) even &= heads[h].n_pages == heads[0].n_pages;
    if (d->batch->n_tokens == 1 && base->n_threads > 1 && even && heads[0].n_pages > 8) {
        attend_pages(d, heads, q, out);
        return;
    }
    size_t n_tasks = 0;
    for (size_t p = 0; p < d->batch->n_parts; p++) n_tasks += n_blocks(d, parts + p);
    const size_t per_thread = cpu_attention_floats(&d->work);
#pragma omp parallel num_threads(base->n_threads) if (n_tasks > 1)
    {
        float *scratch = d->attending + (size_t)omp_get_thread_num() * per_thread;
        const skv_part *part = parts; /* tasks come in ascending order, so the part is found by walking on */
        size_t before = 0;
#pragma omp for schedule(monotonic : dynamic)
        for (size_t task = 0; task < n_tasks; task++) {
            while (task >= before + n_blocks(d, part)) before += n_blocks(d, part++);
            const size_t h = (task - before) % n_kv, first = (task - before) / n_kv * BLOCK_TOKENS;
            const size_t n = part->n - first < BLOCK_TOKENS ? part->n - first : BLOCK_TOKENS;
            const skv_head *head = heads_of(d, part, layer) + h;
            const attention_block block = {part, head, h, first, n, 0, (size_t)head->n_pages};
            attend_block(d, &block, q, scratch, NULL, out);
        }
    }
}

/* Every query adds its probabilities to the slots it sees, queries in order of position and heads in order, whatever
 * the chunk. */
static void receive_head(const cpu_device *d, const skv_part *part, const skv_head *head, size_t kv_head,
                         const float *q, float *scratch, float *logits) {
    const skv_cache_shape *cache = &d->work.cache;
    const size_t n_heads = (size_t)d->work.config->n_heads, group = n_heads / (size_t)d->work.config->n_kv_heads;
    const size_t stride = (size_t)cache->stride, dim = (size_t)cache->head_dim;
    const float scale = 1.0f / sqrtf((float)dim);
    float *query = scratch + SKV_PAGE * stride, *probability = logits + padded(d->work.head_slots);
    for (size_t t = 0; t < part->n; t++)
        for (size_t g = 0; g < group; g++) {
            const size_t visible = (size_t)head->n_slots - part->n + t + 1;
            memcpy(query, q + ((part->first + t) * n_heads + kv_head * group + g) * dim, dim * sizeof *q);
            memset(query + dim, 0, (stride - dim) * sizeof *q);
            for (size_t page = 0; page * SKV_PAGE < visible; page++) {
                const size_t left = visible - page * SKV_PAGE, n = left < SKV_PAGE ? left : SKV_PAGE;
                const float *keys = page_f32(d, page_keys(head, page), n, scratch);
                d->kernels->inner(query, keys, n, stride, logits + page * SKV_PAGE);
            }
            for (size_t j = 0; j < visible; j++) logits[j] *= scale;
            memset(probability, 0, padded(visible) * sizeof *probability);
            d->kernels->add_softmax(logits, visible, probability);
            for (size_t j = 0; j < visible; j++) page_sums(cache, head, j / SKV_PAGE)[j % SKV_PAGE] += probability[j];
        }
}

void cpu_receive(skv_device *base, size_t layer, const float *q) {
    const cpu_device *d = cpu_of(base);
    const size_t n_kv = (size_t)d->work.config->n_kv_heads, attending = cpu_attention_floats(&d->work);
    const size_t logits = 2 * padded(d->work.head_slots);
#pragma omp parallel for schedule(dynamic) num_threads(base->n_threads)
    for (size_t task = 0; task < d->batch->n_parts * n_kv; task++) {
        const skv_part *part = d->batch->parts + task / n_kv;
        const size_t thread = (size_t)omp_get_thread_num(), h = task % n_kv;
        receive_head(d, part, heads_of(d, part, layer) + h, h, q, d->attending + thread * attending,
                     d->received + thread * logits);
    }
}
