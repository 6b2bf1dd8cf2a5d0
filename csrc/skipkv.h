/* The core's public face: two nouns, a model (immutable weights) and a session (rows in flight on a model), and the
 * functions on arrays that need neither. Every fallible function returns a skv_status and fills *error. */
#ifndef SKV_SKIPKV_H
#define SKV_SKIPKV_H

#include "config.h"
#include "dtypes.h"
#include "families.h"
#include "policies.h"
#include "sample.h"

typedef struct skv_model skv_model;
typedef struct skv_session skv_session;

enum { SKV_MAX_THREADS = 1024 };

/* Where ops run (backend.h); NULL stands for the CPU. */
typedef struct skv_backend skv_backend;

/* The backend in a shared object, NULL with *error filled. */
const skv_backend *skv_backend_load(const char *path, skv_error *error);

/* An instruction set of the CPU, or a device of another backend. */
typedef struct skv_variant {
    const char *name;
    bool runs_here;
    char about[160]; /* what it is, or why it does not run here */
} skv_variant;

/* A backend's i-th variant, best first; false beyond the last. */
bool skv_variant_at(const skv_backend *backend, size_t i, skv_variant *variant);

/* What a vocabulary entry is. */
enum {
    SKV_DELIMITER = 1,
    SKV_MARKER = 2,
    SKV_PARAGRAPH = 4, /* holds "\n\n" */
    SKV_NEWLINE = 8, /* a lone "\n" of a tokenizer that writes "\n\n" as two tokens: the second one is the blank line */
};

/* Arrays of the caller's, which outlive the session. */
typedef struct skv_vocabulary {
    const uint8_t *flags;     /* [vocab], or NULL: no sentence ever ends, nothing is thinking */
    const int32_t (*runs)[3]; /* [n_runs, 3] markers of two tokens (the first is −1) or three; ascending */
    size_t n_runs;
    const uint8_t *bytes;  /* the tokens' text, one behind the other */
    const int64_t *starts; /* [vocab + 1] of each token in bytes */
} skv_vocabulary;

/* A finished sentence. */
typedef struct skv_sentence {
    int32_t first, last; /* positions, both included; later delimiters extend `last` */
    int32_t closed;      /* position of the delimiter that closed it */
    float lambda;        /* 0: not flagged */
    bool thought;        /* a non-execution sentence */
    bool repeats;        /* resembles an earlier one */
} skv_sentence;

typedef enum skv_scope { SKV_SCOPE_THINK, SKV_SCOPE_GENERATION, SKV_SCOPE_ALL, SKV_N_SCOPES } skv_scope;

extern const char *const skv_scope_names[SKV_N_SCOPES];

/* x += α·v before block `layer` (METHOD.md §7). */
typedef struct skv_steering {
    const float *vector; /* [hidden]; NULL: no steering */
    int32_t layer;
    float alpha, gamma, alpha_max;
    skv_scope scope;
} skv_steering;

/* A model without weights: its tensors say what to bind. NULL with *error filled on failure. variant NULL: the best. */
skv_model *skv_model_new(const skv_config *config, const skv_backend *backend, const char *variant, skv_dtype type,
                         skv_error *error);
void skv_model_free(skv_model *model);

/* Copies one tensor into the backend's layout; the source may be given back afterwards. */
skv_status skv_model_bind(skv_model *model, const char *name, skv_dtype type, const int64_t *shape, int n_dims,
                          const void *data, int n_threads, skv_error *error);

/* SKV_OK once every tensor is bound; otherwise names what is missing. */
skv_status skv_model_ready(const skv_model *model, skv_error *error);

/* The i-th tensor's name, NULL beyond the last; columns 0: a vector. */
const char *skv_model_tensor(const skv_model *model, size_t i, int32_t *rows, int32_t *columns);

const skv_config *skv_model_config(const skv_model *model);
size_t skv_model_bytes(const skv_model *model);
const char *skv_model_variant(const skv_model *model);
skv_dtype skv_model_dtype(const skv_model *model);

/* With the model's kernels; bytes are read from a buffer of n_bytes. */
skv_status skv_model_limits(const skv_model *model, size_t n_bytes, int n_threads, skv_limits *found, skv_error *error);

typedef enum skv_trace_level { SKV_TRACE_NONE, SKV_TRACE_KEPT, SKV_TRACE_SCORES, SKV_N_TRACE_LEVELS } skv_trace_level;

typedef struct skv_options {
    skv_dtype cache_type;
    size_t n_rows, max_tokens; /* tokens of one forward */
    size_t limit_bytes;        /* of cache; on a device with memory of its own, of all that the session takes there */
    int n_threads;
    skv_method method; /* budgets are copied */
    skv_vocabulary vocabulary;
    skv_trace_level trace;
    bool timed; /* every op is waited for, and its time is added up */
} skv_options;

/* What the time of a forward is spent on, in the order in which a step meets it; NULL beyond the last. */
const char *skv_op_name(size_t i);

/* Seconds that a timed session has spent on them, one for each name. */
const double *skv_session_seconds(const skv_session *session);

skv_session *skv_session_new(const skv_model *model, const skv_options *options, skv_error *error);
void skv_session_free(skv_session *session);

typedef struct skv_row_options {
    int32_t capacity, n_prompt; /* at most that many tokens, of which the first are the prompt */
    int32_t reserve;            /* taken off every budget: what padding would take in a padded batch */
    int64_t sequence[2];        /* prompt index, sample index */
    skv_steering steering;      /* its vector is copied */
} skv_row_options;

/* Bytes under the limit: of such a row, its pages in the worst case; and of the session beside its rows, none longer
 * than this one. 0 where the limit is on the cache alone. */
size_t skv_row_bytes(const skv_session *session, int32_t capacity, int32_t n_prompt);
size_t skv_session_bytes(const skv_session *session, int32_t capacity, int32_t n_prompt);

/* A free row, reserved in full. SKV_CAPACITY: not now, or never. */
skv_status skv_row_open(skv_session *session, const skv_row_options *options, int32_t *row, skv_error *error);

/* A new row that holds what `from` holds, of the same prompt and steering. */
skv_status skv_row_fork(skv_session *session, int32_t from, int32_t capacity, int64_t sample, int32_t *row,
                        skv_error *error);
void skv_row_close(skv_session *session, int32_t row);
bool skv_row_is_open(const skv_session *session, int32_t row);

/* How many of the next n tokens of a row may be fed at once: a span ends where a compaction may be due. */
int32_t skv_row_chunk(const skv_session *session, int32_t row, int32_t n);

/* Raises the row's steering to alpha_max. */
void skv_row_brake(skv_session *session, int32_t row);

typedef struct skv_row_state {
    int32_t n_tokens, n_prompt;
    size_t n_slots, live_bytes, peak_bytes;
    int32_t n_compactions;
    uint64_t n_evicted, n_pairs;
    size_t n_sentences, n_flagged;
    int32_t n_thoughts, n_thinking, n_answer, n_repeating, n_steered;
} skv_row_state;

skv_row_state skv_row_state_of(const skv_session *session, int32_t row);

/* Positions of a head's slots, in their order, for as many as positions has room; returns how many there are. */
size_t skv_row_positions(skv_session *session, int32_t row, size_t layer, size_t head, int32_t *positions, size_t room);

/* The i-th finished sentence of a row; vector [hidden], if not NULL: NaN where it was freed. */
skv_sentence skv_row_sentence(skv_session *session, int32_t row, size_t i, float *vector);

/* n consecutive tokens of a row: 1 is a decode step, more are (a chunk of) prefill or replay. */
typedef struct skv_span {
    int32_t row, n;
} skv_span;

/* Hidden states for the caller: those entering block layers[i], or after the final norm where layers[i] is n_layers. */
typedef struct skv_capture {
    const int32_t *layers;
    size_t n_layers;
    float *states; /* [n_layers, n_tokens, hidden] */
} skv_capture;

/* Feeds a flat batch: tokens of span 0, then of span 1, … Spans name distinct rows. logits [n_tokens, vocab] where
 * every is true, else [n_spans, vocab]: those of each span's last token; NULL: none. Where best [as
 * logits] is not NULL, it gets the id of each token's largest logit, ties to the lower one, −1 where that is not
 * finite; logits are then scratch. capture may be NULL. */
skv_status skv_forward(skv_session *session, const skv_span *spans, size_t n_spans, const int32_t *tokens, bool every,
                       float *logits, int32_t *best, const skv_capture *capture, skv_error *error);

/* Rows of a forward that has run, but whose outcome is lost: they can only be closed. */
void skv_end_rows(skv_session *session, const skv_span *spans, size_t n_spans);

/* Whether token t of the last forward was steered, and by which α. */
bool skv_session_steered(const skv_session *session, size_t t, float *alpha);

/* One KV head of one compaction, followed by the positions of the kept slots [n_kept] int32 and, if scored, by the
 * terms given (in order, bits 1 << skv_term) and the score, [n_candidates] float32 each: the numbers that decided. */
typedef struct skv_record {
    int32_t row, step, layer, head;
    int32_t n_before, n_kept, n_candidates;
    uint32_t given, scored;
} skv_record;

/* The records since they were last dropped, one behind the other. */
const char *skv_session_trace(const skv_session *session, size_t *n_bytes);
void skv_session_drop_trace(skv_session *session);

typedef struct skv_ledger {
    size_t live_bytes, reserved_bytes, pool_bytes, peak_bytes, page_bytes; /* of cache */
    size_t ring_bytes;      /* of open rows: queries, lists of virtual sets, steering */
    size_t sentence_bytes;  /* of open rows: vectors */
    size_t workspace_bytes; /* of forwards and compactions */
    size_t heap_bytes;      /* of the session: all of these, and the host's tables */
    size_t weight_bytes;    /* of the model, which other sessions may share */
    uint64_t n_allocator_calls;
    double evict_seconds;
} skv_ledger;

skv_ledger skv_session_ledger(const skv_session *session);

/* One layer's slots and queries as arrays, to be selected from without a model. */
typedef struct skv_slots {
    size_t n_kv_heads, n_heads, n_slots, n_queries, head_dim, n_penalties;
    const float *keys;        /* [n_kv_heads, n_slots, head_dim] */
    const float *queries;     /* [n_heads, n_queries, head_dim], oldest first */
    const int32_t *positions; /* [n_kv_heads, n_slots] */
    const float *sums;        /* [n_kv_heads, n_slots] or NULL */
    const float *penalties;   /* [n_penalties, 3] first and last position, λ */
    int32_t n_prompt, layer;
    int64_t sequence[2];
} skv_slots;

/* What one head keeps: indices of slots, and the numbers that decided. */
typedef struct skv_selection {
    size_t n_kept, n_candidates;
    int32_t *kept;             /* [n_slots] */
    float *terms[SKV_N_TERMS]; /* [n_slots] those of skv_method_gives */
    float *score;              /* [n_slots] */
} skv_selection;

/* selections [n_kv_heads], with room for what they hold; method->budgets [n_kv_heads]. */
skv_status skv_select(const skv_method *method, const skv_slots *slots, skv_selection *selections, skv_error *error);

/* The sentences of a text (METHOD.md §4): sentences [n], *n_sentences of them. inside [n]: which tokens stand between
 * <think> and </think>; one that completes a marker does not. */
skv_status skv_segment(const skv_vocabulary *vocabulary, unsigned compat, const int32_t *ids, size_t n,
                       int32_t n_prompt, skv_sentence *sentences, size_t *n_sentences, bool *inside, skv_error *error);

/* λ [n] of sentences with these vectors [n, width]. */
skv_status skv_flag_repeats(const float *vectors, size_t n, size_t width, float tau, unsigned compat, float *lambda,
                            skv_error *error);

#endif
