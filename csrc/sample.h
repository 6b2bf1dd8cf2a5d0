/* The next token from a row of logits: greedy, or drawn after temperature, top-k, top-p and min-p, in that order (as
 * transformers does). */
#ifndef SKV_SAMPLE_H
#define SKV_SAMPLE_H

#include <stddef.h>
#include <stdint.h>

typedef struct skv_sampling {
    float temperature;  /* 0: greedy, ties to the lower id */
    int32_t top_k;      /* 0: all */
    float top_p, min_p; /* 1, 0: all */
    uint64_t seed;
} skv_sampling;

typedef struct skv_candidate {
    float weight; /* e^((logit − max) / temperature) */
    int32_t id;
} skv_candidate;

/* The largest logit's id, ties to the lower one. NaN is never larger than another, and nothing than NaN. */
int32_t skv_argmax(const float *logits, size_t vocab);

/* sequence [3]: prompt index, sample index, position. What is drawn depends on these and the seed alone. scratch
 * [vocab]. */
int32_t skv_sample(const float *logits, size_t vocab, const skv_sampling *sampling, const int64_t *sequence,
                   skv_candidate *scratch);

#endif
