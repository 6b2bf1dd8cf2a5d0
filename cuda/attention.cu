/* Keys, values and queries: written, attended to, remembered.
 *
 * kernel         grid, block                         moves                        why
 * append_kernel  [tokens, KV heads], 128             writes a key and a value
 * ring_kernel    [tokens], 256                       copies the newest queries
 * attend_kernel  [blocks of 8 query rows, KV heads,  every page once a block,     a group's rows share a page;
 *                 runs of 8 pages], 256              by cp.async beside the work  a row that decodes has a block
 *                                                    on the page before it        a run, to fill the device
 * merge_kernel   [parts × heads / 8], 256            the runs' results            a warp a head, runs in order
 * stats_kernel   [blocks of 8 query rows, KV heads]  keys once                    maximum and sum of a softmax
 * receive_kernel [parts, KV heads, pages], 256       keys once for 8 rows         sums grow in the queries' order
 */
#include <cfloat>

#include "tiles.cuh"

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

static __device__ attend_place place_of(const cu_batch &b, int32_t layer, int32_t block, int32_t kv_head) {
    const cu_block at = b.blocks[block];
    attend_place p;
    p.at = at.part;
    p.part = b.parts[at.part];
    p.head = b.heads[(size_t(at.part) * size_t(b.n_layers) + size_t(layer)) * size_t(b.n_kv) + size_t(kv_head)];
    p.before = p.head.n_slots - p.part.n;
    p.first = at.first;
    p.n_rows = min(int32_t(QUERIES), p.part.n * b.group - at.first);
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

/* Slots of a page, or of less, that row r sees: from slot `first` on. */
static __device__ __forceinline__ int32_t seen(const cu_batch &b, const attend_place &p, int32_t r, int32_t first) {
    return min(max(p.before + (p.first + r) / b.group + 1 - first, 0), int32_t(SKV_PAGE));
}

/* The result of a run, or of several: Σ e^(l − most) V, most, Σ e^(l − most). */
struct run_state {
    float most, sum;
};

/* Weights by which an old and a new run count together. */
static __device__ __forceinline__ float2 merge_runs(run_state *total, run_state run) {
    const float most = fmaxf(total->most, run.most);
    const float2 weights = make_float2(expf(total->most - most), expf(run.most - most));
    total->sum = fmaf(total->sum, weights.x, run.sum * weights.y);
    total->most = most;
    return weights;
}

/* The one way in which results are merged, so that all kernels round alike. */
static __device__ __forceinline__ float merged(float total, float run, float2 weights) {
    return fmaf(total, weights.x, run * weights.y);
}

/* One softmax row a warp: probabilities [SKV_PAGE, QUERIES] ← logits, and the running state; returns the factor of
 * what was summed up before. */
static __device__ float page_softmax(float *logits, int32_t n_seen, int32_t n, run_state *state) {
    const int lane = threadIdx.x % WARP, row = threadIdx.x / WARP;
    float most = state->most;
    for (int32_t j = lane; j < n_seen; j += WARP) most = fmaxf(most, logits[j * QUERIES + row]);
    most = warp_max(most);
    float sum = 0;
    for (int32_t j = lane; j < n; j += WARP) {
        const float p = j < n_seen ? expf(logits[j * QUERIES + row] - most) : 0.0f;
        logits[j * QUERIES + row] = p;
        sum += p;
    }
    const float factor = most > -FLT_MAX ? expf(state->most - most) : 1.0f;
    state->sum = state->sum * factor + warp_sum(sum);
    state->most = most;
    return factor;
}

template <typename T, int PAIRS> struct attend_shared {
    /* Slots of a tile: a page, or half of one where its vectors are so wide that no block would hold it. */
    static int slots(const cu_cache &c) { return c.slot_bytes <= 1024 ? SKV_PAGE : SKV_PAGE / 2; }
    static size_t tile_bytes(const cu_cache &c) { return 2 * size_t(slots(c)) * c.slot_bytes; }
    /* Tiles held at once: two where they leave room for other blocks. */
    static int stages(const cu_cache &c) { return tile_bytes(c) <= 40 * 1024 ? 2 : 1; }
    /* Of the tiles, in whose place the sums stand once the tiles are used up. */
    static size_t held_bytes(const cu_cache &c) {
        const size_t groups = THREADS / (size_t(c.stride) / 2),
                     sums = groups * QUERIES * size_t(c.stride) * sizeof(float);
        const size_t tiles = size_t(stages(c)) * tile_bytes(c);
        return tiles > sums ? tiles : sums;
    }
    static size_t bytes(const cu_cache &c) {
        return held_bytes(c) + (SKV_PAGE * QUERIES + 2 * QUERIES + QUERIES * size_t(c.stride)) * sizeof(float);
    }
};

/* A block's shared memory, and which slots and elements of the values a thread adds up. */
struct attend_parts {
    char *tiles;            /* [stages, tile_bytes] */
    float *logits;          /* [SKV_PAGE, QUERIES] */
    float *factors;         /* [QUERIES, 2] */
    float *sums;            /* [groups, QUERIES, stride], where the tiles were */
    float *total;           /* [QUERIES, stride] */
    size_t tile_bytes;      /* keys and values of `slots` slots */
    int32_t slots;          /* of a tile */
    int32_t stages, groups; /* tiles held at once; threads that share an element */
    int32_t pair, group;
};

static __device__ attend_parts parts_of(const cu_cache &cache, char *shared, int slots, int stages, size_t held_bytes) {
    const int32_t pairs = cache.stride / 2, tid = int32_t(threadIdx.x);
    attend_parts s;
    s.slots = slots, s.stages = stages, s.groups = THREADS / pairs;
    s.tile_bytes = 2 * size_t(slots) * cache.slot_bytes;
    s.tiles = shared;
    s.sums = reinterpret_cast<float *>(shared);
    s.logits = reinterpret_cast<float *>(shared + held_bytes);
    s.factors = s.logits + SKV_PAGE * QUERIES;
    s.total = s.factors + 2 * QUERIES;
    s.pair = tid % pairs, s.group = tid / pairs;
    return s;
}

/* Keys and values of the slots from `first` on, to shared memory. */
static __device__ __forceinline__ void fetch_tile(const cu_cache &cache, const attend_place &p, const attend_parts &s,
                                                  int32_t first, int stage) {
    const size_t bytes = size_t(min(p.visible - first, s.slots)) * cache.slot_bytes;
    const char *from = p.head.pages[first / SKV_PAGE] + size_t(first % SKV_PAGE) * cache.slot_bytes;
    char *to = s.tiles + size_t(stage) * s.tile_bytes;
    copy_bytes(to, from, bytes);
    copy_bytes(to + s.tile_bytes / 2, from + cache.values_at, bytes);
    cudax_commit();
}

/* acc [QUERIES] ← acc · factors + Σ probability · value over this thread's slots of a tile. */
template <typename T>
static __device__ __forceinline__ void add_values(const cu_cache &cache, const attend_parts &s, const char *tile,
                                                  int32_t n, float2 (&acc)[QUERIES]) {
#pragma unroll
    for (int r = 0; r < QUERIES; r++) acc[r].x *= s.factors[r], acc[r].y *= s.factors[r];
    for (int32_t slot = s.group; slot < n; slot += s.groups) {
        const T *value = reinterpret_cast<const T *>(tile + s.tile_bytes / 2 + size_t(slot) * cache.slot_bytes);
        const float2 v = load_pair(value + 2 * s.pair);
#pragma unroll
        for (int r = 0; r < QUERIES; r++) {
            const float weight = s.logits[slot * QUERIES + r];
            acc[r].x = fmaf(weight, v.x, acc[r].x);
            acc[r].y = fmaf(weight, v.y, acc[r].y);
        }
    }
}

/* Slots first … end − 1: s.sums ← what each group of threads added up; returns the state of this warp's row. */
template <typename T, int PAIRS>
static __device__ __forceinline__ run_state attend_run(const cu_batch &b, const cu_cache &cache, const attend_place &p,
                                                       const attend_parts &s,
                                                       const lane_vector<PAIRS> (&queries)[QUERIES], int32_t first,
                                                       int32_t end, float scale) {
    const int32_t warp = int32_t(threadIdx.x) / WARP;
    run_state state = {-FLT_MAX, 0};
    float2 acc[QUERIES];
#pragma unroll
    for (int r = 0; r < QUERIES; r++) acc[r] = make_float2(0, 0);
    fetch_tile(cache, p, s, first, 0);
    for (int32_t at = first, stage = 0; at < end; at += s.slots) {
        const int32_t n = min(p.visible - at, s.slots), next = at + s.slots;
        const char *tile = s.tiles + size_t(stage) * s.tile_bytes;
        if (s.stages == 2 && next < end) {
            stage = 1 - stage;
            fetch_tile(cache, p, s, next, stage);
            cudax_wait<1>();
        } else {
            cudax_wait<0>();
        }
        __syncthreads();
        page_logits<T, PAIRS>(cache, queries, tile, n, scale, s.logits);
        __syncthreads();
        const int32_t n_seen = min(seen(b, p, min(warp, p.n_rows - 1), at), n);
        const float factor = page_softmax(s.logits, n_seen, n, &state);
        if (threadIdx.x % WARP == 0) s.factors[warp] = factor;
        __syncthreads();
        if (s.group < s.groups) add_values<T>(cache, s, tile, n, acc);
        __syncthreads(); /* the tile and the probabilities are used up */
        if (s.stages == 1 && next < end) fetch_tile(cache, p, s, next, 0);
    }
    if (s.group < s.groups)
#pragma unroll
        for (int r = 0; r < QUERIES; r++) {
            float *to = s.sums + (s.group * QUERIES + r) * cache.stride + 2 * s.pair;
            to[0] = acc[r].x, to[1] = acc[r].y;
        }
    return state;
}

/* A block of query rows of one KV head against a run of pages, or against all runs one after the other. Partial results
 * go to partials [part, head, run, stride + 2], whole ones to out. */
template <typename T, int PAIRS>
static __global__ void __launch_bounds__(THREADS, PAIRS <= 2 ? 2 : 1)
    attend_kernel(cu_batch b, cu_cache cache, int32_t layer, int slots, int stages, size_t held_bytes, float scale,
                  const float *q, float *partials, float *out) {
    CUDAX_SHARED(char, shared);
    const int32_t kv_head = int32_t(blockIdx.y), tid = int32_t(threadIdx.x), warp = tid / WARP, stride = cache.stride;
    const attend_place p = place_of(b, layer, int32_t(blockIdx.x), kv_head);
    const bool decodes = p.part.n == 1;
    const int32_t n_runs = (p.visible + RUN_PAGES * SKV_PAGE - 1) / (RUN_PAGES * SKV_PAGE);
    const int32_t first_run = int32_t(blockIdx.z), end_run = decodes ? first_run + 1 : n_runs;
    if (first_run >= n_runs || (!decodes && first_run > 0)) return; /* the whole block */

    const attend_parts s = parts_of(cache, shared, slots, stages, held_bytes);
    lane_vector<PAIRS> queries[QUERIES];
#pragma unroll
    for (int r = 0; r < QUERIES; r++) /* rows too many repeat the last one */
        queries[r] = load_query<PAIRS>(q + row_at(b, p, kv_head, min(r, p.n_rows - 1)) * size_t(cache.dim), cache.dim);
    run_state whole = {-FLT_MAX, 0};
    for (int32_t run = first_run; run < end_run; run++) {
        const int32_t first = run * RUN_PAGES * SKV_PAGE, end = min(first + RUN_PAGES * SKV_PAGE, p.visible);
        const run_state state = attend_run<T, PAIRS>(b, cache, p, s, queries, first, end, scale);
        const float2 weights = merge_runs(&whole, state);
        if (tid % WARP == 0) s.factors[2 * warp] = weights.x, s.factors[2 * warp + 1] = weights.y;
        __syncthreads();
        for (int32_t i = tid; i < QUERIES * stride; i += THREADS) {
            const int32_t r = i / stride;
            float sum = 0;
            for (int32_t g = 0; g < s.groups; g++) sum += s.sums[g * QUERIES * stride + i];
            if (decodes && r < p.n_rows) partials[partial_at(b, p, kv_head, r, run, stride) + size_t(i % stride)] = sum;
            if (!decodes)
                s.total[i] = merged(run ? s.total[i] : 0.0f, sum, make_float2(s.factors[2 * r], s.factors[2 * r + 1]));
        }
        if (decodes && tid % WARP == 0 && warp < p.n_rows) {
            float *to = partials + partial_at(b, p, kv_head, warp, run, stride);
            to[stride] = state.most, to[stride + 1] = state.sum;
        }
        __syncthreads(); /* sums and factors are written again */
    }
    if (decodes) return;
    if (tid % WARP == 0) s.factors[warp] = 1.0f / whole.sum;
    __syncthreads();
    for (int32_t i = tid; i < p.n_rows * stride; i += THREADS)
        if (i % stride < cache.dim)
            out[row_at(b, p, kv_head, i / stride) * size_t(cache.dim) + size_t(i % stride)] =
                s.total[i] * s.factors[i / stride];
}

/* The runs of parts of one token; a warp a head. */
static __global__ void merge_kernel(cu_batch b, cu_cache cache, int32_t layer, const float *partials, float *out) {
    const size_t row = size_t(blockIdx.x) * WARPS + threadIdx.x / WARP, part = row / size_t(b.n_heads);
    if (part >= size_t(b.n_parts) || b.parts[part].n != 1) return; /* whole warps, and no barrier follows */
    const size_t at = row % size_t(b.n_heads), kv_head = at / size_t(b.group);
    const int32_t lane = int32_t(threadIdx.x % WARP);
    const cu_head head = b.heads[(part * size_t(b.n_layers) + size_t(layer)) * size_t(b.n_kv) + kv_head];
    const int32_t n_runs = ((head.n_slots + SKV_PAGE - 1) / SKV_PAGE + RUN_PAGES - 1) / RUN_PAGES;
    out += (size_t(b.parts[part].first) * size_t(b.n_heads) + at) * size_t(cache.dim);
    partials += row * size_t(b.n_runs) * size_t(cache.stride + 2);
    float sums[16] = {}; /* of elements lane, lane + 32, …: strides up to 512 */
    run_state whole = {-FLT_MAX, 0};
    for (int32_t run = 0; run < n_runs; run++, partials += cache.stride + 2) {
        const float2 weights = merge_runs(&whole, {partials[cache.stride], partials[cache.stride + 1]});
#pragma unroll
        for (int i = 0; i < 16; i++)
            if (lane + WARP * i < cache.dim) sums[i] = merged(sums[i], partials[lane + WARP * i], weights);
    }
    const float inverse = 1.0f / whole.sum;
#pragma unroll
    for (int i = 0; i < 16; i++)
        if (lane + WARP * i < cache.dim) out[lane + WARP * i] = sums[i] * inverse;
}

template <typename T, int PAIRS> static void attend(cu_device *d, size_t layer, const float *q, float *out) {
    using shared = attend_shared<T, PAIRS>;
    const cu_batch &b = d->batch;
    const size_t bytes = shared::bytes(d->cache);
    const float scale = 1.0f / sqrtf(float(d->cache.dim));
    bool decodes = false;
    for (size_t p = 0; p < d->host->n_parts; p++) decodes |= d->host->parts[p].n == 1;
    if (!cu_allow_shared(d, attend_kernel<T, PAIRS>, bytes)) return;
    CU_LAUNCH(d, (attend_kernel<T, PAIRS>),
              dim3(unsigned(b.n_blocks), unsigned(b.n_kv), decodes ? unsigned(b.n_runs) : 1u), THREADS, bytes, b,
              d->cache, int32_t(layer), shared::slots(d->cache), shared::stages(d->cache), shared::held_bytes(d->cache),
              scale, q, d->partials, out);
    if (decodes)
        CU_LAUNCH(d, merge_kernel, cu_blocks(size_t(b.n_parts) * size_t(b.n_heads), WARPS), THREADS, 0, b, d->cache,
                  int32_t(layer), d->partials, out);
}

void cu_attention(skv_device *base, size_t layer, const float *q, float *out) {
    cu_device *d = cu_of(base);
    if (!base->error.code) BY_CACHE(d, attend)(d, layer, q, out);
}

/* ---- attention received ---- */

/* stats [n_tokens, n_heads, 2] ← maximum and sum of each query's softmax. */
template <typename T, int PAIRS>
static __global__ void __launch_bounds__(THREADS, 1)
    stats_kernel(cu_batch b, cu_cache cache, int32_t layer, float scale, const float *q, float *stats) {
    CUDAX_SHARED(char, shared);
    const int32_t kv_head = int32_t(blockIdx.y), warp = int32_t(threadIdx.x) / WARP;
    const attend_place p = place_of(b, layer, int32_t(blockIdx.x), kv_head);
    float *logits = reinterpret_cast<float *>(shared + SKV_PAGE * cache.slot_bytes);
    lane_vector<PAIRS> queries[QUERIES];
#pragma unroll
    for (int r = 0; r < QUERIES; r++)
        queries[r] = load_query<PAIRS>(q + row_at(b, p, kv_head, min(r, p.n_rows - 1)) * size_t(cache.dim), cache.dim);
    run_state state = {-FLT_MAX, 0};
    for (int32_t page = 0; page * SKV_PAGE < p.visible; page++) {
        const int32_t n = min(p.visible - page * SKV_PAGE, int32_t(SKV_PAGE));
        copy_bytes(shared, p.head.pages[page], size_t(n) * cache.slot_bytes);
        cudax_commit();
        cudax_wait<0>();
        __syncthreads();
        page_logits<T, PAIRS>(cache, queries, shared, n, scale, logits);
        __syncthreads();
        page_softmax(logits, min(seen(b, p, min(warp, p.n_rows - 1), page * SKV_PAGE), n), n, &state);
        __syncthreads();
    }
    if (threadIdx.x % WARP != 0 || warp >= p.n_rows) return;
    stats[2 * row_at(b, p, kv_head, warp)] = state.most;
    stats[2 * row_at(b, p, kv_head, warp) + 1] = state.sum;
}

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
            if (slot >= seen(b, p, r, page * SKV_PAGE)) continue;
            const float *stat = stats + 2 * row_at(b, p, kv_head, r);
            sum += expf(logits[slot * QUERIES + r] - stat[0]) / stat[1];
        }
        __syncthreads();
    }
    if (slot < n) page_sums(cache, at)[slot] = sum;
}

template <typename T, int PAIRS> static void receive(cu_device *d, size_t layer, const float *q) {
    const cu_batch &b = d->batch;
    const size_t bytes = SKV_PAGE * d->cache.slot_bytes + 4 * SKV_PAGE * QUERIES;
    const float scale = 1.0f / sqrtf(float(d->cache.dim));
    if (!cu_allow_shared(d, stats_kernel<T, PAIRS>, bytes) || !cu_allow_shared(d, receive_kernel<T, PAIRS>, bytes))
        return;
    CU_LAUNCH(d, (stats_kernel<T, PAIRS>), dim3(unsigned(b.n_blocks), unsigned(b.n_kv)), THREADS, bytes, b, d->cache,
              int32_t(layer), scale, q, d->stats);
    CU_LAUNCH(d, (receive_kernel<T, PAIRS>),
              dim3(unsigned(b.n_parts), unsigned(b.n_kv), unsigned(b.n_runs) * RUN_PAGES), THREADS, bytes, b, d->cache,
              int32_t(layer), scale, q, d->stats);
}

void cu_receive(skv_device *base, size_t layer, const float *q) {
    cu_device *d = cu_of(base);
    if (!base->error.code) BY_CACHE(d, receive)(d, layer, q);
}
