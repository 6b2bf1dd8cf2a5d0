/* Model dimensions, shared by everything. Validated once, by skv_config_check; inside the core they are trusted. */
#ifndef SKV_CONFIG_H
#define SKV_CONFIG_H

#include <stdbool.h>
#include <stdint.h>

#include "error.h"

/* Dynamic: as default up to `context`, beyond which nothing is fed. */
typedef enum skv_rope {
    SKV_ROPE_DEFAULT,
    SKV_ROPE_LINEAR,
    SKV_ROPE_DYNAMIC,
    SKV_ROPE_LLAMA3,
    SKV_ROPE_YARN,
    SKV_N_ROPES
} skv_rope;

extern const char *const skv_rope_names[SKV_N_ROPES];

enum { SKV_MAX_LAYERS = 1024, SKV_MAX_HEAD_DIM = 512, SKV_PAGE = 64 /* slots of a page of the cache */ };

typedef struct skv_config {
    const struct skv_family *family;
    int32_t n_layers, n_heads, n_kv_heads, head_dim, hidden, ffn, vocab;
    int32_t context; /* positions the model was trained for */
    float norm_eps;
    bool tied; /* the LM head is the embedding */
    bool qkv_bias, o_bias, mlp_bias;
    skv_rope rope_type;
    double rope_theta, rope_factor;                     /* factor: linear, llama3, yarn */
    double rope_original_context;                       /* llama3, yarn */
    double rope_low_freq_factor, rope_high_freq_factor; /* llama3 */
    double rope_beta_fast, rope_beta_slow;              /* yarn */
    bool rope_truncate;                                 /* yarn: the ramp begins and ends at whole pairs */
    double rope_attention_factor;                       /* of rotated queries and keys, yarn; 1 */
    uint64_t unrotated[SKV_MAX_LAYERS / 64];            /* bit i % 64 of word i / 64: layer i has no RoPE */
} skv_config;

/* Refuses dimensions that the core cannot hold (see LIMIT in config.c) or that do not fit together. */
skv_status skv_config_check(const skv_config *config, skv_error *error);

/* inv_freq [head_dim / 2]: radians per position of each rotated pair, scaling applied. */
void skv_config_frequencies(const skv_config *config, float *inv_freq);

#endif
