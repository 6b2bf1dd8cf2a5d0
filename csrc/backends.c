#include <string.h>

#include "backend.h"
#include "skipkv.h"

extern const skv_backend skv_cpu;
const skv_backend *const skv_backends[] = {&skv_cpu, NULL};

skv_device *skv_device_open(const char *variant, int n_threads, skv_error *error) {
    for (const skv_backend *const *b = skv_backends; *b; b++)
        for (const char *const *v = (*b)->variants; *v; v++) {
            if (variant && strcmp(variant, *v)) continue;
            if ((*b)->runs_here(*v)) return (*b)->open(*v, n_threads, error);
            if (!variant) continue;
            skv_fail(error, SKV_BACKEND, "CPU variant \"%s\": this processor lacks the instructions", variant);
            return NULL;
        }
    skv_fail(error, SKV_CONFIG, "CPU variant \"%s\" is unknown; allowed: generic, avx2, avx512", variant);
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

const char *skv_variant(size_t i, bool *runs_here) {
    for (const skv_backend *const *b = skv_backends; *b; b++)
        for (const char *const *v = (*b)->variants; *v; v++) {
            if (i-- > 0) continue;
            *runs_here = (*b)->runs_here(*v);
            return *v;
        }
    return NULL;
}
