/* Eviction methods: a table of policies that only score. When a row is compacted, which slots are protected, ties, order, compaction
 * and trace are shared by all of them (evict.h). A new method is a file under policies/ and a row of the table in policies.c. */
#ifndef SKV_POLICIES_H
#define SKV_POLICIES_H

#include "backend.h"

/* What the forward must keep for a policy, and what it fills besides its score. */
enum {
    SKV_NEEDS_QUERIES = 1,   /* the last `window` queries */
    SKV_NEEDS_SUMS = 2,      /* attention received by every slot */
    SKV_NEEDS_SENTENCES = 4, /* flagged sentences */
    SKV_GIVES_IMPORTANCE = 8,
    SKV_GIVES_REDUNDANCY = 16,
    SKV_NEEDS_CALLER = 32, /* a function of the caller's: one thread, and it may fail */
    SKV_SHARED = 64,       /* one kept set for all heads of a layer */
    SKV_COMPACTS = 128,    /* all but `full` */
};

/* Deviations of the released code that can be switched on (METHOD.md, "official"). */
enum {
    SKV_COMPAT_PAIRS = 1,              /* no penalty in a head that holds fewer than two of a sentence's tokens */
    SKV_COMPAT_LOST_HEADS = 2,         /* a head that has lost every finished sentence is never penalised again */
    SKV_COMPAT_SCORE_ORDER = 4,        /* kept slots stand in order of score, not of position */
    SKV_COMPAT_LATEST_FLAG = 8,        /* the latest similar sentence sets λ, not the most similar */
    SKV_COMPAT_EMPTY_SENTENCES = 16,   /* a delimiter after a delimiter is a sentence of its own */
    SKV_COMPAT_PROMPT_MARKER = 32,     /* of the prompt only the first marker counts */
    SKV_COMPAT_THOUGHTS_ANYWHERE = 64, /* N_o counts sentences outside <think> too */
    SKV_COMPAT_THOUGHTS_ON_GRID = 128, /* N_o is brought up to date on the interval's grid only */
    SKV_COMPAT_STEER_PROMPT_END = 256, /* of the prompt only the last token is steered */
    SKV_COMPAT_ALL = 511,
};

/* A flagged sentence: positions first … last, both included. */
typedef struct skv_penalty {
    int32_t first, last;
    float lambda;
} skv_penalty;

typedef struct skv_scoring skv_scoring;

/* Fills scoring->score; false: the caller's function failed (what went wrong is the caller's to know). */
typedef bool (*skv_custom)(void *context, skv_scoring *scoring);

typedef struct skv_policy skv_policy;

/* A policy with its parameters, validated by skv_method_check. */
typedef struct skv_method {
    const skv_policy *policy;
    int32_t interval, window, kernel, sinks;
    double mix, tau, seed; /* seed: a whole number */
    int32_t protect_first; /* positions below this number are kept outright */
    bool protect_prompt;
    bool evict; /* false: kept sets are virtual */
    unsigned compat;
    const int32_t *budgets; /* [n_layers, n_kv_heads] */
    skv_custom custom;
    void *context;
    unsigned custom_needs;
} skv_method;

/* One KV head about to be scored, and where its scores go. L slots, C = L − newest candidates; all arrays have room for
 * 16 more floats than they hold. */
struct skv_scoring {
    const skv_backend *backend;
    const skv_method *method;
    size_t layer, head, n_kv_heads, group;
    size_t n_slots, n_candidates, dim, stride;
    const float *keys;        /* [L, stride] float32, zero beyond dim */
    const int32_t *positions; /* [L] */
    const float *sums;        /* [L], if needed */
    const float *queries;     /* [n_queries, group, stride], oldest first, if needed */
    size_t n_queries;
    const skv_penalty *penalties;
    size_t n_penalties;
    const int64_t *sequence;                          /* [2]: prompt index, sample index */
    float *importance, *redundancy, *penalty, *score; /* [L]; the first three as the policy gives them */
    float *work;                                      /* skv_backend.score_work floats */
    uint64_t n_pairs;                                 /* pairs of keys compared, counted up */
};

struct skv_policy {
    const char *name;
    const char *summary;
    const char *parameters; /* names of those it takes, in order, separated by spaces */
    unsigned needs;
    int32_t (*newest)(const skv_method *method, int32_t budget); /* how many of the newest slots are kept outright */
    bool (*score)(skv_scoring *scoring);                         /* NULL: recency, the newest positions are best */
};

extern const skv_policy *const skv_policies[]; /* NULL-terminated */

/* A parameter of methods. kind: 'i' integer, 'o' odd integer, 'f' number. Defaults apply where it has no_default false. */
typedef struct skv_parameter {
    const char *name;
    char kind;
    bool no_default;
    double low, high, value;
    const char *summary;
} skv_parameter;

extern const skv_parameter skv_parameters[]; /* ended by a NULL name */

const skv_policy *skv_policy_find(const char *name);
bool skv_policy_takes(const skv_policy *policy, const char *parameter);

/* SKV_NEEDS_… and SKV_GIVES_… of the policy and, for `custom`, of the caller. */
static inline unsigned skv_method_needs(const skv_method *method) { return method->policy->needs | method->custom_needs; }

/* Sets one parameter by name (budget is an array and set apart). SKV_CONFIG: out of range. */
skv_status skv_method_set(skv_method *method, const char *name, double value, skv_error *error);

/* All defaults of a policy, no budgets. */
skv_method skv_method_of(const skv_policy *policy);

/* Refuses budgets that leave nothing to choose. n_budgets = n_layers × n_kv_heads. */
skv_status skv_method_check(const skv_method *method, size_t n_budgets, size_t n_kv_heads, skv_error *error);

/* Refuses a prompt whose protected slots alone exceed a budget less `reserve`. */
skv_status skv_method_check_prompt(const skv_method *method, size_t n_budgets, int32_t n_prompt, int32_t reserve, skv_error *error);

/* Positions below this number are kept outright. */
int32_t skv_method_protected(const skv_method *method, int32_t n_prompt);

/* Shared by the policies (policies.c). */
int32_t skv_newest_window(const skv_method *method, int32_t budget);
void skv_score_importance(skv_scoring *scoring);
void skv_score_redundancy(skv_scoring *scoring);
void skv_score_penalty(skv_scoring *scoring);

/* SplitMix64's output function, one step from state x. */
uint64_t skv_splitmix64(uint64_t x);

#endif
