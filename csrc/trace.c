#include "trace.h"

#include <string.h>

bool skv_trace_reserve(skv_trace *t, skv_heap *heap, size_t n) {
    const size_t need = skv_add(t->n, n);
    if (need <= t->capacity) return true;
    const size_t capacity = skv_add(need, need / 2);
    if (!skv_regrow(heap, &t->bytes, t->n, capacity, 1)) return false;
    t->capacity = capacity;
    return true;
}

size_t skv_trace_bytes(const skv_record *r) {
    const size_t arrays = r->scored ? 1 + (size_t)__builtin_popcount(r->given) : 0;
    return sizeof *r + 4 * ((size_t)r->n_kept + arrays * (size_t)r->n_candidates);
}

static void put(skv_trace *t, const void *data, size_t bytes) {
    if (bytes) memcpy(t->bytes + t->n, data, bytes);
    t->n += bytes;
}

void skv_trace_add(skv_trace *t, const skv_record *r, const int32_t *positions, float *const *terms,
                   const float *score) {
    const size_t bytes = (size_t)r->n_candidates * sizeof(float);
    put(t, r, sizeof *r);
    put(t, positions, (size_t)r->n_kept * sizeof *positions);
    if (!r->scored) return;
    for (unsigned term = 0; term < SKV_N_TERMS; term++)
        if (r->given & 1u << term) put(t, terms[term], bytes);
    put(t, score, bytes);
}
