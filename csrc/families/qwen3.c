#include "../families.h"

const skv_family skv_family_qwen3 = {
    .name = "qwen3",
    .architecture = "Qwen3ForCausalLM",
    .qkv_bias = SKV_BIAS_CONFIG,
    .o_bias = SKV_BIAS_CONFIG,
    .mlp_bias = SKV_BIAS_NEVER,
    .qk_norm = true,
};
