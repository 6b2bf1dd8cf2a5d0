/* The last act of a forward (METHOD.md §1, §5): rows that stand on their grid compare their sentences, and every head with at least its
 * budget of slots is scored and compacted: due? → score → protect → select → compact → trace. */
#ifndef SKV_EVICT_H
#define SKV_EVICT_H

#include "session.h"

/* Floats of workspace a thread needs for heads of this many slots. */
size_t skv_evict_workspace(const skv_session *session, size_t n_slots);

/* Compacts the session's `due` rows. */
skv_status skv_evict(skv_session *session, size_t n_due, skv_error *error);

/* keep [budget] ← the slots of one head that stay, ascending: the n_newest last, those at positions below `first`, and of the rest those
 * with the highest score, ties to the lower slot. In order of score with by_score. Returns their number. scratch [n_slots] floats. */
size_t skv_select(const float *score, const int32_t *positions, size_t n_slots, size_t n_newest, int32_t first, size_t budget,
                  bool by_score, float *scratch, int32_t *keep);

/* session.c */
bool skv_row_on_grid(const skv_session *session, const skv_row *row, int32_t n_tokens);
void skv_row_extend(skv_session *session, skv_row *row, skv_head *head, size_t n);
void skv_row_shrink(skv_session *session, skv_row *row); /* gives back what only the prompt needed */

#endif
