#include <string.h>

#include "backend.h"

extern const skv_backend skv_cpu_generic;
#if defined(__x86_64__)
extern const skv_backend skv_cpu_avx2, skv_cpu_avx512;
const skv_backend *const skv_backends[] = {&skv_cpu_avx512, &skv_cpu_avx2, &skv_cpu_generic, NULL};
#else
const skv_backend *const skv_backends[] = {&skv_cpu_generic, NULL};
#endif

bool skv_backend_runs_here(const skv_backend *backend) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (backend == &skv_cpu_avx2) return avx2;
    if (backend == &skv_cpu_avx512)
        return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
               __builtin_cpu_supports("avx512dq");
#endif
    (void)backend;
    return true;
}

skv_status skv_backend_find(const char *name, const skv_backend **backend, skv_error *error) {
    for (const skv_backend *const *b = skv_backends; *b; b++) {
        if (name && strcmp(name, (*b)->name)) continue;
        if (!skv_backend_runs_here(*b)) {
            if (!name) continue;
            return skv_fail(error, SKV_BACKEND, "CPU variant \"%s\": this processor lacks the instructions", name);
        }
        *backend = *b;
        return SKV_OK;
    }
    return skv_fail(error, SKV_CONFIG, "CPU variant \"%s\" is unknown; allowed: generic, avx2, avx512", name);
}
