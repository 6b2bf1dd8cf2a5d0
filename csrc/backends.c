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

const char *skv_variant(size_t i, bool *runs_here) {
    for (const skv_backend *const *b = skv_backends; *b; b++)
        for (const char *const *v = (*b)->variants; *v; v++) {
            if (i-- > 0) continue;
            *runs_here = (*b)->runs_here(*v);
            return *v;
        }
    return NULL;
}
