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

void cpu_pack(skv_device *base, skv_matrix *w, const void *source, skv_dtype type) {
    const skv_weight_type *t = type_of(base, w);
    const size_t panels = n_panels(base, w);
    w->data = skv_alloc(&base->heap, panels, t->panel_bytes((size_t)w->n_in));
    if (!w->data) return;
#pragma omp parallel for schedule(static) num_threads(base->n_threads)
    for (size_t p = 0; p < panels; p++) t->pack(w, p, source, type);
}

void cpu_embed(skv_device *base, const skv_matrix *table, float *x) {
    const skv_batch *batch = cpu_of(base)->batch;
    const size_t n_in = (size_t)table->n_in;
    const skv_weight_type *type = type_of(base, table);
    PARALLEL(batch->n_tokens * n_in > SMALL)
    for (size_t t = 0; t < batch->n_tokens; t++) type->row(table, (size_t)batch->tokens[t].id, x + t * n_in);
}

size_t cpu_input_floats(const cpu_device *d, const skv_workload *work, size_t n_tokens) {
    const skv_weight_type *t = d->kernels->weights + work->weights;
    const size_t hidden = (size_t)work->config->hidden, ffn = (size_t)work->config->ffn,
                 heads = (size_t)work->config->n_heads * (size_t)work->config->head_dim;
    const size_t widest = hidden > ffn ? hidden : ffn;
    return t->quantise ? n_tokens * t->input_bytes(widest > heads ? widest : heads) / sizeof(float) : 0;
}

/* x as the weights want it, made once for all outputs. */
static const void *inputs_for(skv_device *base, const skv_matrix *w, const float *x, size_t n) {
    const skv_weight_type *t = type_of(base, w);
    const size_t n_in = (size_t)w->n_in;
    if (!t->quantise) return x;
    char *inputs = (char *)cpu_of(base)->inputs;
    const size_t bytes = t->input_bytes(n_in);
    PARALLEL(n * n_in > SMALL)
    for (size_t i = 0; i < n; i++) t->quantise(x + i * n_in, n_in, inputs + i * bytes);
    return inputs;
}

/* The panels of all matrices, one after another, are split evenly: every thread takes a contiguous run. */
void cpu_linear(skv_device *base, const skv_linear *jobs, size_t n_jobs, const float *x, size_t n) {
    const size_t panel = cpu_of(base)->kernels->panel, n_threads = (size_t)base->n_threads;
    const void *inputs = inputs_for(base, jobs[0].w, x, n);
    size_t total = 0;
    for (size_t i = 0; i < n_jobs; i++) total += n_panels(base, jobs[i].w);
    PARALLEL(total * panel * (size_t)jobs[0].w->n_in * n > 4 * SMALL)
    for (size_t part = 0; part < n_threads; part++) {
        const size_t begin = total * part / n_threads, stop = total * (part + 1) / n_threads;
        for (size_t i = 0, before = 0, panels; i < n_jobs; i++, before += panels) {
            panels = n_panels(base, jobs[i].w);
            const size_t first = begin > before ? begin - before : 0,
                         end = stop < before + panels ? stop - before : panels;
            if (stop > before && first < end)
                type_of(base, jobs[i].w)->linear(jobs[i].w, first, end, inputs, n, jobs[i].bias, jobs[i].y);
        }
    }
}

void cpu_project(skv_device *base, const skv_matrix *w, const float *x, size_t n, float *y, int32_t *best) {
    const size_t n_out = (size_t)w->n_out;
    cpu_linear(base, (skv_linear[]){{w, NULL, y}}, 1, x, n);
    if (!best) return;
    PARALLEL(n * n_out > SMALL)
    for (size_t t = 0; t < n; t++) {
        const int32_t at = skv_argmax(y + t * n_out, n_out);
        best[t] = isfinite(y[t * n_out + (size_t)at]) ? at : -1;
    }
}
