/* The one allocator of the core. Every model and session owns a heap, so that the ledger can state its bytes and a test
 * can show that a decode step calls no allocator. */
#ifndef SKV_HEAP_H
#define SKV_HEAP_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef struct skv_heap {
    size_t live_bytes; /* allocated and not yet freed, headers left out */
    size_t peak_bytes;
    uint64_t n_calls; /* of alloc and free together */
} skv_heap;

/* count × size zeroed bytes, aligned to 64; NULL if the product overflows or memory is out. A count of 0 gives a valid
 * pointer. */
void *skv_alloc(skv_heap *heap, size_t count, size_t size);
void skv_free(skv_heap *heap, void *block);

/* *block ← room for `to` items of this size, its first `from` ones kept; false, and nothing changed, if memory is
 * out. block: address of a pointer to an object of any type. */
bool skv_regrow(skv_heap *heap, void *block, size_t from, size_t to, size_t size);

/* a × b and a + b, SIZE_MAX where they overflow, so that a later skv_alloc fails. */
size_t skv_mul(size_t a, size_t b);
size_t skv_add(size_t a, size_t b);

#endif
