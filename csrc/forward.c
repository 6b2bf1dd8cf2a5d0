/* tokens → embedding → [steer → norm → q, k, v → rope → append → attention → o → norm → gate, up
 * → silu → down] × layers → norm → sentences → logits → evict. The only layer loop: prefill, decode and
 * mixed batches differ in their spans alone. */
#include <string.h>

#include "evict.h"

/* Refuses a batch that the session cannot take; returns its number of tokens through *n_tokens. */
static skv_status check(const skv_session *s, const skv_span *spans, size_t n_spans, const int32_t *tokens,
                        size_t *n_tokens, skv_error *error) {
    size_t n = 0;
    if (n_spans > s->n_rows) return skv_fail(error, SKV_CONFIG, "%zu spans for %zu rows", n_spans, s->n_rows);
    for (size_t i = 0; i < n_spans; i++) {
        const int32_t row = spans[i].row;
        if (!skv_row_is_open(s, row)) return skv_fail(error, SKV_CONFIG, "span %zu: row %d is not open", i, row);
        const skv_row *r = s->rows + row;
        if (r->failure) return skv_fail(error, SKV_CONFIG, "span %zu: row %d ended when %s", i, row, r->failure);
        for (size_t j = 0; j < i; j++)
            if (spans[j].row == row)
                return skv_fail(error, SKV_CONFIG, "spans %zu and %zu: both feed row %d", j, i, row);
        if (spans[i].n < 1 || spans[i].n > r->capacity - r->n_tokens)
            return skv_fail(error, SKV_CAPACITY, "span %zu: %d tokens for row %d, which has room for %d", i, spans[i].n,
                            row, r->capacity - r->n_tokens);
        const int32_t chunk = skv_row_chunk(s, row, spans[i].n);
        if (chunk < spans[i].n)
            return skv_fail(error, SKV_CONFIG, "span %zu: %d tokens for row %d, which may be compacted after %d", i,
                            spans[i].n, row, chunk);
        n += (size_t)spans[i].n;
    }
    if (n > s->max_tokens)
        return skv_fail(error, SKV_CONFIG, "%zu tokens in one forward; this session allows %zu", n, s->max_tokens);
    for (size_t t = 0; t < n; t++)
        if (tokens[t] < 0 || tokens[t] >= s->model->config.vocab)
            return skv_fail(error, SKV_CONFIG, "token %zu is %d; allowed: 0 to %d", t, tokens[t],
                            s->model->config.vocab - 1);
    *n_tokens = n;
    return SKV_OK;
}

/* The batch: what the ids say of every token, and slots for them in every head. Up to here a failure leaves the rows as
 * they were. */
static skv_status prepare(skv_session *s, const skv_span *spans, size_t n_spans, const int32_t *tokens,
                          skv_error *error) {
    for (size_t j = 0; j < n_spans; j++) {
        skv_row *r = s->rows + spans[j].row;
        /* A decode step finds its room already there: it was made at the last point of the grid. A prompt has none
         * before its end. */
        if (spans[j].n == 1 && r->n_tokens >= r->n_prompt) continue;
        if (!skv_row_reserve_sentences(r, (size_t)spans[j].n + (size_t)s->method.interval))
            return skv_device_full(s->device, error, "the sentences of %d tokens", spans[j].n);
    }
    for (size_t j = 0, first = 0; j < n_spans; first += (size_t)spans[j++].n) {
        skv_row *r = s->rows + spans[j].row;
        s->parts[j] = (skv_part){.row = spans[j].row,
                                 .first = first,
                                 .n = (size_t)spans[j].n,
                                 .position = r->n_tokens,
                                 .heads = r->heads,
                                 .ring = r->ring,
                                 .sum = r->tracker.sum,
                                 .vector = r->vector,
                                 .steered_layer = r->steering.layer};
        for (size_t t = first; t < first + s->parts[j].n; t++) {
            s->tokens[t] = skv_tracker_read(&r->tracker, &r->steering, tokens[t]);
            r->n_steered += s->tokens[t].steered;
        }
        skv_row_extend(s, r, s->parts[j].n);
    }
    return SKV_OK;
}

static void capture_states(skv_session *s, const skv_capture *capture, int32_t index, const float *x, size_t n) {
    const size_t size = n * (size_t)s->model->config.hidden;
    if (!capture) return;
    for (size_t i = 0; i < capture->n_layers; i++)
        if (capture->layers[i] == index)
            s->device->backend->read(s->device, capture->states + i * size, x, size * sizeof *x);
}

#define LAP(op, call) ((call), skv_lap(s, SKV_OP_##op))

static void layer(skv_session *s, size_t index, size_t n) {
    const skv_config *c = &s->model->config;
    const skv_layer *l = s->model->layers + index;
    skv_device *device = s->device;
    const skv_backend *ops = device->backend;
    const size_t hidden = (size_t)c->hidden, n_heads = (size_t)c->n_heads, n_kv = (size_t)c->n_kv_heads;
    const size_t dim = (size_t)c->head_dim;
    const skv_linear qkv[] = {{&l->q, l->q_bias, s->q}, {&l->k, l->k_bias, s->k}, {&l->v, l->v_bias, s->v}};
    const skv_linear o = {&l->o, l->o_bias, s->y}, down = {&l->down, l->down_bias, s->y};
    const skv_linear wide[] = {{&l->gate, l->gate_bias, s->gate}, {&l->up, l->up_bias, s->up}};
    LAP(NORM, ops->rmsnorm(device, s->x, l->attention_norm, c->norm_eps, n, hidden, s->y));
    LAP(QKV, ops->linear(device, qkv, 3, s->y, n));
    if (c->family->qk_norm) {
        LAP(NORM, ops->rmsnorm(device, s->q, l->q_norm, c->norm_eps, n * n_heads, dim, s->q));
        LAP(NORM, ops->rmsnorm(device, s->k, l->k_norm, c->norm_eps, n * n_kv, dim, s->k));
    }
    if (!(c->unrotated[index / 64] >> index % 64 & 1)) {
        LAP(ROPE, ops->rope(device, s->q, n_heads));
        LAP(ROPE, ops->rope(device, s->k, n_kv));
    }
    LAP(APPEND, ops->append(device, index, s->k, s->v));
    if (s->needs & SKV_QUERIES) LAP(QUERIES, ops->keep_queries(device, index, s->q));
    LAP(ATTENTION, ops->attention(device, index, s->q, s->mixed));
    if (s->needs & 1u << SKV_SUMS) LAP(RECEIVE, ops->receive(device, index, s->q));
    LAP(OUT, ops->linear(device, &o, 1, s->mixed, n));
    LAP(ADD, ops->add(device, s->x, s->y, n * hidden));
    LAP(NORM, ops->rmsnorm(device, s->x, l->mlp_norm, c->norm_eps, n, hidden, s->y));
    LAP(WIDE, ops->linear(device, wide, 2, s->y, n));
    LAP(SILU, ops->silu_mul(device, s->gate, s->up, n * (size_t)c->ffn));
    LAP(DOWN, ops->linear(device, &down, 1, s->gate, n));
    LAP(ADD, ops->add(device, s->x, s->y, n * hidden));
}

skv_status skv_forward(skv_session *s, const skv_span *spans, size_t n_spans, const int32_t *tokens, bool every,
                       float *logits, int32_t *best, const skv_capture *capture, skv_error *error) {
    const skv_config *c = &s->model->config;
    const skv_model *m = s->model;
    const skv_backend *ops = s->device->backend;
    const size_t hidden = (size_t)c->hidden;
    size_t n = 0, n_due = 0;
    if (check(s, spans, n_spans, tokens, &n, error) || prepare(s, spans, n_spans, tokens, error)) return error->code;
    const skv_batch batch = {.tokens = s->tokens, .parts = s->parts, .n_tokens = n, .n_parts = n_spans};
    s->lapped = skv_seconds();
    ops->begin(s->device, &batch);
    LAP(EMBED, ops->embed(s->device, &m->embedding, s->x));
    for (size_t i = 0; i < (size_t)c->n_layers; i++) {
        capture_states(s, capture, (int32_t)i, s->x, n);
        LAP(STEER, ops->steer(s->device, i, s->x));
        layer(s, i, n);
    }
    LAP(NORM, ops->rmsnorm(s->device, s->x, m->norm, c->norm_eps, n, hidden, s->y));
    capture_states(s, capture, c->n_layers, s->y, n);
    LAP(SENTENCES, ops->sum_sentences(s->device, s->y));
    if (!every) LAP(LAST, ops->last(s->device, s->y, s->y));
    if (logits) {
        const skv_matrix *head = c->tied ? &m->embedding : &m->head;
        LAP(HEAD, ops->project(s->device, head, s->y, every ? n : n_spans, logits, best));
    }
    for (size_t j = 0; j < n_spans; j++) {
        skv_row *r = s->rows + spans[j].row;
        r->n_tokens += spans[j].n;
        if (skv_row_on_grid(s, r, r->n_tokens)) s->due_rows[n_due++] = spans[j].row;
    }
    skv_status status = n_due ? skv_evict(s, n_due, error) : SKV_OK;
    skv_error device_error;
    if (ops->sync(s->device, &device_error)) {
        *error = device_error;
        status = error->code;
    }
    /* A custom score that fails has ended its own row; the others are whole. */
    if (status && status != SKV_CALLER) skv_end_rows(s, spans, n_spans);
    return status;
}
