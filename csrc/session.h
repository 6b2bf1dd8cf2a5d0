/* Rows in flight on one model: their caches, and the workspace of a forward. One thread at a time. */
#ifndef SKV_SESSION_H
#define SKV_SESSION_H

#include "cache.h"
#include "weights.h"

/* n consecutive tokens of a row: 1 is a decode step, more are (a chunk of) prefill. */
typedef struct skv_span {
    int32_t row, n;
} skv_span;

typedef struct skv_row {
    bool open;
    int32_t n_tokens, capacity; /* fed so far; at most */
    skv_head *heads;            /* [n_layers, n_kv_heads] */
    char **pages;               /* the heads' page lists, one block */
    size_t n_reserved;
} skv_row;

typedef struct skv_session {
    const skv_model *model;
    skv_heap heap;
    skv_exec exec;
    skv_cache cache;
    skv_row *rows;
    size_t n_rows, max_tokens; /* tokens of one forward */
    skv_span_view *views;      /* [n_rows] */
    float *x, *y;              /* residual stream, normed or projected: [max_tokens, hidden] */
    float *q, *k, *v, *mixed;  /* [max_tokens, n_heads or n_kv_heads, head_dim] */
    float *gate, *up;          /* [max_tokens, ffn] */
    float *cosine, *sine;      /* [max_tokens, head_dim / 2] */
} skv_session;

skv_session *skv_session_new(const skv_model *model, skv_dtype cache_type, size_t n_rows, size_t max_tokens, size_t limit_bytes, int n_threads,
                             skv_error *error);
void skv_session_free(skv_session *session);

/* A free row for at most `capacity` tokens, reserved in full. SKV_CAPACITY: not now, or never. */
skv_status skv_row_open(skv_session *session, int32_t capacity, int32_t *row, skv_error *error);
void skv_row_close(skv_session *session, int32_t row);

/* Feeds a flat batch: tokens of span 0, then of span 1, … Spans name distinct rows. logits [n_tokens, vocab] where every is true, else
 * [n_spans, vocab]: those of each span's last token. */
skv_status skv_forward(skv_session *session, const skv_span *spans, size_t n_spans, const int32_t *tokens, bool every, float *logits,
                       skv_error *error);

#endif
