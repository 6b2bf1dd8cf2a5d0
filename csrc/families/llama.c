#include "../families.h"

const skv_family skv_family_llama = {
    .name = "llama",
    .architecture = "LlamaForCausalLM",
    .qkv_bias = SKV_BIAS_CONFIG,
    .o_bias = SKV_BIAS_CONFIG,
    .mlp_bias = SKV_BIAS_CONFIG,
    .qk_norm = false,
};
