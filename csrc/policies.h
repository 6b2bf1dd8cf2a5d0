/* Eviction methods as data (METHOD.md §6): a method is a row of weights of terms, and score = Σ weight · term. When
 * a row is compacted, which slots are protected, ties, order, compaction and trace are shared by all of them (evict.h).
 */
#ifndef SKV_POLICIES_H
#define SKV_POLICIES_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "error.h"

/* The terms, in the order in which they are added. */
typedef enum skv_term {
    SKV_POSITION,     /* of the slot, as float32 */
    SKV_SUMS,         /* attention received since the slot was written */
    SKV_IMPORTANCE,   /* §2 */
    SKV_REDUNDANCY,   /* §3 */
    SKV_PENALTY,      /* λ of the slot's sentence, 0 where it is not flagged (§5) */
    SKV_NOISE,        /* uniform, of seed, sequence, layer, head and position */
    SKV_KEY_NORM,     /* length of the key */
    SKV_KEY_LIKENESS, /* its cosine with the sum of all keys of length 1 */
    SKV_N_TERMS
} skv_term;

extern const char *const skv_term_names[SKV_N_TERMS];

/* Bits: 1 << term for each term, and what else a method is or needs. */
enum {
    SKV_QUERIES = 1 << SKV_N_TERMS,      /* the newest `window` queries */
    SKV_SHARED = 2 << SKV_N_TERMS,       /* one kept set for all heads of a layer, by the mean of their scores */
    SKV_CUSTOM = 4 << SKV_N_TERMS,       /* the score is a function of the caller's, which may fail */
    SKV_COMPACTS = 8 << SKV_N_TERMS,     /* all but `full` */
    SKV_QUERY_HEADS = 16 << SKV_N_TERMS, /* importance: mean over the query heads, in place of their maximum */
    SKV_BY_LAYER = 32 << SKV_N_TERMS,    /* the heads of a layer share their budgets (allocate="layer") */
};

enum { SKV_MAX_BUDGET = 1 << 24 };

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
};

extern const char *const skv_compat_names[]; /* of bit 0, 1, …; NULL-terminated */

/* How many of the newest slots are kept outright. */
typedef enum skv_newest {
    SKV_NEWEST_ALL,    /* the whole budget */
    SKV_NEWEST_WINDOW, /* the window */
    SKV_NEWEST_HALF,   /* half of the budget, the window at least */
    SKV_NEWEST_NONE,
} skv_newest;

/* A weight is base + slope · mix. */
typedef struct skv_weight {
    double base, slope;
} skv_weight;

typedef struct skv_policy {
    const char *name;
    const char *summary;
    const char *parameters; /* names of those it takes, in order, separated by spaces */
    unsigned flags;         /* SKV_SHARED … SKV_QUERY_HEADS */
    skv_newest newest;
    int32_t window, kernel; /* where they are no parameters; 0: the parameter's default */
    skv_weight weights[SKV_N_TERMS];
} skv_policy;

extern const skv_policy skv_policies[]; /* ended by a NULL name */

const skv_policy *skv_policy_find(const char *name);
bool skv_policy_takes(const skv_policy *policy, const char *parameter);

/* One KV head about to be scored, for a caller's function: L slots, C = L less the newest that are always kept. */
typedef struct skv_candidates {
    size_t layer, head, n_slots, n_candidates, group, n_queries, head_dim;
    const float *keys;               /* [L, head_dim] */
    const float *queries;            /* [group, n_queries, head_dim], oldest first, if needed */
    const int32_t *positions;        /* [L] */
    const float *terms[SKV_N_TERMS]; /* [C], those needed; sums, penalty and redundancy [L] */
} skv_candidates;

/* Fills score [C]; false: it failed (what went wrong is the caller's to know). */
typedef bool (*skv_custom)(void *context, const skv_candidates *candidates, float *score);

/* A policy with its parameters, validated by skv_method_check. */
typedef struct skv_method {
    const skv_policy *policy;
    int32_t interval, window, kernel, sinks;
    double mix, tau, seed;       /* seed: a whole number */
    double weights[SKV_N_TERMS]; /* blend's parameters */
    int32_t protect_first;       /* positions below this number are kept outright */
    bool protect_prompt;
    bool by_layer; /* SKV_BY_LAYER */
    bool evict;    /* false: kept sets are virtual */
    unsigned compat;
    const int32_t *budgets; /* [n_layers, n_kv_heads] */
    skv_custom custom;
    void *context;
    unsigned custom_needs; /* bits of terms and SKV_QUERIES */
} skv_method;

/* A parameter of methods. kind: 'i' integer, 'o' odd integer, 'f' number. */
typedef struct skv_parameter {
    const char *name;
    char kind;
    bool no_default;
    double low, high, value; /* value: the default */
    const char *summary;
    size_t offset; /* in skv_method: of an int32_t, or of a double */
    bool is_double;
} skv_parameter;

extern const skv_parameter skv_parameters[]; /* ended by a NULL name */

/* All defaults of a policy, no budgets. */
skv_method skv_method_of(const skv_policy *policy);

/* Sets one parameter by name (budget is an array and set apart). SKV_CONFIG: out of range. */
skv_status skv_method_set(skv_method *method, const char *name, double value, skv_error *error);

/* Flags, terms with a weight, what the caller's function asks for, and the queries where importance is needed. */
unsigned skv_method_needs(const skv_method *method);

/* Bits of the terms that are given beside the score, to a trace or a selection; a mean over heads has none of its own.
 */
unsigned skv_method_gives(const skv_method *method);

/* Bits of the terms that are read back after scoring, if what is given is wanted. */
unsigned skv_method_keeps(const skv_method *method, bool given);

void skv_method_weights(const skv_method *method, float weights[SKV_N_TERMS]);

/* Refuses budgets that leave nothing to choose. n_budgets = n_layers × n_kv_heads. */
skv_status skv_method_check(const skv_method *method, size_t n_budgets, size_t n_kv_heads, skv_error *error);

/* Refuses a prompt whose protected slots alone exceed a budget less `reserve`. */
skv_status skv_method_check_prompt(const skv_method *method, size_t n_budgets, int32_t n_prompt, int32_t reserve,
                                   skv_error *error);

/* How many of the newest slots are kept outright. */
int32_t skv_method_newest(const skv_method *method, int32_t budget);

/* Positions below this number are kept outright. */
int32_t skv_method_protected(const skv_method *method, int32_t n_prompt);

#endif
