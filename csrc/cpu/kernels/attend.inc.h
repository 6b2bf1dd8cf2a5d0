/* Attention of a few queries to the slots of a page, included after kernels.inc.h. T queries share each vector of keys
 * and values that is loaded, and widened, so a page needs no copy in float32. However many share it, a query's sums
 * have one order: along a key lane by lane, then over the lanes; along the slots one by one. */

/* Vectors whose sums fit the registers; keys that meet at a time. */
enum { MOST_SUMS = VW == 16 ? 24 : 12, KEYS = VW / 4 };

/* VW numbers of a page from the i-th on, without their scale. */
INLINE vf v_slots(const skv_dtype type, const char *slots, size_t i) {
    if (type == SKV_BF16) return v_widen((const uint16_t *)(const void *)slots + i);
    if (type == SKV_Q8) return v_integers((const int8_t *)slots + i);
    return v_load((const float *)(const void *)slots + i);
}

/* Asks for n slots of the next page, from slot j on: the first-level cache has no room for two pages. */
INLINE void fetch_ahead(const skv_dtype type, const char *slots, size_t j, size_t n, size_t stride) {
    const size_t bytes = stride * skv_dtypes[type].size;
    for (size_t at = j * bytes; at < (j + n) * bytes; at += 64) __builtin_prefetch(slots + at, 0, 2);
}

/* logits[t, j] = q_t · key j · scale. Of VW keys every fourth meets the queries at a time, so that what a tile leaves
 * are v_sums' vectors after their first folds. */
INLINE void products_with_keys(const skv_dtype type, const int T, const skv_page *page, size_t stride, const float *q,
                               float scale, float (*logits)[SKV_PAGE]) {
    for (size_t j = 0; j < page->n; j += VW) {
        vf folded[SKV_QUERY_TILE][4];
        for (size_t i = 0; i < 4; i++) {
            vf acc[SKV_QUERY_TILE * KEYS];
            fetch_ahead(type, page->next_keys, j + i * KEYS, KEYS, stride);
            UNROLL for (int k = 0; k < T * KEYS; k++) acc[k] = v_set(0);
            for (size_t c = 0; c < stride; c += VW) {
                vf key[KEYS];
                UNROLL for (size_t k = 0; k < KEYS; k++) key[k] =
                    v_slots(type, page->keys, (j + i + 4 * k) * stride + c);
                UNROLL for (int t = 0; t < T; t++) {
                    const vf query = v_load(q + (size_t)t * stride + c);
                    UNROLL for (int k = 0; k < KEYS; k++) acc[t * KEYS + k] = v_fma(query, key[k], acc[t * KEYS + k]);
                }
            }
            UNROLL for (int t = 0; t < T; t++) {
                vf *a = acc + t * KEYS;
                if (KEYS > 2) a[0] = v_fold(8, a[0], a[1]), a[1] = v_fold(8, a[2], a[3]);
                folded[t][i] = KEYS > 1 ? v_fold(4, a[0], a[1]) : a[0];
            }
        }
        UNROLL for (int t = 0; t < T; t++) {
            const vf *f = folded[t];
            vf sums = v_fold(1, v_fold(2, f[0], f[1]), v_fold(2, f[2], f[3]));
            if (type == SKV_Q8) sums = v_mul(sums, v_load(page->key_scales + j));
            v_store(logits[t] + j, v_mul(sums, v_set(scale)));
        }
    }
}

/* weights [n] ← e^(logits − max), times the values' scales */
INLINE skv_partial exponentials(const skv_dtype type, const skv_page *page, float *logits) {
    const size_t n = page->n;
    vf most = v_set(-INFINITY), sum = v_set(0);
    for (size_t beyond = n; beyond % VW; beyond++) logits[beyond] = logits[0]; /* what lies there counts for nothing */
    for (size_t j = 0; j < n; j += VW) most = v_max(most, v_load(logits + j));
    const float max = v_most(most);
    for (size_t j = 0; j < n; j += VW) v_store(logits + j, v_exp(v_sub(v_load(logits + j), v_set(max))));
    for (size_t beyond = n; beyond % VW; beyond++) logits[beyond] = 0;
    for (size_t j = 0; j < n; j += VW) {
        const vf weights = v_load(logits + j);
        sum = v_add(sum, weights);
        if (type == SKV_Q8) v_store(logits + j, v_mul(weights, v_load(page->value_scales + j)));
    }
    return (skv_partial){.max = max, .sum = v_sum(sum)};
}

/* acc[t, i …] = Σ_j weights[t, j] values[j, i …] for C vectors */
INLINE void weigh(const skv_dtype type, const int T, const int C, const skv_page *page, size_t stride, size_t i,
                  float (*weights)[SKV_PAGE], float *acc) {
    vf sum[MOST_SUMS];
    UNROLL for (int k = 0; k < T * C; k++) sum[k] = v_set(0);
    for (size_t j = 0; j < page->n; j++) {
        if (i == 0) fetch_ahead(type, page->next_values, j, 1, stride);
        if (T < C) { /* the fewer stay in registers */
            vf weight[SKV_QUERY_TILE];
            UNROLL for (int t = 0; t < T; t++) weight[t] = v_set(weights[t][j]);
            UNROLL for (int c = 0; c < C; c++) {
                const vf value = v_slots(type, page->values, j * stride + i + (size_t)c * VW);
                UNROLL for (int t = 0; t < T; t++) sum[t * C + c] = v_fma(weight[t], value, sum[t * C + c]);
            }
        } else {
            vf value[8];
            UNROLL for (int c = 0; c < C; c++) value[c] = v_slots(type, page->values, j * stride + i + (size_t)c * VW);
            UNROLL for (int t = 0; t < T; t++) {
                const vf weight = v_set(weights[t][j]);
                UNROLL for (int c = 0; c < C; c++) sum[t * C + c] = v_fma(weight, value[c], sum[t * C + c]);
            }
        }
    }
    UNROLL for (int t = 0; t < T; t++) {
        UNROLL for (int c = 0; c < C; c++) v_store(acc + (size_t)t * stride + i + (size_t)c * VW, sum[t * C + c]);
    }
}

INLINE void attend_tile(const skv_dtype type, const int T, const skv_page *page, size_t stride, const float *q,
                        float scale, skv_partial *parts, float *acc) {
    float logits[SKV_QUERY_TILE][SKV_PAGE];
    size_t i = 0;
    products_with_keys(type, T, page, stride, q, scale, logits);
    for (int t = 0; t < T; t++) parts[t] = exponentials(type, page, logits[t]);
#define WEIGH(C)                                                                                                       \
    if (T * C <= MOST_SUMS)                                                                                            \
        for (; i + C * VW <= stride; i += C * VW) weigh(type, T, C, page, stride, i, logits, acc)
    WEIGH(8);
    WEIGH(4);
    WEIGH(2);
    WEIGH(1);
#undef WEIGH
}

INLINE void attend_any(const skv_dtype type, const skv_page *page, size_t stride, const float *q, size_t n_q,
                       float scale, skv_partial *parts, float *acc) {
#define CASE(T)                                                                                                        \
    case T:                                                                                                            \
        attend_tile(type, T, page, stride, q, scale, parts, acc);                                                      \
        break
    switch (n_q) {
        CASE(1);
        CASE(2);
        CASE(3);
        CASE(4);
        CASE(5);
    default:
        attend_tile(type, SKV_QUERY_TILE, page, stride, q, scale, parts, acc);
    }
#undef CASE
}

#define ATTEND(name, type)                                                                                             \
    static void attend_##name(const skv_page *page, size_t stride, const float *q, size_t n_q, float scale,            \
                              skv_partial *parts, float *acc) {                                                        \
        attend_any(type, page, stride, q, n_q, scale, parts, acc);                                                     \
    }
ATTEND(f32, SKV_F32)
ATTEND(bf16, SKV_BF16)
ATTEND(q8, SKV_Q8)
