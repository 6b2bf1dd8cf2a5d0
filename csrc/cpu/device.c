/* A CPU device: plain memory, threads, workspace, and the tables of ops and variants. */
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "../skipkv.h"
#include "cpu.h"

static const skv_kernels *const variants[] = {
#if defined(__x86_64__)
    &skv_kernels_avx512bf16, &skv_kernels_avx512vnni,
    &skv_kernels_avx512,     &skv_kernels_avx2,
#endif
    &skv_kernels_generic,    NULL};

static const char *cpu_variant(size_t i) { return variants[i] ? variants[i]->name : NULL; }

static bool cpu_runs_here(const char *variant, char *about, size_t size) {
    bool runs = !strcmp(variant, "generic");
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    if (!strcmp(variant, "avx2")) runs = avx2;
    if (!strcmp(variant, "avx512")) runs = avx512;
    const bool vnni = avx512 && __builtin_cpu_supports("avx512vnni");
    if (!strcmp(variant, "avx512vnni")) runs = vnni;
    if (!strcmp(variant, "avx512bf16")) runs = vnni && __builtin_cpu_supports("avx512bf16");
#endif
    snprintf(about, size, "%s", runs ? "" : "this processor lacks the instructions");
    return runs;
}

extern const skv_backend skv_cpu;

static void cpu_close(skv_device *base) {
    cpu_device *d = cpu_of(base);
    float *const blocks[] = {d->cosine,   d->sine,    d->attending, d->partials, d->tasks,
                             d->received, d->scoring, d->scores,    d->inputs};
    for (size_t i = 0; i < sizeof blocks / sizeof *blocks; i++) skv_free(&base->heap, blocks[i]);
    cpu_threads_free(&base->heap, d->threads);
    skv_heap heap = base->heap;
    skv_free(&heap, d);
}

static skv_device *cpu_open(const char *variant, int n_threads, skv_error *error) {
    const skv_kernels *const *kernels = variants;
    while (strcmp((*kernels)->name, variant)) kernels++;
    skv_heap heap = {0};
    cpu_device *d = skv_alloc(&heap, 1, sizeof *d);
    if (!d) {
        skv_fail(error, SKV_CAPACITY, "out of memory for a device");
        return NULL;
    }
    d->kernels = *kernels;
    d->base = (skv_device){.backend = &skv_cpu, .variant = (*kernels)->name, .heap = heap, .n_threads = n_threads};
    size_t started;
    d->threads = cpu_threads_new(&d->base.heap, (size_t)n_threads, &started);
    if (started == (size_t)n_threads) return &d->base;
    skv_fail(error, SKV_CAPACITY, "threads is %d, of which this process may start %zu", n_threads, started);
    cpu_close(&d->base);
    return NULL;
}

static void *cpu_alloc(skv_device *base, size_t count, size_t size) { return skv_alloc(&base->heap, count, size); }

static void cpu_free(skv_device *base, void *block) { skv_free(&base->heap, block); }

static void cpu_copy(skv_device *base, void *to, const void *from, size_t bytes) {
    (void)base;
    if (bytes) memcpy(to, from, bytes);
}

static skv_status cpu_sync(skv_device *base, skv_error *error) {
    if (base->error.code) *error = base->error;
    return base->error.code;
}

static skv_status cpu_reserve(skv_device *base, const skv_workload *work, skv_error *error) {
    cpu_device *d = cpu_of(base);
    const skv_config *c = work->config;
    const size_t n_threads = (size_t)base->n_threads, half = (size_t)c->head_dim / 2;
    const size_t tokens = work->n_tokens == d->work.n_tokens ? 0 : work->n_tokens;
    const bool longer = work->head_slots > d->work.head_slots || work->due_slots > d->work.due_slots;
    struct {
        float **block;
        size_t n;
    } const parts[] = {
        {&d->cosine, tokens * half},
        {&d->sine, tokens * half},
        {&d->inputs, cpu_input_floats(d, work, tokens)},
        {&d->attending, tokens ? n_threads * cpu_attention_floats(work) : 0},
        {&d->tasks, tokens ? cpu_task_floats(work) : 0},
        {&d->partials, longer ? n_threads * cpu_partial_floats(work) : 0},
        {&d->received, longer && work->cache.sums ? n_threads * 2 * padded(work->head_slots) : 0},
        {&d->scoring, longer && work->due_slots ? n_threads * cpu_scoring_floats(work) : 0},
        {&d->scores, longer ? cpu_scores_floats(work) : 0},
    };
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++) {
        if (!parts[i].n) continue;
        float *larger = skv_alloc(&base->heap, parts[i].n, sizeof *larger);
        if (!larger) return skv_fail(error, SKV_CAPACITY, "out of memory for %zu bytes of workspace", 4 * parts[i].n);
        skv_free(&base->heap, *parts[i].block);
        *parts[i].block = larger;
    }
    d->work = *work;
    return SKV_OK;
}

static void cpu_begin(skv_device *base, const skv_batch *batch) {
    cpu_device *d = cpu_of(base);
    const size_t half = (size_t)d->work.config->head_dim / 2;
    const double factor = d->work.config->rope_attention_factor;
    d->batch = batch;
    cpu_threads_after_fork(d->threads);
    for (const skv_part *part = batch->parts; part < batch->parts + batch->n_parts; part++)
        for (size_t t = 0; t < part->n; t++)
            for (size_t c = 0; c < half; c++) {
                const double angle = (double)(part->position + (int32_t)t) * (double)d->work.inv_freq[c];
                d->cosine[(part->first + t) * half + c] = (float)(factor * cos(angle));
                d->sine[(part->first + t) * half + c] = (float)(factor * sin(angle));
            }
}

typedef struct limit_job {
    const skv_kernels *kernels;
    const float *memory;             /* NULL: multiply-accumulates count, not bytes */
    double (*peak)(size_t, float *); /* of those */
    size_t share;
    double *done; /* [threads] */
} limit_job;

static void reach_limit(const void *argument, cpu_range r) {
    const limit_job *j = argument;
    float sum = 0;
    for (size_t part = r.first; part < r.end; part++)
        if (j->memory) {
            j->kernels->stream(j->memory + part * j->share, j->share);
            j->done[part] = (double)(j->share * sizeof *j->memory);
        } else {
            j->done[part] = j->peak(10000000, &sum);
        }
}

/* The best of a few passes with all threads. */
static skv_limits cpu_limits(skv_device *base, float *memory, size_t n, skv_dtype weights) {
    const cpu_device *d = cpu_of(base);
    const size_t n_threads = (size_t)base->n_threads;
    double done[SKV_MAX_THREADS];
    skv_limits found = {0};
    const limit_job jobs[] = {{d->kernels, memory, NULL, n / n_threads, done},
                              {d->kernels, NULL, d->kernels->weights[SKV_F32].peak, 0, done},
                              {d->kernels, NULL, d->kernels->weights[weights].peak, 0, done}};
    double *const best[] = {&found.bytes, &found.macs, &found.weight_macs};
    memset(memory, 0, n * sizeof *memory); /* pages that were never touched are not read */
    for (int pass = 0; pass < 18; pass++) {
        double sum = 0, *to = best[pass % 3];
        const double begin = skv_seconds();
        cpu_run(d->threads, n_threads, SIZE_MAX, reach_limit, jobs + pass % 3);
        const double seconds = skv_seconds() - begin;
        for (size_t part = 0; part < n_threads; part++) sum += done[part];
        if (sum / seconds > *to) *to = sum / seconds;
    }
    return found;
}

const skv_backend skv_cpu = {
    .name = "cpu",
    .variant = cpu_variant,
    .runs_here = cpu_runs_here,
    .open = cpu_open,
    .close = cpu_close,
    .alloc = cpu_alloc,
    .free = cpu_free,
    .write = cpu_copy,
    .read = cpu_copy,
    .copy = cpu_copy,
    .sync = cpu_sync,
    .reserve = cpu_reserve,
    .pack = cpu_pack,
    .begin = cpu_begin,
    .embed = cpu_embed,
    .rmsnorm = cpu_rmsnorm,
    .linear = cpu_linear,
    .rope = cpu_rope,
    .append = cpu_append,
    .receive = cpu_receive,
    .keep_queries = cpu_keep_queries,
    .attention = cpu_attention,
    .steer = cpu_steer,
    .silu_mul = cpu_silu_mul,
    .add = cpu_add,
    .last = cpu_last,
    .project = cpu_project,
    .sum_sentences = cpu_sum_sentences,
    .similarities = cpu_similarities,
    .score = cpu_score,
    .fetch = cpu_fetch,
    .put_score = cpu_put_score,
    .select = cpu_select,
    .compact = cpu_compact,
    .limits = cpu_limits,
    .weight_types = 1u << SKV_F32 | 1u << SKV_BF16 | 1u << SKV_Q8 | 1u << SKV_BF16A16,
};
