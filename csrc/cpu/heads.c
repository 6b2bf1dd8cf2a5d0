#include "heads.h"

#include <string.h>

/* Lays the arrays out from block on, if it is not NULL; returns the floats they take. */
static size_t lay_out(const skv_workload *work, head_work *w, float *block) {
    const size_t stride = (size_t)work->cache.stride, n = work->scored_slots, row = padded(n);
    const size_t n_kv = (size_t)work->config->n_kv_heads, group = (size_t)work->config->n_heads / n_kv;
    const size_t rows = (size_t)work->window * (work->needs & SKV_QUERY_HEADS ? group : 1);
    const size_t pooled = work->needs & SKV_BY_LAYER ? n_kv : 1;
    struct {
        float **floats;
        int32_t **integers;
        size_t n;
    } const parts[] = {
        {&w->keys, NULL, n * stride},
        {&w->unit, NULL, n * stride},
        {&w->queries, NULL, (size_t)work->window * group * stride},
        {&w->z, NULL, rows * row},
        {&w->panel, NULL, stride * SKV_COLUMNS},
        {&w->products, NULL, ROWS * SKV_COLUMNS},
        {&w->sum, NULL, stride},
        {&w->self, NULL, row},
        {&w->lost, NULL, row},
        {&w->scratch, NULL, 2 * row * pooled},
        {NULL, &w->active, row},
        {NULL, &w->positions, row},
        {NULL, &w->wanted, n_kv},
        {NULL, &w->ends, n_kv},
    };
    size_t at = 0;
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++) {
        if (block && parts[i].floats) *parts[i].floats = block + at;
        if (block && parts[i].integers) *parts[i].integers = (int32_t *)(void *)(block + at);
        at += (parts[i].n + 15) / 16 * 16;
    }
    for (size_t i = 0; i < SKV_N_TERMS; i++, at += row)
        if (block) w->terms[i] = block + at;
    return at;
}

size_t cpu_scoring_floats(const skv_workload *work) { return lay_out(work, &(head_work){0}, NULL); }

static size_t area_parts(unsigned keep) { return 2 + (size_t)__builtin_popcount(keep); }

size_t cpu_scores_floats(const skv_workload *work) {
    const size_t n_heads = (size_t)work->config->n_layers * (size_t)work->config->n_kv_heads;
    return work->n_due * (work->due_slots + 32 * n_heads) * area_parts(work->keep);
}

head_work head_of_thread(const cpu_device *d, const skv_scoring *scoring, size_t thread) {
    const skv_config *c = d->work.config;
    head_work w = {.device = d,
                   .scoring = scoring,
                   .group = (size_t)(c->n_heads / c->n_kv_heads),
                   .dim = (size_t)c->head_dim,
                   .stride = (size_t)d->work.cache.stride};
    lay_out(&d->work, &w, d->scoring + thread * cpu_scoring_floats(&d->work));
    return w;
}

size_t head_area(const skv_scoring *s, const skv_job *job) {
    return area_parts(s->keep) * padded((size_t)job->n_slots);
}

float *head_score(const cpu_device *d, const skv_job *job) { return d->scores + job->at; }

float *head_term(const cpu_device *d, const skv_scoring *s, const skv_job *job, unsigned term) {
    const unsigned before = s->keep & ((1u << term) - 1);
    return d->scores + job->at + (1 + (size_t)__builtin_popcount(before)) * padded((size_t)job->n_slots);
}

int32_t *head_kept(const cpu_device *d, const skv_scoring *s, const skv_job *job) {
    const size_t before = area_parts(s->keep) - 1;
    return (int32_t *)(void *)(d->scores + job->at + before * padded((size_t)job->n_slots));
}

size_t head_slot(const skv_job *job, size_t i) {
    if (!job->held) return i;
    return i < (size_t)job->n_held ? (size_t)job->held[i] : (size_t)job->end + i - (size_t)job->n_held;
}

void head_gather(const cpu_device *d, const skv_job *job, float *keys, int32_t *positions, float *sums) {
    const skv_cache_shape *cache = &d->work.cache;
    const size_t n = (size_t)job->n_slots, stride = (size_t)cache->stride;
    for (size_t i = 0, run; i < n; i += run) {
        const size_t slot = head_slot(job, i), page = slot / SKV_PAGE, at = slot % SKV_PAGE;
        run = job->held ? 1 : n - i < SKV_PAGE ? n - i : SKV_PAGE; /* without a list page by page */
        memcpy(positions + i, page_positions(cache, job->head, page) + at, run * sizeof *positions);
        if (sums) memcpy(sums + i, page_sums(cache, job->head, page) + at, run * sizeof *sums);
        if (!keys) continue;
        const float *from = cpu_keys(d, job->head, page, at, run, keys + i * stride);
        if (from != keys + i * stride) memcpy(keys + i * stride, from, run * stride * sizeof *keys);
    }
}

size_t head_queries(const cpu_device *d, const skv_job *job) {
    const size_t window = (size_t)d->work.window, fed = (size_t)job->due->n_tokens;
    return fed < window ? fed : window;
}

const float *head_query(const cpu_device *d, const skv_job *job, size_t i, size_t g) {
    const skv_config *c = d->work.config;
    const size_t window = (size_t)d->work.window, n_heads = (size_t)c->n_heads, group = n_heads / (size_t)c->n_kv_heads;
    const size_t place = ((size_t)job->due->n_tokens - head_queries(d, job) + i) % window;
    const size_t query = ((size_t)job->layer * window + place) * n_heads + (size_t)job->kv_head * group + g;
    return job->due->ring + query * (size_t)c->head_dim;
}
