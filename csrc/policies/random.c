/* The control that every scorer must beat: noise of (seed, prompt, sample, layer, head, position), the same in any batch. */
#include "../policies.h"

static bool score(skv_scoring *s) {
    const uint64_t parts[] = {(uint64_t)s->sequence[0], (uint64_t)s->sequence[1], s->layer, s->head};
    uint64_t x = skv_splitmix64((uint64_t)s->method->seed);
    for (size_t i = 0; i < 4; i++) x = skv_splitmix64(x ^ parts[i]);
    for (size_t j = 0; j < s->n_candidates; j++) s->score[j] = (float)(skv_splitmix64(x ^ (uint64_t)s->positions[j]) >> 40) * 0x1p-24f;
    return true;
}

const skv_policy skv_policy_random = {
    .name = "random",
    .summary = "uniform noise: the control",
    .parameters = "budget interval window seed tau",
    .needs = SKV_COMPACTS,
    .newest = skv_newest_window,
    .score = score,
};
