/* FullKV: nothing is ever dropped. */
#include "../policies.h"

static int32_t newest(const skv_method *method, int32_t budget) {
    (void)method;
    return budget;
}

const skv_policy skv_policy_full = {
    .name = "full", .summary = "the whole cache, never compacted", .parameters = "interval tau", .newest = newest};
