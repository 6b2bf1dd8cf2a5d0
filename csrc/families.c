#include "families.h"

#include <stddef.h>
#include <string.h>

const skv_family skv_families[] = {
    {"llama", "LlamaForCausalLM", SKV_BIAS_CONFIG, SKV_BIAS_CONFIG, SKV_BIAS_CONFIG, .qk_norm = false},
    {"qwen2", "Qwen2ForCausalLM", SKV_BIAS_ALWAYS, SKV_BIAS_NEVER, SKV_BIAS_NEVER, .qk_norm = false},
    {"qwen3", "Qwen3ForCausalLM", SKV_BIAS_CONFIG, SKV_BIAS_CONFIG, SKV_BIAS_NEVER, .qk_norm = true},
    {0},
};

const skv_family *skv_family_find(const char *name) {
    for (const skv_family *family = skv_families; family->name; family++)
        if (!strcmp(family->name, name)) return family;
    return NULL;
}
