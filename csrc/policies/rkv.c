/* R-KV (arXiv 2505.24133): score = σI − (1 − σ)R. */
#include "../policies.h"

static bool score(skv_scoring *s) {
    const float mix = (float)s->method->mix, rest = (float)(1 - s->method->mix);
    skv_score_importance(s);
    skv_score_redundancy(s);
    for (size_t j = 0; j < s->n_candidates; j++) s->score[j] = mix * s->importance[j] - rest * s->redundancy[j];
    return true;
}

const skv_policy skv_policy_rkv = {
    .name = "rkv",
    .summary = "R-KV: importance against redundancy of the keys",
    .parameters = "budget interval window mix kernel tau",
    .needs = SKV_COMPACTS | SKV_NEEDS_QUERIES | SKV_GIVES_IMPORTANCE | SKV_GIVES_REDUNDANCY,
    .newest = skv_newest_window,
    .score = score,
};
