/* Matrices of 8-bit weights, included before the table of kernels.inc.h. Inputs stand in groups of 32, the last one
 * filled up with zeros; a group of an output's weights has a scale, and so has a group of a token's inputs:
 *
 *     scale = max |v| / 127      q = v / scale, to the nearest integer, ties to even
 *     y[t, o] = Σ_g (Σ_k q_x[t, g, k] q_w[o, g, k]) · (scale_w[o, g] · scale_x[t, g])
 *
 * with the groups added in order, each product rounded. Sums within a group are integers, so y has the same bits in
 * every variant and whatever else is computed beside it. A group whose scale would be subnormal counts as zero; one
 * that holds a number that is not finite has the scale NaN. Weights' scales are bf16 (8.5 bits a weight; f32 would be
 * 9): rounding one to nearest moves the largest q to at most 127.25, so it costs no range, and unlike f16 it has that
 * of the weights.
 *
 * A panel is n_groups blocks: scales [PANEL] bf16 as pairs (o, o + VW), then for every four inputs [PANEL, 4] bytes
 * q + 128: unsigned, as one factor of the instruction that adds up four products is. 128 Σ_k q_x comes off again. */

enum { Q8_GROUP = 32, Q8_BLOCK = PANEL * (2 + Q8_GROUP), Q8_TILE = VW == 16 ? 6 : 4 };

/* A group of a token's inputs. */
typedef struct q8_inputs {
    float scale;
    int32_t start; /* −128 Σ q */
    v_factor q[Q8_GROUP];
} q8_inputs;

static size_t q8_groups(size_t n_in) { return (n_in + Q8_GROUP - 1) / Q8_GROUP; }

static size_t panel_bytes_q8(size_t n_in) { return q8_groups(n_in) * Q8_BLOCK; }

static size_t input_bytes_q8(size_t n_in) { return q8_groups(n_in) * sizeof(q8_inputs); }

/* The scale of a group. Bits of positive floats are in the order of the floats, NaN above all. */
INLINE float q8_scale(const float *v) {
    int32_t most = 0;
    float largest;
    for (int k = 0; k < Q8_GROUP; k++) {
        int32_t bits;
        memcpy(&bits, v + k, sizeof bits);
        most = (bits & INT32_MAX) > most ? bits & INT32_MAX : most;
    }
    memcpy(&largest, &most, sizeof largest);
    if (!isfinite(largest)) return NAN;
    return largest / 127 < FLT_MIN ? 0 : largest / 127;
}

/* q ← v / scale, rounded by adding a number whose last bit is worth 1; returns Σ q. */
INLINE int32_t q8_round(const float *v, float scale, v_factor *q) {
    int32_t sum = 0;
    if (!(scale > 0)) {
        memset(q, 0, Q8_GROUP * sizeof *q);
        return 0;
    }
    for (int k = 0; k < Q8_GROUP; k++) {
        const float shifted = v[k] / scale + 0x1.8p23f;
        int32_t bits;
        memcpy(&bits, &shifted, sizeof bits);
        bits -= 0x4b400000; /* 1.5 · 2²³ */
        q[k] = (v_factor)bits;
        sum += bits;
    }
    return sum;
}

static void quantise_q8(const float *x, size_t n_in, void *to) {
    q8_inputs *inputs = to;
    for (size_t k0 = 0; k0 < n_in; k0 += Q8_GROUP, inputs++) {
        float last[Q8_GROUP] = {0};
        const float *v = n_in - k0 < Q8_GROUP ? memcpy(last, x + k0, (n_in - k0) * sizeof *v) : x + k0;
        inputs->scale = q8_scale(v);
        inputs->start = -128 * q8_round(v, inputs->scale, inputs->q);
    }
}

/* Where weight k of a group of output o of a panel stands in its block. */
INLINE size_t q8_place(size_t o, size_t k) { return 2 * PANEL + (k / 4 * PANEL + o) * 4 + v_place(k % 4); }

static void pack_q8(const skv_matrix *m, size_t p, const void *source, skv_dtype type) {
    const size_t n_in = (size_t)m->n_in, size = skv_dtypes[type].size;
    uint8_t *block = (uint8_t *)m->data + p * panel_bytes_q8(n_in);
    for (size_t k0 = 0; k0 < n_in; k0 += Q8_GROUP, block += Q8_BLOCK)
        for (size_t o = 0; o < PANEL; o++) {
            float v[Q8_GROUP] = {0};
            v_factor q[Q8_GROUP];
            uint16_t half;
            if (p * PANEL + o < (size_t)m->n_out)
                skv_dtypes[type].widen((const char *)source + ((p * PANEL + o) * n_in + k0) * size,
                                       least(n_in - k0, Q8_GROUP), v);
            float scale = q8_scale(v);
            skv_dtypes[SKV_BF16].narrow(&scale, 1, &half);
            skv_dtypes[SKV_BF16].widen(&half, 1, &scale);
            memcpy(block + 2 * place(SKV_BF16, o, 0), &half, sizeof half);
            q8_round(v, scale, q);
            for (size_t k = 0; k < Q8_GROUP; k++) block[q8_place(o, k)] = (uint8_t)(q[k] + 128);
        }
}

static void row_q8(const skv_matrix *m, size_t output, float *x) {
    const size_t n_in = (size_t)m->n_in, o = output % PANEL;
    const uint8_t *panel = (const uint8_t *)m->data + output / PANEL * panel_bytes_q8(n_in);
    for (size_t k = 0; k < n_in; k++) {
        const uint8_t *block = panel + k / Q8_GROUP * Q8_BLOCK;
        float scale;
        skv_dtypes[SKV_BF16].widen(block + 2 * place(SKV_BF16, o, 0), 1, &scale);
        x[k] = scale * (float)(block[q8_place(o, k % Q8_GROUP)] - 128);
    }
}

/* y [T, PANEL] of one panel and T tokens, whose inputs are [T, n_groups] */
INLINE void tile_q8(const int T, const uint8_t *block, size_t n_groups, const q8_inputs *x, float *y) {
    vf acc[2 * Q8_TILE];
    UNROLL for (int i = 0; i < 2 * T; i++) acc[i] = v_set(0);
    for (size_t g = 0; g < n_groups; g++, block += Q8_BLOCK, x++) {
        vi sum[2 * Q8_TILE];
        UNROLL for (int t = 0; t < T; t++) sum[2 * t] = sum[2 * t + 1] = vi_set(x[(size_t)t * n_groups].start);
        ROLLED for (size_t k = 0; k < Q8_GROUP; k += 4) {
            const v_bytes low = v_load_bytes(block + q8_place(0, k)), high = v_load_bytes(block + q8_place(VW, k));
            /* Fewer tokens, and wider vectors, read fast enough for the CPU to see the stream itself. */
            if (T > 2 && VW < 16) __builtin_prefetch(block + q8_place(0, k) + 2048);
            UNROLL for (int t = 0; t < T; t++) {
                const v_factor *four = x[(size_t)t * n_groups].q + k;
                sum[2 * t] = v_dot(sum[2 * t], low, four);
                sum[2 * t + 1] = v_dot(sum[2 * t + 1], high, four);
            }
        }
        vf low, high;
        v_split(vi_load(block), &low, &high);
        UNROLL for (int t = 0; t < T; t++) {
            const vf scale = v_set(x[(size_t)t * n_groups].scale);
            acc[2 * t] = v_add(acc[2 * t], v_mul(v_convert(sum[2 * t]), v_mul(low, scale)));
            acc[2 * t + 1] = v_add(acc[2 * t + 1], v_mul(v_convert(sum[2 * t + 1]), v_mul(high, scale)));
        }
    }
    UNROLL for (int i = 0; i < 2 * T; i++) v_store(y + i * VW, acc[i]);
}

/* Bytes differ from round to round, and factors from sum to sum, so that no product is one that was there before. */
static double peak_q8(size_t n, float *sink) {
    enum { ROUNDS = 8, SUMS = 12 };
    uint8_t bytes[ROUNDS * 4 * VW];
    v_factor factors[4 * SUMS];
    vi sum[SUMS];
    for (int i = 0; i < ROUNDS * 4 * VW; i++) bytes[i] = (uint8_t)i;
    for (int i = 0; i < 4 * SUMS; i++) factors[i] = (v_factor)(i - 2 * SUMS);
    UNROLL for (int c = 0; c < SUMS; c++) sum[c] = vi_set(c);
    for (size_t i = 0; i < n; i++) {
        const v_bytes b = v_load_bytes(bytes + i % ROUNDS * 4 * VW);
        UNROLL for (int c = 0; c < SUMS; c++) sum[c] = v_dot(sum[c], b, factors + 4 * c);
    }
    for (int c = 0; c < SUMS; c++) *sink += v_sum(v_convert(sum[c]));
    return 4.0 * SUMS * VW * (double)n;
}

/* As in `linear`, a panel meets all tokens of a block before the next one. */
static void linear_q8(const skv_matrix *m, size_t first, size_t end, const void *inputs, size_t n_tokens,
                      const float *bias, float *y) {
    const size_t n_groups = q8_groups((size_t)m->n_in), n_out = (size_t)m->n_out;
    float out[Q8_TILE * PANEL];
    for (size_t t0 = 0; t0 < n_tokens; t0 += BLOCK_T)
        for (size_t p = first; p < end; p++) {
            const uint8_t *panel = (const uint8_t *)m->data + p * n_groups * Q8_BLOCK;
            const size_t stop = least(t0 + BLOCK_T, n_tokens), o0 = p * PANEL, width = least(n_out - o0, PANEL);
            for (size_t t = t0, n; t < stop; t += n) {
                const q8_inputs *x = (const q8_inputs *)inputs + t * n_groups;
                n = least(stop - t, Q8_TILE);
#define CASE(T)                                                                                                        \
    case T:                                                                                                            \
        if (T <= Q8_TILE) tile_q8(T, panel, n_groups, x, out);                                                         \
        break
                switch (n) {
                    CASE(1);
                    CASE(2);
                    CASE(3);
                    CASE(4);
                    CASE(5);
                    CASE(6);
                default:
                    break;
                }
#undef CASE
                for (size_t i = 0; i < n; i++)
                    for (size_t o = 0; o < width; o++)
                        y[(t + i) * n_out + o0 + o] = out[i * PANEL + o] + (bias ? bias[o0 + o] : 0);
            }
        }
}
