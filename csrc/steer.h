/* Adaptive steering (METHOD.md §7): x += α·v before one block, for the tokens that hold "\n\n". */
#ifndef SKV_STEER_H
#define SKV_STEER_H

#include "sentences.h"

typedef enum skv_scope { SKV_SCOPE_THINK, SKV_SCOPE_GENERATION, SKV_SCOPE_ALL, SKV_N_SCOPES } skv_scope;

extern const char *const skv_scope_names[SKV_N_SCOPES];

typedef struct skv_steering {
    float *vector; /* [hidden]; NULL: no steering */
    int32_t layer;
    float alpha, gamma, alpha_max;
    skv_scope scope;
} skv_steering;

/* Whether the token that the tracker has just read is steered, and how strongly. */
bool skv_steer_alpha(const skv_steering *steering, const skv_tracker *tracker, bool inside, float *alpha);

#endif
