#define _DEFAULT_SOURCE /* MAP_ANONYMOUS, madvise */
#include "heap.h"

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

/* Blocks of 2 MiB and more are mapped on their own: pages that are never touched cost nothing, huge pages save TLB
 * misses when weights are streamed, and the memory goes back to the system when the block is freed. */
enum { HEADER = 64 };
static const size_t HUGE_PAGE = (size_t)2 << 20;

typedef struct block_header {
    size_t size;
    void *base;    /* what to give back */
    size_t mapped; /* bytes mapped at base; 0: from malloc */
} block_header;

#ifdef SKIPKV_TEST
static _Thread_local long left, held;

/* The k-th allocation from now on fails, 0: none; returns how many were left before that of the last k. */
__attribute__((visibility("default"))) long skv_test_refuse(long k) {
    const long before = left;
    left = k;
    return before;
}

/* Blocks that this thread has allocated and not freed. */
__attribute__((visibility("default"))) long skv_test_blocks(void) { return held; }

static bool refuses(void) { return left && !--left; }
static void hold(long n) { held += n; }
#else
static bool refuses(void) { return false; }
static void hold(long n) { (void)n; }
#endif

size_t skv_mul(size_t a, size_t b) {
    size_t product;
    return __builtin_mul_overflow(a, b, &product) ? SIZE_MAX : product;
}

size_t skv_add(size_t a, size_t b) {
    size_t sum;
    return __builtin_add_overflow(a, b, &sum) ? SIZE_MAX : sum;
}

static char *align_up(char *p, size_t alignment) { return p + (alignment - (uintptr_t)p % alignment) % alignment; }

void *skv_alloc(skv_heap *heap, size_t count, size_t size) {
    size = skv_mul(count, size);
    if (size > SIZE_MAX / 2 || refuses()) return NULL;
    block_header header = {.size = size};
    char *block;
    if (size < HUGE_PAGE) {
        header.base = calloc(1, size + 2 * HEADER);
        if (!header.base) return NULL;
        block = align_up((char *)header.base + HEADER, HEADER);
    } else {
        header.mapped = size + HUGE_PAGE + HEADER;
        header.base =
            mmap(NULL, header.mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (header.base == MAP_FAILED) return NULL;
        block = align_up((char *)header.base + HEADER, HUGE_PAGE);
        /* Only whole huge pages inside the block: rounding up would make small models' memory grow. */
        madvise(block, size / HUGE_PAGE * HUGE_PAGE, MADV_HUGEPAGE);
    }
    memcpy(block - HEADER, &header, sizeof header);
    hold(1);
    heap->n_calls++;
    heap->live_bytes += size;
    if (heap->live_bytes > heap->peak_bytes) heap->peak_bytes = heap->live_bytes;
    return block;
}

void skv_free(skv_heap *heap, void *block) {
    if (!block) return;
    block_header header;
    memcpy(&header, (char *)block - HEADER, sizeof header);
    hold(-1);
    heap->n_calls++;
    heap->live_bytes -= header.size;
    if (header.mapped)
        munmap(header.base, header.mapped);
    else
        free(header.base);
}

bool skv_regrow(skv_heap *heap, void *block, size_t from, size_t to, size_t size) {
    void **at = block;
    void *larger = skv_alloc(heap, to, size);
    if (!larger) return false;
    if (from) memcpy(larger, *at, from * size);
    skv_free(heap, *at);
    *at = larger;
    return true;
}
