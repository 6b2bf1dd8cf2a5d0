#include "cache.h"

#include <assert.h>
#include <string.h>

skv_cache_shape skv_cache_shape_of(int32_t head_dim, skv_dtype type, bool sums) {
    skv_cache_shape s = {.type = type, .sums = sums, .head_dim = head_dim, .stride = (head_dim + 15) / 16 * 16};
    s.slot_bytes = (size_t)s.stride * skv_dtypes[type].size;
    s.values_at = SKV_PAGE * s.slot_bytes;
    s.scales_at = 2 * s.values_at;
    s.positions_at = s.scales_at + (type == SKV_Q8 ? 2 * SKV_PAGE * sizeof(float) : 0);
    s.sums_at = s.positions_at + SKV_PAGE * sizeof(int32_t);
    s.page_bytes = s.sums_at + (sums ? SKV_PAGE * sizeof(float) : 0);
    return s;
}

/* Adds a chunk of n pages to the pool. */
static bool grow(skv_cache *c, size_t n) {
    char *chunk = c->device->backend->alloc(c->device, n, c->shape.page_bytes);
    if (!chunk || !skv_regrow(c->heap, &c->chunks, c->n_chunks, c->n_chunks + 1, sizeof *c->chunks) ||
        !skv_regrow(c->heap, &c->free_pages, c->n_free, c->n_pages + n, sizeof *c->free_pages)) {
        c->device->backend->free(c->device, chunk);
        return false;
    }
    c->chunks[c->n_chunks++] = chunk;
    /* New pages go below the old ones: the stack is popped at its end. */
    memmove(c->free_pages + n, c->free_pages, c->n_free * sizeof *c->free_pages);
    for (size_t i = 0; i < n; i++) c->free_pages[i] = chunk + (n - 1 - i) * c->shape.page_bytes;
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
        return skv_device_full(c->device, error, "%zu bytes of cache", skv_mul(n, c->shape.page_bytes));
    c->n_reserved = total;
    return SKV_OK;
}

void skv_cache_release(skv_cache *c, size_t n) { c->n_reserved -= n; }

void skv_cache_extend(skv_cache *c, skv_head *head, size_t n) {
    head->n_slots += (int32_t)n;
    if ((size_t)head->n_pages < skv_cache_pages((size_t)head->n_slots)) head->version = ++c->n_versions;
    while ((size_t)head->n_pages * SKV_PAGE < (size_t)head->n_slots) {
        assert(c->n_free);
        head->pages[head->n_pages++] = c->free_pages[--c->n_free];
    }
    if (c->n_pages - c->n_free > c->peak_pages) c->peak_pages = c->n_pages - c->n_free;
}

void skv_cache_truncate(skv_cache *c, skv_head *head, size_t n) {
    if ((size_t)head->n_pages > skv_cache_pages(n)) head->version = ++c->n_versions;
    while ((size_t)head->n_pages * SKV_PAGE >= n + SKV_PAGE) c->free_pages[c->n_free++] = head->pages[--head->n_pages];
    head->n_slots = (int32_t)n;
}

void skv_cache_free(skv_cache *c) {
    for (size_t i = 0; i < c->n_chunks; i++) c->device->backend->free(c->device, c->chunks[i]);
    skv_free(c->heap, c->chunks);
    skv_free(c->heap, c->free_pages);
    c->chunks = c->free_pages = NULL;
    c->n_chunks = c->n_free = c->n_pages = 0;
}
