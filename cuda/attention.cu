/* Keys, values and queries: written, attended to, remembered.
 *
 * kernel         grid, block                          moves                        why
 * append_kernel  [tokens, KV heads], 128              writes a key and a value
 * ring_kernel    [tokens], 256                        copies the newest queries
 * attend_kernel  prompts: [blocks of 64 query rows,   every page once a block, by  a group's rows share a page;
 *                 KV heads], 128                      cp.async: values behind the  tensor cores: FP32 units would
 *                rows that decode: [parts, KV heads   products with keys, the      take longer than the memory; a
 *                 × tiles of 16 query rows, runs of   next keys behind those with  row that decodes has a block a
 *                 8 pages], 128                       values                       run, to fill the device
 * merge_kernel   [parts × heads / 8], 256             the runs' results            a warp a head, runs in order
 * receive_kernel [parts, KV heads, pages], 256        keys once for 8 rows         sums grow in the queries' order
 *
 * Products are m16n8k16 of bf16 with float32 sums. Beside bf16 keys and values, queries and probabilities are the sum
 * of two bf16, off by 2^-18 at most (one bf16: 2^-9): twice the plain flops, 8 · head_dim a slot and row. With float32
 * caches all are the sum of three, which hold a float's every bit; six of the nine products count.
 */
#include <cfloat>

#include "tiles.cuh"

constexpr int ATTEND_WARPS = 4, ATTEND_THREADS = ATTEND_WARPS * WARP;

/* ---- written and remembered ---- */

template <typename T>
static __global__ void append_kernel(cu_batch b, cu_cache cache, int32_t layer, const float *k, const float *v) {
    const int32_t t = int32_t(blockIdx.x), h = int32_t(blockIdx.y);
    const cu_token token = b.tokens[t];
    const cu_part part = b.parts[token.part];
    const cu_head head =
        b.heads[(size_t(token.part) * size_t(b.n_layers) + size_t(layer)) * size_t(b.n_kv) + size_t(h)];
    const int32_t slot = head.n_slots - part.n + (t - part.first), at = slot % SKV_PAGE;
    char *page = head.pages[slot / SKV_PAGE];
    const size_t from = (size_t(t) * size_t(b.n_kv) + size_t(h)) * size_t(cache.dim);
    T *key = page_key<T>(cache, page, at), *value = page_value<T>(cache, page, at);
    for (int32_t i = int32_t(threadIdx.x); i < cache.stride; i += int32_t(blockDim.x)) {
        narrow(i < cache.dim ? k[from + size_t(i)] : 0.0f, key + i);
        narrow(i < cache.dim ? v[from + size_t(i)] : 0.0f, value + i);
    }
    if (threadIdx.x != 0) return;
    page_positions(cache, page)[at] = token.position;
    if (cache.sums) page_sums(cache, page)[at] = 0;
}

void cu_append(skv_device *base, size_t layer, const float *k, const float *v) {
    cu_device *d = cu_of(base);
    const dim3 grid(unsigned(d->batch.n_tokens), unsigned(d->batch.n_kv));
    if (d->work.cache.type == SKV_F32)
        CU_LAUNCH(d, append_kernel<float>, grid, 128, 0, d->batch, d->cache, int32_t(layer), k, v);
    else
        CU_LAUNCH(d, append_kernel<__nv_bfloat16>, grid, 128, 0, d->batch, d->cache, int32_t(layer), k, v);
}

static __global__ void ring_kernel(cu_batch b, size_t width, int32_t layer, int32_t window, const float *q) {
    const int32_t t = int32_t(blockIdx.x);
    const cu_part part = b.parts[b.tokens[t].part];
    if (!part.ring || t < part.first + part.n - window) return;
    const size_t place = size_t(layer) * size_t(window) + size_t(b.tokens[t].position % window);
    for (size_t i = threadIdx.x; i < width; i += THREADS) part.ring[place * width + i] = q[size_t(t) * width + i];
}

void cu_keep_queries(skv_device *base, size_t layer, const float *q) {
    cu_device *d = cu_of(base);
    const size_t width = size_t(d->batch.n_heads) * size_t(d->cache.dim);
    CU_LAUNCH(d, ring_kernel, unsigned(d->batch.n_tokens), THREADS, 0, d->batch, width, int32_t(layer), d->work.window,
              q);
}

/* ---- attended to ---- */

/* What a block works on. */
struct attend_place {
    cu_part part;
    cu_head head;
    int32_t at, before;      /* number of the part; slots older than it */
    int32_t first;           /* query row */
    int32_t n_rows, visible; /* slots that the last row sees */
};

static __device__ attend_place place_of(const cu_batch &b, int32_t layer, cu_block at, int32_t kv_head, int32_t rows) {
    attend_place p;
    p.at = at.part;
    p.part = b.parts[at.part];
    p.head = b.heads[(size_t(at.part) * size_t(b.n_layers) + size_t(layer)) * size_t(b.n_kv) + size_t(kv_head)];
    p.before = p.head.n_slots - p.part.n;
    p.first = at.first;
    p.n_rows = min(rows, p.part.n * b.group - at.first);
    p.visible = p.before + (at.first + p.n_rows - 1) / b.group + 1;
    return p;
}

/* Where row r's query, and its output, lie in [n_tokens, n_heads, dim]. */
static __device__ __forceinline__ size_t row_at(const cu_batch &b, const attend_place &p, int32_t kv_head, int32_t r) {
    const int32_t row = p.first + r;
    return size_t(p.part.first + row / b.group) * size_t(b.n_heads) + size_t(kv_head * b.group + row % b.group);
}

/* Where the result of a run of row r of a part of one token lies, if it is one. */
static __device__ __forceinline__ size_t partial_at(const cu_batch &b, const attend_place &p, int32_t kv_head,
                                                    int32_t r, int32_t run, int32_t stride) {
    const size_t head = size_t(p.at) * size_t(b.n_heads) + size_t(kv_head * b.group + p.first + r);
    return (head * size_t(b.n_runs) + size_t(run)) * size_t(stride + 2);
}

/* Slots that row r sees. */
static __device__ __forceinline__ int32_t seen(const cu_batch &b, const attend_place &p, int32_t r) {
    return p.before + (p.first + r) / b.group + 1;
}

/* The result of a run, or of several: Σ 2^(l − most) V, most, Σ 2^(l − most); l: logits / ln 2. */
struct run_state {
    float most, sum;
};

/* Weights by which an old and a new run count together. */
static __device__ __forceinline__ float2 merge_runs(run_state *total, run_state run) {
    const float most = fmaxf(total->most, run.most);
    const float2 weights = make_float2(exp2f(total->most - most), exp2f(run.most - most));
    total->sum = fmaf(total->sum, weights.x, run.sum * weights.y);
    total->most = most;
    return weights;
}

/* The one way in which results are merged, so that all kernels round alike. */
static __device__ __forceinline__ float merged(float total, float run, float2 weights) {
    return fmaf(total, weights.x, run * weights.y);
}

/* What multiplies logits that are powers of two from here on. */
static float log2_scale(const cu_cache &cache) { return 1.44269504f / sqrtf(float(cache.dim)); }

/* How a block of four warps shares its work: each has 16 rows of its own and all slots of a tile (COLUMNS 1, for
 * prompts), or all have the same 16 rows, a warp some of the slots and then some of the values' elements (COLUMNS 4,
 * for rows that decode). An element is summed up in the same order by both. */
template <typename T, int PAIRS, int N> struct attend_shape {
    static constexpr int COLUMNS = N;
    static constexpr int PLANES = sizeof(T) == 2 ? 1 : 3; /* bf16 whose sum is a key's or a value's element */
    static constexpr int PARTS = PLANES == 1 ? 2 : 3;     /* and a query's, or a probability */
    static constexpr int SLOTS = PAIRS * PLANES <= 2 ? 64 : PAIRS * PLANES <= 4 ? 32 : 16; /* of a tile */
    static constexpr int STEPS = SLOTS / 16, OWN = STEPS > COLUMNS ? STEPS / COLUMNS : 1;  /* OWN: a warp's logits */
    static constexpr int ROWS = 16 * (ATTEND_WARPS / COLUMNS);
    static constexpr int WIDE = 4 * PAIRS / COLUMNS; /* a warp's elements of the values, by 16 */
    static constexpr int SHARES = COLUMNS > 1 ? STEPS *PARTS *WARP : 0;
};

/* A block's shared memory. Rows of stride + 8 elements: no two lanes of ldmatrix share a bank. */
template <typename Shape> struct attend_shared {
    __nv_bfloat16 *keys, *values; /* [PLANES, SLOTS, pitch] */
    __nv_bfloat16 *queries;       /* [PARTS, ROWS, pitch] */
    uint4 *shares;                /* [STEPS, PARTS, lanes] probabilities as fragments; COLUMNS 4 only */
    float *most;                  /* [COLUMNS, 16]; COLUMNS 4 only */
    int32_t pitch;

    __device__ attend_shared(const cu_cache &cache, char *shared) {
        pitch = cache.stride + 8;
        keys = reinterpret_cast<__nv_bfloat16 *>(shared);
        values = keys + Shape::PLANES * Shape::SLOTS * pitch;
        queries = values + Shape::PLANES * Shape::SLOTS * pitch;
        shares = reinterpret_cast<uint4 *>(queries + Shape::PARTS * Shape::ROWS * pitch);
        most = reinterpret_cast<float *>(shares + Shape::SHARES);
    }

    static size_t bytes(const cu_cache &cache) {
        const size_t rows = 2 * Shape::PLANES * Shape::SLOTS + Shape::PARTS * Shape::ROWS;
        return rows * size_t(cache.stride + 8) * sizeof(__nv_bfloat16) +
               (Shape::SHARES ? Shape::SHARES * sizeof(uint4) + Shape::COLUMNS * 16 * sizeof(float) : 0);
    }
};

/* Two numbers as the sum of pairs of bf16, the highest first. */
template <int N> static __device__ __forceinline__ void split_pair(float2 x, uint32_t (&parts)[N]) {
#pragma unroll
    for (int i = 0; i < N; i++) {
        const __nv_bfloat162 part = __floats2bfloat162_rn(x.x, x.y);
        parts[i] = *reinterpret_cast<const uint32_t *>(&part);
        x.x -= __low2float(part), x.y -= __high2float(part);
    }
}

/* 16 bytes of a vector, zeros from NULL, to shared memory; `plane` elements on: the next part. */
static __device__ __forceinline__ void store_part(const __nv_bfloat16 *from, __nv_bfloat16 *to, int32_t) {
    if (from)
        cudax_copy16(to, from);
    else
        *reinterpret_cast<uint4 *>(to) = make_uint4(0, 0, 0, 0);
}

static __device__ __forceinline__ void store_part(const float *from, __nv_bfloat16 *to, int32_t plane) {
    const float4 x = from ? *reinterpret_cast<const float4 *>(from) : make_float4(0, 0, 0, 0);
    uint32_t low[3], high[3];
    split_pair(make_float2(x.x, x.y), low);
    split_pair(make_float2(x.z, x.w), high);
#pragma unroll
    for (int i = 0; i < 3; i++) *reinterpret_cast<uint2 *>(to + i * plane) = make_uint2(low[i], high[i]);
}

/* to [PLANES, SLOTS, pitch] ← n vectors, then zeros: what lies beyond may be no number. */
template <typename T, int PAIRS, int SLOTS>
static __device__ __forceinline__ void fetch_tile(const cu_cache &cache, const char *from, int32_t n, int32_t pitch,
                                                  __nv_bfloat16 *to) {
    constexpr int EACH = 16 / sizeof(T), PER_SLOT = 64 * PAIRS / EACH;
    for (int32_t i = int32_t(threadIdx.x); i < SLOTS * PER_SLOT; i += ATTEND_THREADS) {
        const int32_t slot = i / PER_SLOT, c = i % PER_SLOT * EACH;
        const T *part = reinterpret_cast<const T *>(from + size_t(slot) * cache.slot_bytes) + c;
        if (c < cache.stride) store_part(slot < n ? part : nullptr, to + slot * pitch + c, SLOTS * pitch);
    }
    cudax_commit();
}

/* What a lane has of its warp's 16 rows: two of them, rows lane / 4 and lane / 4 + 8 of the fragments. */
template <typename Shape> struct attend_lane {
    float acc[Shape::WIDE][2][4] = {}; /* of elements 16 (column + COLUMNS i) + … */
    float sums[4] = {};                /* of the probabilities, as values of one: 0 and 2 count */
    float most[2] = {-FLT_MAX, -FLT_MAX};
};

/* d [16 rows, 16] += a · b, each a sum of parts; products of parts too small to count are left out. */
template <int PARTS, int PLANES>
static __device__ __forceinline__ void multiply_split(float (&d)[2][4], const uint32_t (&a)[PARTS][4],
                                                      const uint32_t (&b)[PLANES][4]) {
#pragma unroll
    for (int i = 0; i < PARTS; i++)
#pragma unroll
        for (int k = 0; k < PLANES && i + k < PARTS; k++)
#pragma unroll
            for (int t = 0; t < 2; t++) cudax_mma_16816(d[t], a[i], b[k] + 2 * t, d[t]);
}

/* A warp's logits of 16 rows and of OWN × 16 slots from `slot` on, unscaled. */
template <typename Shape>
static __device__ __forceinline__ void multiply_keys(const attend_shared<Shape> &s, int32_t stride, int32_t row,
                                                     int32_t slot, float (&logits)[Shape::OWN][2][4]) {
    const int32_t lane = int32_t(threadIdx.x % WARP);
    const __nv_bfloat16 *query = s.queries + (row + lane % 16) * s.pitch + lane / 16 * 8;
    const __nv_bfloat16 *key = s.keys + (slot + lane % 8 + lane / 16 * 8) * s.pitch + lane / 8 % 2 * 8;
    for (int32_t k = 0; k < stride; k += 16) {
        uint32_t queries[Shape::PARTS][4], keys[Shape::PLANES][4];
#pragma unroll
        for (int part = 0; part < Shape::PARTS; part++)
            cudax_ldmatrix_x4(queries[part], query + part * Shape::ROWS * s.pitch + k);
#pragma unroll
        for (int i = 0; i < Shape::OWN; i++) {
#pragma unroll
            for (int plane = 0; plane < Shape::PLANES; plane++)
                cudax_ldmatrix_x4(keys[plane], key + (plane * Shape::SLOTS + 16 * i) * s.pitch + k);
            multiply_split(logits[i], queries, keys);
        }
    }
}

/* logits ← probabilities over the `most` that the tile leaves; what was summed up before is scaled to it. The warps
 * that share rows agree on it through shared memory. */
template <typename Shape>
static __device__ __forceinline__ void tile_softmax(const attend_shared<Shape> &s, const int32_t (&n_seen)[2],
                                                    int32_t column, float scale, float (&logits)[Shape::OWN][2][4],
                                                    attend_lane<Shape> *state) {
    const int32_t lane = int32_t(threadIdx.x % WARP), within = lane % 4 * 2;
    float most[2] = {-FLT_MAX, -FLT_MAX};
#pragma unroll
    for (int i = 0; i < 8 * Shape::OWN; i++) {
        const int row = i / 2 % 2, slot = i / 4 * 8 + i % 2;
        if (within + slot < n_seen[row]) most[row] = fmaxf(most[row], logits[i / 8][i / 4 % 2][i % 4]);
    }
#pragma unroll
    for (int row = 0; row < 2; row++) {
        most[row] = fmaxf(most[row], __shfl_xor_sync(0xffffffffu, most[row], 1));
        most[row] = fmaxf(most[row], __shfl_xor_sync(0xffffffffu, most[row], 2));
    }
    if (Shape::COLUMNS > 1) {
        if (lane % 4 == 0) s.most[column * 16 + lane / 4] = most[0], s.most[column * 16 + lane / 4 + 8] = most[1];
        __syncthreads();
#pragma unroll
        for (int i = 0; i < 2 * Shape::COLUMNS; i++)
            most[i % 2] = fmaxf(most[i % 2], s.most[i / 2 * 16 + lane / 4 + i % 2 * 8]);
    }
    float factors[2];
#pragma unroll
    for (int row = 0; row < 2; row++) {
        most[row] = fmaxf(state->most[row], most[row] * scale);
        factors[row] = exp2f(state->most[row] - most[row]);
        state->most[row] = most[row];
    }
#pragma unroll
    for (int i = 0; i < 8 * Shape::OWN; i++) {
        const int row = i / 2 % 2, slot = i / 4 * 8 + i % 2;
        float *logit = &logits[i / 8][i / 4 % 2][i % 4];
        *logit = within + slot < n_seen[row] ? exp2f(fmaf(*logit, scale, -most[row])) : 0.0f;
    }
#pragma unroll
    for (int k = 0; k < 4; k++) {
        state->sums[k] *= factors[k / 2];
#pragma unroll
        for (int i = 0; i < 2 * Shape::WIDE; i++) state->acc[i / 2][i % 2][k] *= factors[k / 2];
    }
}

/* The probabilities of 16 rows and 16 slots as operands of a product, from what a product gave. */
template <int PARTS>
static __device__ __forceinline__ void split_fragment(const float (&p)[2][4], uint32_t (&parts)[PARTS][4]) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
        uint32_t pair[PARTS];
        split_pair(make_float2(p[i / 2][i % 2 * 2], p[i / 2][i % 2 * 2 + 1]), pair);
#pragma unroll
        for (int part = 0; part < PARTS; part++) parts[part][i] = pair[part];
    }
}

/* The same of a warp, to those that share its rows. */
template <typename Shape>
static __device__ __forceinline__ void share_fragment(const attend_shared<Shape> &s, const float (&p)[2][4],
                                                      int32_t step) {
    uint32_t parts[Shape::PARTS][4];
    split_fragment(p, parts);
    uint4 *to = s.shares + step * Shape::PARTS * WARP + int32_t(threadIdx.x % WARP);
#pragma unroll
    for (int i = 0; i < Shape::PARTS; i++)
        to[i * WARP] = make_uint4(parts[i][0], parts[i][1], parts[i][2], parts[i][3]);
}

template <typename Shape>
static __device__ __forceinline__ void take_fragment(const attend_shared<Shape> &s, int32_t step,
                                                     uint32_t (&parts)[Shape::PARTS][4]) {
    const uint4 *from = s.shares + step * Shape::PARTS * WARP + int32_t(threadIdx.x % WARP);
#pragma unroll
    for (int i = 0; i < Shape::PARTS; i++) {
        const uint4 part = from[i * WARP];
        parts[i][0] = part.x, parts[i][1] = part.y, parts[i][2] = part.z, parts[i][3] = part.w;
    }
}

/* state += the probabilities of 16 slots · their values, and · 1. */
template <typename Shape>
static __device__ __forceinline__ void add_values(const attend_shared<Shape> &s, int32_t stride, int32_t step,
                                                  int32_t column, const uint32_t (&p)[Shape::PARTS][4],
                                                  attend_lane<Shape> *state) {
    const int32_t lane = int32_t(threadIdx.x % WARP);
    const __nv_bfloat16 *value = s.values + (16 * step + lane % 16) * s.pitch + lane / 16 * 8;
    const uint32_t ones[2] = {0x3f803f80u, 0x3f803f80u};
#pragma unroll
    for (int part = 0; part < Shape::PARTS; part++) cudax_mma_16816(state->sums, p[part], ones, state->sums);
#pragma unroll
    for (int i = 0; i < Shape::WIDE; i++) {
        const int32_t c = 16 * (column + Shape::COLUMNS * i);
        if (c >= stride) continue;
        uint32_t values[Shape::PLANES][4];
#pragma unroll
        for (int plane = 0; plane < Shape::PLANES; plane++)
            cudax_ldmatrix_x4_trans(values[plane], value + plane * Shape::SLOTS * s.pitch + c);
        multiply_split(state->acc[i], p, values);
    }
}

/* queries ← the block's rows, zeros beyond. */
template <typename Shape>
static __device__ __forceinline__ void load_queries(const cu_batch &b, const cu_cache &cache, const attend_place &p,
                                                    int32_t kv_head, const float *q, const attend_shared<Shape> &s) {
    for (int32_t r = int32_t(threadIdx.x) / WARP; r < Shape::ROWS; r += ATTEND_WARPS) {
        const float *from = q + row_at(b, p, kv_head, min(r, p.n_rows - 1)) * size_t(cache.dim);
        for (int32_t c = 2 * int32_t(threadIdx.x % WARP); c < cache.stride; c += 2 * WARP) {
            uint32_t parts[Shape::PARTS];
            split_pair(r < p.n_rows && c < cache.dim ? load_pair(from + c) : make_float2(0, 0),
                       parts); /* dim is even */
#pragma unroll
            for (int part = 0; part < Shape::PARTS; part++)
                *reinterpret_cast<uint32_t *>(s.queries + (part * Shape::ROWS + r) * s.pitch + c) = parts[part];
        }
    }
}

/* What the kernel is given besides the batch. No padding, as launches are compared by their bytes. */
struct attend_work {
    const float *q;
    float *partials, *stats, *out; /* stats: NULL, or [n_tokens, n_heads, 2] */
    float scale;
    int32_t layer;
};

/* A run is at its end: its result goes to partials [part, head, run, stride + 2] where the part decodes; elsewhere it
 * is merged with what stands in out, which the last run makes the result. */
template <typename Shape>
static __device__ void end_run(const cu_batch &b, const cu_cache &cache, const attend_place &p, const attend_work &w,
                               int32_t kv_head, int32_t row0, int32_t column, int32_t run, bool last,
                               const attend_lane<Shape> &state, run_state (&whole)[2]) {
    const int32_t lane = int32_t(threadIdx.x % WARP), dim = cache.dim;
    const bool decodes = p.part.n == 1;
#pragma unroll
    for (int row = 0; row < 2; row++) {
        const int32_t r = row0 + lane / 4 + 8 * row;
        const run_state found = {state.most[row], state.sums[2 * row]};
        const float2 weights = merge_runs(&whole[row], found);
        if (r >= p.n_rows) continue;
        const size_t at = row_at(b, p, kv_head, r);
        float *to = decodes ? w.partials + partial_at(b, p, kv_head, r, run, cache.stride) : w.out + at * size_t(dim);
        const float inverse = last ? 1.0f / whole[row].sum : 1.0f;
#pragma unroll
        for (int i = 0; i < 2 * Shape::WIDE; i++) {
            const int32_t c = 16 * (column + Shape::COLUMNS * (i / 2)) + i % 2 * 8 + lane % 4 * 2;
            if (c >= dim) continue;
            float2 x = make_float2(state.acc[i / 2][i % 2][2 * row], state.acc[i / 2][i % 2][2 * row + 1]);
            if (!decodes) {
                const float2 old = run ? load_pair(to + c) : make_float2(0, 0);
                x = make_float2(merged(old.x, x.x, weights) * inverse, merged(old.y, x.y, weights) * inverse);
            }
            *reinterpret_cast<float2 *>(to + c) = x;
        }
        if (column != 0 || lane % 4 != 0) continue;
        if (decodes)
            to[cache.stride] = found.most, to[cache.stride + 1] = found.sum;
        else if (last && w.stats)
            w.stats[2 * at] = whole[row].most, w.stats[2 * at + 1] = whole[row].sum;
    }
}

/* A block of query rows of one KV head against a run of pages, or against all runs one after the other. While a tile's
 * keys are worked on its values arrive, and then the next tile's keys. */
template <typename T, int PAIRS, int COLUMNS>
static __global__ void __launch_bounds__(ATTEND_THREADS, 2)
    attend_kernel(cu_batch b, cu_cache cache, bool decodes, attend_work w) {
    using Shape = attend_shape<T, PAIRS, COLUMNS>;
    constexpr int RUN = RUN_PAGES * SKV_PAGE, SLOTS = Shape::SLOTS;
    CUDAX_SHARED(char, shared);
    const int32_t warp = int32_t(threadIdx.x) / WARP, lane = int32_t(threadIdx.x) % WARP;
    const int32_t row0 = warp / COLUMNS * 16, column = warp % COLUMNS, own = 16 * Shape::OWN * column;
    const int32_t kv_head = int32_t(blockIdx.y) % b.n_kv, tile = int32_t(blockIdx.y) / b.n_kv;
    cu_block at = {int32_t(blockIdx.x), 0};
    if (!decodes) at = b.blocks[gridDim.x - 1 - blockIdx.x]; /* those that see the most begin first */
    at.first += tile * Shape::ROWS;
    if (decodes != (b.parts[at.part].n == 1) || at.first >= b.parts[at.part].n * b.group) return;
    const attend_place p = place_of(b, w.layer, at, kv_head, Shape::ROWS);
    const int32_t first = int32_t(blockIdx.z) * RUN, end = decodes ? min(first + RUN, p.visible) : p.visible;
    if (first >= end) return; /* the whole block, here and above */

    const attend_shared<Shape> s(cache, shared);
    const auto fetch = [&](int32_t slot, size_t part, __nv_bfloat16 *to) {
        const char *from = p.head.pages[slot / SKV_PAGE] + part + size_t(slot % SKV_PAGE) * cache.slot_bytes;
        fetch_tile<T, PAIRS, SLOTS>(cache, from, p.visible - slot, s.pitch, to);
    };
    fetch(first, 0, s.keys);
    fetch(first, cache.values_at, s.values);
    load_queries(b, cache, p, kv_head, w.q, s);
    const int32_t limits[2] = {seen(b, p, row0 + lane / 4), seen(b, p, row0 + lane / 4 + 8)};
    run_state whole[2] = {{-FLT_MAX, 0}, {-FLT_MAX, 0}};
    attend_lane<Shape> state;
    for (int32_t slot = first, next = first + SLOTS; slot < end; slot = next, next += SLOTS) {
        float logits[Shape::OWN][2][4] = {};
        const int32_t n_seen[2] = {own < SLOTS ? limits[0] - slot - own : 0, own < SLOTS ? limits[1] - slot - own : 0};
        cudax_wait<1>();
        __syncthreads();
        if (own < SLOTS) multiply_keys(s, cache.stride, row0, own, logits);
        tile_softmax(s, n_seen, column, w.scale, logits, &state);
        if (COLUMNS > 1 && own < SLOTS) share_fragment(s, logits[0], column);
        cudax_wait<0>();
        __syncthreads(); /* the keys are used up; values and probabilities are there */
        if (next < end) fetch(next, 0, s.keys);
#pragma unroll
        for (int step = 0; step < Shape::STEPS; step++) {
            uint32_t fragment[Shape::PARTS][4];
            if constexpr (COLUMNS > 1)
                take_fragment(s, step, fragment);
            else
                split_fragment(logits[step], fragment);
            add_values(s, cache.stride, step, column, fragment, &state);
        }
        __syncthreads();
        if (next < end) fetch(next, cache.values_at, s.values);
        if (next < end && next % RUN) continue;
        end_run(b, cache, p, w, kv_head, row0, column, slot / RUN, next >= end, state, whole);
        state = attend_lane<Shape>();
    }
}

/* The runs of parts of one token; a warp a head. */
static __global__ void merge_kernel(cu_batch b, cu_cache cache, attend_work w) {
    const size_t row = size_t(blockIdx.x) * WARPS + threadIdx.x / WARP, part = row / size_t(b.n_heads);
    if (part >= size_t(b.n_parts) || b.parts[part].n != 1) return; /* whole warps, and no barrier follows */
    const size_t head = row % size_t(b.n_heads), at = size_t(b.parts[part].first) * size_t(b.n_heads) + head;
    const int32_t lane = int32_t(threadIdx.x % WARP);
    const size_t heads = (part * size_t(b.n_layers) + size_t(w.layer)) * size_t(b.n_kv);
    const int32_t n_slots = b.heads[heads + head / size_t(b.group)].n_slots;
    const float *partials = w.partials + row * size_t(b.n_runs) * size_t(cache.stride + 2);
    float sums[16] = {}; /* of elements lane, lane + 32, …: strides up to 512 */
    run_state whole = {-FLT_MAX, 0};
    for (int32_t slot = 0; slot < n_slots; slot += RUN_PAGES * SKV_PAGE, partials += cache.stride + 2) {
        const float2 weights = merge_runs(&whole, {partials[cache.stride], partials[cache.stride + 1]});
#pragma unroll
        for (int i = 0; i < 16; i++)
            if (lane + WARP * i < cache.dim) sums[i] = merged(sums[i], partials[lane + WARP * i], weights);
    }
    const float inverse = 1.0f / whole.sum;
    float *out = w.out + at * size_t(cache.dim);
#pragma unroll
    for (int i = 0; i < 16; i++)
        if (lane + WARP * i < cache.dim) out[lane + WARP * i] = sums[i] * inverse;
    if (w.stats && lane == 0) w.stats[2 * at] = whole.most, w.stats[2 * at + 1] = whole.sum;
}

template <typename T, int PAIRS, int COLUMNS>
static void launch_attend(cu_device *d, bool decodes, size_t n, size_t rows, size_t runs, const attend_work &w) {
    using Shape = attend_shape<T, PAIRS, COLUMNS>;
    const size_t bytes = attend_shared<Shape>::bytes(d->cache);
    if (!cu_allow_shared(d, attend_kernel<T, PAIRS, COLUMNS>, bytes)) return;
    CU_LAUNCH(d, (attend_kernel<T, PAIRS, COLUMNS>),
              dim3(unsigned(n), unsigned(d->batch.n_kv) * cu_blocks(rows, Shape::ROWS), unsigned(runs)), ATTEND_THREADS,
              bytes, d->batch, d->cache, decodes, w);
}

template <typename T, int PAIRS> static void attend(cu_device *d, size_t layer, const float *q, float *out) {
    constexpr int COLUMNS = PAIRS <= 2 ? 1 : 4; /* of prompts: a warp's registers do not hold 16 wider rows */
    const cu_batch &b = d->batch;
    const attend_work w = {q,   d->partials,          d->cache.sums ? d->stats : nullptr,
                           out, log2_scale(d->cache), int32_t(layer)};
    if (b.n_blocks) launch_attend<T, PAIRS, COLUMNS>(d, false, size_t(b.n_blocks), PROMPT_ROWS, 1, w);
    bool decodes = false;
    for (size_t p = 0; p < d->host->n_parts; p++) decodes |= d->host->parts[p].n == 1;
    if (!decodes) return;
    launch_attend<T, PAIRS, 4>(d, true, size_t(b.n_parts), size_t(b.group), size_t(b.n_runs), w);
    CU_LAUNCH(d, merge_kernel, cu_blocks(size_t(b.n_parts) * size_t(b.n_heads), WARPS), THREADS, 0, b, d->cache, w);
}

void cu_attention(skv_device *base, size_t layer, const float *q, float *out) {
    cu_device *d = cu_of(base);
    if (!base->error.code) BY_CACHE(d, attend)(d, layer, q, out);
}

/* ---- attention received ---- */

/* Every query adds its probabilities to the slots it sees, queries in order of position and heads in order. */
template <typename T, int PAIRS>
static __global__ void __launch_bounds__(THREADS, 1)
    receive_kernel(cu_batch b, cu_cache cache, int32_t layer, float scale, const float *q, const float *stats) {
    CUDAX_SHARED(char, shared);
    const int32_t part = int32_t(blockIdx.x), kv_head = int32_t(blockIdx.y), page = int32_t(blockIdx.z);
    attend_place p;
    p.part = b.parts[part];
    p.head = b.heads[(size_t(part) * size_t(b.n_layers) + size_t(layer)) * size_t(b.n_kv) + size_t(kv_head)];
    p.before = p.head.n_slots - p.part.n;
    const int32_t n = min(p.head.n_slots - page * SKV_PAGE, int32_t(SKV_PAGE)), slot = int32_t(threadIdx.x);
    if (n <= 0) return; /* the whole block */
    char *at = p.head.pages[page];
    float *logits = reinterpret_cast<float *>(shared + SKV_PAGE * cache.slot_bytes);
    copy_bytes(shared, at, size_t(n) * cache.slot_bytes);
    cudax_commit();
    cudax_wait<0>();
    __syncthreads();
    float sum = slot < n ? page_sums(cache, at)[slot] : 0;
    for (p.first = 0; p.first < p.part.n * b.group; p.first += QUERIES) {
        p.n_rows = min(int32_t(QUERIES), p.part.n * b.group - p.first);
        lane_vector<PAIRS> queries[QUERIES];
#pragma unroll
        for (int r = 0; r < QUERIES; r++)
            queries[r] =
                load_query<PAIRS>(q + row_at(b, p, kv_head, min(r, p.n_rows - 1)) * size_t(cache.dim), cache.dim);
        page_logits<T, PAIRS>(cache, queries, shared, n, scale, logits);
        __syncthreads();
        for (int32_t r = 0; slot < n && r < p.n_rows; r++) {
            if (page * SKV_PAGE + slot >= seen(b, p, r)) continue;
            const float *stat = stats + 2 * row_at(b, p, kv_head, r);
            sum += exp2f(logits[slot * QUERIES + r] - stat[0]) / stat[1];
        }
        __syncthreads();
    }
    if (slot < n) page_sums(cache, at)[slot] = sum;
}

template <typename T, int PAIRS> static void receive(cu_device *d, size_t layer, const float *q) {
    const cu_batch &b = d->batch;
    const size_t bytes = SKV_PAGE * d->cache.slot_bytes + 4 * SKV_PAGE * QUERIES;
    const float scale = log2_scale(d->cache);
    if (!cu_allow_shared(d, receive_kernel<T, PAIRS>, bytes)) return;
    CU_LAUNCH(d, (receive_kernel<T, PAIRS>),
              dim3(unsigned(b.n_parts), unsigned(b.n_kv), unsigned(b.n_runs) * RUN_PAGES), THREADS, bytes, b, d->cache,
              int32_t(layer), scale, q, d->stats);
}

void cu_receive(skv_device *base, size_t layer, const float *q) {
    cu_device *d = cu_of(base);
    if (!base->error.code) BY_CACHE(d, receive)(d, layer, q);
}
