/* A caller's function of arrays: to try an idea without a compiler. */
#include "../policies.h"

static bool score(skv_scoring *s) {
    if (s->method->custom_needs & SKV_GIVES_IMPORTANCE) skv_score_importance(s);
    if (s->method->custom_needs & SKV_GIVES_REDUNDANCY) skv_score_redundancy(s);
    if (s->method->custom_needs & SKV_NEEDS_SENTENCES) skv_score_penalty(s);
    return s->method->custom(s->method->context, s);
}

const skv_policy skv_policy_custom = {
    .name = "custom",
    .summary = "the caller's own score",
    .parameters = "budget interval window tau",
    .needs = SKV_COMPACTS | SKV_NEEDS_CALLER,
    .newest = skv_newest_window,
    .score = score,
};
