/* SnapKV (arXiv 2404.14469), in the form of R-KV's and SkipKV's repositories: score = I. */
#include <string.h>

#include "../policies.h"

static bool score(skv_scoring *s) {
    skv_score_importance(s);
    memcpy(s->score, s->importance, s->n_candidates * sizeof *s->score);
    return true;
}

const skv_policy skv_policy_snapkv = {
    .name = "snapkv",
    .summary = "SnapKV: attention of the window's queries, pooled",
    .parameters = "budget interval window kernel tau",
    .needs = SKV_COMPACTS | SKV_NEEDS_QUERIES | SKV_GIVES_IMPORTANCE,
    .newest = skv_newest_window,
    .score = score,
};
