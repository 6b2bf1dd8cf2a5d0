#include "cache.h"

#include <assert.h>
#include <string.h>

skv_cache_shape skv_cache_shape_of(const skv_config *config, skv_dtype type, bool sums) {
    const int32_t stride = (config->head_dim + 15) / 16 * 16;
    return (skv_cache_shape){.type = type,
                             .head_dim = config->head_dim,
                             .stride = stride,
                             .sums = sums,
                             .page_bytes =
                                 SKV_PAGE * (2 * (size_t)stride * skv_dtype_size(type) + sizeof(int32_t) + (sums ? sizeof(float) : 0))};
}

/* Adds a chunk of n pages to the pool. */
static bool grow(skv_cache *c, size_t n) {
    char *chunk = skv_alloc(c->heap, n, c->shape.page_bytes);
    char **chunks = skv_alloc(c->heap, c->n_chunks + 1, sizeof *chunks);
    char **free_pages = skv_alloc(c->heap, c->n_pages + n, sizeof *free_pages);
    if (!chunk || !chunks || !free_pages) {
        skv_free(c->heap, chunk);
        skv_free(c->heap, chunks);
        skv_free(c->heap, free_pages);
        return false;
    }
    if (c->n_chunks) memcpy(chunks, c->chunks, c->n_chunks * sizeof *chunks);
    chunks[c->n_chunks++] = chunk;
    /* New pages go below the old ones: the stack is popped at its end. */
    for (size_t i = 0; i < n; i++) free_pages[i] = chunk + (n - 1 - i) * c->shape.page_bytes;
    if (c->n_free) memcpy(free_pages + n, c->free_pages, c->n_free * sizeof *free_pages);
    skv_free(c->heap, c->chunks);
    skv_free(c->heap, c->free_pages);
    c->chunks = chunks;
    c->free_pages = free_pages;
    c->n_free += n;
    c->n_pages += n;
    return true;
}

skv_status skv_cache_reserve(skv_cache *c, size_t n, skv_error *error) {
    const size_t total = skv_add(c->n_reserved, n), bytes = skv_mul(total, c->shape.page_bytes);
    if (bytes > c->limit_bytes)
        return skv_fail(error, SKV_CAPACITY, "the cache needs %zu bytes with %zu in use; memory_limit is %zu",
                        skv_mul(n, c->shape.page_bytes), c->n_reserved * c->shape.page_bytes, c->limit_bytes);
    if (total > c->n_pages && !grow(c, total - c->n_pages))
        return skv_fail(error, SKV_CAPACITY, "out of memory for %zu bytes of cache", skv_mul(n, c->shape.page_bytes));
    c->n_reserved = total;
    return SKV_OK;
}

void skv_cache_release(skv_cache *c, size_t n) { c->n_reserved -= n; }

void skv_cache_extend(skv_cache *c, skv_head *head, size_t n) {
    head->n_slots += (int32_t)n;
    while ((size_t)head->n_pages * SKV_PAGE < (size_t)head->n_slots) {
        assert(c->n_free);
        head->pages[head->n_pages++] = c->free_pages[--c->n_free];
    }
    if (c->n_pages - c->n_free > c->peak_pages) c->peak_pages = c->n_pages - c->n_free;
}

void skv_cache_truncate(skv_cache *c, skv_head *head, size_t n) {
    while ((size_t)head->n_pages * SKV_PAGE >= n + SKV_PAGE) c->free_pages[c->n_free++] = head->pages[--head->n_pages];
    head->n_slots = (int32_t)n;
}

void skv_cache_clear(skv_cache *c, skv_head *head) { skv_cache_truncate(c, head, 0); }

void skv_cache_free(skv_cache *c) {
    for (size_t i = 0; i < c->n_chunks; i++) skv_free(c->heap, c->chunks[i]);
    skv_free(c->heap, c->chunks);
    skv_free(c->heap, c->free_pages);
}
