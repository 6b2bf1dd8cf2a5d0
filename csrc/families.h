/* Model families: what distinguishes one architecture of the Llama kind from another. A new family is a file under families/
 * and a row of the table in families.c. */
#ifndef SKV_FAMILIES_H
#define SKV_FAMILIES_H

#include <stddef.h>

#include "config.h"

/* Whether linear layers have a bias. */
typedef enum skv_bias { SKV_BIAS_NEVER, SKV_BIAS_ALWAYS, SKV_BIAS_CONFIG } skv_bias;

typedef struct skv_family {
    const char *name;         /* model_type of config.json */
    const char *architecture; /* its "architectures" */
    skv_bias qkv_bias, o_bias, mlp_bias;
    bool qk_norm; /* RMSNorm over each head of q and k before the rotation */
} skv_family;

extern const skv_family *const skv_families[]; /* NULL-terminated */

const skv_family *skv_family_find(const char *name); /* NULL if unknown */

extern const char *const skv_rope_names[SKV_N_ROPES];

#endif
