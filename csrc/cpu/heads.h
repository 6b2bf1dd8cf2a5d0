/* One head of a compaction on the CPU: a thread's arrays for it, and where its results lie between score, select and
 * compact. */
#ifndef SKV_CPU_HEADS_H
#define SKV_CPU_HEADS_H

#include "cpu.h"

/* Rows of products computed at a time. */
enum { ROWS = 48 };

/* A thread's arrays for one head of L slots, [padded(L)] each unless said otherwise. */
typedef struct head_work {
    const cpu_device *device;
    const skv_scoring *scoring;
    skv_job *job;
    size_t n_slots, n_candidates, n_queries, group, dim, stride;
    float *keys;    /* [L, stride] float32, zero beyond dim */
    float *unit;    /* [L, stride] keys of length 1 */
    float *queries; /* [n_queries, group, stride], oldest first */
    float *terms[SKV_N_TERMS];
    float *z;           /* [window, padded(L)] logits; of every query head where they count one by one */
    float *panel;       /* [stride, SKV_COLUMNS] */
    float *products;    /* [ROWS, SKV_COLUMNS] */
    float *sum;         /* [stride] Σ unit */
    float *self, *lost; /* unit · unit; see search_hits */
    float *scratch;     /* [2 padded(L)], of all heads of a layer where they share their budgets */
    int32_t *active;    /* rows without a hit so far */
    int32_t *positions;
    int32_t *wanted, *ends; /* [n_kv_heads] see share_budget */
} head_work;

/* What threads share in score and select: `together` jobs at a time. */
typedef struct head_jobs {
    const cpu_device *device;
    const skv_scoring *scoring;
    skv_job *jobs;
    size_t together;
} head_jobs;

/* A thread's arrays for the heads of a call. */
head_work head_of_thread(const cpu_device *device, const skv_scoring *scoring, size_t thread);

/* A job's area: its score, the terms that are kept, in order, and its kept slots; padded(L) each. */
float *head_score(const cpu_device *device, const skv_job *job);
float *head_term(const cpu_device *device, const skv_scoring *scoring, const skv_job *job, unsigned term);
int32_t *head_kept(const cpu_device *device, const skv_scoring *scoring, const skv_job *job);

/* Floats of a job's area. */
size_t head_area(const skv_scoring *scoring, const skv_job *job);

/* The slot that is the i-th held one. */
size_t head_slot(const skv_job *job, size_t i);

/* keys [L, stride] as float32, positions [L], sums [L] ← the held slots; keys and sums may be NULL. */
void head_gather(const cpu_device *device, const skv_job *job, float *keys, int32_t *positions, float *sums);

/* How many queries the job's row remembers; the i-th of them for head g of the job's group, oldest first. */
size_t head_queries(const cpu_device *device, const skv_job *job);
const float *head_query(const cpu_device *device, const skv_job *job, size_t i, size_t g);

#endif
