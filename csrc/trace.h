/* What was kept, and with which scores: a list of records that the caller takes out after a forward. */
#ifndef SKV_TRACE_H
#define SKV_TRACE_H

#include "heap.h"

typedef enum skv_trace_level { SKV_TRACE_NONE, SKV_TRACE_KEPT, SKV_TRACE_SCORES } skv_trace_level;

/* One KV head of one compaction, followed by the positions of the kept slots [n_kept] int32 and, at SKV_TRACE_SCORES, by importance,
 * redundancy, penalty (as the policy gives them) and score [n_candidates] float32: the numbers that decided. */
typedef struct skv_record {
    int32_t row, step, layer, head;
    int32_t n_before, n_kept, n_candidates;
    uint32_t given, scored; /* which arrays stand before the score (SKV_GIVES_…, SKV_NEEDS_SENTENCES); whether there are any */
} skv_record;

typedef struct skv_trace {
    char *bytes;
    size_t n, capacity;
} skv_trace;

#endif
