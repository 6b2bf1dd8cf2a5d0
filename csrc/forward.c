/* tokens → embedding → [norm → q, k, v → rope → append → attention → o → norm → gate, up → silu → down] × layers → norm → logits.
 * The only layer loop: prefill, decode and mixed batches differ in their spans alone. */
#include <math.h>
#include <string.h>

#include "session.h"

/* Refuses a batch that the session cannot take; returns its number of tokens through *n_tokens. */
static skv_status check(const skv_session *s, const skv_span *spans, size_t n_spans, const int32_t *tokens, size_t *n_tokens, skv_error *error) {
    size_t n = 0;
    if (n_spans > s->n_rows) return skv_fail(error, SKV_CONFIG, "%zu spans for %zu rows", n_spans, s->n_rows);
    for (size_t i = 0; i < n_spans; i++) {
        const int32_t row = spans[i].row;
        if (row < 0 || (size_t)row >= s->n_rows || !s->rows[row].open) return skv_fail(error, SKV_CONFIG, "span %zu: row %d is not open", i, row);
        for (size_t j = 0; j < i; j++)
            if (spans[j].row == row) return skv_fail(error, SKV_CONFIG, "spans %zu and %zu: both feed row %d", j, i, row);
        if (spans[i].n < 1 || spans[i].n > s->rows[row].capacity - s->rows[row].n_tokens)
            return skv_fail(error, SKV_CAPACITY, "span %zu: %d tokens for row %d, which has room for %d", i, spans[i].n, row,
                            s->rows[row].capacity - s->rows[row].n_tokens);
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

static void layer(skv_session *s, const skv_layer *l, size_t n_spans, size_t n) {
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
    ops->attention(exec, &s->cache.shape, s->views, n_spans, n_heads, n_kv, s->q, s->mixed);
    ops->linear(exec, (skv_linear[]){{&l->o, l->o_bias, s->y}}, 1, s->mixed, n);
    ops->add(exec, s->x, s->y, n * hidden);
    ops->rmsnorm(exec, s->x, l->mlp_norm, c->norm_eps, n, hidden, s->y);
    ops->linear(exec, (skv_linear[]){{&l->gate, l->gate_bias, s->gate}, {&l->up, l->up_bias, s->up}}, 2, s->y, n);
    ops->silu_mul(exec, s->gate, s->up, n * (size_t)c->ffn);
    ops->linear(exec, (skv_linear[]){{&l->down, l->down_bias, s->y}}, 1, s->gate, n);
    ops->add(exec, s->x, s->y, n * hidden);
}

skv_status skv_forward(skv_session *s, const skv_span *spans, size_t n_spans, const int32_t *tokens, bool every, float *logits, skv_error *error) {
    const skv_config *c = &s->model->config;
    const size_t hidden = (size_t)c->hidden, n_kv = (size_t)c->n_kv_heads;
    size_t n = 0;
    if (check(s, spans, n_spans, tokens, &n, error)) return error->code;
    place(s, spans, n_spans);
    s->model->backend->embed(&s->exec, &s->model->embedding, tokens, n, s->x);
    for (size_t i = 0; i < (size_t)c->n_layers; i++) {
        for (size_t j = 0; j < n_spans; j++) {
            s->views[j].heads = s->rows[spans[j].row].heads + i * n_kv;
            for (size_t h = 0; h < n_kv; h++) skv_cache_extend(&s->cache, s->views[j].heads + h, s->views[j].n);
        }
        layer(s, s->model->layers + i, n_spans, n);
    }
    for (size_t j = 0; j < n_spans; j++) s->rows[spans[j].row].n_tokens += spans[j].n;
    s->model->backend->rmsnorm(&s->exec, s->x, s->model->norm, c->norm_eps, n, hidden, s->y);
    if (!every) { /* the last tokens move up: token index ≥ span index, so nothing is overwritten before it is read */
        for (size_t j = 0; j < n_spans; j++) memmove(s->y + j * hidden, s->y + (s->views[j].first + s->views[j].n - 1) * hidden, hidden * sizeof *s->y);
        n = n_spans;
    }
    s->model->backend->linear(&s->exec, (skv_linear[]){{skv_model_head(s->model), NULL, logits}}, 1, s->y, n);
    return SKV_OK;
}
