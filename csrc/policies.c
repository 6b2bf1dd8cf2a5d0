#include "policies.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

const char *const skv_term_names[SKV_N_TERMS] = {
    [SKV_POSITION] = "position",     [SKV_SUMS] = "sums",
    [SKV_IMPORTANCE] = "importance", [SKV_REDUNDANCY] = "redundancy",
    [SKV_PENALTY] = "penalty",       [SKV_NOISE] = "noise",
    [SKV_KEY_NORM] = "key_norm",     [SKV_KEY_LIKENESS] = "key_likeness",
};

const char *const skv_compat_names[] = {
    "pairs",         "lost-heads",        "score-order",      "latest-flag",      "empty-sentences",
    "prompt-marker", "thoughts-anywhere", "thoughts-on-grid", "steer-prompt-end", NULL};

/* METHOD.md §6. A summary is what `skipkv methods` says of it. */
const skv_policy skv_policies[] = {
    {"full", "the whole cache, never compacted", "interval tau", 0, SKV_NEWEST_ALL, .weights = {{0}}},
    {"streaming", "StreamingLLM: the first positions and the most recent ones", "budget interval sinks tau",
     SKV_COMPACTS, SKV_NEWEST_NONE, .weights = {[SKV_POSITION] = {1, 0}}},
    {"h2o", "H2O: half recent, half by the attention received so far", "budget interval window tau", SKV_COMPACTS,
     SKV_NEWEST_HALF, .weights = {[SKV_SUMS] = {1, 0}}},
    {"h2o-last", "H2O as in SkipKV's repository: the last query's attention, one kept set for all heads",
     "budget interval tau", SKV_COMPACTS | SKV_SHARED, SKV_NEWEST_WINDOW, .window = 1, .kernel = 1,
     .weights = {[SKV_IMPORTANCE] = {1, 0}}},
    {"tova", "TOVA: the last query's attention, mean of all query heads, one kept set for all heads",
     "budget interval tau", SKV_COMPACTS | SKV_SHARED | SKV_QUERY_HEADS, SKV_NEWEST_WINDOW, .window = 1, .kernel = 1,
     .weights = {[SKV_IMPORTANCE] = {1, 0}}},
    {"snapkv", "SnapKV: attention of the window's queries, pooled", "budget interval window kernel tau", SKV_COMPACTS,
     SKV_NEWEST_WINDOW, .weights = {[SKV_IMPORTANCE] = {1, 0}}},
    {"knorm", "the shortest keys stay (L2 norm)", "budget interval window tau", SKV_COMPACTS, SKV_NEWEST_WINDOW,
     .weights = {[SKV_KEY_NORM] = {-1, 0}}},
    {"keydiff", "KeyDiff: the keys least like the others", "budget interval window tau", SKV_COMPACTS,
     SKV_NEWEST_WINDOW, .weights = {[SKV_KEY_LIKENESS] = {-1, 0}}},
    {"rkv", "R-KV: importance against redundancy of the keys", "budget interval window mix kernel tau", SKV_COMPACTS,
     SKV_NEWEST_WINDOW, .weights = {[SKV_IMPORTANCE] = {0, 1}, [SKV_REDUNDANCY] = {-1, 1}}},
    {"skipkv", "SkipKV: R-KV's score less a penalty on sentences that a later one repeats",
     "budget interval window mix kernel tau", SKV_COMPACTS, SKV_NEWEST_WINDOW,
     .weights = {[SKV_IMPORTANCE] = {0, 1}, [SKV_REDUNDANCY] = {-1, 1}, [SKV_PENALTY] = {-1, 0}}},
    {"random", "uniform noise: the control", "budget interval window seed tau", SKV_COMPACTS, SKV_NEWEST_WINDOW,
     .weights = {[SKV_NOISE] = {1, 0}}},
    {"blend", "a weighted sum of terms",
     "budget position sums importance redundancy penalty noise key_norm key_likeness interval window kernel seed tau",
     SKV_COMPACTS, SKV_NEWEST_WINDOW, .weights = {{0}}},
    {"custom", "the caller's own score", "budget interval window tau", SKV_COMPACTS | SKV_CUSTOM, SKV_NEWEST_WINDOW,
     .weights = {{0}}},
    {0},
};

#define WEIGHT(name, term)                                                                                             \
    { name, 'f', false, -1e6, 1e6, 0, "weight of the term " name, FIELD(weights[term]), true }
#define FIELD(field) offsetof(skv_method, field)
const skv_parameter skv_parameters[] = {
    {"budget", 'i', true, 1, SKV_MAX_BUDGET, 0, "slots that a KV head keeps after a compaction", 0, false},
    {"interval", 'i', false, 1, 1 << 20, 128, "tokens between compactions", FIELD(interval), false},
    {"window", 'i', false, 1, 256, 8, "newest slots always kept, and newest queries that score the others",
     FIELD(window), false},
    {"mix", 'f', false, 0, 1, 0.1, "weight of importance against redundancy", FIELD(mix), true},
    {"kernel", 'o', false, 1, 255, 7, "neighbouring slots over which importance is pooled", FIELD(kernel), false},
    {"sinks", 'i', false, 0, 1 << 20, 4, "first positions always kept", FIELD(sinks), false},
    {"tau", 'f', false, -1, 2, 0.95, "similarity above which a later sentence repeats an earlier one", FIELD(tau),
     true},
    {"seed", 'i', false, 0, 9007199254740991.0, 0, "of the noise", FIELD(seed), true},
    WEIGHT("position", SKV_POSITION),
    WEIGHT("sums", SKV_SUMS),
    WEIGHT("importance", SKV_IMPORTANCE),
    WEIGHT("redundancy", SKV_REDUNDANCY),
    WEIGHT("penalty", SKV_PENALTY),
    WEIGHT("noise", SKV_NOISE),
    WEIGHT("key_norm", SKV_KEY_NORM),
    WEIGHT("key_likeness", SKV_KEY_LIKENESS),
    {0},
};

const skv_policy *skv_policy_find(const char *name) {
    for (const skv_policy *p = skv_policies; p->name; p++)
        if (!strcmp(p->name, name)) return p;
    return NULL;
}

bool skv_policy_takes(const skv_policy *policy, const char *parameter) {
    const size_t length = strlen(parameter);
    for (const char *at = policy->parameters; (at = strstr(at, parameter)); at += length)
        if ((at == policy->parameters || at[-1] == ' ') && (at[length] == ' ' || at[length] == 0)) return true;
    return false;
}

static void store(skv_method *m, const skv_parameter *p, double value) {
    char *field = (char *)m + p->offset;
    if (p->is_double)
        *(double *)(void *)field = value;
    else
        *(int32_t *)(void *)field = (int32_t)value;
}

skv_method skv_method_of(const skv_policy *policy) {
    skv_method m = {.policy = policy, .evict = true};
    for (const skv_parameter *p = skv_parameters; p->name; p++)
        if (!p->no_default) store(&m, p, p->value);
    if (policy->window) m.window = policy->window;
    if (policy->kernel) m.kernel = policy->kernel;
    return m;
}

skv_status skv_method_set(skv_method *m, const char *name, double value, skv_error *error) {
    const skv_parameter *p = skv_parameters;
    while (p->name && strcmp(p->name, name)) p++;
    if (!p->name) return skv_fail(error, SKV_CONFIG, "parameter \"%.40s\" is unknown", name);
    const bool whole = p->kind != 'f', odd = p->kind == 'o';
    if (!(value >= p->low && value <= p->high) || (whole && value != floor(value)) || (odd && fmod(value, 2) != 1)) {
        const char *kind = odd ? "odd integers" : whole ? "integers" : "numbers";
        char text[32];
        for (int digits = 6; digits <= 17; digits++) { /* as few as say which number it is */
            snprintf(text, sizeof text, "%.*g", digits, value);
            if (strtod(text, NULL) == value) break;
        }
        return skv_fail(error, SKV_CONFIG, "%s is %s; allowed: %s from %.17g to %.17g", name, text, kind, p->low,
                        p->high);
    }
    store(m, p, value);
    return SKV_OK;
}

unsigned skv_method_needs(const skv_method *m) {
    const bool shares = m->by_layer && m->policy->flags & SKV_COMPACTS; /* `full` has nothing to share */
    unsigned needs = m->policy->flags | m->custom_needs | (shares ? SKV_BY_LAYER : 0);
    for (unsigned term = 0; term < SKV_N_TERMS; term++) {
        const skv_weight *w = m->policy->weights + term;
        if (w->base != 0 || w->slope != 0 || m->weights[term] != 0) needs |= 1u << term;
    }
    return needs & 1u << SKV_IMPORTANCE ? needs | SKV_QUERIES : needs;
}

unsigned skv_method_gives(const skv_method *m) {
    const unsigned needs = skv_method_needs(m);
    return needs & SKV_SHARED ? 0 : needs & (1 << SKV_IMPORTANCE | 1 << SKV_REDUNDANCY | 1 << SKV_PENALTY);
}

unsigned skv_method_keeps(const skv_method *m, bool given) {
    const unsigned needs = skv_method_needs(m);
    if (needs & SKV_CUSTOM) return needs & ((1 << SKV_N_TERMS) - 1);
    return given ? skv_method_gives(m) : 0;
}

void skv_method_weights(const skv_method *m, float weights[SKV_N_TERMS]) {
    for (size_t term = 0; term < SKV_N_TERMS; term++) {
        const skv_weight *w = m->policy->weights + term;
        weights[term] = (float)(w->base + w->slope * m->mix + m->weights[term]);
    }
}

int32_t skv_method_newest(const skv_method *m, int32_t budget) {
    switch (m->policy->newest) {
    case SKV_NEWEST_ALL:
        return budget;
    case SKV_NEWEST_HALF:
        return budget / 2 > m->window ? budget / 2 : m->window;
    case SKV_NEWEST_WINDOW:
        return m->window;
    default:
        return 0;
    }
}

int32_t skv_method_protected(const skv_method *m, int32_t n_prompt) {
    const int32_t first = m->protect_prompt && n_prompt > m->protect_first ? n_prompt : m->protect_first;
    return skv_policy_takes(m->policy, "sinks") && m->sinks > first ? m->sinks : first;
}

skv_status skv_method_check(const skv_method *m, size_t n_budgets, size_t n_kv_heads, skv_error *error) {
    const unsigned flags = m->policy->flags;
    const char *name = m->policy->name;
    if (!(flags & SKV_COMPACTS)) return SKV_OK;
    if (m->by_layer && (flags & SKV_SHARED))
        return skv_fail(error, SKV_CONFIG, "allocate is layer; allowed: head, as %s keeps one set for all heads", name);
    if (!(flags & SKV_CUSTOM) && !(skv_method_needs(m) & ((1 << SKV_N_TERMS) - 1)))
        return skv_fail(error, SKV_CONFIG, "%s weighs no term; allowed: at least one weight that is not 0", name);
    for (size_t i = 0; i < n_budgets; i++) {
        const int32_t budget = m->budgets[i], newest = skv_method_newest(m, budget);
        if (budget < 1 || budget > SKV_MAX_BUDGET)
            return skv_fail(error, SKV_CONFIG, "budget is %d; allowed: integers from 1 to %d", budget, SKV_MAX_BUDGET);
        if (budget <= newest)
            return skv_fail(error, SKV_CONFIG,
                            "budget is %d; allowed: more than the %d newest slots that %s always keeps", budget, newest,
                            name);
        if ((flags & SKV_SHARED) && budget != m->budgets[i / n_kv_heads * n_kv_heads])
            return skv_fail(
                error, SKV_CONFIG,
                "budget differs between the KV heads of layer %zu; allowed: one number a layer, as %s keeps "
                "one set for all heads",
                i / n_kv_heads, name);
    }
    return skv_method_check_prompt(m, n_budgets, 0, 0, error);
}

skv_status skv_method_check_prompt(const skv_method *m, size_t n_budgets, int32_t n_prompt, int32_t reserve,
                                   skv_error *error) {
    if (!(m->policy->flags & SKV_COMPACTS)) return SKV_OK;
    const int32_t first = skv_method_protected(m, n_prompt);
    for (size_t i = 0; i < n_budgets; i++) {
        const int32_t budget = m->budgets[i] - reserve, newest = skv_method_newest(m, budget);
        /* Where none of the newest are protected, or padding takes from the budget, one slot at least must be left to
         * choose. */
        const int32_t least = first + newest + (newest == 0 || reserve > 0);
        if (budget < least)
            return skv_fail(
                error, SKV_CONFIG,
                "budget is %d%s; allowed: at least %d, as the first %d positions and the %d newest slots are "
                "protected",
                budget, reserve ? " after the padding reserve" : "", least, first, newest);
    }
    return SKV_OK;
}
