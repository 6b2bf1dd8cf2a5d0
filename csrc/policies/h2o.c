/* H2O (arXiv 2306.14048): half of the budget for the most recent slots, half for those that received most attention so far. */
#include <string.h>

#include "../policies.h"

static int32_t newest(const skv_method *method, int32_t budget) { return budget / 2 > method->window ? budget / 2 : method->window; }

static bool score(skv_scoring *s) {
    memcpy(s->score, s->sums, s->n_candidates * sizeof *s->score);
    return true;
}

const skv_policy skv_policy_h2o = {
    .name = "h2o",
    .summary = "H2O: half recent, half by the attention received so far",
    .parameters = "budget interval window tau",
    .needs = SKV_COMPACTS | SKV_NEEDS_SUMS,
    .newest = newest,
    .score = score,
};
