/* The terms of a head (METHOD.md §2, §3, §5, §6) and their weighted sum. A block works on a head with its arrays in
 * its area; where the work grows with the square of the slots, on a part of it.
 *
 * kernel             grid, block               moves                         why
 * importance_kernel  [jobs], 256               keys twice                    heads of all layers fill the device
 * units_kernel       [jobs], 256               keys up to four times         norms, and the sum of all unit keys
 * search_kernel      [jobs, slots / 64], 256   keys, newest tile first       no L × L matrix; a block's rows leave
 *                                                                            the search together
 * redundancy_kernel  [jobs, slots / 256], 256  keys once, hits once a block  what is lost is added in order of slots
 * score_kernel       [jobs], 256               what terms there are          one launch for every method
 * share_kernel       [layers], 256             the heads' scores             one kept set for all heads
 */
#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstring>

#include "jobs.cuh"
#include "tiles.cuh"

/* ---- importance (§2) ---- */

/* Where query i of the remembered ones, oldest first, lies for head g of the job's group. */
static __device__ __forceinline__ const float *job_query(const cu_cache &c, const cu_job &job, int32_t n_heads,
                                                         int32_t group, int32_t window, int32_t i, int32_t g) {
    const size_t place = size_t((job.oldest + i) % window);
    return job.queries + (place * size_t(n_heads) + size_t(job.kv_head * group + g)) * size_t(c.dim);
}

/* What importance needs besides the job. */
struct importance_shape {
    int32_t n_heads, group, window, kernel;
    bool by_head; /* every query head counts by itself, in place of the group's maximum */
};

/* z [SKV_PAGE] ← logits of one softmax row (a query, its group's maximum; or one head's) for the slots of a tile. */
template <typename T, int PAIRS>
static __device__ void row_logits(const cu_cache &cache, const cu_job &job, const importance_shape &s, int32_t row,
                                  const char *tile, int32_t n, float scale, float *logits, float *z) {
    const int32_t query = s.by_head ? row / s.group : row;
    const int32_t first = s.by_head ? row % s.group : 0, end = s.by_head ? first + 1 : s.group;
    for (int32_t g = first; g < end; g += QUERIES) {
        lane_vector<PAIRS> queries[QUERIES];
#pragma unroll
        for (int r = 0; r < QUERIES; r++)
            queries[r] = load_query<PAIRS>(
                job_query(cache, job, s.n_heads, s.group, s.window, query, min(g + r, end - 1)), cache.dim);
        page_logits<T, PAIRS>(cache, queries, tile, n, scale, logits);
        __syncthreads();
        for (int32_t j = int32_t(threadIdx.x); j < n; j += THREADS) {
            float most = logits[j * QUERIES];
            for (int r = 1; r < min(int32_t(QUERIES), end - g); r++) most = fmaxf(most, logits[j * QUERIES + r]);
            z[j] = g == first ? most : fmaxf(z[j], most);
        }
        __syncthreads();
    }
}

/* The tile of keys [first, first + n) of the held slots, as they are stored. */
static __device__ void load_tile(const cu_cache &cache, const cu_job &job, int32_t first, int32_t n, char *tile) {
    const int32_t chunks = int32_t(cache.slot_bytes / 16);
    for (int32_t i = int32_t(threadIdx.x); i < n * chunks; i += THREADS) {
        const int32_t slot = job_slot(job, first + i / chunks);
        const char *key = job.pages[slot / SKV_PAGE] + size_t(slot % SKV_PAGE) * cache.slot_bytes;
        cudax_copy16(tile + size_t(i / chunks) * cache.slot_bytes + 16 * size_t(i % chunks), key + 16 * (i % chunks));
    }
    cudax_commit();
    cudax_wait<0>();
    __syncthreads();
}

/* out [C] ← importance; mean [C] is scratch. Two passes over the keys: the softmax of every row, then their mean. */
template <typename T, int PAIRS>
static __device__ void importance(const cu_cache &cache, const cu_job &job, const importance_shape &s, char *shared,
                                  float *mean, float *out) {
    const int32_t rows = job.n_queries * (s.by_head ? s.group : 1), n = job.n_candidates, tid = int32_t(threadIdx.x);
    float *logits = reinterpret_cast<float *>(shared + SKV_PAGE * cache.slot_bytes); /* [SKV_PAGE, QUERIES] */
    float *z = logits + SKV_PAGE * QUERIES;                                          /* [SKV_PAGE] */
    float *stats = z + SKV_PAGE;                                                     /* [rows, 2] */
    const float scale = 1.0f / sqrtf(float(cache.dim));
    for (int32_t r = tid; r < rows; r += THREADS) stats[2 * r] = -FLT_MAX, stats[2 * r + 1] = 0;
    __syncthreads();
    for (int pass = 0; pass < 2; pass++)
        for (int32_t first = 0; first < n; first += SKV_PAGE) {
            const int32_t here = min(n - first, int32_t(SKV_PAGE));
            float sum = 0;
            load_tile(cache, job, first, here, shared);
            for (int32_t r = 0; r < rows; r++) {
                row_logits<T, PAIRS>(cache, job, s, r, shared, here, scale, logits, z);
                if (pass == 0 && tid < WARP) { /* one warp: the row's maximum and sum so far */
                    const float a = tid < here ? z[tid] : -FLT_MAX, b = tid + WARP < here ? z[tid + WARP] : -FLT_MAX;
                    const float most = fmaxf(stats[2 * r], warp_max(fmaxf(a, b)));
                    const float part = (tid < here ? expf(a - most) : 0) + (tid + WARP < here ? expf(b - most) : 0);
                    const float total = warp_sum(part);
                    __syncwarp(); /* all lanes have read what the first one writes */
                    if (tid == 0) {
                        stats[2 * r + 1] = fmaf(stats[2 * r + 1], expf(stats[2 * r] - most), total);
                        stats[2 * r] = most;
                    }
                }
                if (pass == 1 && tid < here) sum += expf(z[tid] - stats[2 * r]) / stats[2 * r + 1];
                __syncthreads();
            }
            if (pass == 1 && tid < here) mean[first + tid] = sum / float(rows);
        }
    __syncthreads();
    const int32_t half = s.kernel / 2;
    for (int32_t j = tid; j < n; j += THREADS) {
        float most = 0;
        for (int32_t k = max(j - half, 0); k <= min(j + half, n - 1); k++) most = fmaxf(most, mean[k]);
        out[j] = most;
    }
}

/* ---- keys alone (§3, §6) ---- */

/* out [L] ← the length of each key; a warp a key. */
template <typename T> static __device__ void key_norms(const cu_cache &cache, const cu_job &job, float *out) {
    const int32_t lane = int32_t(threadIdx.x % WARP), warp = int32_t(threadIdx.x / WARP);
    for (int32_t i = warp; i < job.n_slots; i += WARPS) {
        const T *key = job_key<T>(cache, job, i);
        float squares = 0;
        for (int32_t c = lane; c < cache.dim; c += WARP) squares = fmaf(widen(key[c]), widen(key[c]), squares);
        squares = warp_sum(squares);
        if (lane == 0) out[i] = sqrtf(squares);
    }
    __syncthreads();
}

/* Rows of a tile of unit keys, so that two of them fit. */
static __host__ __device__ int32_t tile_rows(const cu_cache &cache) {
    return cache.stride <= 128 ? 64 : cache.stride <= 256 ? 32 : 16;
}

static __host__ __device__ int32_t tile_width(const cu_cache &cache) { return cache.stride + 1; }

/* tile [rows, width] ← unit keys first … first + n − 1, zero rows behind them. */
template <typename T>
static __device__ void load_unit(const cu_cache &cache, const cu_job &job, int32_t first, int32_t n, float *tile) {
    const int32_t rows = tile_rows(cache), width = tile_width(cache);
    for (int32_t i = int32_t(threadIdx.x); i < rows * cache.stride; i += THREADS) {
        const int32_t row = i / cache.stride, c = i % cache.stride;
        float x = 0;
        if (row < n && c < cache.dim)
            x = widen(job_key<T>(cache, job, first + row)[c]) / fmaxf(job.norm[first + row], 1e-8f);
        tile[row * width + c] = x;
    }
    __syncthreads();
}

/* job.sum ← Σ of all unit keys; a thread an element, in order of the slots. */
template <typename T> static __device__ void sum_units(const cu_cache &cache, const cu_job &job, float *tile) {
    const int32_t rows = tile_rows(cache), width = tile_width(cache);
    double total[2] = {0, 0}; /* strides up to 2 THREADS */
    for (int32_t first = 0; first < job.n_slots; first += rows) {
        load_unit<T>(cache, job, first, min(rows, job.n_slots - first), tile);
        for (int k = 0; k < 2; k++) {
            const int32_t c = int32_t(threadIdx.x) + k * THREADS;
            for (int32_t r = 0; c < cache.stride && r < rows; r++) total[k] += double(tile[r * width + c]);
        }
        __syncthreads();
    }
    for (int k = 0; k < 2; k++)
        if (int32_t(threadIdx.x) + k * THREADS < cache.stride)
            job.sum[int32_t(threadIdx.x) + k * THREADS] = float(total[k]);
    __syncthreads();
}

/* hit, cosine ← r(i) (METHOD.md §3) and S[i, r(i)] of the rows from row0 on: the last key similar to key i is sought
 * from the newest tile of keys downwards until every row has found its own. Where there is none it is key 0. Returns
 * the thread's share of the pairs compared. */
template <typename T>
static __device__ uint64_t search_hits(const cu_cache &cache, const cu_job &job, int32_t row0, float *row_tile,
                                       float *key_tile, int32_t *best) {
    const int32_t rows = tile_rows(cache), width = tile_width(cache), each = rows / 16, tid = int32_t(threadIdx.x);
    const int32_t x = tid % 16, y = tid / 16, n = job.n_slots, n_rows = min(rows, n - row0);
    uint64_t pairs = 0;
    load_unit<T>(cache, job, row0, n_rows, row_tile);
    if (tid < rows) best[tid] = -1;
    bool all = false;
    for (int32_t key0 = (n - 1) / rows * rows; key0 >= 0 && !all; key0 -= rows) {
        const int32_t n_keys = min(rows, n - key0);
        load_unit<T>(cache, job, key0, n_keys, key_tile); /* ends with a barrier */
        float s[4][4] = {};
        for (int32_t c = 0; c < cache.dim; c++) {
            float a[4], b[4];
#pragma unroll
            for (int k = 0; k < 4; k++) {
                a[k] = k < each ? row_tile[(y + 16 * k) * width + c] : 0;
                b[k] = k < each ? key_tile[(x + 16 * k) * width + c] : 0;
            }
#pragma unroll
            for (int i = 0; i < 4; i++)
#pragma unroll
                for (int j = 0; j < 4; j++) s[i][j] = fmaf(a[i], b[j], s[i][j]);
        }
        bool open[4]; /* rows without a hit before this tile */
#pragma unroll
        for (int i = 0; i < 4; i++) {
            open[i] = i < each && y + 16 * i < n_rows && best[y + 16 * i] < 0;
            if (open[i] && x == 0) pairs += uint64_t(n_keys);
        }
        __syncthreads();
#pragma unroll
        for (int i = 0; i < 4; i++)
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const int32_t key = key0 + x + 16 * j;
                if (open[i] && j < each && key < n && s[i][j] > 0.5f && key != row0 + y + 16 * i)
                    atomicMax(best + y + 16 * i, key);
            }
        __syncthreads();
        bool mine = true; /* rows of this thread have found theirs */
#pragma unroll
        for (int i = 0; i < 4; i++) {
            if (!open[i]) continue;
            const int32_t found = best[y + 16 * i], at = found >= 0 ? found : 0;
            mine &= found >= 0;
            if (found < 0 && key0 > 0) continue;
#pragma unroll
            for (int j = 0; j < 4; j++)
                if (j < each && at == key0 + x + 16 * j) {
                    job.hit[row0 + y + 16 * i] = at;
                    job.cosine[row0 + y + 16 * i] = s[i][j];
                }
        }
        all = __syncthreads_and(mine);
    }
    return pairs;
}

/* The unit keys' products with job.sum, and with themselves, of a key; in every lane of a warp. */
template <typename T> static __device__ float2 unit_products(const cu_cache &cache, const cu_job &job, int32_t slot) {
    const T *key = job_key<T>(cache, job, slot);
    const float norm = fmaxf(job.norm[slot], 1e-8f);
    float whole = 0, self = 0;
    for (int32_t c = int32_t(threadIdx.x % WARP); c < cache.dim; c += WARP) {
        const float unit = widen(key[c]) / norm;
        whole = fmaf(unit, job.sum[c], whole);
        self = fmaf(unit, unit, self);
    }
    return make_float2(warp_sum(whole), warp_sum(self));
}

/* out [L] ← unit · s / ‖s‖ with s the sum of all unit keys */
template <typename T>
static __device__ void key_likeness(const cu_cache &cache, const cu_job &job, float *scratch, float *out) {
    float squares = 0;
    for (int32_t c = int32_t(threadIdx.x); c < cache.stride; c += THREADS) squares += job.sum[c] * job.sum[c];
    squares = block_sum(squares, scratch);
    const float norm = squares > 0 ? sqrtf(squares) : 1;
    for (int32_t j = int32_t(threadIdx.x / WARP); j < job.n_slots; j += WARPS) {
        const float whole = unit_products<T>(cache, job, j).x;
        if (threadIdx.x % WARP == 0) out[j] = whole / norm;
    }
}

/* x [n] ← softmax */
static __device__ void softmax(float *x, int32_t n, float *scratch) {
    float most = -FLT_MAX, total = 0;
    for (int32_t j = int32_t(threadIdx.x); j < n; j += THREADS) most = fmaxf(most, x[j]);
    most = block_max(most, scratch);
    for (int32_t j = int32_t(threadIdx.x); j < n; j += THREADS) total += expf(x[j] - most);
    total = block_sum(total, scratch);
    for (int32_t j = int32_t(threadIdx.x); j < n; j += THREADS) x[j] = expf(x[j] - most) / total;
}

/* ---- what needs no keys ---- */

/* out [L] ← λ of the slot's sentence. pairs (compat): only where the head holds at least two of its slots. */
static __device__ void penalty(const cu_job &job, bool pairs, float *out) {
    for (int32_t j = int32_t(threadIdx.x); j < job.n_slots; j += THREADS) {
        int32_t low = 0, high = job.n_penalties; /* the first that ends at the slot's position or later */
        while (low < high) {
            const int32_t middle = (low + high) / 2;
            if (job.penalties[middle].positions.last < job.positions[j])
                low = middle + 1;
            else
                high = middle;
        }
        const bool inside =
            job.penalised && low < job.n_penalties && job.penalties[low].positions.first <= job.positions[j];
        job.hit[j] = inside ? low : -1;
        out[j] = inside ? job.penalties[low].lambda : 0;
    }
    __syncthreads();
    for (int32_t j = int32_t(threadIdx.x); pairs && j < job.n_slots; j += THREADS) {
        int32_t n = 0;
        for (int32_t i = 0; i < job.n_slots && n < 2; i++) n += job.hit[i] == job.hit[j];
        if (job.hit[j] >= 0 && n < 2) out[j] = 0;
    }
}

/* ---- kernels ---- */

template <typename T, int PAIRS>
static __global__ void __launch_bounds__(THREADS)
    importance_kernel(const cu_job *jobs, cu_cache cache, importance_shape s) {
    CUDAX_SHARED(char, shared);
    __shared__ cu_job job;
    load_job(jobs + blockIdx.x, &job);
    if (job.scored) importance<T, PAIRS>(cache, job, s, shared, job.mean, job.terms[SKV_IMPORTANCE]);
}

/* What a pass or two over the keys say. */
template <typename T>
static __global__ void __launch_bounds__(THREADS) units_kernel(const cu_job *jobs, cu_cache cache, unsigned needs) {
    CUDAX_SHARED(float, tile);
    __shared__ cu_job job;
    __shared__ float scratch[WARPS];
    load_job(jobs + blockIdx.x, &job);
    if (!job.scored) return; /* the whole block */
    if (needs & 1u << SKV_KEY_NORM) key_norms<T>(cache, job, job.terms[SKV_KEY_NORM]);
    if (!(needs & (1u << SKV_REDUNDANCY | 1u << SKV_KEY_LIKENESS))) return;
    key_norms<T>(cache, job, job.norm);
    sum_units<T>(cache, job, tile);
    if (needs & 1u << SKV_KEY_LIKENESS) key_likeness<T>(cache, job, scratch, job.terms[SKV_KEY_LIKENESS]);
}

template <typename T>
static __global__ void __launch_bounds__(THREADS)
    search_kernel(const cu_job *jobs, cu_cache cache, cu_result *results) {
    CUDAX_SHARED(float, tiles); /* of rows and of keys; best [rows] */
    __shared__ cu_job job;
    __shared__ unsigned long long pairs;
    const int32_t rows = tile_rows(cache), size = rows * tile_width(cache), row0 = int32_t(blockIdx.y) * rows;
    if (threadIdx.x == 0) pairs = 0;
    load_job(jobs + blockIdx.x, &job);
    if (!job.scored || row0 >= job.n_slots) return; /* the whole block */
    atomicAdd(&pairs, static_cast<unsigned long long>(search_hits<T>(cache, job, row0, tiles, tiles + size,
                                                                     reinterpret_cast<int32_t *>(tiles + 2 * size))));
    __syncthreads();
    if (threadIdx.x == 0) atomicAdd(reinterpret_cast<unsigned long long *>(&results[blockIdx.x].n_pairs), pairs);
}

/* Of THREADS slots: (Σ_i S[i, j] − S[j, j] − Σ of the cosines of those whose hit is j) / L. */
template <typename T>
static __global__ void __launch_bounds__(THREADS, 1) redundancy_kernel(const cu_job *jobs, cu_cache cache) {
    __shared__ cu_job job;
    __shared__ int32_t hits[THREADS];
    __shared__ float cosines[THREADS], lost[THREADS];
    const int32_t tid = int32_t(threadIdx.x), first = int32_t(blockIdx.y) * THREADS, j = first + tid;
    load_job(jobs + blockIdx.x, &job);
    const int32_t n = job.n_slots;
    if (!job.scored || first >= n) return; /* the whole block */
    float sum = 0;
    for (int32_t i0 = 0; i0 < n; i0 += THREADS) {
        const bool there = i0 + tid < n && job.hit[i0 + tid] != i0 + tid;
        __syncthreads();
        hits[tid] = there ? job.hit[i0 + tid] : -1;
        cosines[tid] = there ? job.cosine[i0 + tid] : 0;
        __syncthreads();
#pragma unroll 8
        for (int32_t i = 0; i < THREADS; i++) sum += hits[i] == j ? cosines[i] : 0;
    }
    lost[tid] = sum;
    __syncthreads();
    for (int32_t slot = first + tid / WARP; slot < min(first + THREADS, n); slot += WARPS) {
        const float2 products = unit_products<T>(cache, job, slot);
        if (tid % WARP == 0)
            job.terms[SKV_REDUNDANCY][slot] = (products.x - products.y - lost[slot - first]) / float(n);
    }
}

/* Terms in order, each weighted and rounded before it is added, as on the CPU. */
struct score_weights {
    float of[SKV_N_TERMS];
    unsigned needs;
    bool pairs;
};

static __global__ void __launch_bounds__(THREADS) score_kernel(const cu_job *jobs, cu_cache cache, score_weights w) {
    __shared__ cu_job job;
    __shared__ float scratch[WARPS];
    load_job(jobs + blockIdx.x, &job);
    if (!job.scored) return; /* the whole block */
    if (w.needs & 1u << SKV_REDUNDANCY) softmax(job.terms[SKV_REDUNDANCY], job.n_slots, scratch);
    for (int32_t j = int32_t(threadIdx.x); j < job.n_slots; j += THREADS) {
        const int32_t slot = job_slot(job, j), at = job_position(cache, job, j);
        job.positions[j] = at;
        if (w.needs & 1u << SKV_POSITION) job.terms[SKV_POSITION][j] = float(at);
        if (w.needs & 1u << SKV_SUMS)
            job.terms[SKV_SUMS][j] = page_sums(cache, job.pages[slot / SKV_PAGE])[slot % SKV_PAGE];
        if (w.needs & 1u << SKV_NOISE)
            job.terms[SKV_NOISE][j] = float(skv_splitmix64(job.noise ^ uint64_t(int64_t(at))) >> 40) * 0x1p-24f;
    }
    __syncthreads();
    if (w.needs & 1u << SKV_PENALTY) penalty(job, w.pairs, job.terms[SKV_PENALTY]);
    __syncthreads();
    for (int32_t j = int32_t(threadIdx.x); j < job.n_candidates; j += THREADS) {
        float score = 0;
        bool first = true;
#pragma unroll
        for (unsigned term = 0; term < SKV_N_TERMS; term++) {
            if (!(w.needs & 1u << term)) continue;
            const float part = __fmul_rn(w.of[term], job.terms[term][j]);
            score = first ? part : __fadd_rn(score, part);
            first = false;
        }
        job.score[j] = score;
    }
}

/* Every head of a layer ← the mean of its heads' scores. */
static __global__ void share_kernel(const cu_job *jobs, int32_t n_heads) {
    const cu_job *layer = jobs + size_t(blockIdx.x) * size_t(n_heads);
    if (!layer->scored) return; /* the whole block */
    for (int32_t j = int32_t(threadIdx.x); j < layer->n_candidates; j += THREADS) {
        float sum = layer->score[j];
        for (int32_t h = 1; h < n_heads; h++) sum += layer[h].score[j];
        for (int32_t h = 0; h < n_heads; h++) layer[h].score[j] = sum / float(n_heads);
    }
}

/* ---- the op ---- */

template <typename T, int PAIRS> static void launch_importance(cu_device *d, const importance_shape &s, size_t n_jobs) {
    const size_t rows = size_t(s.window) * size_t(s.by_head ? s.group : 1);
    const size_t bytes = SKV_PAGE * d->cache.slot_bytes + (SKV_PAGE * QUERIES + SKV_PAGE + 2 * rows) * sizeof(float);
    if (cu_allow_shared(d, importance_kernel<T, PAIRS>, bytes))
        CU_LAUNCH(d, (importance_kernel<T, PAIRS>), unsigned(n_jobs), THREADS, bytes, cu_jobs(d), d->cache, s);
}

template <typename T> static void launch_keys(cu_device *d, unsigned needs, size_t n_jobs, size_t longest) {
    const cu_cache &c = d->cache;
    const size_t rows = size_t(tile_rows(c)), tile = rows * size_t(tile_width(c)) * sizeof(float);
    const size_t bytes = 2 * tile + rows * sizeof(float);
    if (!cu_allow_shared(d, units_kernel<T>, tile) || !cu_allow_shared(d, search_kernel<T>, bytes)) return;
    CU_LAUNCH(d, units_kernel<T>, unsigned(n_jobs), THREADS, tile, cu_jobs(d), c, needs);
    if (!(needs & 1u << SKV_REDUNDANCY)) return;
    CU_LAUNCH(d, search_kernel<T>, dim3(unsigned(n_jobs), cu_blocks(longest, rows)), THREADS, bytes, cu_jobs(d), c,
              static_cast<cu_result *>(d->results.data));
    CU_LAUNCH(d, redundancy_kernel<T>, dim3(unsigned(n_jobs), cu_blocks(longest, THREADS)), THREADS, 0, cu_jobs(d), c);
}

void cu_score(skv_device *base, const skv_scoring *scoring, skv_job *jobs, size_t n_jobs) {
    cu_device *d = cu_of(base);
    const skv_config *c = d->work.config;
    const importance_shape s = {c->n_heads, c->n_heads / c->n_kv_heads, d->work.window, scoring->method->kernel,
                                (scoring->needs & SKV_QUERY_HEADS) != 0};
    score_weights w = {};
    w.needs = scoring->needs;
    w.pairs = (scoring->method->compat & SKV_COMPAT_PAIRS) != 0;
    memcpy(w.of, scoring->weights, sizeof w.of);
    size_t longest = 1;
    for (size_t i = 0; i < n_jobs; i++) longest = std::max(longest, size_t(jobs[i].n_slots));
    cu_place_jobs(d, scoring, jobs, n_jobs);
    if (!cu_upload_jobs(d, scoring, jobs, n_jobs)) return;
    cu_check(d, cudaMemsetAsync(d->results.data, 0, n_jobs * sizeof(cu_result), d->stream), "cudaMemsetAsync");
    if (w.needs & 1u << SKV_IMPORTANCE) BY_CACHE(d, launch_importance)(d, s, n_jobs);
    if (w.needs & (1u << SKV_REDUNDANCY | 1u << SKV_KEY_NORM | 1u << SKV_KEY_LIKENESS)) {
        if (d->work.cache.type == SKV_F32)
            launch_keys<float>(d, w.needs, n_jobs, longest);
        else
            launch_keys<__nv_bfloat16>(d, w.needs, n_jobs, longest);
    }
    CU_LAUNCH(d, score_kernel, unsigned(n_jobs), THREADS, 0, cu_jobs(d), d->cache, w);
    if (scoring->needs & SKV_SHARED)
        CU_LAUNCH(d, share_kernel, unsigned(n_jobs / size_t(c->n_kv_heads)), THREADS, 0, cu_jobs(d), c->n_kv_heads);
}
