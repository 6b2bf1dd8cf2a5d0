/* Pages of slots for many rows. A row reserves its worst case when it is opened, so that a step never allocates: pages
 * come from a pool that grows only then, and go back to it at once. */
#ifndef SKV_CACHE_H
#define SKV_CACHE_H

#include "backend.h"

typedef struct skv_cache {
    skv_cache_shape shape;
    skv_device *device;
    skv_heap *heap;
    size_t limit_bytes; /* of the pool; SIZE_MAX: none */
    char **chunks;      /* device: what the pool is made of */
    size_t n_chunks;
    char **free_pages;                              /* a stack */
    size_t n_free, n_pages, n_reserved, peak_pages; /* peak: most in use at once */
    uint64_t n_versions;                            /* of lists of pages */
} skv_cache;

skv_cache_shape skv_cache_shape_of(int32_t head_dim, skv_dtype type, bool sums);

static inline size_t skv_cache_pages(size_t n_slots) { return (n_slots + SKV_PAGE - 1) / SKV_PAGE; }

/* Sets n pages aside. SKV_CAPACITY where they do not fit beside what is reserved now. */
skv_status skv_cache_reserve(skv_cache *cache, size_t n, skv_error *error);
void skv_cache_release(skv_cache *cache, size_t n);

/* Room for n more slots of one head, within its row's reservation. */
void skv_cache_extend(skv_cache *cache, skv_head *head, size_t n);

/* Only the first n slots of a head stay; pages beyond them go back. */
void skv_cache_truncate(skv_cache *cache, skv_head *head, size_t n);

/* Gives the pool back, of which nothing may be reserved. */
void skv_cache_free(skv_cache *cache);

#endif
