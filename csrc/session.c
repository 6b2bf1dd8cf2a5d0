#include "session.h"

static float *floats(skv_session *s, size_t n, size_t width) { return skv_alloc(&s->heap, skv_mul(n, width), sizeof(float)); }

skv_session *skv_session_new(const skv_model *model, skv_dtype cache_type, size_t n_rows, size_t max_tokens, size_t limit_bytes, int n_threads,
                             skv_error *error) {
    const skv_config *c = &model->config;
    const size_t q = (size_t)c->n_heads * (size_t)c->head_dim, kv = (size_t)c->n_kv_heads * (size_t)c->head_dim;
    skv_heap heap = {0};
    skv_session *s = skv_alloc(&heap, 1, sizeof *s);
    if (!s) goto out_of_memory;
    *s = (skv_session){.model = model, .heap = heap, .n_rows = n_rows, .max_tokens = max_tokens};
    s->cache = (skv_cache){.shape = skv_cache_shape_of(c, cache_type), .heap = &s->heap, .limit_bytes = limit_bytes};
    s->exec = (skv_exec){.backend = model->backend, .n_threads = n_threads};
    s->exec.scratch_per_thread = (model->backend->scratch(&s->cache.shape, c->n_heads / c->n_kv_heads) + 15) / 16 * 16;
    s->exec.scratch = floats(s, (size_t)n_threads, s->exec.scratch_per_thread);
    s->rows = skv_alloc(&s->heap, n_rows, sizeof *s->rows);
    s->views = skv_alloc(&s->heap, n_rows, sizeof *s->views);
    s->x = floats(s, max_tokens, (size_t)c->hidden);
    s->y = floats(s, max_tokens, (size_t)c->hidden);
    s->q = floats(s, max_tokens, q);
    s->mixed = floats(s, max_tokens, q);
    s->k = floats(s, max_tokens, kv);
    s->v = floats(s, max_tokens, kv);
    s->gate = floats(s, max_tokens, (size_t)c->ffn);
    s->up = floats(s, max_tokens, (size_t)c->ffn);
    s->cosine = floats(s, max_tokens, (size_t)c->head_dim / 2);
    s->sine = floats(s, max_tokens, (size_t)c->head_dim / 2);
    if (s->exec.scratch && s->rows && s->views && s->x && s->y && s->q && s->mixed && s->k && s->v && s->gate && s->up && s->cosine && s->sine) return s;

out_of_memory:
    skv_session_free(s);
    skv_fail(error, SKV_CAPACITY, "out of memory for a session of %zu rows and %zu tokens a forward", n_rows, max_tokens);
    return NULL;
}

void skv_session_free(skv_session *s) {
    if (!s) return;
    for (size_t r = 0; s->rows && r < s->n_rows; r++)
        if (s->rows[r].open) skv_row_close(s, (int32_t)r);
    skv_cache_free(&s->cache);
    void *const blocks[] = {s->exec.scratch, s->exec.partials, s->rows, s->views, s->x, s->y, s->q, s->mixed, s->k, s->v, s->gate, s->up, s->cosine, s->sine};
    for (size_t i = 0; i < sizeof blocks / sizeof *blocks; i++) skv_free(&s->heap, blocks[i]);
    skv_heap heap = s->heap;
    skv_free(&heap, s);
}

skv_status skv_row_open(skv_session *s, int32_t capacity, int32_t *row, skv_error *error) {
    const skv_config *c = &s->model->config;
    if (capacity < 1 || capacity > c->context)
        return skv_fail(error, SKV_CONFIG, "a row of %d tokens; this model's context allows 1 to %d", capacity, c->context);
    size_t free_row = 0;
    while (free_row < s->n_rows && s->rows[free_row].open) free_row++;
    if (free_row == s->n_rows) return skv_fail(error, SKV_CAPACITY, "all %zu rows are taken", s->n_rows);
    const size_t n_heads = (size_t)c->n_layers * (size_t)c->n_kv_heads, pages = ((size_t)capacity + SKV_PAGE - 1) / SKV_PAGE;
    skv_row *r = s->rows + free_row;
    *r = (skv_row){.capacity = capacity};
    if (pages > s->exec.n_partial_pages) {
        float *partials = floats(s, (size_t)c->n_heads * pages, (size_t)s->cache.shape.stride + 2);
        if (!partials) return skv_fail(error, SKV_CAPACITY, "out of memory for a row of %d tokens", capacity);
        skv_free(&s->heap, s->exec.partials);
        s->exec.partials = partials;
        s->exec.n_partial_pages = pages;
    }
    if (skv_cache_reserve(&s->cache, n_heads * pages, error)) return error->code;
    r->n_reserved = n_heads * pages;
    r->heads = skv_alloc(&s->heap, n_heads, sizeof *r->heads);
    r->pages = skv_alloc(&s->heap, n_heads * pages, sizeof *r->pages);
    r->open = true;
    if (!r->heads || !r->pages) {
        skv_row_close(s, (int32_t)free_row);
        return skv_fail(error, SKV_CAPACITY, "out of memory for a row of %d tokens", capacity);
    }
    for (size_t h = 0; h < n_heads; h++) r->heads[h].pages = r->pages + h * pages;
    *row = (int32_t)free_row;
    return SKV_OK;
}

void skv_row_close(skv_session *s, int32_t row) {
    const size_t n_heads = (size_t)s->model->config.n_layers * (size_t)s->model->config.n_kv_heads;
    skv_row *r = s->rows + row;
    for (size_t h = 0; r->heads && h < n_heads; h++) skv_cache_clear(&s->cache, r->heads + h);
    skv_free(&s->heap, r->heads);
    skv_free(&s->heap, r->pages);
    skv_cache_release(&s->cache, r->n_reserved);
    *r = (skv_row){0};
}
