/* Matrices: a weight type belongs to the variant that multiplies it (kernels.h), here its panels are split over
 * threads. A panel is the weights of `panel` outputs; a matrix is its panels, one behind the other. */
#include <math.h>

#include "../sample.h"
#include "cpu.h"

static const skv_weight_type *type_of(skv_device *base, const skv_matrix *w) {
    return cpu_of(base)->kernels->weights + w->type;
}

static size_t n_panels(skv_device *base, const skv_matrix *w) {
    const size_t panel = cpu_of(base)->kernels->panel;
    return ((size_t)w->n_out + panel - 1) / panel;
}

typedef struct pack_job {
    const skv_weight_type *type;
    const skv_matrix *w;
    const void *source;
    skv_dtype stored;
} pack_job;

static void pack_panels(const void *argument, cpu_range r) {
    const pack_job *j = argument;
    for (size_t p = r.first; p < r.end; p++) j->type->pack(j->w, p, j->source, j->stored);
}

/* The threads are of this call: a model that is loaded keeps none. Fewer than asked for do the same. */
void cpu_pack(skv_device *base, skv_matrix *w, const void *source, skv_dtype type) {
    const pack_job job = {type_of(base, w), w, source, type};
    const size_t panels = n_panels(base, w), n_in = (size_t)w->n_in;
    w->data = skv_alloc(&base->heap, panels, job.type->panel_bytes(n_in));
    if (!w->data) return;
    size_t started;
    cpu_threads *threads = cpu_threads_new(&base->heap, (size_t)base->n_threads, &started);
    cpu_run(threads, panels, (size_t)w->n_out * n_in, pack_panels, &job);
    cpu_threads_free(&base->heap, threads);
}

typedef struct embed_job {
    const skv_weight_type *type;
    const skv_matrix *table;
    const skv_token *tokens;
    float *x;
} embed_job;

static void embed_tokens(const void *argument, cpu_range r) {
    const embed_job *j = argument;
    for (size_t t = r.first; t < r.end; t++)
        j->type->row(j->table, (size_t)j->tokens[t].id, j->x + t * (size_t)j->table->n_in);
}

void cpu_embed(skv_device *base, const skv_matrix *table, float *x) {
    const skv_batch *batch = cpu_of(base)->batch;
    const embed_job job = {type_of(base, table), table, batch->tokens, x};
    cpu_run(cpu_of(base)->threads, batch->n_tokens, batch->n_tokens * (size_t)table->n_in, embed_tokens, &job);
}

size_t cpu_input_floats(const cpu_device *d, const skv_workload *work, size_t n_tokens) {
    const skv_weight_type *t = d->kernels->weights + work->weights;
    const size_t hidden = (size_t)work->config->hidden, ffn = (size_t)work->config->ffn,
                 heads = (size_t)work->config->n_heads * (size_t)work->config->head_dim;
    const size_t widest = hidden > ffn ? hidden : ffn;
    return t->quantise ? n_tokens * t->input_bytes(widest > heads ? widest : heads) / sizeof(float) : 0;
}

typedef struct quantise_job {
    const skv_weight_type *type;
    const float *x;
    size_t n_in;
    char *inputs;
} quantise_job;

static void quantise_tokens(const void *argument, cpu_range r) {
    const quantise_job *j = argument;
    const size_t bytes = j->type->input_bytes(j->n_in);
    for (size_t t = r.first; t < r.end; t++) j->type->quantise(j->x + t * j->n_in, j->n_in, j->inputs + t * bytes);
}

/* x as the weights want it, made once for all outputs. */
static const void *inputs_for(skv_device *base, const skv_matrix *w, const float *x, size_t n) {
    const quantise_job job = {type_of(base, w), x, (size_t)w->n_in, (char *)cpu_of(base)->inputs};
    if (!job.type->quantise) return x;
    cpu_run(cpu_of(base)->threads, n, n * job.n_in, quantise_tokens, &job);
    return job.inputs;
}

typedef struct linear_job {
    skv_device *device;
    const skv_linear *matrices;
    size_t n_matrices, n;
    const void *inputs;
} linear_job;

static void multiply_panels(const void *argument, cpu_range r) {
    const linear_job *j = argument;
    for (size_t i = 0, before = 0, panels; i < j->n_matrices; i++, before += panels) {
        const skv_linear *m = j->matrices + i;
        panels = n_panels(j->device, m->w);
        const size_t first = r.first > before ? r.first - before : 0,
                     end = r.end < before + panels ? r.end - before : panels;
        if (r.end > before && first < end)
            type_of(j->device, m->w)->linear(m->w, first, end, j->inputs, j->n, m->bias, m->y);
    }
}

/* The panels of all matrices, one after another, are split evenly. */
void cpu_linear(skv_device *base, const skv_linear *jobs, size_t n_jobs, const float *x, size_t n) {
    const linear_job job = {base, jobs, n_jobs, n, inputs_for(base, jobs[0].w, x, n)};
    size_t panels = 0;
    for (size_t i = 0; i < n_jobs; i++) panels += n_panels(base, jobs[i].w);
    const size_t macs = panels * cpu_of(base)->kernels->panel * (size_t)jobs[0].w->n_in * n;
    cpu_run(cpu_of(base)->threads, panels, macs / 4, multiply_panels, &job);
}

typedef struct best_job {
    const float *y;
    size_t n_out;
    int32_t *best;
} best_job;

static void find_best(const void *argument, cpu_range r) {
    const best_job *j = argument;
    for (size_t t = r.first; t < r.end; t++) {
        const float *y = j->y + t * j->n_out;
        const int32_t at = skv_argmax(y, j->n_out);
        j->best[t] = isfinite(y[at]) ? at : -1;
    }
}

void cpu_project(skv_device *base, const skv_matrix *w, const float *x, size_t n, float *y, int32_t *best) {
    const size_t n_out = (size_t)w->n_out;
    cpu_linear(base, (skv_linear[]){{w, NULL, y}}, 1, x, n);
    if (best) cpu_run(cpu_of(base)->threads, n, n * n_out, find_best, &(best_job){y, n_out, best});
}
