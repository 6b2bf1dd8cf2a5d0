#include "config.h"

#include <math.h>
#include <stddef.h>

const char *const skv_rope_names[SKV_N_ROPES] = {"default", "linear", "dynamic", "llama3", "yarn"};

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
    if (c->n_layers > SKV_MAX_LAYERS)
        return skv_fail(error, SKV_CONFIG, "config: n_layers is %d; allowed: 1 to %d", c->n_layers, SKV_MAX_LAYERS);
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
    if (!(c->rope_factor > 0) || !isfinite(c->rope_factor))
        return skv_fail(error, SKV_CONFIG, "config: rope_factor is %g; it must be positive", c->rope_factor);
    if (!(c->rope_attention_factor > 0) || !isfinite(c->rope_attention_factor))
        return skv_fail(error, SKV_CONFIG, "config: rope_attention_factor is %g; it must be positive",
                        c->rope_attention_factor);
    if (c->rope_type == SKV_ROPE_LLAMA3 &&
        !(c->rope_low_freq_factor > 0 && c->rope_high_freq_factor > c->rope_low_freq_factor &&
          c->rope_original_context > 0))
        return skv_fail(error, SKV_CONFIG,
                        "config: llama3 rope needs 0 < low_freq_factor < high_freq_factor and original_context > 0; "
                        "found %g, %g, %g",
                        c->rope_low_freq_factor, c->rope_high_freq_factor, c->rope_original_context);
    if (c->rope_type == SKV_ROPE_YARN &&
        !(c->rope_theta > 1 && c->rope_beta_fast > 0 && c->rope_beta_slow > 0 && c->rope_original_context > 0))
        return skv_fail(error, SKV_CONFIG,
                        "config: yarn rope needs theta > 1 and beta_fast, beta_slow, original_context > 0; found %g, "
                        "%g, %g, %g",
                        c->rope_theta, c->rope_beta_fast, c->rope_beta_slow, c->rope_original_context);
    return SKV_OK;
}

static const double TURN = 2.0 * 3.14159265358979323846;

/* llama3: wavelengths above original/low are stretched by factor, those below original/high stay, a linear blend in
 * between. */
static double llama3_scaled(const skv_config *c, double frequency) {
    const double turns = c->rope_original_context * frequency / TURN;
    double blend = (turns - c->rope_low_freq_factor) / (c->rope_high_freq_factor - c->rope_low_freq_factor);
    blend = fmin(fmax(blend, 0.0), 1.0);
    return (1.0 - blend) * frequency / c->rope_factor + blend * frequency;
}

/* The pair, as a fraction of one, that makes so many turns within the original context. */
static double turning_pair(const skv_config *c, double turns) {
    return c->head_dim * log(c->rope_original_context / (turns * TURN)) / (2.0 * log(c->rope_theta));
}

/* yarn: pairs that make more than beta_fast turns stay, those with fewer than beta_slow are stretched by factor, a
 * ramp over the pairs in between. */
static double yarn_scaled(const skv_config *c, int32_t pair, double frequency) {
    double low = turning_pair(c, c->rope_beta_fast), high = turning_pair(c, c->rope_beta_slow);
    if (c->rope_truncate) low = floor(low), high = ceil(high);
    low = fmax(low, 0.0), high = fmin(high, c->head_dim - 1);
    if (low == high) high += 0.001;
    const double stretched = fmin(fmax((pair - low) / (high - low), 0.0), 1.0);
    return stretched * frequency / c->rope_factor + (1.0 - stretched) * frequency;
}

void skv_config_frequencies(const skv_config *c, float *inv_freq) {
    for (int32_t i = 0; i < c->head_dim / 2; i++) {
        double frequency = pow(c->rope_theta, -2.0 * i / c->head_dim);
        if (c->rope_type == SKV_ROPE_LINEAR) frequency /= c->rope_factor;
        if (c->rope_type == SKV_ROPE_LLAMA3) frequency = llama3_scaled(c, frequency);
        if (c->rope_type == SKV_ROPE_YARN) frequency = yarn_scaled(c, i, frequency);
        inv_freq[i] = (float)frequency;
    }
}
