/* Ops that work element by element, and the vectors of sentences. */
#include <math.h>
#include <string.h>

#include "cpu.h"

typedef struct norm_job {
    const skv_kernels *kernels;
    const float *x, *w;
    float eps;
    size_t dim;
    float *y;
} norm_job;

static void norm_tokens(const void *argument, cpu_range r) {
    const norm_job *j = argument;
    for (size_t t = r.first; t < r.end; t++)
        j->kernels->rmsnorm(j->x + t * j->dim, j->w, j->eps, j->dim, j->y + t * j->dim);
}

void cpu_rmsnorm(skv_device *base, const float *x, const float *w, float eps, size_t n, size_t dim, float *y) {
    const norm_job job = {cpu_of(base)->kernels, x, w, eps, dim, y};
    cpu_run(cpu_of(base)->threads, n, n * dim, norm_tokens, &job);
}

typedef struct rope_job {
    const cpu_device *device;
    float *x;
    size_t n_heads;
} rope_job;

static void turn_tokens(const void *argument, cpu_range r) {
    const rope_job *j = argument;
    const cpu_device *d = j->device;
    const size_t dim = (size_t)d->work.config->head_dim, half = dim / 2;
    for (size_t t = r.first; t < r.end; t++)
        d->kernels->rope(j->x + t * j->n_heads * dim, j->n_heads, dim, d->cosine + t * half, d->sine + t * half);
}

void cpu_rope(skv_device *base, float *x, size_t n_heads) {
    const cpu_device *d = cpu_of(base);
    const size_t n = d->batch->n_tokens;
    cpu_run(d->threads, n, n * n_heads * (size_t)d->work.config->head_dim, turn_tokens, &(rope_job){d, x, n_heads});
}

void cpu_steer(skv_device *base, size_t layer, float *x) {
    const skv_batch *batch = cpu_of(base)->batch;
    const size_t hidden = (size_t)cpu_of(base)->work.config->hidden;
    for (const skv_part *part = batch->parts; part < batch->parts + batch->n_parts; part++) {
        if (!part->vector || (size_t)part->steered_layer != layer) continue;
        for (size_t t = part->first; t < part->first + part->n; t++) {
            const skv_token *token = batch->tokens + t;
            if (!token->steered) continue;
            for (size_t i = 0; i < hidden; i++) x[t * hidden + i] += token->alpha * part->vector[i];
        }
    }
}

/* Elements that one thread does at a time. */
enum { BLOCK = 4096 };

typedef struct pair_job {
    const skv_kernels *kernels;
    float *x;
    const float *y;
    size_t n;
} pair_job;

static void silu_blocks(const void *argument, cpu_range r) {
    const pair_job *j = argument;
    for (size_t i = r.first * BLOCK, end = r.end * BLOCK < j->n ? r.end * BLOCK : j->n; i < end; i += BLOCK)
        j->kernels->silu_mul(j->x + i, j->y + i, end - i < BLOCK ? end - i : BLOCK);
}

static void add_blocks(const void *argument, cpu_range r) {
    const pair_job *j = argument;
    for (size_t i = r.first * BLOCK, end = r.end * BLOCK < j->n ? r.end * BLOCK : j->n; i < end; i++)
        j->x[i] += j->y[i];
}

static void run_pair(skv_device *base, float *x, const float *y, size_t n, cpu_work *work) {
    const pair_job job = {cpu_of(base)->kernels, x, y, n};
    cpu_run(cpu_of(base)->threads, (n + BLOCK - 1) / BLOCK, n, work, &job);
}

void cpu_silu_mul(skv_device *base, float *gate, const float *up, size_t n) {
    run_pair(base, gate, up, n, silu_blocks);
}

void cpu_add(skv_device *base, float *x, const float *y, size_t n) { run_pair(base, x, y, n, add_blocks); }

/* Token index ≥ part index, so with y = x nothing is overwritten before it is read. */
void cpu_last(skv_device *base, const float *x, float *y) {
    const skv_batch *batch = cpu_of(base)->batch;
    const size_t hidden = (size_t)cpu_of(base)->work.config->hidden;
    for (size_t p = 0; p < batch->n_parts; p++) {
        const skv_part *part = batch->parts + p;
        memmove(y + p * hidden, x + (part->first + part->n - 1) * hidden, hidden * sizeof *y);
    }
}

/* vector = sum / length, scaled to length 1; sum = 0 */
static void close_sentence(float *sum, size_t n, int32_t length, float *vector) {
    double squares = 0;
    for (size_t i = 0; i < n; i++) {
        vector[i] = sum[i] / (float)length;
        squares += (double)vector[i] * (double)vector[i];
        sum[i] = 0;
    }
    const float norm = squares > 0 ? (float)sqrt(squares) : 1;
    for (size_t i = 0; i < n; i++) vector[i] /= norm;
    for (size_t i = n; i % 16; i++) vector[i] = 0;
}

void cpu_sum_sentences(skv_device *base, const float *x) {
    const skv_batch *batch = cpu_of(base)->batch;
    const size_t hidden = (size_t)cpu_of(base)->work.config->hidden;
    for (const skv_part *part = batch->parts; part < batch->parts + batch->n_parts; part++)
        for (size_t t = part->first; t < part->first + part->n; t++) {
            const skv_token *token = batch->tokens + t;
            if (token->mark != SKV_MARK_ADD && token->mark != SKV_MARK_CLOSE) continue;
            for (size_t i = 0; i < hidden; i++) part->sum[i] += x[t * hidden + i];
            if (token->mark == SKV_MARK_CLOSE) close_sentence(part->sum, hidden, token->length, token->vector);
        }
}

void cpu_similarities(skv_device *base, float *const *vectors, size_t width, size_t first, size_t n, float *out) {
    const skv_kernels *kernels = cpu_of(base)->kernels;
    for (size_t j = first; j < n; j++)
        for (size_t i = 0; i < j; i++)
            if (vectors[i]) kernels->inner(vectors[i], vectors[j], 1, width, out + (j - first) * n + i);
}
