/* The last act of a forward (METHOD.md §1, §5): rows that stand on their grid compare their sentences, and every head
 * with at least its budget of slots is scored and compacted: due? → score → select → trace → compact. What is kept is
 * decided by the backend's score and select. */
#ifndef SKV_EVICT_H
#define SKV_EVICT_H

#include "session.h"

/* Bits of the terms that are read back after scoring. */
unsigned skv_evict_keeps(const skv_method *method, skv_trace_level level);

/* Floats of the session's `fetched` for heads of n_slots; 0: nothing is ever read back. */
size_t skv_evict_fetched(const skv_session *session, size_t n_slots);

/* Compacts the session's first n due rows. A row that cannot go on afterwards has its `failure` set. */
skv_status skv_evict(skv_session *session, size_t n, skv_error *error);

#endif
