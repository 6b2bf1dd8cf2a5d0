/* Rows in flight on one model: their caches, sentences and steering, and the buffers of a forward. One thread at a
 * time. */
#ifndef SKV_SESSION_H
#define SKV_SESSION_H

#include "cache.h"
#include "sentences.h"
#include "trace.h"
#include "weights.h"

/* Rows compacted in one call; more take turns, so that the workspace does not grow with the batch. */
enum { SKV_DUE = 8 };

/* With evict = false, the slots of a head that the method would still hold: these, and all from `end` on. */
typedef struct skv_held {
    int32_t *slots; /* device */
    int32_t n, end;
} skv_held;

/* What a timed session tells apart, in the order in which a step meets it. */
#define SKV_OPS(X)                                                                                                     \
    X(EMBED, "embed")                                                                                                  \
    X(STEER, "steer")                                                                                                  \
    X(NORM, "norm")                                                                                                    \
    X(QKV, "q, k, v")                                                                                                  \
    X(ROPE, "rope")                                                                                                    \
    X(APPEND, "append")                                                                                                \
    X(QUERIES, "keep queries")                                                                                         \
    X(ATTENTION, "attention")                                                                                          \
    X(RECEIVE, "receive")                                                                                              \
    X(OUT, "o")                                                                                                        \
    X(ADD, "add")                                                                                                      \
    X(WIDE, "gate, up")                                                                                                \
    X(SILU, "silu")                                                                                                    \
    X(DOWN, "down")                                                                                                    \
    X(SENTENCES, "sentences")                                                                                          \
    X(LAST, "last")                                                                                                    \
    X(HEAD, "head")                                                                                                    \
    X(COMPARE, "compare")                                                                                              \
    X(SCORE, "score")                                                                                                  \
    X(SELECT, "select")                                                                                                \
    X(COMPACT, "compact")
#define SKV_OP(op, name) SKV_OP_##op,
typedef enum skv_op { SKV_OPS(SKV_OP) SKV_N_OPS } skv_op;

typedef struct skv_row {
    bool open;
    const char *failure;        /* why it can only be closed; NULL: it can go on */
    int32_t n_tokens, capacity; /* fed so far; at most */
    int32_t n_prompt;
    int32_t reserve;     /* taken off every budget: what padding would take in a padded batch */
    int64_t sequence[2]; /* prompt index, sample index */
    skv_head *heads;     /* [n_layers, n_kv_heads] */
    char **pages;        /* the heads' page lists, one block */
    size_t n_reserved, n_pages, peak_pages;
    float *ring;    /* device [n_layers, window, n_heads, head_dim] newest queries, if needed */
    skv_held *held; /* [n_layers, n_kv_heads], if evict is false */
    bool *lost;     /* [n_layers, n_kv_heads] SKV_COMPAT_LOST_HEADS: no longer penalised */
    skv_tracker tracker;
    skv_steering steering;
    float *vector; /* device [hidden]: of the steering */
    int32_t n_steered, n_compactions;
    uint64_t n_evicted, n_pairs;
} skv_row;

struct skv_session {
    const skv_model *model;
    skv_device *device;
    skv_heap heap; /* of host memory; the device has its own */
    skv_workload work;
    skv_cache cache;
    skv_method method;
    unsigned needs; /* of the method */
    skv_vocabulary vocabulary;
    skv_trace_level trace_level;
    skv_trace trace;
    skv_row *rows;
    size_t n_rows, max_tokens;
    int32_t *budgets;         /* [n_layers, n_kv_heads] */
    skv_token *tokens;        /* [max_tokens] */
    skv_part *parts;          /* [n_rows] */
    int32_t *due_rows;        /* [n_rows] rows whose grid has come */
    skv_due *due;             /* [SKV_DUE] those compacted in one call, and their jobs */
    skv_job *jobs;            /* [SKV_DUE, n_layers, n_kv_heads] */
    float *x, *y;             /* device [max_tokens, hidden] residual stream; normed */
    float *q, *k, *v, *mixed; /* device [max_tokens, n_heads or n_kv_heads, head_dim] */
    float *gate, *up;         /* device [max_tokens, ffn] */
    int32_t *fetched_slots;   /* [2, scored_slots] positions and kept slots of one head */
    float *fetched;           /* host arrays of one head: evict.c */
    double evict_seconds;
    bool timed;
    double lapped; /* when the last op of a timed session ended */
    double op_seconds[SKV_N_OPS];
};

/* What a timed session did since the last lap was this op. */
void skv_lap(skv_session *session, skv_op op);

static inline int32_t skv_row_budget(const skv_session *session, const skv_row *row, size_t head) {
    return session->budgets[head] - row->reserve;
}

/* Room for the sentences of a row's next n tokens, of no more than it may still be fed. */
static inline bool skv_row_reserve_sentences(skv_row *row, size_t n) {
    const size_t left = (size_t)(row->capacity - row->n_tokens);
    return skv_tracker_reserve(&row->tracker, n < left ? n : left);
}

/* Whether a compaction is considered once a row has been fed n_tokens (METHOD.md §1). */
bool skv_row_on_grid(const skv_session *session, const skv_row *row, int32_t n_tokens);

/* Room for n more slots in each head of a row. */
void skv_row_extend(skv_session *session, skv_row *row, size_t n);

/* Gives back what only the prompt needed. */
void skv_row_shrink(skv_session *session, skv_row *row);

#endif
