/* Kernels of the scores, included after kernels.inc.h: products of many rows with sixteen keys, and sums of softmaxes.
 */

enum { N_VECTORS = SKV_COLUMNS / VW, TILE_ROWS = 12 / N_VECTORS < 8 ? 12 / N_VECTORS : 8 };

INLINE void products_tile(const int T, const float *panel, const float *const *rows, size_t dim, float *out) {
    vf acc[TILE_ROWS * N_VECTORS];
    UNROLL for (int i = 0; i < T * N_VECTORS; i++) acc[i] = v_set(0);
    for (size_t k = 0; k < dim; k++) {
        vf column[N_VECTORS];
        UNROLL for (int v = 0; v < N_VECTORS; v++) column[v] = v_load(panel + k * SKV_COLUMNS + (size_t)v * VW);
        UNROLL for (int t = 0; t < T; t++) {
            const vf broadcast = v_set(rows[t][k]);
            UNROLL for (int v = 0; v < N_VECTORS; v++) acc[t * N_VECTORS + v] =
                v_fma(broadcast, column[v], acc[t * N_VECTORS + v]);
        }
    }
    UNROLL for (int i = 0; i < T * N_VECTORS; i++) v_store(out + (size_t)i * VW, acc[i]);
}

static void products(const float *panel, const float *const *rows, size_t n, size_t dim, float *out) {
    size_t i = 0;
    for (; i + TILE_ROWS <= n; i += TILE_ROWS) products_tile(TILE_ROWS, panel, rows + i, dim, out + i * SKV_COLUMNS);
    for (; i < n; i++) products_tile(1, panel, rows + i, dim, out + i * SKV_COLUMNS);
}

static void exceed(const float *products, size_t n, float least, bool *found) {
    for (size_t r = 0; r < n; r++, products += SKV_COLUMNS) {
        vf most = v_set(least); /* which a NaN, the first of two, leaves as it is */
        UNROLL for (int v = 0; v < N_VECTORS; v++) most = v_max(v_load(products + (size_t)v * VW), most);
        found[r] = v_most(most) > least;
    }
}

static void columns(const float *rows, size_t stride, size_t n, float *panel) {
    for (size_t k = 0; k < stride; k += VW) UNROLL for (size_t v = 0; v < N_VECTORS; v++) {
            vf a[VW];
            UNROLL for (size_t j = 0; j < VW; j++) {
                const size_t row = v * VW + j;
                a[j] = row < n ? v_load(rows + row * stride + k) : v_set(0);
            }
            v_transpose(a);
            UNROLL for (size_t i = 0; i < VW; i++) v_store(panel + (k + i) * SKV_COLUMNS + v * VW, a[i]);
        }
}

/* out[j] = q · keys[j] for N keys: each is summed lane by lane, then over the lanes, alone or among others. */
INLINE void dots(const int N, const float *q, const float *keys, size_t stride, float *out) {
    vf acc[VW];
    UNROLL for (int j = 0; j < N; j++) acc[j] = v_set(0);
    for (size_t i = 0; i < stride; i += VW) {
        const vf part = v_load(q + i);
        UNROLL for (int j = 0; j < N; j++) acc[j] = v_fma(part, v_load(keys + (size_t)j * stride + i), acc[j]);
    }
    if (N == VW) {
        v_store(out, v_sums(acc));
    } else {
        UNROLL for (int j = 0; j < N; j++) out[j] = v_sum(acc[j]);
    }
}

static void inner(const float *q, const float *keys, size_t n, size_t stride, float *out) {
    size_t j = 0;
    for (; j + VW <= n; j += VW) dots(VW, q, keys + j * stride, stride, out + j);
    for (; j < n; j++) dots(1, q, keys + j * stride, stride, out + j);
}

static void add_softmax(float *z, size_t n, float *sum) {
    float max = z[0];
    for (size_t j = 1; j < n; j++) max = z[j] > max ? z[j] : max;
    for (size_t j = n; j % VW; j++) z[j] = max; /* keeps the unused lanes finite */
    for (size_t j = 0; j < n; j += VW) v_store(z + j, v_exp(v_sub(v_load(z + j), v_set(max))));
    for (size_t j = n; j % VW; j++) z[j] = 0;
    vf total = v_set(0);
    for (size_t j = 0; j < n; j += VW) total = v_add(total, v_load(z + j));
    const vf scale = v_set(1.0f / v_sum(total));
    for (size_t j = 0; j < n; j += VW) v_store(sum + j, v_fma(v_load(z + j), scale, v_load(sum + j)));
}

static void normalise(const float *keys, size_t n, size_t stride, float *unit, float *sum) {
    for (size_t k = 0; k < stride; k++) sum[k] = 0;
    for (size_t i = 0; i < n; i++, keys += stride, unit += stride) {
        vf squares = v_set(0);
        for (size_t k = 0; k < stride; k += VW) squares = v_fma(v_load(keys + k), v_load(keys + k), squares);
        const vf length = v_set(sqrtf(v_sum(squares)) + 1e-8f);
        for (size_t k = 0; k < stride; k += VW) {
            const vf part = v_div(v_load(keys + k), length);
            v_store(unit + k, part);
            v_store(sum + k, v_add(v_load(sum + k), part));
        }
    }
}
