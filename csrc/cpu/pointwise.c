/* Ops that work element by element, and the vectors of sentences. */
#include <math.h>
#include <string.h>

#include "cpu.h"

void cpu_rmsnorm(skv_device *base, const float *x, const float *w, float eps, size_t n, size_t dim, float *y) {
    const skv_kernels *kernels = cpu_of(base)->kernels;
    PARALLEL(n * dim > SMALL)
    for (size_t t = 0; t < n; t++) kernels->rmsnorm(x + t * dim, w, eps, dim, y + t * dim);
}

void cpu_rope(skv_device *base, float *x, size_t n_heads) {
    const cpu_device *d = cpu_of(base);
    const size_t n = d->batch->n_tokens, head_dim = (size_t)d->work.config->head_dim, half = head_dim / 2;
    PARALLEL(n * n_heads * head_dim > SMALL)
    for (size_t t = 0; t < n; t++)
        d->kernels->rope(x + t * n_heads * head_dim, n_heads, head_dim, d->cosine + t * half, d->sine + t * half);
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

void cpu_silu_mul(skv_device *base, float *gate, const float *up, size_t n) {
    const skv_kernels *kernels = cpu_of(base)->kernels;
    const size_t block = 4096;
    PARALLEL(n > SMALL)
    for (size_t i = 0; i < n; i += block) kernels->silu_mul(gate + i, up + i, n - i < block ? n - i : block);
}

void cpu_add(skv_device *base, float *x, const float *y, size_t n) {
    PARALLEL(n > SMALL)
    for (size_t i = 0; i < n; i++) x[i] += y[i];
}

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
