#define _POSIX_C_SOURCE 200809L /* clock_gettime */
#include <dlfcn.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

#include "backend.h"
#include "skipkv.h"

extern const skv_backend skv_cpu;

double skv_seconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

const skv_backend *skv_backend_load(const char *path, skv_error *error) {
    void *library = dlopen(path, RTLD_NOW | RTLD_LOCAL); /* stays for the life of the process */
    const skv_backend *(*entry)(size_t abi) = NULL;
    if (library) *(void **)&entry = dlsym(library, "skv_cuda_backend");
    const skv_backend *backend = entry ? entry(SKV_ABI) : NULL;
    if (!backend)
        skv_fail(error, SKV_BACKEND, "%.200s: %.200s", path,
                 entry     ? "built for another version of skipkv; build both again"
                 : library ? "no backend of skipkv"
                           : dlerror());
    return backend;
}

bool skv_variant_at(const skv_backend *backend, size_t i, skv_variant *variant) {
    if (!backend) backend = &skv_cpu;
    const char *name = backend->variant(i);
    if (!name) return false;
    *variant = (skv_variant){.name = name};
    variant->runs_here = backend->runs_here(name, variant->about, sizeof variant->about);
    return true;
}

skv_device *skv_device_open(const skv_backend *backend, const char *variant, int n_threads, skv_error *error) {
    char known[96] = "", longer[96];
    skv_variant v;
    if (!backend) backend = &skv_cpu;
    const char *what = backend == &skv_cpu ? "CPU variant" : "device";
    for (size_t i = 0; skv_variant_at(backend, i, &v); i++) {
        const bool named = variant && !strcmp(variant, v.name);
        if (v.runs_here && (named || !variant)) return backend->open(v.name, n_threads, error);
        if (named) {
            skv_fail(error, SKV_BACKEND, "%s \"%s\": %s", what, variant, v.about);
            return NULL;
        }
        snprintf(longer, sizeof longer, "%s%s%.60s", v.name, i ? ", " : "", known);
        memcpy(known, longer, sizeof known);
    }
    if (variant)
        skv_fail(error, SKV_CONFIG, "%s \"%s\" is unknown; allowed: %s", what, variant, known);
    else
        skv_fail(error, SKV_BACKEND, "%s", v.about);
    return NULL;
}

skv_status skv_device_full(skv_device *device, skv_error *error, const char *format, ...) {
    char what[160];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(what, sizeof what, format, arguments);
    va_end(arguments);
    if (device->error.code) return *error = device->error, error->code; /* it gives nothing since */
    skv_fail(error, SKV_CAPACITY, "out of memory for %s%s%s", what, *device->shortage ? "; " : "", device->shortage);
    *device->shortage = 0;
    return error->code;
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
