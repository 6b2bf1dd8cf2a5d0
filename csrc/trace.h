/* What was kept, and with which scores: records (skv_record) one behind the other, until the caller takes them out. */
#ifndef SKV_TRACE_H
#define SKV_TRACE_H

#include "heap.h"
#include "skipkv.h"

typedef struct skv_trace {
    char *bytes;
    size_t n, capacity;
} skv_trace;

/* Room for n more bytes. */
bool skv_trace_reserve(skv_trace *trace, skv_heap *heap, size_t n);

/* Bytes of a record with what follows it. */
size_t skv_trace_bytes(const skv_record *record);

/* Adds a record, its positions [n_kept] and its arrays: terms in `given` and the score, [n_candidates] each. */
void skv_trace_add(skv_trace *trace, const skv_record *record, const int32_t *positions, float *const *terms,
                   const float *score);

#endif
