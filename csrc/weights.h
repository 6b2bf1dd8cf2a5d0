/* A model: immutable weights, bound by name, on one device. Many sessions may share it. */
#ifndef SKV_WEIGHTS_H
#define SKV_WEIGHTS_H

#include "backend.h"
#include "skipkv.h"

/* All device memory. */
typedef struct skv_layer {
    float *attention_norm, *mlp_norm;         /* [hidden] */
    skv_matrix q, o;                          /* [n_heads·head_dim, hidden] and its transpose's shape */
    skv_matrix k, v;                          /* [n_kv_heads·head_dim, hidden] */
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

struct skv_model {
    skv_config config;
    skv_device *device;
    skv_dtype type; /* of the matrices: f32 or bf16 */
    skv_heap heap;
    skv_matrix embedding, head; /* [vocab, hidden]; head.data is NULL where tied */
    float *norm;                /* device [hidden] */
    float *inv_freq;            /* host [head_dim / 2] */
    skv_layer *layers;
    skv_slot *slots;
    size_t n_slots, n_bound;
};

#endif
