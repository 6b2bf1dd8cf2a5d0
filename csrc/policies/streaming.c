/* StreamingLLM (arXiv 2309.17453): attention sinks and the most recent slots. */
#include "../policies.h"

static int32_t newest(const skv_method *method, int32_t budget) {
    (void)method, (void)budget;
    return 0;
}

static bool score(skv_scoring *s) {
    for (size_t j = 0; j < s->n_candidates; j++) s->score[j] = (float)s->positions[j];
    return true;
}

const skv_policy skv_policy_streaming = {
    .name = "streaming",
    .summary = "StreamingLLM: the first positions and the most recent ones",
    .parameters = "budget interval sinks tau",
    .needs = SKV_COMPACTS,
    .newest = newest,
    .score = score,
};
