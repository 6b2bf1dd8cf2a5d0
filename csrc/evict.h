/* The last act of a forward (METHOD.md §1, §5): rows that stand on their grid compare their sentences, and every head
 * with at least its budget of slots is scored and compacted: due? → score → select → trace → compact. What is
 * kept is decided by the backend's score and select (cpu/score.c, cpu/evict.c). */
#ifndef SKV_EVICT_H
#define SKV_EVICT_H

#include "session.h"

/* Compacts the session's first n due rows. A row that cannot go on afterwards has its `failure` set. */
skv_status skv_evict(skv_session *session, size_t n, skv_error *error);

#endif
