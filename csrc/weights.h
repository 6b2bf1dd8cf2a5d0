/* A model: immutable weights, bound by name, on one backend. Many sessions may share it. */
#ifndef SKV_WEIGHTS_H
#define SKV_WEIGHTS_H

#include "backend.h"
#include "families.h"

typedef struct skv_layer {
    float *attention_norm, *mlp_norm; /* [hidden] */
    skv_matrix q, k, v, o;            /* [n_heads·head_dim, hidden], [n_kv_heads·head_dim, hidden] ×2, [hidden, n_heads·head_dim] */
    float *q_bias, *k_bias, *v_bias, *o_bias; /* NULL where the family has none */
    float *q_norm, *k_norm;                   /* [head_dim], NULL likewise */
    skv_matrix gate, up, down;                /* [ffn, hidden] ×2, [hidden, ffn] */
    float *gate_bias, *up_bias, *down_bias;
} skv_layer;

/* A tensor that the configuration calls for, and where it goes: a matrix or a float vector. */
typedef struct skv_slot {
    char name[96];
    int32_t rows, columns; /* columns 0: a vector */
    skv_matrix *matrix;
    float **vector;
} skv_slot;

typedef struct skv_model {
    skv_config config;
    const skv_backend *backend;
    skv_dtype type; /* of the matrices: f32 or bf16 */
    skv_heap heap;
    skv_matrix embedding, head; /* [vocab, hidden]; head.data is NULL where tied */
    float *norm;                /* [hidden] */
    float *inv_freq;            /* [head_dim / 2] */
    skv_layer *layers;
    skv_slot *slots;
    size_t n_slots, n_bound;
} skv_model;

/* A model without weights: its slots say what to bind. NULL with *error filled on failure. */
skv_model *skv_model_new(const skv_config *config, const skv_backend *backend, skv_dtype type, skv_error *error);
void skv_model_free(skv_model *model);

/* Copies one tensor into the backend's layout; the source may be given back afterwards. */
skv_status skv_model_bind(skv_model *model, const char *name, skv_dtype type, const int64_t *shape, int n_dims, const void *data,
                          int n_threads, skv_error *error);

/* SKV_OK once every slot is bound; otherwise names what is missing. */
skv_status skv_model_ready(const skv_model *model, skv_error *error);

const skv_matrix *skv_model_head(const skv_model *model);

#endif
