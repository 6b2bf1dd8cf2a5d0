/* SkipKV (MLSys 2026, arXiv 2512.07993): score = σI − (1 − σ)R − λ, λ of the sentence that the slot's position lies in. */
#include "../policies.h"

static bool score(skv_scoring *s) {
    const float mix = (float)s->method->mix, rest = (float)(1 - s->method->mix);
    skv_score_importance(s);
    skv_score_redundancy(s);
    skv_score_penalty(s);
    for (size_t j = 0; j < s->n_candidates; j++) s->score[j] = mix * s->importance[j] - rest * s->redundancy[j] - s->penalty[j];
    return true;
}

const skv_policy skv_policy_skipkv = {
    .name = "skipkv",
    .summary = "SkipKV: R-KV's score less a penalty on sentences that a later one repeats",
    .parameters = "budget interval window mix kernel tau",
    .needs = SKV_COMPACTS | SKV_NEEDS_QUERIES | SKV_NEEDS_SENTENCES | SKV_GIVES_IMPORTANCE | SKV_GIVES_REDUNDANCY,
    .newest = skv_newest_window,
    .score = score,
};
