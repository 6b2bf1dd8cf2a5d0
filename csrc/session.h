/* Rows in flight on one model: their caches, sentences and steering, and the workspace of a forward. One thread at a time. */
#ifndef SKV_SESSION_H
#define SKV_SESSION_H

#include "cache.h"
#include "steer.h"
#include "trace.h"
#include "weights.h"

/* n consecutive tokens of a row: 1 is a decode step, more are (a chunk of) prefill or replay. */
typedef struct skv_span {
    int32_t row, n;
} skv_span;

/* With evict = false, the slots of a head that the method would still hold: these, and all from `end` on. */
typedef struct skv_held {
    int32_t *slots;
    int32_t n, end;
} skv_held;

typedef struct skv_row {
    bool open;
    bool failed;                /* its custom score failed halfway through a compaction: it can only be closed */
    int32_t n_tokens, capacity; /* fed so far; at most */
    int32_t n_prompt;
    int32_t reserve;     /* taken off every budget: what padding would take in a padded batch */
    int64_t sequence[2]; /* prompt index, sample index */
    skv_head *heads;     /* [n_layers, n_kv_heads] */
    char **pages;        /* the heads' page lists, one block */
    size_t n_reserved, n_pages, peak_pages;
    float *ring;    /* [n_layers, window, n_heads, head_dim] newest queries, that of position t in place t % window; if needed */
    skv_held *held; /* [n_layers, n_kv_heads], if evict is false */
    bool *lost;     /* [n_layers, n_kv_heads] SKV_COMPAT_LOST_HEADS: no longer penalised */
    skv_tracker tracker;
    skv_steering steering;
    int32_t n_steered, n_compactions;
    uint64_t n_evicted, n_pairs;
} skv_row;

/* One layer of a row that is due: where its records go, and what came of it. */
typedef struct skv_layer_task {
    size_t trace; /* byte of the trace */
    uint64_t n_pairs, n_evicted;
    bool failed;
} skv_layer_task;

typedef struct skv_options {
    skv_dtype cache_type;
    size_t n_rows, max_tokens; /* tokens of one forward */
    size_t limit_bytes;        /* of cache */
    int n_threads;
    skv_method method; /* budgets are copied */
    skv_vocabulary vocabulary;
    skv_trace_level trace;
} skv_options;

typedef struct skv_session {
    const skv_model *model;
    skv_heap heap;
    skv_exec exec;
    skv_cache cache;
    skv_method method;
    skv_vocabulary vocabulary;
    skv_trace_level trace_level;
    skv_trace trace;
    skv_row *rows;
    size_t n_rows, max_tokens;
    skv_span_view *views;     /* [n_rows] */
    int32_t *budgets;         /* [n_layers, n_kv_heads] */
    int32_t *due;             /* [n_rows] rows to compact */
    skv_layer_task *tasks;    /* [n_rows, n_layers] */
    uint8_t *marks;           /* [max_tokens] skv_mark */
    bool *steered;            /* [max_tokens] */
    float *alphas;            /* [max_tokens] α of the steered tokens */
    float *x, *y;             /* residual stream, normed or projected: [max_tokens, hidden] */
    float *q, *k, *v, *mixed; /* [max_tokens, n_heads or n_kv_heads, head_dim] */
    float *gate, *up;         /* [max_tokens, ffn] */
    float *cosine, *sine;     /* [max_tokens, head_dim / 2] */
    float *scoring;           /* [n_threads, scoring_per_thread]: evict.c */
    float *received;          /* [n_threads, 2, received_ld]: h2o */
    size_t scoring_slots, scoring_per_thread, received_ld;
    double evict_seconds;
} skv_session;

/* Hidden states for the caller: those entering block layers[i], or after the final norm where layers[i] is n_layers. */
typedef struct skv_capture {
    const int32_t *layers;
    size_t n_layers;
    float *states; /* [n_layers, n_tokens, hidden] */
} skv_capture;

skv_session *skv_session_new(const skv_model *model, const skv_options *options, skv_error *error);
void skv_session_free(skv_session *session);

typedef struct skv_row_options {
    int32_t capacity, n_prompt; /* at most that many tokens, of which the first are the prompt */
    int32_t reserve;            /* taken off every budget */
    int64_t sequence[2];
    skv_steering steering; /* its vector is copied */
} skv_row_options;

static inline int32_t skv_row_budget(const skv_session *session, const skv_row *row, size_t head) {
    return session->budgets[head] - row->reserve;
}

/* Bytes of cache that such a row reserves: its worst case. */
size_t skv_row_bytes(const skv_session *session, int32_t capacity, int32_t n_prompt);

/* Room for the sentences of a row's next n tokens, of no more than it may still be fed. */
static inline bool skv_row_reserve_sentences(skv_row *row, size_t n) {
    const size_t left = (size_t)(row->capacity - row->n_tokens);
    return skv_tracker_reserve(&row->tracker, n < left ? n : left);
}

/* A free row, reserved in full. SKV_CAPACITY: not now, or never. */
skv_status skv_row_open(skv_session *session, const skv_row_options *options, int32_t *row, skv_error *error);

/* A new row that holds what `from` holds, of the same prompt and steering. */
skv_status skv_row_fork(skv_session *session, int32_t from, int32_t capacity, int64_t sample, int32_t *row, skv_error *error);
void skv_row_close(skv_session *session, int32_t row);

/* How many of the next n tokens of a row may be fed at once: a span ends where a compaction may be due. */
int32_t skv_row_chunk(const skv_session *session, int32_t row, int32_t n);

/* Feeds a flat batch: tokens of span 0, then of span 1, … Spans name distinct rows. logits [n_tokens, vocab] where every is true, else
 * [n_spans, vocab]: those of each span's last token. capture may be NULL. */
skv_status skv_forward(skv_session *session, const skv_span *spans, size_t n_spans, const int32_t *tokens, bool every, float *logits,
                       const skv_capture *capture, skv_error *error);

#endif
