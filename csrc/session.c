#include "session.h"

#include <string.h>

#include "evict.h"

static float *floats(skv_session *s, size_t n, size_t width) { return skv_alloc(&s->heap, skv_mul(n, width), sizeof(float)); }

static size_t n_cache_heads(const skv_session *s) { return (size_t)s->model->config.n_layers * (size_t)s->model->config.n_kv_heads; }

skv_session *skv_session_new(const skv_model *model, const skv_options *options, skv_error *error) {
    const skv_config *c = &model->config;
    const size_t q = (size_t)c->n_heads * (size_t)c->head_dim, kv = (size_t)c->n_kv_heads * (size_t)c->head_dim, n = options->max_tokens;
    const size_t n_heads = (size_t)c->n_layers * (size_t)c->n_kv_heads;
    if (skv_method_check(&options->method, n_heads, (size_t)c->n_kv_heads, error)) return NULL;
    skv_heap heap = {0};
    skv_session *s = skv_alloc(&heap, 1, sizeof *s);
    if (!s) goto out_of_memory;
    *s = (skv_session){.model = model,
                       .heap = heap,
                       .n_rows = options->n_rows,
                       .max_tokens = n,
                       .method = options->method,
                       .vocabulary = options->vocabulary,
                       .trace_level = options->trace};
    s->cache = (skv_cache){.shape = skv_cache_shape_of(c, options->cache_type, skv_method_needs(&options->method) & SKV_NEEDS_SUMS),
                           .heap = &s->heap,
                           .limit_bytes = options->limit_bytes};
    s->exec = (skv_exec){.backend = model->backend, .n_threads = options->n_threads};
    s->exec.scratch_per_thread = (model->backend->scratch(&s->cache.shape, c->n_heads / c->n_kv_heads) + 15) / 16 * 16;
    s->exec.scratch = floats(s, (size_t)options->n_threads, s->exec.scratch_per_thread);
    s->rows = skv_alloc(&s->heap, s->n_rows, sizeof *s->rows);
    s->views = skv_alloc(&s->heap, s->n_rows, sizeof *s->views);
    s->due = skv_alloc(&s->heap, s->n_rows, sizeof *s->due);
    s->tasks = skv_alloc(&s->heap, skv_mul(s->n_rows, (size_t)c->n_layers), sizeof *s->tasks);
    s->budgets = skv_alloc(&s->heap, n_heads, sizeof *s->budgets);
    s->marks = skv_alloc(&s->heap, n, sizeof *s->marks);
    s->steered = skv_alloc(&s->heap, n, sizeof *s->steered);
    s->alphas = floats(s, n, 1);
    s->x = floats(s, n, (size_t)c->hidden);
    s->y = floats(s, n, (size_t)c->hidden);
    s->q = floats(s, n, q);
    s->mixed = floats(s, n, q);
    s->k = floats(s, n, kv);
    s->v = floats(s, n, kv);
    s->gate = floats(s, n, (size_t)c->ffn);
    s->up = floats(s, n, (size_t)c->ffn);
    s->cosine = floats(s, n, (size_t)c->head_dim / 2);
    s->sine = floats(s, n, (size_t)c->head_dim / 2);
    if (!(s->exec.scratch && s->rows && s->views && s->due && s->tasks && s->budgets && s->marks && s->steered && s->alphas && s->x &&
          s->y && s->q && s->mixed && s->k && s->v && s->gate && s->up && s->cosine && s->sine))
        goto out_of_memory;
    for (size_t h = 0; h < n_heads; h++) s->budgets[h] = options->method.budgets ? options->method.budgets[h] : 0;
    s->method.budgets = s->budgets;
    return s;

out_of_memory:
    skv_session_free(s);
    skv_fail(error, SKV_CAPACITY, "out of memory for a session of %zu rows and %zu tokens a forward", options->n_rows, n);
    return NULL;
}

void skv_session_free(skv_session *s) {
    if (!s) return;
    for (size_t r = 0; s->rows && r < s->n_rows; r++)
        if (s->rows[r].open) skv_row_close(s, (int32_t)r);
    skv_cache_free(&s->cache);
    void *const blocks[] = {s->exec.scratch,
                            s->exec.partials,
                            s->rows,
                            s->views,
                            s->due,
                            s->tasks,
                            s->budgets,
                            s->marks,
                            s->steered,
                            s->alphas,
                            s->x,
                            s->y,
                            s->q,
                            s->mixed,
                            s->k,
                            s->v,
                            s->gate,
                            s->up,
                            s->cosine,
                            s->sine,
                            s->scoring,
                            s->received,
                            s->trace.bytes};
    for (size_t i = 0; i < sizeof blocks / sizeof *blocks; i++) skv_free(&s->heap, blocks[i]);
    skv_heap heap = s->heap;
    skv_free(&heap, s);
}

/* Most slots that a head holds at once: all tokens, or those of the prompt, or a budget and what comes before the next compaction. */
static size_t peak_slots(const skv_session *s, size_t head, int32_t capacity, int32_t n_prompt) {
    if (!(s->method.policy->needs & SKV_COMPACTS) || !s->method.evict) return (size_t)capacity;
    const int32_t decoding = s->method.budgets[head] + s->method.interval, peak = decoding > n_prompt ? decoding : n_prompt;
    return (size_t)(peak < capacity ? peak : capacity);
}

static size_t pages_for(size_t slots) { return (slots + SKV_PAGE - 1) / SKV_PAGE; }

static size_t row_pages(const skv_session *s, int32_t capacity, int32_t n_prompt) {
    size_t pages = 0;
    for (size_t h = 0; h < n_cache_heads(s); h++) pages += pages_for(peak_slots(s, h, capacity, n_prompt));
    return pages;
}

size_t skv_row_bytes(const skv_session *s, int32_t capacity, int32_t n_prompt) {
    return row_pages(s, capacity, n_prompt) * s->cache.shape.page_bytes;
}

void skv_row_shrink(skv_session *s, skv_row *r) {
    const size_t pages = row_pages(s, r->capacity, 0);
    if (pages >= r->n_reserved) return;
    skv_cache_release(&s->cache, r->n_reserved - pages);
    r->n_reserved = pages;
}

/* *block, sized for *have, becomes `total` floats for `need` where that is more; its content is dropped. */
static bool grow(skv_session *s, float **block, size_t *have, size_t need, size_t total) {
    if (need <= *have) return true;
    float *larger = floats(s, total, 1);
    if (!larger) return false;
    skv_free(&s->heap, *block);
    *block = larger;
    *have = need;
    return true;
}

/* What forwards with rows of this many slots need of the session. */
static bool grow_workspace(skv_session *s, size_t slots) {
    const unsigned needs = skv_method_needs(&s->method);
    const size_t pages = pages_for(slots), n_threads = (size_t)s->exec.n_threads, ld = pages * SKV_PAGE + 32;
    const size_t partial = (size_t)s->model->config.n_heads * ((size_t)s->cache.shape.stride + 2);
    if (!grow(s, &s->exec.partials, &s->exec.n_partial_pages, pages, skv_mul(pages, partial))) return false;
    if ((needs & SKV_NEEDS_SUMS) && !grow(s, &s->received, &s->received_ld, ld, skv_mul(ld, 2 * n_threads))) return false;
    if (!(needs & SKV_COMPACTS)) return true;
    if (!grow(s, &s->scoring, &s->scoring_slots, slots, skv_mul(skv_evict_workspace(s, slots), n_threads))) return false;
    s->scoring_per_thread = skv_evict_workspace(s, s->scoring_slots);
    return true;
}

/* The parts of a row whose size follows from its options; those it has are freed by skv_row_close. */
static bool allocate(skv_session *s, skv_row *r) {
    const skv_config *c = &s->model->config;
    const size_t n_heads = n_cache_heads(s);
    size_t n_pages = 0, slots = 0;
    for (size_t h = 0; h < n_heads; h++) {
        const size_t peak = peak_slots(s, h, r->capacity, r->n_prompt);
        n_pages += pages_for(peak);
        if (peak > slots) slots = peak;
    }
    r->heads = skv_alloc(&s->heap, n_heads, sizeof *r->heads);
    r->pages = skv_alloc(&s->heap, n_pages, sizeof *r->pages);
    if (!r->heads || !r->pages || !grow_workspace(s, slots)) return false;
    for (size_t h = 0, at = 0; h < n_heads; h++) {
        r->heads[h].pages = r->pages + at;
        at += pages_for(peak_slots(s, h, r->capacity, r->n_prompt));
    }
    if (skv_method_needs(&s->method) & SKV_NEEDS_QUERIES) {
        r->ring = floats(s, (size_t)c->n_layers * (size_t)s->method.window, (size_t)c->n_heads * (size_t)c->head_dim);
        if (!r->ring) return false;
    }
    if ((s->method.policy->needs & SKV_COMPACTS) && !s->method.evict) {
        r->held = skv_alloc(&s->heap, n_heads, sizeof *r->held);
        if (!r->held) return false;
        for (size_t h = 0; h < n_heads; h++) {
            r->held[h].slots = skv_alloc(&s->heap, (size_t)s->method.budgets[h], sizeof *r->held[h].slots);
            if (!r->held[h].slots) return false;
        }
    }
    if (s->method.compat & SKV_COMPAT_LOST_HEADS) {
        r->lost = skv_alloc(&s->heap, n_heads, sizeof *r->lost);
        if (!r->lost) return false;
    }
    return true;
}

/* A free row of this shape, its pages reserved; its tracker is still to be made. */
static skv_status open_row(skv_session *s, const skv_row *shape, int32_t *row, skv_error *error) {
    const skv_config *c = &s->model->config;
    if (shape->capacity < 1 || shape->capacity > c->context)
        return skv_fail(error, SKV_CONFIG, "a row of %d tokens; this model's context allows 1 to %d", shape->capacity, c->context);
    if (shape->n_prompt < 1 || shape->n_prompt > shape->capacity)
        return skv_fail(error, SKV_CONFIG, "a prompt of %d tokens; this row's capacity allows 1 to %d", shape->n_prompt, shape->capacity);
    if (skv_method_check_prompt(&s->method, n_cache_heads(s), shape->n_prompt, shape->reserve, error)) return error->code;
    size_t free_row = 0;
    while (free_row < s->n_rows && s->rows[free_row].open) free_row++;
    if (free_row == s->n_rows) return skv_fail(error, SKV_CAPACITY, "all %zu rows are taken", s->n_rows);
    const size_t pages = row_pages(s, shape->capacity, shape->n_prompt);
    if (skv_cache_reserve(&s->cache, pages, error)) return error->code;
    skv_row *r = s->rows + free_row;
    *r = *shape;
    r->open = true;
    r->n_reserved = pages;
    *row = (int32_t)free_row;
    if (allocate(s, r)) return SKV_OK;
    skv_row_close(s, *row);
    return skv_fail(error, SKV_CAPACITY, "out of memory for a row of %d tokens", shape->capacity);
}

static bool copy_steering(skv_session *s, skv_row *r, const skv_steering *from) {
    r->steering = *from;
    r->steering.vector = NULL;
    if (!from->vector) return true;
    const size_t hidden = (size_t)s->model->config.hidden;
    r->steering.vector = floats(s, hidden, 1);
    if (r->steering.vector) memcpy(r->steering.vector, from->vector, hidden * sizeof(float));
    return r->steering.vector != NULL;
}

skv_status skv_row_open(skv_session *s, const skv_row_options *o, int32_t *row, skv_error *error) {
    const skv_row shape = {
        .capacity = o->capacity, .n_prompt = o->n_prompt, .reserve = o->reserve, .sequence = {o->sequence[0], o->sequence[1]}};
    if (o->steering.vector && (o->steering.layer < 0 || o->steering.layer >= s->model->config.n_layers))
        return skv_fail(error, SKV_CONFIG, "steering layer is %d; allowed: 0 to %d", o->steering.layer, s->model->config.n_layers - 1);
    if (open_row(s, &shape, row, error)) return error->code;
    skv_row *r = s->rows + *row;
    const size_t decoding = (size_t)s->method.interval;
    if (skv_tracker_init(&r->tracker, &s->heap, &s->vocabulary, s->method.compat, (size_t)s->model->config.hidden, o->n_prompt) &&
        skv_tracker_reserve(&r->tracker, decoding < (size_t)o->capacity ? decoding : (size_t)o->capacity) &&
        copy_steering(s, r, &o->steering))
        return SKV_OK;
    skv_row_close(s, *row);
    return skv_fail(error, SKV_CAPACITY, "out of memory for a row of %d tokens", o->capacity);
}

skv_status skv_row_fork(skv_session *s, int32_t from, int32_t capacity, int64_t sample, int32_t *row, skv_error *error) {
    const skv_config *c = &s->model->config;
    const skv_row *parent = s->rows + from;
    if (capacity < parent->n_tokens)
        return skv_fail(error, SKV_CONFIG, "a fork of capacity %d; the row holds %d tokens already", capacity, parent->n_tokens);
    const skv_row shape = {.failed = parent->failed,
                           .capacity = capacity,
                           .n_prompt = parent->n_prompt,
                           .reserve = parent->reserve,
                           .sequence = {parent->sequence[0], sample},
                           .n_tokens = parent->n_tokens,
                           .n_steered = parent->n_steered,
                           .n_compactions = parent->n_compactions,
                           .n_evicted = parent->n_evicted,
                           .n_pairs = parent->n_pairs};
    if (open_row(s, &shape, row, error)) return error->code;
    skv_row *r = s->rows + *row;
    const size_t n_heads = n_cache_heads(s);
    for (size_t h = 0; h < n_heads; h++) {
        skv_row_extend(s, r, r->heads + h, (size_t)parent->heads[h].n_slots);
        for (int32_t page = 0; page < r->heads[h].n_pages; page++)
            memcpy(r->heads[h].pages[page], parent->heads[h].pages[page], s->cache.shape.page_bytes);
        if (r->held) {
            r->held[h].n = parent->held[h].n, r->held[h].end = parent->held[h].end;
            memcpy(r->held[h].slots, parent->held[h].slots, (size_t)parent->held[h].n * sizeof *r->held[h].slots);
        }
        if (r->lost) r->lost[h] = parent->lost[h];
    }
    if (r->ring) {
        const size_t ring = (size_t)c->n_layers * (size_t)s->method.window * (size_t)c->n_heads * (size_t)c->head_dim;
        memcpy(r->ring, parent->ring, ring * sizeof *r->ring);
    }
    if (skv_tracker_copy(&r->tracker, &parent->tracker) && skv_row_reserve_sentences(r, (size_t)s->method.interval) &&
        copy_steering(s, r, &parent->steering))
        return SKV_OK;
    skv_row_close(s, *row);
    return skv_fail(error, SKV_CAPACITY, "out of memory for a row of %d tokens", capacity);
}

void skv_row_close(skv_session *s, int32_t row) {
    skv_row *r = s->rows + row;
    for (size_t h = 0; r->heads && h < n_cache_heads(s); h++) skv_cache_clear(&s->cache, r->heads + h);
    for (size_t h = 0; r->held && h < n_cache_heads(s); h++) skv_free(&s->heap, r->held[h].slots);
    skv_tracker_free(&r->tracker);
    void *const blocks[] = {r->heads, r->pages, r->ring, r->held, r->lost, r->steering.vector};
    for (size_t i = 0; i < sizeof blocks / sizeof *blocks; i++) skv_free(&s->heap, blocks[i]);
    skv_cache_release(&s->cache, r->n_reserved);
    *r = (skv_row){0};
}

void skv_row_extend(skv_session *s, skv_row *r, skv_head *head, size_t n) {
    const int32_t before = head->n_pages;
    skv_cache_extend(&s->cache, head, n);
    r->n_pages += (size_t)(head->n_pages - before);
    if (r->n_pages > r->peak_pages) r->peak_pages = r->n_pages;
}

bool skv_row_on_grid(const skv_session *s, const skv_row *r, int32_t n_tokens) {
    return n_tokens == r->n_prompt || (n_tokens > r->n_prompt && n_tokens > 1 && n_tokens % s->method.interval == 1 % s->method.interval);
}

int32_t skv_row_chunk(const skv_session *s, int32_t row, int32_t n) {
    const skv_row *r = s->rows + row;
    for (int32_t i = 1; i < n; i++)
        if (skv_row_on_grid(s, r, r->n_tokens + i)) return i;
    return n;
}
