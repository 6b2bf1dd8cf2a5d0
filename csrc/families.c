#include "families.h"

#include <stddef.h>
#include <string.h>

const skv_family skv_families[] = {
    {"llama", "LlamaForCausalLM", SKV_BIAS_CONFIG, SKV_BIAS_CONFIG, SKV_BIAS_CONFIG, .rope_theta = 1e4},
    {"mistral", "MistralForCausalLM", SKV_BIAS_NEVER, SKV_BIAS_NEVER, SKV_BIAS_NEVER, .slides = true,
     .rope_theta = 1e4},
    {"qwen2", "Qwen2ForCausalLM", SKV_BIAS_ALWAYS, SKV_BIAS_NEVER, SKV_BIAS_NEVER, .rope_theta = 1e4},
    {"qwen3", "Qwen3ForCausalLM", SKV_BIAS_CONFIG, SKV_BIAS_CONFIG, SKV_BIAS_NEVER, .qk_norm = true, .rope_theta = 1e4},
    {"smollm3", "SmolLM3ForCausalLM", SKV_BIAS_CONFIG, SKV_BIAS_CONFIG, SKV_BIAS_CONFIG, .skips_rope = true,
     .tied = true, .rope_theta = 2e6},
    {0},
};

const skv_family *skv_family_find(const char *name) {
    for (const skv_family *family = skv_families; family->name; family++)
        if (!strcmp(family->name, name)) return family;
    return NULL;
}
