/* The CUDA backend's own header: the device, what of a batch and of a compaction lies in its memory, and what its files
 * share. The ops are declared and documented in csrc/backend.h; the CPU's are their specification. */
#ifndef SKV_CUDA_CUH
#define SKV_CUDA_CUH

#include <cublas_v2.h>

#include <functional>
#include <tuple>
#include <unordered_map>
#include <vector>

#include "cudax.cuh"

extern "C" {
#include "../csrc/backend.h"
#include "../csrc/random.h"
}

constexpr int WARP = 32, THREADS = 256, WARPS = THREADS / WARP;

/* Query rows, (token, head of the group) pairs, that a block of scores works on at a time: one a warp. */
constexpr int QUERIES = WARPS;

/* Query rows of a prompt that a block attends with. */
constexpr int PROMPT_ROWS = 64;

/* Pages of one run of the attention. The runs of a head are merged in order, so its result depends neither on what else
 * is in the batch nor on how a prompt was cut into chunks. */
constexpr int RUN_PAGES = 8;

/* Rows up to which a matrix is multiplied by our own kernel, which reads it once; cuBLAS does the rest. */
constexpr size_t GEMV_ROWS = 4;

/* Rows of logits that are made at a time: as many as a session has, between these. */
constexpr size_t FEWEST_LOGITS = 32, MOST_LOGITS = 128;

/* Rows up to which both parts of bf16 activations are multiplied at once. */
constexpr size_t FEW_ROWS = 64;

/* Where the parts of a page lie, as in skv_cache_shape. */
struct cu_cache {
    int32_t dim, stride; /* elements of a vector; of its slot */
    size_t slot_bytes, values_at, positions_at, sums_at;
    bool sums;
};

struct cu_token {
    float *vector; /* of the sentence that it closes */
    int32_t id, position, part, mark, length;
    float alpha; /* of a steered token */
    bool steered;
};

struct cu_part {
    float *ring, *sum;
    const float *vector;
    int32_t first, n, position, steered_layer;
};

struct cu_head {
    char *const *pages;
    int32_t n_slots;
};

/* A block of query rows of a part of several tokens: (first … first + PROMPT_ROWS − 1), where a row is a token of
 * the part × group + head. */
struct cu_block {
    int32_t part, first;
};

/* What a forward's kernels see of the batch. */
struct cu_batch {
    const cu_token *tokens;
    const cu_part *parts;
    const cu_head *heads;                        /* [n_parts, n_layers, n_kv_heads] */
    const cu_block *blocks;                      /* [n_blocks] */
    const float *cosine, *sine;                  /* [n_tokens, head_dim / 2] */
    int32_t n_tokens, n_parts, n_blocks, n_runs; /* n_runs: of the longest head */
    int32_t n_layers, n_heads, n_kv, group;
};

/* One job of a compaction. The arrays are [padded(n_slots)], device memory. */
struct cu_job {
    char *const *pages;
    int32_t *held;
    const float *queries;         /* the ring's of the job's layer [window, n_heads, head_dim] */
    const skv_penalty *penalties; /* [n_penalties] */
    const skv_range *sentences;   /* [n_sentences] */
    uint8_t *alive;               /* [n_sentences] */
    float *score, *norm, *mean, *cosine;
    float *sum;                /* [stride] of the unit keys */
    float *terms[SKV_N_TERMS]; /* those that are needed */
    int32_t *kept, *positions, *hit;
    uint64_t noise; /* the generator's state of the head */
    int32_t n_slots, n_candidates, n_held, end, first, budget;
    int32_t n_queries, oldest; /* remembered queries; place of the oldest */
    int32_t kv_head, n_penalties, n_sentences;
    bool scored, penalised;
};

/* What becomes of a job. */
struct cu_result {
    uint64_t n_pairs;
    int32_t n_kept, any_sentence;
};

/* Where the bytes that tell which sentences of a row live on lie in page_lists. */
struct cu_alive {
    skv_due *due;
    size_t at;
};

/* A growing block of device memory. */
struct cu_block_of_memory {
    void *data;
    size_t bytes;
};

/* A launch that waits, and what it is. */
struct cu_step {
    uint64_t hash;
    std::function<bool()> run;
};

/* Launches that came in this order before. */
struct cu_graph {
    uint64_t hash;
    cudaGraphExec_t graph;
};

struct cu_device {
    skv_device base;
    int index, n_processors;
    bool deterministic; /* our own products of matrices, with one order of summation, in place of cuBLAS */
    cudaStream_t stream;
    cublasHandle_t blas;
    void *blas_memory; /* cuBLAS's workspace: with its own it would allocate while a graph is captured */
    size_t blas_bytes;
    skv_workload work;
    cu_cache cache;
    cu_batch batch;
    const skv_batch *host; /* the batch as it was given */

    /* Small blocks are cut from slabs, by powers of two; large ones are allocations of their own. */
    std::unordered_map<void *, size_t> sizes;
    std::vector<void *> slabs, free_blocks[48];
    char *slab;
    size_t slab_left;

    /* Workspace, made by reserve */
    char *staging; /* pinned: what begin tells of a batch, and pages that are new */
    size_t staging_bytes;
    cu_block_of_memory staged, tables; /* the same; the lists of pages [n_rows, n_cache_heads · pages of head_slots] */
    std::vector<uint64_t> versions;    /* [n_rows] the newest of a row's lists that are in tables; 0: none */
    float *inv_freq;                   /* [head_dim / 2] */
    float *cosine, *sine;              /* [n_tokens, head_dim / 2] */
    float *partials;                   /* [n_rows, n_heads, runs, stride + 2] */
    float *stats;                      /* [n_tokens, n_heads, 2] maximum and sum of a query's softmax */
    void *narrow;                      /* [2, n_tokens, widest input] bf16 */
    float *logits;                     /* [cu_logit_rows, vocab] */
    int32_t *best;                     /* [n_tokens] the largest logits' */
    float *halves;                     /* [n_halves] products with both parts of few rows */
    size_t n_halves;
    std::vector<std::vector<char>> uploads; /* what was written since the last sync; the copies may not have begun */
    cu_block_of_memory areas, jobs, page_lists, results, similar, vectors, order;
    std::vector<cu_alive> sentences; /* of the jobs that were uploaded last */

    /* The launches of a batch that decodes. They are the same at every step but for what `begin` uploads. */
    bool recording;
    std::vector<cu_step> steps;
    std::vector<cu_graph> graphs; /* the oldest first */
    uint64_t before;              /* what came last */

    /* A selection whose results sync hands over. */
    skv_job *selected;
    size_t n_selected;
    std::vector<cu_result> found;
    std::vector<uint8_t> alive;
};

/* FNV-1a */
static inline uint64_t cu_hash(uint64_t hash, const void *data, size_t n) {
    hash ^= 0xcbf29ce484222325u;
    for (size_t i = 0; i < n; i++) hash = (hash ^ static_cast<const unsigned char *>(data)[i]) * 0x100000001b3u;
    return hash;
}

static inline size_t cu_logit_rows(const skv_workload *w) {
    return w->n_rows < FEWEST_LOGITS ? FEWEST_LOGITS : w->n_rows < MOST_LOGITS ? w->n_rows : MOST_LOGITS;
}

static inline cu_device *cu_of(skv_device *base) { return reinterpret_cast<cu_device *>(base); }

/* Keeps the first failure of any op, for sync. */
bool cu_check(cu_device *d, cudaError_t status, const char *what);
bool cu_check_blas(cu_device *d, cublasStatus_t status, const char *what);

/* Every launch goes through here. While a batch is recorded it waits for cu_flush, in company of all others. */
template <typename... Parameters, typename... Arguments>
bool cu_launch(cu_device *d, const char *name, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared,
               Arguments... arguments) {
    const std::tuple<Parameters...> given(arguments...);
    const auto launch = [=] {
        return std::apply(
            [=](Parameters... each) {
                return cu_check(d, CUDAX_LAUNCH(kernel, grid, block, shared, d->stream, each...), name);
            },
            given);
    };
    if (!d->recording) return launch();
    const unsigned shape[] = {grid.x, grid.y, grid.z, block.x, unsigned(shared)};
    uint64_t hash = cu_hash(0, &kernel, sizeof kernel);
    hash = cu_hash(hash, shape, sizeof shape);
    std::apply([&hash](const Parameters &...each) { ((hash = cu_hash(hash, &each, sizeof each)), ...); }, given);
    d->steps.push_back({hash, launch});
    return true;
}

#define CU_LAUNCH(d, kernel, grid, block, shared, ...)                                                                 \
    cu_launch(d, CU_NAME(kernel), kernel, dim3(grid), dim3(block), shared, __VA_ARGS__)
#define CU_NAME(kernel) #kernel

/* Has what was recorded done: as a graph, where the same came before. */
void cu_flush(cu_device *d);

/* Room for so many bytes, which need not be kept; false, with the error set, if memory is out. */
bool cu_grow(cu_device *d, cu_block_of_memory *block, size_t bytes);

/* Raises the limit of a kernel's dynamic shared memory where it needs more than the default. */
template <typename Kernel> bool cu_allow_shared(cu_device *d, Kernel kernel, size_t bytes) {
    if (bytes <= 48 * 1024) return true;
    return cu_check(d,
                    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)),
                    "shared memory");
}

static inline unsigned cu_blocks(size_t n, size_t each) { return static_cast<unsigned>((n + each - 1) / each); }

static inline __host__ __device__ size_t cu_padded(size_t n) { return (n + 15) / 16 * 16; }

void cu_begin(skv_device *device, const skv_batch *batch);
void cu_pack(skv_device *device, skv_matrix *w, const void *source, skv_dtype type);
void cu_embed(skv_device *device, const skv_matrix *table, float *x);
void cu_rmsnorm(skv_device *device, const float *x, const float *w, float eps, size_t n, size_t dim, float *y);
void cu_linear(skv_device *device, const skv_linear *jobs, size_t n_jobs, const float *x, size_t n);
void cu_rope(skv_device *device, float *x, size_t n_heads);
void cu_append(skv_device *device, size_t layer, const float *k, const float *v);
void cu_receive(skv_device *device, size_t layer, const float *q);
void cu_keep_queries(skv_device *device, size_t layer, const float *q);
void cu_attention(skv_device *device, size_t layer, const float *q, float *out);
void cu_steer(skv_device *device, size_t layer, float *x);
void cu_silu_mul(skv_device *device, float *gate, const float *up, size_t n);
void cu_add(skv_device *device, float *x, const float *y, size_t n);
void cu_last(skv_device *device, const float *x, float *y);
void cu_project(skv_device *device, const skv_matrix *w, const float *x, size_t n, float *y, int32_t *best);
void cu_sum_sentences(skv_device *device, const float *x);
void cu_similarities(skv_device *device, float *const *vectors, size_t width, size_t first, size_t n, float *out);
void cu_score(skv_device *device, const skv_scoring *scoring, skv_job *jobs, size_t n_jobs);
void cu_fetch(skv_device *device, const skv_scoring *scoring, const skv_job *job, skv_fetched *to);
void cu_put_score(skv_device *device, const skv_job *job, const float *score);
void cu_select(skv_device *device, const skv_scoring *scoring, skv_job *jobs, size_t n_jobs);
void cu_compact(skv_device *device, const skv_scoring *scoring, const skv_job *jobs, size_t n_jobs);
skv_limits cu_limits(skv_device *device, float *memory, size_t n, skv_dtype weights);

/* Bytes of a compaction, for `reserve`: its areas; lists of a row with so many pages; what reordering, or a head that
 * is fetched, takes. */
size_t cu_area_bytes(const skv_workload *work);
size_t cu_list_bytes(const skv_workload *work, size_t n_pages);
size_t cu_order_bytes(const skv_workload *work);

/* Hands over what a selection found, once the stream has caught up. */
void cu_deliver(cu_device *d);

/* ---- device functions ---- */

static __device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
    for (int offset = WARP / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
    return x;
}

static __device__ __forceinline__ float warp_max(float x) {
#pragma unroll
    for (int offset = WARP / 2; offset > 0; offset /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, offset));
    return x;
}

/* Of a block of THREADS, in one order; every thread gets it. scratch [WARPS] shared. */
static __device__ __forceinline__ float block_sum(float x, float *scratch) {
    x = warp_sum(x);
    __syncthreads();
    if (threadIdx.x % WARP == 0) scratch[threadIdx.x / WARP] = x;
    __syncthreads();
    float sum = 0;
#pragma unroll
    for (int w = 0; w < WARPS; w++) sum += scratch[w];
    return sum;
}

static __device__ __forceinline__ float block_max(float x, float *scratch) {
    x = warp_max(x);
    __syncthreads();
    if (threadIdx.x % WARP == 0) scratch[threadIdx.x / WARP] = x;
    __syncthreads();
    float most = scratch[0];
#pragma unroll
    for (int w = 1; w < WARPS; w++) most = fmaxf(most, scratch[w]);
    return most;
}

static __device__ __forceinline__ float2 load_pair(const float *x) { return *reinterpret_cast<const float2 *>(x); }

static __device__ __forceinline__ float2 load_pair(const __nv_bfloat16 *x) {
    return __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162 *>(x));
}

static __device__ __forceinline__ float widen(float x) { return x; }
static __device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
static __device__ __forceinline__ float widen(__half x) { return __half2float(x); }

static __device__ __forceinline__ void narrow(float x, float *to) { *to = x; }
static __device__ __forceinline__ void narrow(float x, __nv_bfloat16 *to) { *to = __float2bfloat16_rn(x); }

/* A page's parts. */
template <typename T> static __device__ __forceinline__ T *page_key(const cu_cache &c, char *page, int slot) {
    return reinterpret_cast<T *>(page + slot * c.slot_bytes);
}

template <typename T> static __device__ __forceinline__ T *page_value(const cu_cache &c, char *page, int slot) {
    return reinterpret_cast<T *>(page + c.values_at + slot * c.slot_bytes);
}

static __device__ __forceinline__ int32_t *page_positions(const cu_cache &c, char *page) {
    return reinterpret_cast<int32_t *>(page + c.positions_at);
}

static __device__ __forceinline__ float *page_sums(const cu_cache &c, char *page) {
    return reinterpret_cast<float *>(page + c.sums_at);
}

#endif
