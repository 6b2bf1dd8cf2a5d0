/* The seam: what a backend does, as formulas and shapes; the CPU's (cpu/) are the specification. A backend owns memory,
 * threads or streams, workspace, scoring and selection. "Device memory" is what `alloc` gave: only ops follow such
 * addresses; all else is plain host memory. Activations are float32, row-major. */
#ifndef SKV_BACKEND_H
#define SKV_BACKEND_H

#include "config.h"
#include "dtypes.h"
#include "heap.h"
#include "policies.h"

/* A weight matrix [n_out, n_in] in the backend's own layout. */
typedef struct skv_matrix {
    int32_t n_out, n_in;
    skv_dtype type;
    void *data; /* device */
} skv_matrix;

/* The slots of one (row, layer, KV head): slot i is entry i % SKV_PAGE of pages[i / SKV_PAGE]. */
typedef struct skv_head {
    char **pages; /* device addresses */
    int32_t n_pages, n_slots;
    uint64_t version; /* of the list of pages; no other list of the cache has or had the same */
} skv_head;

/* A page holds keys [SKV_PAGE, stride] at its start, values [SKV_PAGE, stride], both in the cache's type, of q8 the
 * scales of the keys and of the values [2, SKV_PAGE] float, positions [SKV_PAGE] int32 and, with sums, attention
 * received [SKV_PAGE] float; zero from head_dim to stride. */
typedef struct skv_cache_shape {
    skv_dtype type;
    bool sums;
    int32_t head_dim, stride; /* stride: head_dim rounded up to 16 */
    size_t slot_bytes;        /* of a key or a value */
    size_t values_at, scales_at, positions_at, sums_at, page_bytes;
} skv_cache_shape;

/* Sentences that are compared with all earlier ones at a time. */
enum { SKV_COMPARED = 16 };

/* What a device will be asked for at most, so that a step allocates nothing. */
typedef struct skv_workload {
    const skv_config *config;
    const float *inv_freq; /* host [head_dim / 2] */
    skv_cache_shape cache;
    skv_dtype weights;       /* of the matrices */
    size_t n_rows, n_tokens; /* of a forward */
    size_t head_slots;       /* that a head holds */
    size_t n_due;            /* rows of a compaction; 0: none compacts */
    size_t scored_slots;     /* of a head that is compacted */
    size_t due_slots;        /* of a row that is compacted, all heads together */
    size_t n_sentences;      /* of a row */
    bool reorders, fetches;  /* SKV_COMPAT_SCORE_ORDER; heads are fetched */
    int32_t window;
    unsigned needs; /* skv_method_needs */
    unsigned keep;  /* bits of terms that are fetched after scoring */
} skv_workload;

/* What a token does to the open sentence of its row (METHOD.md §4). */
typedef enum skv_mark { SKV_MARK_ADD, SKV_MARK_CLOSE, SKV_MARK_EXTEND, SKV_MARK_NONE } skv_mark;

/* What the ids alone say of a token. */
typedef struct skv_token {
    int32_t id;
    skv_mark mark;
    int32_t length; /* of the sentence that it closes, in tokens */
    float *vector;  /* device [width]: of that sentence */
    float alpha;    /* of a steered token */
    bool steered;
} skv_token;

/* n consecutive tokens of one row inside a flat batch. */
typedef struct skv_part {
    int32_t row;      /* of the session, below the workload's n_rows */
    size_t first, n;  /* of the batch's tokens */
    int32_t position; /* of its first token */
    skv_head *heads;  /* [n_layers, n_kv_heads]; slots for the n tokens are there already, the newest ones */
    float *ring; /* device [n_layers, window, n_heads, head_dim], that of position t in place t % window; or NULL */
    float *sum;  /* device [width]: states of the open sentence, added up; width: hidden rounded up to 16 */
    const float *vector; /* device [hidden]: steering; or NULL */
    int32_t steered_layer;
} skv_part;

typedef struct skv_batch {
    const skv_token *tokens; /* [n_tokens] */
    const skv_part *parts;   /* [n_parts], of distinct rows, in order of their tokens */
    size_t n_tokens, n_parts;
} skv_batch;

typedef struct skv_linear {
    const skv_matrix *w;
    const float *bias; /* [n_out] or NULL */
    float *y;          /* [n_tokens, n_out] */
} skv_linear;

/* A run of positions, both included. */
typedef struct skv_range {
    int32_t first, last;
} skv_range;

/* A flagged sentence. */
typedef struct skv_penalty {
    skv_range positions;
    float lambda;
} skv_penalty;

/* How all heads of a compaction are scored and selected. */
typedef struct skv_scoring {
    const skv_method *method;
    unsigned needs, keep; /* as in skv_workload */
    float weights[SKV_N_TERMS];
} skv_scoring;

/* A row that is compacted. */
typedef struct skv_due {
    const float *ring;   /* as in skv_part */
    int32_t n_tokens;    /* fed; the newest query is that of position n_tokens − 1 */
    int32_t first;       /* positions below this number are kept outright */
    int32_t first_layer; /* number of the jobs' layer 0 */
    int64_t sequence[2];
    const skv_penalty *penalties; /* in order of position */
    const skv_range *sentences;   /* finished and compared, in order */
    uint8_t *alive;               /* [n_sentences]: set to 1 where some head keeps a slot of the sentence */
    size_t n_penalties, n_sentences;
} skv_due;

/* One KV head of a row that is compacted. The jobs of a call are all heads of its rows: [row, layer, head]. */
typedef struct skv_job {
    skv_due *due;
    skv_head *head;
    int32_t layer, kv_head;
    int32_t *held; /* device: slots of a virtual set, n_held, followed by all slots from `end` on; NULL: all slots */
    int32_t n_held, end;
    int32_t n_slots; /* held */
    int32_t n_newest, budget;
    bool scored;    /* false: not due, everything stays */
    bool penalised; /* λ counts */
    /* results */
    int32_t n_kept;
    bool any_sentence; /* whether it keeps a slot of any of the sentences */
    uint64_t n_pairs;  /* pairs of keys compared */
    size_t at;         /* the backend's own: where its scores lie */
} skv_job;

static inline size_t skv_job_candidates(const skv_job *job) {
    return job->n_slots > job->n_newest ? (size_t)(job->n_slots - job->n_newest) : 0;
}

/* Host arrays that `fetch` fills, each where it is not NULL. L slots, C candidates. */
typedef struct skv_fetched {
    float *keys;               /* [L, head_dim] */
    float *queries;            /* [group, n_queries, head_dim], oldest first */
    float *terms[SKV_N_TERMS]; /* [C] (penalty and redundancy [L]): those in `keep`; sums [L] of the slots */
    float *score;              /* [C] */
    int32_t *positions;        /* [L] */
    int32_t *kept;             /* [n_kept] indices of the held slots that stay, after `select` */
    size_t n_queries;          /* set: how many there are */
} skv_fetched;

/* Floats of a block that holds all that can be fetched of a head of n_slots, and its arrays laid out in one: of the
 * terms those whose bits are given. */
size_t skv_fetched_floats(const skv_workload *work, size_t n_slots);
skv_fetched skv_fetched_in(const skv_workload *work, unsigned terms, size_t n_slots, float *block);

/* An opened backend: where ops run, one caller at a time. */
typedef struct skv_device {
    const struct skv_backend *backend;
    const char *variant;
    skv_heap heap;     /* what was asked of it and not given back */
    size_t idle_bytes; /* what it took beyond that */
    skv_error error;   /* the first failure of any op, told by sync */
    int n_threads;
    char shortage[96]; /* what was asked and what was free when `alloc` gave NULL, until it is told */
} skv_device;

typedef struct skv_backend {
    const char *name;
    unsigned weight_types;            /* bits of the skv_dtypes that matrices may have */
    const char *(*variant)(size_t i); /* names, best first; NULL beyond the last */

    /* about [size]: what the variant is, or why it does not run here */
    bool (*runs_here)(const char *variant, char *about, size_t size);

    /* NULL with *error filled. The variant is one that runs here. */
    skv_device *(*open)(const char *variant, int n_threads, skv_error *error);
    void (*close)(skv_device *device);

    /* Zeroed device memory, NULL if it is out; copies between host and device and on it, done when `sync` returns. */
    void *(*alloc)(skv_device *device, size_t count, size_t size);
    void (*free)(skv_device *device, void *block);
    void (*write)(skv_device *device, void *to, const void *from, size_t bytes);
    void (*read)(skv_device *device, void *to, const void *from, size_t bytes);
    void (*copy)(skv_device *device, void *to, const void *from, size_t bytes);

    /* Waits for all that was asked. The one op that waits, and the one that fails. */
    skv_status (*sync)(skv_device *device, skv_error *error);

    /* Workspace for the work; never less than before. */
    skv_status (*reserve)(skv_device *device, const skv_workload *work, skv_error *error);

    /* Bytes of that workspace, on a backend whose memory is a device's own: there a session's limit is on all that the
     * session takes of it. NULL: the limit is on the cache alone. */
    size_t (*workspace)(const skv_device *device, const skv_workload *work);

    /* w ← source [n_out, n_in] (host) of any dtype that tensors are stored in, rounded to w->type (to nearest even),
     * laid out for `linear`. w->data is set, NULL if memory is out. */
    void (*pack)(skv_device *device, skv_matrix *w, const void *source, skv_dtype type);

    /* Once a forward, before the ops on its tokens; the batch stays as it is until `sync`. */
    void (*begin)(skv_device *device, const skv_batch *batch);

    /* x[t, :] = table[tokens[t], :]; x [n_tokens, n_in] */
    void (*embed)(skv_device *device, const skv_matrix *table, float *x);

    /* y[t, :] = x[t, :] / √(mean x[t, :]² + eps) · w; x, y [n, dim], w [dim]; y may be x */
    void (*rmsnorm)(skv_device *device, const float *x, const float *w, float eps, size_t n, size_t dim, float *y);

    /* y_i = x W_iᵀ + bias_i for several matrices of the same input; x [n, n_in] */
    void (*linear)(skv_device *device, const skv_linear *jobs, size_t n_jobs, const float *x, size_t n);

    /* x [n_tokens, n_heads, head_dim] turned by the angles of each token's position, times rope_attention_factor */
    void (*rope)(skv_device *device, float *x, size_t n_heads);

    /* The newest slots of every head of a layer ← k, v [n_tokens, n_kv_heads, head_dim] and the positions */
    void (*append)(skv_device *device, size_t layer, const float *k, const float *v);

    /* Rings ← the newest queries */
    void (*keep_queries)(skv_device *device, size_t layer, const float *q);

    /* out[t, h, :] = Σ_j softmax_j(q[t, h, :] · K[j, :] / √head_dim) V[j, :] over the slots up to the token's own;
     * q, out [n_tokens, n_heads, head_dim]. Reduced page by page in slot order. */
    void (*attention)(skv_device *device, size_t layer, const float *q, float *out);

    /* Every slot's sum += Σ of the probabilities that the tokens' queries give it; after `attention` with the
     * same queries */
    void (*receive)(skv_device *device, size_t layer, const float *q);

    /* x[t, :] += alpha_t · vector of the row, for the steered tokens of rows steered before this layer */
    void (*steer)(skv_device *device, size_t layer, float *x);

    /* gate = silu(gate) · up; x += y; all [n] */
    void (*silu_mul)(skv_device *device, float *gate, const float *up, size_t n);
    void (*add)(skv_device *device, float *x, const float *y, size_t n);

    /* y[p, :] = x[last token of part p, :]; hidden wide; y may be x */
    void (*last)(skv_device *device, const float *x, float *y);

    /* As linear without a bias, but y [n, n_out] is host memory. Where best [n] (host) is not NULL, y is scratch, and
     * best[t] ← the output that is largest (skv_argmax), −1 where that is not finite. */
    void (*project)(skv_device *device, const skv_matrix *w, const float *x, size_t n, float *y, int32_t *best);

    /* x [n_tokens, hidden], token by token: sum += x unless it only extends a sentence; one that closes it sets vector
     * = sum / length, scaled to length 1, and sum = 0. */
    void (*sum_sentences)(skv_device *device, const float *x);

    /* out[j − first, i] = vectors[j] · vectors[i] for i < j, first ≤ j < n (host [n − first, n]); vectors
     * [width] are device memory, those that are NULL left out */
    void (*similarities)(skv_device *device, float *const *vectors, size_t width, size_t first, size_t n, float *out);

    /* Terms and Σ weight · term of every scored job (METHOD.md §2, §3, §5, §6) */
    void (*score)(skv_device *device, const skv_scoring *scoring, skv_job *jobs, size_t n_jobs);

    /* What one job holds and what `score` and `select` made of it; host arrays */
    void (*fetch)(skv_device *device, const skv_scoring *scoring, const skv_job *job, skv_fetched *to);

    /* The caller's score [C] (host) of one job */
    void (*put_score)(skv_device *device, const skv_job *job, const float *score);

    /* The held slots that stay (METHOD.md §5), n_kept of them, `alive` and `any_sentence`, done when `sync` returns */
    void (*select)(skv_device *device, const skv_scoring *scoring, skv_job *jobs, size_t n_jobs);

    /* Slots 0 … n_kept − 1 of every scored job ← those that stay; a virtual set's list likewise */
    void (*compact)(skv_device *device, const skv_scoring *scoring, const skv_job *jobs, size_t n_jobs);

    /* The largest that this device reaches with these kernels, reading memory [n], which is overwritten. */
    skv_limits (*limits)(skv_device *device, float *memory, size_t n, skv_dtype weights);
} skv_backend;

/* What a backend in a shared object of its own must have been compiled with. */
#define SKV_ABI                                                                                                        \
    (sizeof(skv_backend) ^ sizeof(skv_workload) << 10 ^ sizeof(skv_job) << 20 ^ sizeof(skv_config) << 30 ^             \
     sizeof(skv_part) << 40)

/* A device of the named variant, or with NULL of the best one that this machine can run. backend NULL: the CPU. */
skv_device *skv_device_open(const skv_backend *backend, const char *variant, int n_threads, skv_error *error);

/* Of a clock that only goes forward. */
double skv_seconds(void);

/* What to say where `alloc` gave NULL: "out of memory for …" and the device's shortage, or what failed before. */
skv_status skv_device_full(skv_device *device, skv_error *error, const char *format, ...)
    __attribute__((format(printf, 3, 4)));

#endif
