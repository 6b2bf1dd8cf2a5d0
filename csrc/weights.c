#include "weights.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

/* Adds a slot; with model->slots NULL only counts. */
static void slot(skv_model *m, int32_t rows, int32_t columns, skv_matrix *matrix, float **vector, const char *format,
                 ...) __attribute__((format(printf, 6, 7)));

static void slot(skv_model *m, int32_t rows, int32_t columns, skv_matrix *matrix, float **vector, const char *format,
                 ...) {
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

static bool has(skv_bias bias, bool configured) {
    return bias == SKV_BIAS_ALWAYS || (bias == SKV_BIAS_CONFIG && configured);
}

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

static void refuse_type(const skv_device *device, skv_dtype type, skv_error *error) {
    char allowed[64] = "";
    for (int i = 0; i < SKV_N_DTYPES; i++)
        if (device->backend->weight_types >> i & 1)
            snprintf(allowed + strlen(allowed), sizeof allowed - strlen(allowed), "%s%s", *allowed ? ", " : "",
                     skv_dtypes[i].name);
    skv_fail(error, SKV_CONFIG, "dtype is \"%s\"; allowed on %s: %s", skv_dtypes[type].name, device->variant, allowed);
}

skv_model *skv_model_new(const skv_config *config, const skv_backend *backend, const char *variant, skv_dtype type,
                         skv_error *error) {
    if (skv_config_check(config, error)) return NULL;
    skv_device *device = skv_device_open(backend, variant, 1, error);
    if (!device) return NULL;
    if (!(device->backend->weight_types >> type & 1)) {
        refuse_type(device, type, error);
        device->backend->close(device);
        return NULL;
    }
    skv_heap heap = {0};
    skv_model *m = skv_alloc(&heap, 1, sizeof *m);
    if (!m) {
        device->backend->close(device);
        goto out_of_memory;
    }
    *m = (skv_model){.config = *config, .device = device, .type = type, .heap = heap};
    m->layers = skv_alloc(&m->heap, (size_t)config->n_layers, sizeof *m->layers);
    m->inv_freq = skv_alloc(&m->heap, (size_t)config->head_dim / 2, sizeof *m->inv_freq);
    if (!m->layers || !m->inv_freq) goto out_of_memory;
    list_slots(m);
    m->slots = skv_alloc(&m->heap, m->n_slots, sizeof *m->slots);
    if (!m->slots) goto out_of_memory;
    list_slots(m);
    skv_config_frequencies(config, m->inv_freq);
    return m;

out_of_memory:
    skv_model_free(m);
    skv_fail(error, SKV_CAPACITY, "out of memory for the tables of a model with %d layers", config->n_layers);
    return NULL;
}

/* Where a tensor's data is, device memory; NULL until it is bound. */
static void *data_of(const skv_slot *slot) { return slot->matrix ? slot->matrix->data : *slot->vector; }

void skv_model_free(skv_model *m) {
    if (!m) return;
    const size_t n_slots = m->slots ? m->n_slots : 0;
    for (size_t i = 0; i < n_slots; i++) m->device->backend->free(m->device, data_of(m->slots + i));
    m->device->backend->close(m->device);
    void *const blocks[] = {m->slots, m->layers, m->inv_freq};
    for (size_t i = 0; i < sizeof blocks / sizeof *blocks; i++) skv_free(&m->heap, blocks[i]);
    skv_heap heap = m->heap;
    skv_free(&heap, m);
}

skv_status skv_model_bind(skv_model *m, const char *name, skv_dtype type, const int64_t *shape, int n_dims,
                          const void *data, int n_threads, skv_error *error) {
    skv_slot *s = m->slots;
    while (s < m->slots + m->n_slots && strcmp(s->name, name)) s++;
    if (s == m->slots + m->n_slots)
        return skv_fail(error, SKV_CHECKPOINT, "tensor \"%.96s\" is not part of this model", name);
    const bool vector = !s->columns;
    if (n_dims != (vector ? 1 : 2) || shape[0] != s->rows || (!vector && shape[1] != s->columns))
        return skv_fail(error, SKV_CHECKPOINT,
                        "tensor \"%s\": expected shape [%d] × [%d], found %lld × %lld in %d dimensions", name, s->rows,
                        vector ? 1 : s->columns, (long long)shape[0], (long long)shape[1], n_dims);
    if (data_of(s)) return skv_fail(error, SKV_CHECKPOINT, "tensor \"%s\" was bound before", name);
    m->device->n_threads = n_threads;
    if (vector) {
        float *values = m->device->backend->alloc(m->device, (size_t)s->rows, sizeof *values);
        float *wide = skv_alloc(&m->heap, (size_t)s->rows, sizeof *wide);
        if (values && wide) {
            skv_dtypes[type].widen(data, (size_t)s->rows, wide);
            m->device->backend->write(m->device, values, wide, (size_t)s->rows * sizeof *wide);
            *s->vector = values;
        } else {
            m->device->backend->free(m->device, values);
        }
        skv_free(&m->heap, wide);
    } else {
        m->device->backend->pack(m->device, s->matrix, data, type);
    }
    if (!data_of(s)) return skv_device_full(m->device, error, "tensor \"%s\"", name);
    m->n_bound++;
    return m->device->backend->sync(m->device, error);
}

skv_status skv_model_ready(const skv_model *m, skv_error *error) {
    for (size_t i = 0; i < m->n_slots; i++)
        if (!data_of(m->slots + i))
            return skv_fail(error, SKV_CHECKPOINT, "tensor \"%s\" is missing (%zu of %zu are bound)", m->slots[i].name,
                            m->n_bound, m->n_slots);
    return SKV_OK;
}

const char *skv_model_tensor(const skv_model *m, size_t i, int32_t *rows, int32_t *columns) {
    if (i >= m->n_slots) return NULL;
    *rows = m->slots[i].rows;
    *columns = m->slots[i].columns;
    return m->slots[i].name;
}

const skv_config *skv_model_config(const skv_model *m) { return &m->config; }

size_t skv_model_bytes(const skv_model *m) { return m->heap.live_bytes + m->device->heap.live_bytes; }

const char *skv_model_variant(const skv_model *m) { return m->device->variant; }

skv_dtype skv_model_dtype(const skv_model *m) { return m->type; }

skv_status skv_model_limits(const skv_model *m, size_t n_bytes, int n_threads, skv_limits *found, skv_error *error) {
    skv_device *device = skv_device_open(m->device->backend, m->device->variant, n_threads, error);
    if (!device) return error->code;
    float *memory = device->backend->alloc(device, n_bytes, 1);
    skv_status status = SKV_OK;
    if (memory)
        *found = device->backend->limits(device, memory, n_bytes / sizeof *memory, m->type);
    else
        status = skv_device_full(device, error, "a buffer of %zu bytes", n_bytes);
    device->backend->free(device, memory);
    device->backend->close(device);
    return status;
}
