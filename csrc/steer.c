#include "steer.h"

const char *const skv_scope_names[SKV_N_SCOPES] = {"think", "generation", "all"};

/* Whether the newest token ends a blank line. */
static bool is_paragraph(const skv_tracker *t) {
    const int32_t *id = t->recent + SKV_WAY - 1;
    const uint8_t *flags = t->vocabulary->flags;
    if (flags[id[0]] & SKV_PARAGRAPH) return true;
    bool newline[3];
    for (int i = 0; i < 3; i++) newline[i] = id[-i] >= 0 && (flags[id[-i]] & SKV_NEWLINE);
    return newline[0] && newline[1] && !newline[2];
}

bool skv_steer_alpha(const skv_steering *s, const skv_tracker *t, bool inside, float *alpha) {
    const int32_t position = t->n_tokens - 1;
    if (!s->vector || !t->vocabulary->flags || !is_paragraph(t)) return false;
    if (s->scope == SKV_SCOPE_THINK && !inside) return false;
    if (s->scope == SKV_SCOPE_GENERATION && position < t->n_prompt) return false;
    if ((t->compat & SKV_COMPAT_STEER_PROMPT_END) && position < t->n_prompt - 1) return false;
    const float raised = s->alpha + s->gamma * (float)(t->compat & SKV_COMPAT_THOUGHTS_ON_GRID ? t->n_thoughts_on_grid : t->n_thoughts);
    *alpha = raised < s->alpha_max ? raised : s->alpha_max;
    return true;
}
