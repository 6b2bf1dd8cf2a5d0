/* Model families: what distinguishes one architecture of the Llama kind from another. A family is a row of the table.
 */
#ifndef SKV_FAMILIES_H
#define SKV_FAMILIES_H

#include <stdbool.h>

/* Whether linear layers have a bias. */
typedef enum skv_bias { SKV_BIAS_NEVER, SKV_BIAS_ALWAYS, SKV_BIAS_CONFIG } skv_bias;

typedef struct skv_family {
    const char *name;         /* model_type of config.json */
    const char *architecture; /* its "architectures" */
    skv_bias qkv_bias, o_bias, mlp_bias;
    bool qk_norm;      /* RMSNorm over each head of q and k before the rotation */
    bool skips_rope;   /* config.json says which layers have none */
    bool slides;       /* sliding_window holds without use_sliding_window */
    bool tied;         /* unless config.json says otherwise */
    double rope_theta; /* as above */
} skv_family;

extern const skv_family skv_families[]; /* ended by a NULL name */

const skv_family *skv_family_find(const char *name); /* NULL if unknown */

#endif
