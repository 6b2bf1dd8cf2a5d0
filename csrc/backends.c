#include <stdio.h>
#include <string.h>

#include "backend.h"
#include "skipkv.h"

extern const skv_backend skv_cpu;
const skv_backend *const skv_backends[] = {&skv_cpu, NULL};

/* The i-th variant of all backends, NULL beyond the last. */
static const char *variant_at(size_t i, const skv_backend **backend) {
    for (const skv_backend *const *b = skv_backends; *b; b++) {
        const char *name;
        *backend = *b;
        for (size_t of_this = 0; (name = (*b)->variant(of_this)); of_this++)
            if (i-- == 0) return name;
    }
    return NULL;
}

const char *skv_variant(size_t i, bool *runs_here) {
    const skv_backend *backend;
    const char *name = variant_at(i, &backend);
    if (name) *runs_here = backend->runs_here(name);
    return name;
}

skv_device *skv_device_open(const char *variant, int n_threads, skv_error *error) {
    const skv_backend *backend;
    const char *name;
    char known[96] = "", longer[96];
    for (size_t i = 0; (name = variant_at(i, &backend)); i++) {
        const bool runs_here = backend->runs_here(name), named = variant && !strcmp(variant, name);
        if (runs_here && (named || !variant)) return backend->open(name, n_threads, error);
        if (named) {
            skv_fail(error, SKV_BACKEND, "CPU variant \"%s\": this processor lacks the instructions", variant);
            return NULL;
        }
        snprintf(longer, sizeof longer, "%s%s%.60s", name, i ? ", " : "", known);
        memcpy(known, longer, sizeof known);
    }
    skv_fail(error, SKV_CONFIG, "CPU variant \"%s\" is unknown; allowed: %s", variant, known);
    return NULL;
}

static size_t query_floats(const skv_workload *work) {
    return (size_t)(work->config->n_heads / work->config->n_kv_heads * work->window * work->config->head_dim);
}

size_t skv_fetched_floats(const skv_workload *work, size_t n_slots) {
    return n_slots * ((size_t)work->config->head_dim + SKV_N_TERMS + 1) + query_floats(work);
}

skv_fetched skv_fetched_in(const skv_workload *work, unsigned terms, size_t n_slots, float *block) {
    skv_fetched f = {.score = block, .keys = block + n_slots};
    f.queries = f.keys + n_slots * (size_t)work->config->head_dim;
    float *term = f.queries + query_floats(work);
    for (size_t i = 0; i < SKV_N_TERMS; i++, term += n_slots)
        if (terms & 1u << i) f.terms[i] = term;
    return f;
}
