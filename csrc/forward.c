/* tokens → embedding → [steer → norm → q, k, v → rope → append → attention → o → norm → gate, up → silu → down] × layers → norm → sentences
 * → logits → evict.
 * The only layer loop: prefill, decode and mixed batches differ in their spans alone. */
#include <math.h>
#include <string.h>

#include "evict.h"

/* Refuses a batch that the session cannot take; returns its number of tokens through *n_tokens. */
static skv_status check(const skv_session *s, const skv_span *spans, size_t n_spans, const int32_t *tokens, size_t *n_tokens,
                        skv_error *error) {
    size_t n = 0;
    if (n_spans > s->n_rows) return skv_fail(error, SKV_CONFIG, "%zu spans for %zu rows", n_spans, s->n_rows);
    for (size_t i = 0; i < n_spans; i++) {
        const int32_t row = spans[i].row;
        if (row < 0 || (size_t)row >= s->n_rows || !s->rows[row].open)
            return skv_fail(error, SKV_CONFIG, "span %zu: row %d is not open", i, row);
        if (s->rows[row].failed) return skv_fail(error, SKV_CONFIG, "span %zu: row %d ended when its custom score failed", i, row);
        for (size_t j = 0; j < i; j++)
            if (spans[j].row == row) return skv_fail(error, SKV_CONFIG, "spans %zu and %zu: both feed row %d", j, i, row);
        if (spans[i].n < 1 || spans[i].n > s->rows[row].capacity - s->rows[row].n_tokens)
            return skv_fail(error, SKV_CAPACITY, "span %zu: %d tokens for row %d, which has room for %d", i, spans[i].n, row,
                            s->rows[row].capacity - s->rows[row].n_tokens);
        const int32_t chunk = skv_row_chunk(s, row, spans[i].n);
        if (chunk < spans[i].n)
            return skv_fail(error, SKV_CONFIG, "span %zu: %d tokens for row %d, which may be compacted after %d", i, spans[i].n, row,
                            chunk);
        n += (size_t)spans[i].n;
    }
    if (n > s->max_tokens) return skv_fail(error, SKV_CONFIG, "%zu tokens in one forward; this session allows %zu", n, s->max_tokens);
    for (size_t t = 0; t < n; t++)
        if (tokens[t] < 0 || tokens[t] >= s->model->config.vocab)
            return skv_fail(error, SKV_CONFIG, "token %zu is %d; allowed: 0 to %d", t, tokens[t], s->model->config.vocab - 1);
    *n_tokens = n;
    return SKV_OK;
}

/* The angles of every token's position, and the views of the spans (heads are set layer by layer). */
static void place(skv_session *s, const skv_span *spans, size_t n_spans) {
    const size_t half = (size_t)s->model->config.head_dim / 2;
    size_t token = 0;
    for (size_t i = 0; i < n_spans; i++) {
        const int32_t position = s->rows[spans[i].row].n_tokens;
        s->views[i] = (skv_span_view){.first = token, .n = (size_t)spans[i].n, .position = position};
        for (int32_t t = 0; t < spans[i].n; t++, token++)
            for (size_t c = 0; c < half; c++) {
                const double angle = (double)(position + t) * (double)s->model->inv_freq[c];
                s->cosine[token * half + c] = (float)cos(angle);
                s->sine[token * half + c] = (float)sin(angle);
            }
    }
}

/* The newest queries of every span, that of position t in place t % window. */
static void remember_queries(skv_session *s, const skv_span *spans, size_t n_spans, size_t index) {
    const size_t width = (size_t)s->model->config.n_heads * (size_t)s->model->config.head_dim, window = (size_t)s->method.window;
    for (size_t j = 0; j < n_spans; j++) {
        const skv_span_view *view = s->views + j;
        float *ring = s->rows[spans[j].row].ring;
        for (size_t t = view->n > window ? view->n - window : 0; ring && t < view->n; t++)
            memcpy(ring + (index * window + ((size_t)view->position + t) % window) * width, s->q + (view->first + t) * width,
                   width * sizeof *ring);
    }
}

/* x += α·v for the steered tokens of rows that are steered before this layer. */
static void steer(skv_session *s, const skv_span *spans, size_t n_spans, size_t index) {
    const size_t hidden = (size_t)s->model->config.hidden;
    for (size_t j = 0; j < n_spans; j++) {
        const skv_steering *steering = &s->rows[spans[j].row].steering;
        if (!steering->vector || (size_t)steering->layer != index) continue;
        for (size_t t = s->views[j].first; t < s->views[j].first + s->views[j].n; t++)
            if (s->steered[t]) s->model->backend->add_scaled(&s->exec, s->x + t * hidden, steering->vector, s->alphas[t], hidden);
    }
}

/* What the ids alone say: sentences, think markers, α of the steered tokens. */
static skv_status read_tokens(skv_session *s, const skv_span *spans, size_t n_spans, const int32_t *tokens, skv_error *error) {
    for (size_t j = 0; j < n_spans; j++) {
        skv_row *r = s->rows + spans[j].row;
        /* A decode step finds its room already there: it was made at the last point of the grid. A prompt has none before its end. */
        if ((spans[j].n > 1 || r->n_tokens < r->n_prompt) && !skv_row_reserve_sentences(r, (size_t)spans[j].n + (size_t)s->method.interval))
            return skv_fail(error, SKV_CAPACITY, "out of memory for the sentences of %d tokens", spans[j].n);
    }
    for (size_t j = 0; j < n_spans; j++) {
        skv_row *r = s->rows + spans[j].row;
        for (size_t t = s->views[j].first; t < s->views[j].first + s->views[j].n; t++) {
            bool inside;
            s->marks[t] = (uint8_t)skv_tracker_read(&r->tracker, tokens[t], &inside);
            s->steered[t] = skv_steer_alpha(&r->steering, &r->tracker, inside, s->alphas + t);
            r->n_steered += s->steered[t];
        }
    }
    return SKV_OK;
}

static void capture_states(const skv_session *s, const skv_capture *capture, int32_t index, const float *x, size_t n) {
    const size_t hidden = (size_t)s->model->config.hidden;
    for (size_t i = 0; capture && i < capture->n_layers; i++)
        if (capture->layers[i] == index) memcpy(capture->states + i * n * hidden, x, n * hidden * sizeof *x);
}

static void layer(skv_session *s, const skv_layer *l, const skv_span *spans, size_t n_spans, size_t n) {
    const skv_config *c = &s->model->config;
    const skv_backend *ops = s->model->backend;
    const skv_exec *exec = &s->exec;
    const size_t hidden = (size_t)c->hidden, n_heads = (size_t)c->n_heads, n_kv = (size_t)c->n_kv_heads, dim = (size_t)c->head_dim;
    ops->rmsnorm(exec, s->x, l->attention_norm, c->norm_eps, n, hidden, s->y);
    ops->linear(exec, (skv_linear[]){{&l->q, l->q_bias, s->q}, {&l->k, l->k_bias, s->k}, {&l->v, l->v_bias, s->v}}, 3, s->y, n);
    if (c->family->qk_norm) {
        ops->rmsnorm(exec, s->q, l->q_norm, c->norm_eps, n * n_heads, dim, s->q);
        ops->rmsnorm(exec, s->k, l->k_norm, c->norm_eps, n * n_kv, dim, s->k);
    }
    ops->rope(exec, s->q, n, n_heads, dim, s->cosine, s->sine);
    ops->rope(exec, s->k, n, n_kv, dim, s->cosine, s->sine);
    ops->append(exec, &s->cache.shape, s->views, n_spans, n_kv, s->k, s->v);
    if (skv_method_needs(&s->method) & SKV_NEEDS_SUMS)
        ops->receive(exec, &s->cache.shape, s->views, n_spans, n_heads, n_kv, s->q, s->received, s->received_ld);
    remember_queries(s, spans, n_spans, (size_t)(l - s->model->layers));
    ops->attention(exec, &s->cache.shape, s->views, n_spans, n_heads, n_kv, s->q, s->mixed);
    ops->linear(exec, (skv_linear[]){{&l->o, l->o_bias, s->y}}, 1, s->mixed, n);
    ops->add(exec, s->x, s->y, n * hidden);
    ops->rmsnorm(exec, s->x, l->mlp_norm, c->norm_eps, n, hidden, s->y);
    ops->linear(exec, (skv_linear[]){{&l->gate, l->gate_bias, s->gate}, {&l->up, l->up_bias, s->up}}, 2, s->y, n);
    ops->silu_mul(exec, s->gate, s->up, n * (size_t)c->ffn);
    ops->linear(exec, (skv_linear[]){{&l->down, l->down_bias, s->y}}, 1, s->gate, n);
    ops->add(exec, s->x, s->y, n * hidden);
}

skv_status skv_forward(skv_session *s, const skv_span *spans, size_t n_spans, const int32_t *tokens, bool every, float *logits,
                       const skv_capture *capture, skv_error *error) {
    const skv_config *c = &s->model->config;
    const size_t hidden = (size_t)c->hidden, n_kv = (size_t)c->n_kv_heads;
    size_t n = 0;
    if (check(s, spans, n_spans, tokens, &n, error)) return error->code;
    place(s, spans, n_spans);
    if (read_tokens(s, spans, n_spans, tokens, error)) return error->code;
    s->model->backend->embed(&s->exec, &s->model->embedding, tokens, n, s->x);
    for (size_t i = 0; i < (size_t)c->n_layers; i++) {
        for (size_t j = 0; j < n_spans; j++) {
            skv_row *r = s->rows + spans[j].row;
            s->views[j].heads = r->heads + i * n_kv;
            for (size_t h = 0; h < n_kv; h++) skv_row_extend(s, r, s->views[j].heads + h, s->views[j].n);
        }
        capture_states(s, capture, (int32_t)i, s->x, n);
        steer(s, spans, n_spans, i);
        layer(s, s->model->layers + i, spans, n_spans, n);
    }
    s->model->backend->rmsnorm(&s->exec, s->x, s->model->norm, c->norm_eps, n, hidden, s->y);
    capture_states(s, capture, c->n_layers, s->y, n);
    size_t n_due = 0;
    for (size_t j = 0; j < n_spans; j++) {
        skv_row *r = s->rows + spans[j].row;
        r->n_tokens += spans[j].n;
        for (size_t t = s->views[j].first; t < s->views[j].first + s->views[j].n; t++)
            skv_tracker_add(&r->tracker, (skv_mark)s->marks[t], s->y + t * hidden, hidden);
        if (skv_row_on_grid(s, r, r->n_tokens)) s->due[n_due++] = spans[j].row;
    }
    if (!every) { /* the last tokens move up: token index ≥ span index, so nothing is overwritten before it is read */
        for (size_t j = 0; j < n_spans; j++)
            memmove(s->y + j * hidden, s->y + (s->views[j].first + s->views[j].n - 1) * hidden, hidden * sizeof *s->y);
        n = n_spans;
    }
    if (logits) s->model->backend->linear(&s->exec, (skv_linear[]){{skv_model_head(s->model), NULL, logits}}, 1, s->y, n);
    return n_due ? skv_evict(s, n_due, error) : SKV_OK;
}
