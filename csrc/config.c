#include "config.h"

#include <math.h>
#include <stddef.h>

const char *const skv_rope_names[SKV_N_ROPES] = {"default", "linear", "llama3"};

/* Largest value of any dimension, so that products of two fit an int64 and a buffer's index never overflows. */
enum { LIMIT = 1 << 24 };

skv_status skv_config_check(const skv_config *c, skv_error *error) {
    const struct {
        const char *name;
        int32_t value;
    } dimensions[] = {
        {"n_layers", c->n_layers}, {"n_heads", c->n_heads}, {"n_kv_heads", c->n_kv_heads}, {"head_dim", c->head_dim},
        {"hidden", c->hidden},     {"ffn", c->ffn},         {"vocab", c->vocab},           {"context", c->context},
    };
    for (size_t i = 0; i < sizeof dimensions / sizeof *dimensions; i++)
        if (dimensions[i].value < 1 || dimensions[i].value > LIMIT)
            return skv_fail(error, SKV_CONFIG, "config: %s is %d; allowed: 1 to %d", dimensions[i].name,
                            dimensions[i].value, LIMIT);
    if (c->n_heads % c->n_kv_heads)
        return skv_fail(error, SKV_CONFIG, "config: n_heads is %d; it must be a multiple of n_kv_heads, %d", c->n_heads,
                        c->n_kv_heads);
    if (c->head_dim % 2 || c->head_dim > SKV_MAX_HEAD_DIM)
        return skv_fail(error, SKV_CONFIG, "config: head_dim is %d; allowed: even numbers up to %d", c->head_dim,
                        SKV_MAX_HEAD_DIM);
    if ((int64_t)c->n_heads * c->head_dim > LIMIT)
        return skv_fail(error, SKV_CONFIG, "config: n_heads × head_dim is %lld; allowed: up to %d",
                        (long long)c->n_heads * c->head_dim, LIMIT);
    if (!(c->norm_eps >= 0) || !(c->norm_eps < 1))
        return skv_fail(error, SKV_CONFIG, "config: norm_eps is %g; allowed: 0 to 1", (double)c->norm_eps);
    if (!(c->rope_theta > 0) || !isfinite(c->rope_theta))
        return skv_fail(error, SKV_CONFIG, "config: rope_theta is %g; it must be positive", c->rope_theta);
    if (c->rope_type != SKV_ROPE_DEFAULT && (!(c->rope_factor > 0) || !isfinite(c->rope_factor)))
        return skv_fail(error, SKV_CONFIG, "config: rope_factor is %g; it must be positive", c->rope_factor);
    if (c->rope_type == SKV_ROPE_LLAMA3 &&
        !(c->rope_low_freq_factor > 0 && c->rope_high_freq_factor > c->rope_low_freq_factor &&
          c->rope_original_context > 0))
        return skv_fail(error, SKV_CONFIG,
                        "config: llama3 rope needs 0 < low_freq_factor < high_freq_factor and original_context > 0; "
                        "found %g, %g, %g",
                        c->rope_low_freq_factor, c->rope_high_freq_factor, c->rope_original_context);
    return SKV_OK;
}

/* llama3: wavelengths above original/low are stretched by factor, those below original/high stay, a linear blend in
 * between. */
static double llama3_scaled(const skv_config *c, double frequency) {
    const double turns = c->rope_original_context * frequency / (2.0 * 3.14159265358979323846);
    double blend = (turns - c->rope_low_freq_factor) / (c->rope_high_freq_factor - c->rope_low_freq_factor);
    blend = fmin(fmax(blend, 0.0), 1.0);
    return (1.0 - blend) * frequency / c->rope_factor + blend * frequency;
}

void skv_config_frequencies(const skv_config *c, float *inv_freq) {
    for (int32_t i = 0; i < c->head_dim / 2; i++) {
        double frequency = pow(c->rope_theta, -2.0 * i / c->head_dim);
        if (c->rope_type == SKV_ROPE_LINEAR) frequency /= c->rope_factor;
        if (c->rope_type == SKV_ROPE_LLAMA3) frequency = llama3_scaled(c, frequency);
        inv_freq[i] = (float)frequency;
    }
}
