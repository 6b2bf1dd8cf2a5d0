/* The CPU backend: splits every op of backend.h over threads and calls the kernels of one variant. Threads split
 * outputs, heads and pages, never a sum, so results do not depend on their number. */
#ifndef SKV_CPU_H
#define SKV_CPU_H

#include "kernels/kernels.h"
#include "threads.h"

typedef struct cpu_device {
    skv_device base;
    const skv_kernels *kernels;
    cpu_threads *threads;
    skv_workload work;
    const skv_batch *batch;
    float *cosine, *sine; /* [n_tokens, head_dim / 2] of the batch's positions */
    float *inputs;    /* [n_tokens, the widest input of a matrix] as its type wants them, where that is not floats */
    float *attending; /* [n_threads, cpu_attention_floats] */
    float *partials;  /* [n_threads, pages of head_slots, group, stride + 2]: attention page by page */
    float *tasks;     /* [n_tokens, n_kv_heads] attention_task */
    float *received;  /* [n_threads, 2, padded head_slots]: with sums */
    float *scoring;   /* [n_threads, cpu_scoring_floats] */
    float *scores;    /* [scores_capacity] the jobs' scores, kept terms and kept slots */
} cpu_device;

static inline cpu_device *cpu_of(skv_device *device) { return (cpu_device *)device; }

/* Rounded up to whole vectors, with room for one more. */
static inline size_t padded(size_t n) { return (n + 31) / 16 * 16; }

static inline char *page_keys(const skv_head *head, size_t page) { return head->pages[page]; }

static inline char *page_values(const skv_cache_shape *cache, const skv_head *head, size_t page) {
    return head->pages[page] + cache->values_at;
}

static inline int32_t *page_positions(const skv_cache_shape *cache, const skv_head *head, size_t page) {
    return (int32_t *)(void *)(head->pages[page] + cache->positions_at);
}

/* Attention received, only where the cache has sums. */
static inline float *page_sums(const skv_cache_shape *cache, const skv_head *head, size_t page) {
    return (float *)(void *)(head->pages[page] + cache->sums_at);
}

/* q8 only: of a page's keys [SKV_PAGE], then of its values */
static inline float *page_scales(const skv_cache_shape *cache, const skv_head *head, size_t page) {
    return (float *)(void *)(head->pages[page] + cache->scales_at);
}

/* n keys of a page from slot `at` on as float32, in the page itself or in scratch [n, stride]. */
const float *cpu_keys(const cpu_device *d, const skv_head *head, size_t page, size_t at, size_t n, float *scratch);

/* Floats of workspace: of a thread for attention, for scoring one head, of all jobs of a compaction, and of the inputs
 * of a matrix for n tokens. */
size_t cpu_attention_floats(const skv_workload *work);
size_t cpu_task_floats(const skv_workload *work);
size_t cpu_partial_floats(const skv_workload *work);
size_t cpu_scoring_floats(const skv_workload *work);
size_t cpu_scores_floats(const skv_workload *work);
size_t cpu_input_floats(const cpu_device *d, const skv_workload *work, size_t n_tokens);

/* Ops of backend.h, by file. */
void cpu_pack(skv_device *device, skv_matrix *w, const void *source, skv_dtype type);
void cpu_embed(skv_device *device, const skv_matrix *table, float *x);
void cpu_linear(skv_device *device, const skv_linear *jobs, size_t n_jobs, const float *x, size_t n);
void cpu_project(skv_device *device, const skv_matrix *w, const float *x, size_t n, float *y, int32_t *best);

void cpu_rmsnorm(skv_device *device, const float *x, const float *w, float eps, size_t n, size_t dim, float *y);
void cpu_rope(skv_device *device, float *x, size_t n_heads);
void cpu_steer(skv_device *device, size_t layer, float *x);
void cpu_silu_mul(skv_device *device, float *gate, const float *up, size_t n);
void cpu_add(skv_device *device, float *x, const float *y, size_t n);
void cpu_last(skv_device *device, const float *x, float *y);
void cpu_sum_sentences(skv_device *device, const float *x);
void cpu_similarities(skv_device *device, float *const *vectors, size_t width, size_t first, size_t n, float *out);

void cpu_append(skv_device *device, size_t layer, const float *k, const float *v);
void cpu_receive(skv_device *device, size_t layer, const float *q);
void cpu_keep_queries(skv_device *device, size_t layer, const float *q);
void cpu_attention(skv_device *device, size_t layer, const float *q, float *out);

void cpu_score(skv_device *device, const skv_scoring *scoring, skv_job *jobs, size_t n_jobs);
void cpu_fetch(skv_device *device, const skv_scoring *scoring, const skv_job *job, skv_fetched *to);
void cpu_put_score(skv_device *device, const skv_job *job, const float *score);
void cpu_select(skv_device *device, const skv_scoring *scoring, skv_job *jobs, size_t n_jobs);
void cpu_compact(skv_device *device, const skv_scoring *scoring, const skv_job *jobs, size_t n_jobs);

#endif
