#include "weights.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

/* Adds a slot; with model->slots NULL only counts. */
static void slot(skv_model *m, int32_t rows, int32_t columns, skv_matrix *matrix, float **vector, const char *format, ...)
    __attribute__((format(printf, 6, 7)));

static void slot(skv_model *m, int32_t rows, int32_t columns, skv_matrix *matrix, float **vector, const char *format, ...) {
    skv_slot *s = m->slots ? m->slots + m->n_slots : NULL;
    m->n_slots++;
    if (!s) return;
    *s = (skv_slot){.rows = rows, .columns = columns, .matrix = matrix, .vector = vector};
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(s->name, sizeof s->name, format, arguments);
    va_end(arguments);
    if (matrix) *matrix = (skv_matrix){.n_out = rows, .n_in = columns, .type = m->type};
}

static bool has(skv_bias bias, bool configured) { return bias == SKV_BIAS_ALWAYS || (bias == SKV_BIAS_CONFIG && configured); }

/* Every tensor of the configuration, by its Hugging Face name. */
static void list_slots(skv_model *m) {
    const skv_config *c = &m->config;
    const int32_t q = c->n_heads * c->head_dim, kv = c->n_kv_heads * c->head_dim;
    const bool qkv_bias = has(c->family->qkv_bias, c->qkv_bias), o_bias = has(c->family->o_bias, c->o_bias);
    const bool mlp_bias = has(c->family->mlp_bias, c->mlp_bias);
    m->n_slots = 0;
    slot(m, c->vocab, c->hidden, &m->embedding, NULL, "model.embed_tokens.weight");
    for (int32_t i = 0; i < c->n_layers; i++) {
        skv_layer *l = m->layers + i;
        slot(m, c->hidden, 0, NULL, &l->attention_norm, "model.layers.%d.input_layernorm.weight", i);
        slot(m, q, c->hidden, &l->q, NULL, "model.layers.%d.self_attn.q_proj.weight", i);
        slot(m, kv, c->hidden, &l->k, NULL, "model.layers.%d.self_attn.k_proj.weight", i);
        slot(m, kv, c->hidden, &l->v, NULL, "model.layers.%d.self_attn.v_proj.weight", i);
        slot(m, c->hidden, q, &l->o, NULL, "model.layers.%d.self_attn.o_proj.weight", i);
        if (qkv_bias) {
            slot(m, q, 0, NULL, &l->q_bias, "model.layers.%d.self_attn.q_proj.bias", i);
            slot(m, kv, 0, NULL, &l->k_bias, "model.layers.%d.self_attn.k_proj.bias", i);
            slot(m, kv, 0, NULL, &l->v_bias, "model.layers.%d.self_attn.v_proj.bias", i);
        }
        if (o_bias) slot(m, c->hidden, 0, NULL, &l->o_bias, "model.layers.%d.self_attn.o_proj.bias", i);
        if (c->family->qk_norm) {
            slot(m, c->head_dim, 0, NULL, &l->q_norm, "model.layers.%d.self_attn.q_norm.weight", i);
            slot(m, c->head_dim, 0, NULL, &l->k_norm, "model.layers.%d.self_attn.k_norm.weight", i);
        }
        slot(m, c->hidden, 0, NULL, &l->mlp_norm, "model.layers.%d.post_attention_layernorm.weight", i);
        slot(m, c->ffn, c->hidden, &l->gate, NULL, "model.layers.%d.mlp.gate_proj.weight", i);
        slot(m, c->ffn, c->hidden, &l->up, NULL, "model.layers.%d.mlp.up_proj.weight", i);
        slot(m, c->hidden, c->ffn, &l->down, NULL, "model.layers.%d.mlp.down_proj.weight", i);
        if (mlp_bias) {
            slot(m, c->ffn, 0, NULL, &l->gate_bias, "model.layers.%d.mlp.gate_proj.bias", i);
            slot(m, c->ffn, 0, NULL, &l->up_bias, "model.layers.%d.mlp.up_proj.bias", i);
            slot(m, c->hidden, 0, NULL, &l->down_bias, "model.layers.%d.mlp.down_proj.bias", i);
        }
    }
    slot(m, c->hidden, 0, NULL, &m->norm, "model.norm.weight");
    if (!c->tied) slot(m, c->vocab, c->hidden, &m->head, NULL, "lm_head.weight");
}

skv_model *skv_model_new(const skv_config *config, const skv_backend *backend, skv_dtype type, skv_error *error) {
    if (skv_config_check(config, error)) return NULL;
    skv_heap heap = {0};
    skv_model *m = skv_alloc(&heap, 1, sizeof *m);
    if (!m) goto out_of_memory;
    *m = (skv_model){.config = *config, .backend = backend, .type = type, .heap = heap};
    m->layers = skv_alloc(&m->heap, (size_t)config->n_layers, sizeof *m->layers);
    m->inv_freq = skv_alloc(&m->heap, (size_t)config->head_dim / 2, sizeof *m->inv_freq);
    if (!m->layers || !m->inv_freq) goto out_of_memory;
    list_slots(m);
    m->slots = skv_alloc(&m->heap, m->n_slots, sizeof *m->slots);
    if (!m->slots) goto out_of_memory;
    list_slots(m);
    skv_rope_frequencies(config, m->inv_freq);
    return m;

out_of_memory:
    skv_model_free(m);
    skv_fail(error, SKV_CAPACITY, "out of memory for the tables of a model with %d layers", config->n_layers);
    return NULL;
}

void skv_model_free(skv_model *m) {
    if (!m) return;
    for (size_t i = 0; m->slots && i < m->n_slots; i++)
        skv_free(&m->heap, m->slots[i].matrix ? m->slots[i].matrix->data : *m->slots[i].vector);
    skv_free(&m->heap, m->slots);
    skv_free(&m->heap, m->layers);
    skv_free(&m->heap, m->inv_freq);
    skv_heap heap = m->heap;
    skv_free(&heap, m);
}

skv_status skv_model_bind(skv_model *m, const char *name, skv_dtype type, const int64_t *shape, int n_dims, const void *data, int n_threads,
                          skv_error *error) {
    skv_slot *s = NULL;
    for (size_t i = 0; i < m->n_slots && !s; i++)
        if (!strcmp(m->slots[i].name, name)) s = m->slots + i;
    if (!s) return skv_fail(error, SKV_CHECKPOINT, "tensor \"%.96s\" is not part of this model", name);
    const bool vector = !s->columns;
    if (n_dims != (vector ? 1 : 2) || shape[0] != s->rows || (!vector && shape[1] != s->columns))
        return skv_fail(error, SKV_CHECKPOINT, "tensor \"%s\": expected shape [%d] × [%d], found %lld × %lld in %d dimensions", name,
                        s->rows, vector ? 1 : s->columns, (long long)shape[0], (long long)shape[1], n_dims);
    if (vector ? *s->vector != NULL : s->matrix->data != NULL)
        return skv_fail(error, SKV_CHECKPOINT, "tensor \"%s\" was bound before", name);
    if (vector) {
        /* A vector is packed as a matrix of one input: f32, in order, filled up with zeros. */
        skv_matrix as_matrix = {.n_out = s->rows, .n_in = 1, .type = SKV_F32};
        m->backend->pack(m->backend, &m->heap, &as_matrix, data, type, 1);
        *s->vector = as_matrix.data;
    } else {
        m->backend->pack(m->backend, &m->heap, s->matrix, data, type, n_threads);
    }
    if (vector ? *s->vector == NULL : s->matrix->data == NULL)
        return skv_fail(error, SKV_CAPACITY, "out of memory for tensor \"%s\"", name);
    m->n_bound++;
    return SKV_OK;
}

skv_status skv_model_ready(const skv_model *m, skv_error *error) {
    for (size_t i = 0; i < m->n_slots; i++)
        if (m->slots[i].matrix ? !m->slots[i].matrix->data : !*m->slots[i].vector)
            return skv_fail(error, SKV_CHECKPOINT, "tensor \"%s\" is missing (%zu of %zu are bound)", m->slots[i].name, m->n_bound,
                            m->n_slots);
    return SKV_OK;
}

const skv_matrix *skv_model_head(const skv_model *m) { return m->config.tied ? &m->embedding : &m->head; }
