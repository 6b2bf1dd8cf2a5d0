#include "policies.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

extern const skv_policy skv_policy_full, skv_policy_streaming, skv_policy_h2o, skv_policy_h2o_last, skv_policy_snapkv, skv_policy_rkv,
    skv_policy_skipkv, skv_policy_random, skv_policy_custom;

const skv_policy *const skv_policies[] = {
    &skv_policy_full, &skv_policy_streaming, &skv_policy_h2o,    &skv_policy_h2o_last, &skv_policy_snapkv,
    &skv_policy_rkv,  &skv_policy_skipkv,    &skv_policy_random, &skv_policy_custom,   NULL};

const skv_parameter skv_parameters[] = {
    {"budget", 'i', true, 1, 1 << 24, 0, "slots that a KV head keeps after a compaction"},
    {"interval", 'i', false, 1, 1 << 20, 128, "tokens between compactions"},
    {"window", 'i', false, 1, 256, 8, "newest slots always kept, and newest queries that score the others"},
    {"mix", 'f', false, 0, 1, 0.1, "weight of importance against redundancy"},
    {"kernel", 'o', false, 1, 255, 7, "neighbouring slots over which importance is pooled"},
    {"sinks", 'i', false, 0, 1 << 20, 4, "first positions always kept"},
    {"tau", 'f', false, -1, 2, 0.95, "similarity above which a later sentence repeats an earlier one"},
    {"seed", 'i', false, 0, 9007199254740991.0, 0, "of the noise"},
    {0},
};

const skv_policy *skv_policy_find(const char *name) {
    for (const skv_policy *const *p = skv_policies; *p; p++)
        if (!strcmp((*p)->name, name)) return *p;
    return NULL;
}

bool skv_policy_takes(const skv_policy *policy, const char *parameter) {
    const size_t length = strlen(parameter);
    for (const char *at = policy->parameters; (at = strstr(at, parameter)); at += length)
        if ((at == policy->parameters || at[-1] == ' ') && (at[length] == ' ' || at[length] == 0)) return true;
    return false;
}

skv_method skv_method_of(const skv_policy *policy) {
    skv_method m = {.policy = policy, .evict = true};
    skv_error unused;
    for (const skv_parameter *p = skv_parameters; p->name; p++)
        if (!p->no_default) skv_method_set(&m, p->name, p->value, &unused);
    return m;
}

skv_status skv_method_set(skv_method *m, const char *name, double value, skv_error *error) {
    const skv_parameter *p = skv_parameters;
    while (p->name && strcmp(p->name, name)) p++;
    if (!p->name) return skv_fail(error, SKV_CONFIG, "parameter \"%.40s\" is unknown", name);
    const bool whole = p->kind != 'f', odd = p->kind == 'o';
    if (!(value >= p->low && value <= p->high) || (whole && value != floor(value)) || (odd && fmod(value, 2) != 1)) {
        char text[32];
        for (int digits = 6; digits <= 17; digits++) { /* as few as say which number it is */
            snprintf(text, sizeof text, "%.*g", digits, value);
            if (strtod(text, NULL) == value) break;
        }
        return skv_fail(error, SKV_CONFIG, "%s is %s; allowed: %s from %.17g to %.17g", name, text,
                        odd     ? "odd integers"
                        : whole ? "integers"
                                : "numbers",
                        p->low, p->high);
    }
    const struct {
        const char *name;
        int32_t *integer;
        double *number;
    } fields[] = {{"interval", &m->interval, NULL}, {"window", &m->window, NULL}, {"kernel", &m->kernel, NULL}, {"sinks", &m->sinks, NULL},
                  {"mix", NULL, &m->mix},           {"tau", NULL, &m->tau},       {"seed", NULL, &m->seed}};
    for (size_t i = 0; i < sizeof fields / sizeof *fields; i++)
        if (!strcmp(fields[i].name, name)) {
            if (fields[i].integer)
                *fields[i].integer = (int32_t)value;
            else
                *fields[i].number = value;
        }
    return SKV_OK;
}

int32_t skv_method_protected(const skv_method *m, int32_t n_prompt) {
    const int32_t first = m->protect_prompt && n_prompt > m->protect_first ? n_prompt : m->protect_first;
    return skv_policy_takes(m->policy, "sinks") && m->sinks > first ? m->sinks : first;
}

skv_status skv_method_check(const skv_method *m, size_t n_budgets, size_t n_kv_heads, skv_error *error) {
    if (!(m->policy->needs & SKV_COMPACTS)) return SKV_OK;
    for (size_t i = 0; i < n_budgets; i++) {
        const int32_t budget = m->budgets[i], newest = m->policy->newest(m, budget);
        if (budget < 1 || budget > 1 << 24)
            return skv_fail(error, SKV_CONFIG, "budget is %d; allowed: integers from 1 to %d", budget, 1 << 24);
        if (budget <= newest)
            return skv_fail(error, SKV_CONFIG, "budget is %d; allowed: more than the %d newest slots that %s always keeps", budget, newest,
                            m->policy->name);
        if ((m->policy->needs & SKV_SHARED) && budget != m->budgets[i / n_kv_heads * n_kv_heads])
            return skv_fail(
                error, SKV_CONFIG,
                "budget differs between the KV heads of layer %zu; allowed: one number a layer, as %s keeps one set for all heads",
                i / n_kv_heads, m->policy->name);
    }
    return skv_method_check_prompt(m, n_budgets, 0, 0, error);
}

skv_status skv_method_check_prompt(const skv_method *m, size_t n_budgets, int32_t n_prompt, int32_t reserve, skv_error *error) {
    if (!(m->policy->needs & SKV_COMPACTS)) return SKV_OK;
    const int32_t first = skv_method_protected(m, n_prompt);
    for (size_t i = 0; i < n_budgets; i++) {
        const int32_t budget = m->budgets[i] - reserve, newest = m->policy->newest(m, budget);
        /* Where none of the newest are protected, or padding takes from the budget, one slot at least must be left to choose. */
        const int32_t least = first + newest + (newest == 0 || reserve > 0);
        if (budget < least)
            return skv_fail(error, SKV_CONFIG,
                            "budget is %d%s; allowed: at least %d, as the first %d positions and the %d newest slots are protected", budget,
                            reserve ? " after the padding reserve" : "", least, first, newest);
    }
    return SKV_OK;
}

int32_t skv_newest_window(const skv_method *m, int32_t budget) {
    (void)budget;
    return m->window;
}

void skv_score_importance(skv_scoring *s) { s->backend->importance(s); }

void skv_score_redundancy(skv_scoring *s) { s->backend->redundancy(s); }

/* First slot at or after a position; positions ascend. */
static size_t lower_bound(const int32_t *positions, size_t n, int32_t position) {
    size_t low = 0, high = n;
    while (low < high) {
        const size_t middle = (low + high) / 2;
        if (positions[middle] < position)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

/* The slots of one sentence where they do not ascend. */
static void penalise_everywhere(skv_scoring *s, const skv_penalty *p) {
    size_t n = 0;
    for (size_t j = 0; j < s->n_slots; j++) n += s->positions[j] >= p->first && s->positions[j] <= p->last;
    if ((s->method->compat & SKV_COMPAT_PAIRS) && n < 2) return;
    for (size_t j = 0; j < s->n_slots; j++)
        if (s->positions[j] >= p->first && s->positions[j] <= p->last) s->penalty[j] = p->lambda;
}

void skv_score_penalty(skv_scoring *s) {
    memset(s->penalty, 0, s->n_slots * sizeof *s->penalty);
    const bool ascending = !(s->method->compat & SKV_COMPAT_SCORE_ORDER);
    for (size_t i = 0; i < s->n_penalties; i++) {
        if (!ascending) {
            penalise_everywhere(s, s->penalties + i);
            continue;
        }
        const size_t first = lower_bound(s->positions, s->n_slots, s->penalties[i].first);
        const size_t end = lower_bound(s->positions, s->n_slots, s->penalties[i].last + 1);
        if ((s->method->compat & SKV_COMPAT_PAIRS) && end - first < 2) continue;
        for (size_t j = first; j < end; j++) s->penalty[j] = s->penalties[i].lambda;
    }
}

uint64_t skv_splitmix64(uint64_t x) {
    x += 0x9E3779B97F4A7C15u;
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
    return x ^ (x >> 31);
}
