#include "../families.h"

const skv_family skv_family_qwen2 = {
    .name = "qwen2",
    .architecture = "Qwen2ForCausalLM",
    .qkv_bias = SKV_BIAS_ALWAYS,
    .o_bias = SKV_BIAS_NEVER,
    .mlp_bias = SKV_BIAS_NEVER,
    .qk_norm = false,
};
