/* H2O as in SkipKV's repository: the last query's attention, averaged over the KV heads, decides for all of them. The heads are scored one
 * after the other into the same row, which evict.c divides by their number. */
#include "../policies.h"

static int32_t newest(const skv_method *method, int32_t budget) {
    (void)method, (void)budget;
    return 1;
}

static bool score(skv_scoring *s) {
    skv_method one = *s->method;
    one.kernel = 1; /* no pooling: importance is then the softmax of the last query's group maximum */
    skv_scoring last = *s;
    last.method = &one;
    last.queries = s->queries + (s->n_queries - 1) * s->group * s->stride;
    last.n_queries = 1;
    skv_score_importance(&last);
    for (size_t j = 0; j < s->n_candidates; j++) s->score[j] = (s->head ? s->score[j] : 0) + s->importance[j];
    if (s->head + 1 == s->n_kv_heads)
        for (size_t j = 0; j < s->n_candidates; j++) s->score[j] /= (float)s->n_kv_heads;
    return true;
}

const skv_policy skv_policy_h2o_last = {
    .name = "h2o-last",
    .summary = "H2O as in SkipKV's repository: the last query's attention, one kept set for all heads",
    .parameters = "budget interval tau",
    .needs = SKV_COMPACTS | SKV_NEEDS_QUERIES | SKV_SHARED,
    .newest = newest,
    .score = score,
};
