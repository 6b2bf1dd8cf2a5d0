/* Where things lie inside a page (see skv_head). */
#ifndef SKV_PAGES_H
#define SKV_PAGES_H

#include "kernels.h"

static inline char *page_keys(const skv_head *head, size_t page) { return head->pages[page]; }

static inline char *page_values(const skv_cache_shape *cache, const skv_head *head, size_t page) {
    return head->pages[page] + SKV_PAGE * (size_t)cache->stride * skv_dtype_size(cache->type);
}

static inline int32_t *page_positions(const skv_cache_shape *cache, const skv_head *head, size_t page) {
    return (int32_t *)(void *)(head->pages[page] + 2 * SKV_PAGE * (size_t)cache->stride * skv_dtype_size(cache->type));
}

/* Attention received, only where the cache has sums. */
static inline float *page_sums(const skv_cache_shape *cache, const skv_head *head, size_t page) {
    return (float *)(void *)(page_positions(cache, head, page) + SKV_PAGE);
}

/* n keys or values of a page as float32, in the page itself or in scratch [SKV_PAGE, stride]. */
static inline const float *page_f32(const skv_kernels *kernels, const skv_cache_shape *cache, const char *page, size_t n, float *scratch) {
    if (cache->type == SKV_F32) return (const float *)(const void *)page;
    kernels->widen((const uint16_t *)(const void *)page, n * (size_t)cache->stride, scratch);
    return scratch;
}

#endif
