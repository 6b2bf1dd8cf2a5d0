/* A CUDA device: a stream, cuBLAS, memory, what a forward uploads, and the table of ops.
 *
 * kernel          grid, block                  moves                        why
 * angle_kernel    [tokens × pairs / 256], 256  writes 8 bytes a pair        the angles of all layers, once a forward
 */
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <new>

#include "cuda.cuh"

extern const skv_backend skv_cuda;

bool cu_check(cu_device *d, cudaError_t status, const char *what) {
    if (status == cudaSuccess) return !d->base.error.code;
    if (!d->base.error.code)
        skv_fail(&d->base.error, status == cudaErrorMemoryAllocation ? SKV_CAPACITY : SKV_BACKEND, "%s: %s: %s",
                 d->base.variant, what, cudaGetErrorString(status));
    return false;
}

bool cu_check_blas(cu_device *d, cublasStatus_t status, const char *what) {
    if (status == CUBLAS_STATUS_SUCCESS) return true;
    if (!d->base.error.code)
        skv_fail(&d->base.error, SKV_BACKEND, "%s: %s: %s", d->base.variant, what, cublasGetStatusString(status));
    return false;
}

/* ---- graphs ---- */

/* Shapes of a batch whose graphs are kept. */
constexpr size_t MAX_GRAPHS = 16;

/* The steps as a graph, NULL with the error set. */
static cudaGraphExec_t capture(cu_device *d) {
    cudaGraph_t graph = nullptr;
    cudaGraphExec_t made = nullptr;
    if (!cu_check(d, cudaStreamBeginCapture(d->stream, cudaStreamCaptureModeThreadLocal), "capture")) return nullptr;
    for (const cu_step &step : d->steps) step.run();
    if (cu_check(d, cudaStreamEndCapture(d->stream, &graph), "capture"))
        cu_check(d, cudaGraphInstantiate(&made, graph, 0), "cudaGraphInstantiate");
    if (graph) cudaGraphDestroy(graph);
    return made;
}

void cu_flush(cu_device *d) {
    if (!d->recording) return;
    d->recording = false; /* what the steps launch is launched */
    uint64_t hash = 0;
    for (const cu_step &step : d->steps) hash = cu_hash(hash, &step.hash, sizeof step.hash);
    const cu_graph *found = nullptr;
    for (const cu_graph &graph : d->graphs)
        if (graph.hash == hash) found = &graph;
    if (!found && hash == d->before) { /* the second time in a row: it will come again */
        if (const cudaGraphExec_t made = capture(d)) {
            if (d->graphs.size() == MAX_GRAPHS) {
                cudaGraphExecDestroy(d->graphs.front().graph);
                d->graphs.erase(d->graphs.begin());
            }
            d->graphs.push_back({hash, made});
            found = &d->graphs.back();
        }
    }
    if (found)
        cu_check(d, cudaGraphLaunch(found->graph, d->stream), "cudaGraphLaunch");
    else if (!d->base.error.code)
        for (const cu_step &step : d->steps) step.run();
    d->before = hash;
    d->steps.clear();
}

/* ---- memory ---- */

constexpr int SMALLEST = 8, LARGEST = 18; /* 256 bytes to 256 KiB */
constexpr size_t SLAB = size_t(4) << 20;

static void *device_malloc(cu_device *d, size_t bytes) {
    void *data = nullptr;
    if (cudaMalloc(&data, bytes) != cudaSuccess) {
        size_t available = 0, total = 0;
        cudaGetLastError(); /* it is the caller who says what did not fit */
        cudaMemGetInfo(&available, &total);
        snprintf(d->base.shortage, sizeof d->base.shortage, "%s: %zu bytes asked, %zu of %zu free", d->base.variant,
                 bytes, available, total);
        return nullptr;
    }
    return data;
}

/* The least order with bytes ≤ 2^order; beyond LARGEST if there is none. */
static int order_of(size_t bytes) {
    int order = SMALLEST;
    while (order <= LARGEST && size_t(1) << order < bytes) order++;
    return order;
}

/* A block of 2^order bytes. */
static void *small_block(cu_device *d, int order) {
    std::vector<void *> &list = d->free_blocks[order];
    const size_t bytes = size_t(1) << order;
    if (!list.empty()) {
        void *data = list.back();
        list.pop_back();
        return data;
    }
    if (d->slab_left < bytes) {
        d->slab = static_cast<char *>(device_malloc(d, SLAB));
        d->slab_left = d->slab ? SLAB : 0;
        if (!d->slab) return nullptr;
        d->slabs.push_back(d->slab);
        d->base.idle_bytes += SLAB;
    }
    void *data = d->slab;
    d->slab += bytes;
    d->slab_left -= bytes;
    return data;
}

static void *cu_alloc(skv_device *base, size_t count, size_t size) {
    cu_device *d = cu_of(base);
    const size_t bytes = skv_mul(count, size);
    const int order = order_of(bytes);
    if (bytes == SIZE_MAX || !cu_check(d, cudaSetDevice(d->index), "cudaSetDevice")) return nullptr;
    base->heap.n_calls++;
    void *data = order <= LARGEST ? small_block(d, order) : device_malloc(d, bytes);
    if (!data) return nullptr;
    d->sizes[data] = bytes;
    base->heap.live_bytes += bytes;
    if (order <= LARGEST) base->idle_bytes -= bytes;
    cu_flush(d);
    cu_check(d, cudaMemsetAsync(data, 0, bytes, d->stream), "cudaMemsetAsync");
    return data;
}

static void cu_free(skv_device *base, void *block) {
    cu_device *d = cu_of(base);
    const auto found = d->sizes.find(block);
    if (found == d->sizes.end()) return;
    const size_t bytes = found->second;
    const int order = order_of(bytes);
    base->heap.n_calls++;
    base->heap.live_bytes -= bytes;
    d->sizes.erase(found);
    if (order <= LARGEST) {
        base->idle_bytes += bytes;
        d->free_blocks[order].push_back(block);
        return;
    }
    cu_flush(d);
    cu_check(d, cudaStreamSynchronize(d->stream), "cudaStreamSynchronize"); /* something may still use it */
    cu_check(d, cudaFree(block), "cudaFree");
}

static skv_status out_of_workspace(cu_device *d, skv_error *error) {
    if (d->base.error.code) return *error = d->base.error, error->code;
    skv_fail(error, SKV_CAPACITY, "out of memory for the workspace; %s", d->base.shortage);
    *d->base.shortage = 0;
    return error->code;
}

/* *block ← so many bytes in place of those it had; false, and as many as it had, if memory is out. */
static bool replace(cu_device *d, void **block, size_t had, size_t bytes) {
    cu_free(&d->base, *block); /* first, because both may not fit */
    *block = cu_alloc(&d->base, bytes, 1);
    if (*block) return true;
    if (had && !(*block = cu_alloc(&d->base, had, 1))) out_of_workspace(d, &d->base.error);
    return false;
}

static bool grow(cu_device *d, cu_block_of_memory *block, size_t bytes) {
    if (bytes <= block->bytes) return true;
    if (!replace(d, &block->data, block->bytes, bytes)) return false;
    block->bytes = bytes;
    return true;
}

bool cu_grow(cu_device *d, cu_block_of_memory *block, size_t bytes) {
    return grow(d, block, bytes) || (out_of_workspace(d, &d->base.error), false);
}

static void copy(skv_device *base, void *to, const void *from, size_t bytes, cudaMemcpyKind kind) {
    cu_device *d = cu_of(base);
    if (!bytes || base->error.code || !cu_check(d, cudaSetDevice(d->index), "cudaSetDevice")) return;
    cu_flush(d);
    cu_check(d, cudaMemcpyAsync(to, from, bytes, kind, d->stream), "cudaMemcpyAsync");
}

static void cu_write(skv_device *base, void *to, const void *from, size_t bytes) {
    const auto *first = static_cast<const char *>(from);
    if (!bytes) return;
    cu_of(base)->uploads.emplace_back(first, first + bytes); /* moving the list leaves its members' memory in place */
    copy(base, to, cu_of(base)->uploads.back().data(), bytes, cudaMemcpyHostToDevice);
}

static void cu_read(skv_device *base, void *to, const void *from, size_t bytes) {
    copy(base, to, from, bytes, cudaMemcpyDeviceToHost);
}

static void cu_copy(skv_device *base, void *to, const void *from, size_t bytes) {
    copy(base, to, from, bytes, cudaMemcpyDeviceToDevice);
}

static skv_status cu_sync(skv_device *base, skv_error *error) {
    cu_device *d = cu_of(base);
    cu_check(d, cudaSetDevice(d->index), "cudaSetDevice");
    cu_flush(d);
    cu_check(d, cudaStreamSynchronize(d->stream), "the device");
    d->uploads.clear();
    if (!base->error.code) cu_deliver(d);
    if (base->error.code) *error = base->error;
    return base->error.code;
}

/* ---- the device ---- */

/* A device, and the same with `deterministic`. */
#define NAME(i)                                                                                                        \
    { "cuda:" #i, "cuda:" #i ":deterministic" }
static const char *const NAMES[16][2] = {NAME(0), NAME(1), NAME(2),  NAME(3),  NAME(4),  NAME(5),  NAME(6),  NAME(7),
                                         NAME(8), NAME(9), NAME(10), NAME(11), NAME(12), NAME(13), NAME(14), NAME(15)};
#undef NAME

static int n_devices(cudaError_t *status) {
    int n = 0;
    *status = cudaGetDeviceCount(&n);
    if (*status == cudaSuccess) return n < 16 ? n : 16;
    cudaGetLastError();
    return 0;
}

/* Without a device the first name stands for it, so that there is something to say why of. */
static const char *cu_variant(size_t i) {
    cudaError_t status;
    const int n = n_devices(&status);
    return i < size_t(n ? 2 * n : 1) ? NAMES[i / 2][i % 2] : nullptr;
}

static bool cu_runs_here(const char *variant, char *about, size_t size) {
    cudaError_t status;
    cudaDeviceProp p;
    int i = 0;
    if (!n_devices(&status)) {
        snprintf(about, size, "no CUDA device: %s", cudaGetErrorString(status));
        return false;
    }
    while (strcmp(NAMES[i / 2][i % 2], variant)) i++;
    status = cudaGetDeviceProperties(&p, i / 2);
    if (status != cudaSuccess)
        snprintf(about, size, "%s", cudaGetErrorString(status));
    else if (p.major < 8)
        snprintf(about, size, "%.80s: compute capability %d.%d; expected 8.0 or newer", p.name, p.major, p.minor);
    else
        snprintf(about, size, "%.80s, %.1f GB", p.name, double(p.totalGlobalMem) / 1e9);
    return status == cudaSuccess && p.major >= 8;
}

static void cu_close(skv_device *base) {
    cu_device *d = cu_of(base);
    cudaSetDevice(d->index);
    if (d->stream) cudaStreamSynchronize(d->stream);
    for (const cu_graph &graph : d->graphs) cudaGraphExecDestroy(graph.graph);
    if (d->blas) cublasDestroy(d->blas);
    for (const auto &block : d->sizes)
        if (order_of(block.second) > LARGEST) cudaFree(block.first);
    for (void *slab : d->slabs) cudaFree(slab);
    if (d->staging) cudaFreeHost(d->staging);
    if (d->stream) cudaStreamDestroy(d->stream);
    delete d;
}

static skv_device *cu_open(const char *variant, int n_threads, skv_error *error) {
    cu_device *d = new (std::nothrow) cu_device();
    if (!d) {
        skv_fail(error, SKV_CAPACITY, "out of memory for a device");
        return nullptr;
    }
    int i = 0, major = 0;
    while (strcmp(NAMES[i / 2][i % 2], variant)) i++;
    d->index = i / 2;
    d->deterministic = i % 2;
    d->base.backend = &skv_cuda;
    d->base.variant = NAMES[i / 2][i % 2];
    d->base.n_threads = n_threads;
    if (cu_check(d, cudaSetDevice(d->index), "cudaSetDevice") &&
        cu_check(d, cudaStreamCreateWithFlags(&d->stream, cudaStreamNonBlocking), "cudaStreamCreate") &&
        cu_check(d, cudaDeviceGetAttribute(&d->n_processors, cudaDevAttrMultiProcessorCount, d->index), "attributes") &&
        cu_check_blas(d, cublasCreate(&d->blas), "cublasCreate") &&
        cu_check_blas(d, cublasSetStream(d->blas, d->stream), "cublasSetStream") &&
        cu_check(d, cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, d->index), "attributes")) {
        if (!d->deterministic) d->blas_bytes = size_t(major < 9 ? 4 : 32) << 20;
        return &d->base;
    }
    *error = d->base.error;
    cu_close(&d->base);
    return nullptr;
}

/* ---- workspace ---- */

static size_t n_cache_heads(const skv_config *c) { return size_t(c->n_layers) * size_t(c->n_kv_heads); }

static size_t n_pages(size_t slots) { return (slots + SKV_PAGE - 1) / SKV_PAGE; }

/* Of a batch, what begin tells: the parts of the staging area, each at a multiple of 64 bytes. */
struct layout {
    size_t tokens, parts, heads, blocks, pages, bytes;
};

static layout lay_out(size_t n_tokens, size_t n_parts, size_t n_heads, size_t n_blocks, size_t pages) {
    layout l = {};
    const auto take = [&l](size_t n, size_t size) {
        const size_t at = l.bytes;
        l.bytes += (n * size + 63) / 64 * 64;
        return at;
    };
    l.tokens = take(n_tokens, sizeof(cu_token));
    l.parts = take(n_parts, sizeof(cu_part));
    l.heads = take(n_heads, sizeof(cu_head));
    l.blocks = take(n_blocks, sizeof(cu_block));
    l.pages = take(pages, sizeof(char *));
    return l;
}

/* Of the largest batch, with so many pages that are new. */
static layout lay_out_most(const skv_workload *w, size_t pages) {
    const size_t group = size_t(w->config->n_heads) / size_t(w->config->n_kv_heads);
    const size_t blocks = (w->n_tokens * group + PROMPT_ROWS - 1) / PROMPT_ROWS + w->n_rows;
    return lay_out(w->n_tokens, w->n_rows, w->n_rows * n_cache_heads(w->config), blocks, pages);
}

static cu_cache cache_of(const skv_cache_shape *s) {
    return {s->head_dim, s->stride, s->slot_bytes, s->values_at, s->positions_at, s->sums_at, s->sums};
}

static size_t partial_floats(const skv_workload *w) {
    const size_t runs = (n_pages(w->head_slots) + RUN_PAGES - 1) / RUN_PAGES;
    return w->n_rows * size_t(w->config->n_heads) * runs * size_t(w->cache.stride + 2);
}

static size_t widest_input(const skv_config *c) {
    size_t most = size_t(c->hidden);
    if (size_t(c->ffn) > most) most = size_t(c->ffn);
    if (size_t(c->n_heads) * size_t(c->head_dim) > most) most = size_t(c->n_heads) * size_t(c->head_dim);
    return (most + 7) / 8 * 8;
}

static size_t widest_output(const skv_config *c) {
    const size_t heads = size_t(c->n_heads) * size_t(c->head_dim),
                 most = heads > size_t(c->ffn) ? heads : size_t(c->ffn);
    return most > size_t(c->hidden) ? most : size_t(c->hidden);
}

/* As much as cuBLAS's manual recommends, counted as everything else. */
static bool give_workspace(cu_device *d) {
    if (d->blas_memory || !d->blas_bytes) return true;
    d->blas_memory = cu_alloc(&d->base, d->blas_bytes, 1);
    return d->blas_memory &&
           cu_check_blas(d, cublasSetWorkspace(d->blas, d->blas_memory, d->blas_bytes), "cublasSetWorkspace");
}

/* A part of the workspace; known: where the bytes that it has are noted, if they are. */
struct piece {
    void **block;
    size_t bytes, *known;
};

static size_t halves_of(const skv_workload *w) {
    const size_t logits = cu_logit_rows(w) * size_t(w->config->vocab), few = FEW_ROWS * widest_output(w->config);
    return 2 * (few > logits ? few : logits);
}

/* What work needs, in an order that does not depend on it. */
static std::vector<piece> pieces_of(cu_device *d, const skv_workload *w) {
    const skv_config *c = w->config;
    const size_t n = w->n_tokens, half = size_t(c->head_dim) / 2;
    const size_t heads = n_cache_heads(c), pages = heads * n_pages(w->head_slots), jobs = w->n_due * heads;
    const auto plain = [](auto **block, size_t count) {
        return piece{reinterpret_cast<void **>(block), skv_mul(count, sizeof **block), nullptr};
    };
    const auto block = [](cu_block_of_memory *block, size_t bytes) {
        return piece{&block->data, bytes, &block->bytes};
    };
    return {plain(&d->inv_freq, half),
            plain(&d->cosine, n * half),
            plain(&d->sine, n * half),
            plain(&d->stats, w->cache.sums ? n * 2 * size_t(c->n_heads) : 0),
            plain(&d->partials, partial_floats(w)),
            plain(reinterpret_cast<float **>(&d->narrow), n * widest_input(c)),
            plain(&d->halves, halves_of(w)),
            plain(&d->logits, cu_logit_rows(w) * size_t(c->vocab)),
            plain(&d->best, n),
            block(&d->staged, lay_out_most(w, 0).bytes),
            block(&d->tables, w->n_rows * pages * sizeof(char *)),
            block(&d->areas, w->n_due ? cu_area_bytes(w) : 0),
            block(&d->page_lists, w->n_due * cu_list_bytes(w, pages)),
            block(&d->jobs, jobs * sizeof(cu_job)),
            block(&d->results, jobs * sizeof(cu_result)),
            block(&d->order, cu_order_bytes(w)),
            block(&d->vectors, w->n_sentences * sizeof(float *)),
            block(&d->similar, SKV_COMPARED * w->n_sentences * sizeof(float))};
}

static size_t cu_workspace(const skv_device *base, const skv_workload *work) {
    auto *d = cu_of(const_cast<skv_device *>(base));
    size_t bytes = d->blas_bytes;
    for (const piece &p : pieces_of(d, work)) bytes += p.bytes;
    return bytes;
}

static bool give_pieces(cu_device *d, const skv_workload *work) {
    std::vector<piece> had = pieces_of(d, d->work.config ? &d->work : work), pieces = pieces_of(d, work);
    for (size_t i = 0; i < pieces.size(); i++) {
        const piece &p = pieces[i];
        const size_t before = p.known ? *p.known : d->work.config ? had[i].bytes : 0;
        if (p.bytes <= before) continue;
        if (!replace(d, p.block, before, p.bytes)) return false;
        if (p.known) *p.known = p.bytes;
    }
    return true;
}

static skv_status cu_reserve(skv_device *base, const skv_workload *work, skv_error *error) {
    if (work->cache.type == SKV_Q8) return skv_fail(error, SKV_CONFIG, "cache is \"q8\"; allowed on CUDA: bf16, f32");
    cu_device *d = cu_of(base);
    const size_t pages = work->n_rows * n_cache_heads(work->config) * n_pages(work->head_slots);
    const size_t bytes = lay_out_most(work, pages).bytes;
    bool room = cu_check(d, cudaSetDevice(d->index), "cudaSetDevice") && give_workspace(d) && give_pieces(d, work);
    d->versions.assign(work->n_rows, 0); /* if the tables moved, they are empty */
    if (room && bytes > d->staging_bytes) {
        void *pinned = nullptr;
        if (cudaMallocHost(&pinned, bytes) != cudaSuccess) {
            cudaGetLastError();
            snprintf(base->shortage, sizeof base->shortage, "%zu bytes of pinned memory asked", bytes);
            room = false;
        }
        if (room) {
            if (d->staging) cudaFreeHost(d->staging);
            d->staging = static_cast<char *>(pinned);
            d->staging_bytes = bytes;
        }
    }
    if (!room) return out_of_workspace(d, error);
    cu_write(base, d->inv_freq, work->inv_freq, size_t(work->config->head_dim) / 2 * sizeof(float));
    d->work = *work;
    d->n_halves = halves_of(work);
    d->cache = cache_of(&work->cache);
    return SKV_OK;
}

/* ---- a batch ---- */

static __global__ void angle_kernel(cu_batch b, const float *inv_freq, int half, double factor, float *cosine,
                                    float *sine) {
    const size_t i = size_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= size_t(b.n_tokens) * size_t(half)) return;
    double s, c;
    sincos(double(b.tokens[i / size_t(half)].position) * double(inv_freq[i % size_t(half)]), &s, &c);
    cosine[i] = float(factor * c);
    sine[i] = float(factor * s);
}

static uint64_t newest_version(const skv_part *part, size_t n_heads) {
    uint64_t newest = 0;
    for (size_t h = 0; h < n_heads; h++) newest = std::max(newest, part->heads[h].version);
    return newest;
}

/* The lists of pages, 30 MB for 256 rows of 8192 tokens and 112 heads, stay on the device; a row's are sent when one
 * of them has changed, which is once in SKV_PAGE steps. */
void cu_begin(skv_device *base, const skv_batch *batch) {
    cu_device *d = cu_of(base);
    const skv_config *c = d->work.config;
    const size_t per_row = n_cache_heads(c), per_table = per_row * n_pages(d->work.head_slots),
                 group = size_t(c->n_heads) / size_t(c->n_kv_heads);
    if (base->error.code || !cu_check(d, cudaSetDevice(d->index), "cudaSetDevice")) return;
    size_t blocks = 0, pages = 0;
    int32_t longest = 0;
    for (const skv_part *part = batch->parts; part < batch->parts + batch->n_parts; part++) {
        size_t n = 0;
        if (part->n > 1) blocks += (part->n * group + PROMPT_ROWS - 1) / PROMPT_ROWS;
        for (size_t h = 0; h < per_row; h++) {
            n += size_t(part->heads[h].n_pages);
            longest = std::max(longest, part->heads[h].n_pages);
        }
        if (newest_version(part, per_row) != d->versions[size_t(part->row)]) pages += n;
    }
    const layout l = lay_out(batch->n_tokens, batch->n_parts, batch->n_parts * per_row, blocks, pages);
    cu_flush(d);
    if (l.bytes > d->staging_bytes) {
        skv_fail(&base->error, SKV_BACKEND, "%s: a batch of %zu bytes where %zu were reserved", base->variant, l.bytes,
                 d->staging_bytes);
        return;
    }
    auto *tokens = reinterpret_cast<cu_token *>(d->staging + l.tokens);
    auto *parts = reinterpret_cast<cu_part *>(d->staging + l.parts);
    auto *heads = reinterpret_cast<cu_head *>(d->staging + l.heads);
    auto *block = reinterpret_cast<cu_block *>(d->staging + l.blocks);
    auto *page = reinterpret_cast<char **>(d->staging + l.pages);
    char *staged = static_cast<char *>(d->staged.data);
    for (size_t p = 0; p < batch->n_parts; p++) {
        const skv_part *from = batch->parts + p;
        parts[p] = {from->ring,       from->sum,      from->vector,       int32_t(from->first),
                    int32_t(from->n), from->position, from->steered_layer};
        for (size_t i = 0; i < from->n; i++) {
            const skv_token *t = batch->tokens + from->first + i;
            tokens[from->first + i] = {
                t->vector, t->id,     from->position + int32_t(i), int32_t(p), int32_t(t->mark), t->length,
                t->alpha,  t->steered};
        }
        char **const table = static_cast<char **>(d->tables.data) + size_t(from->row) * per_table, **there = table;
        uint64_t &version = d->versions[size_t(from->row)];
        const bool is_new = version != newest_version(from, per_row);
        for (size_t h = 0; h < per_row; h++) {
            const skv_head *head = from->heads + h;
            heads[p * per_row + h] = {there, head->n_slots};
            if (is_new) memcpy(page + (there - table), head->pages, size_t(head->n_pages) * sizeof *page);
            there += head->n_pages;
        }
        if (is_new) {
            const size_t n = size_t(there - table);
            if (!cu_check(d, cudaMemcpyAsync(table, page, n * sizeof *page, cudaMemcpyHostToDevice, d->stream),
                          "a row's pages"))
                return;
            page += n, version = newest_version(from, per_row);
        }
        for (size_t first = 0; from->n > 1 && first < from->n * group; first += PROMPT_ROWS)
            *block++ = {int32_t(p), int32_t(first)};
    }
    if (!cu_check(d, cudaMemcpyAsync(staged, d->staging, l.pages, cudaMemcpyHostToDevice, d->stream), "the batch"))
        return;
    d->host = batch, d->recording = batch->n_tokens == batch->n_parts;
    d->batch = {reinterpret_cast<const cu_token *>(staged + l.tokens),
                reinterpret_cast<const cu_part *>(staged + l.parts),
                reinterpret_cast<const cu_head *>(staged + l.heads),
                reinterpret_cast<const cu_block *>(staged + l.blocks),
                d->cosine,
                d->sine,
                int32_t(batch->n_tokens),
                int32_t(batch->n_parts),
                int32_t(blocks),
                (longest + RUN_PAGES - 1) / RUN_PAGES,
                c->n_layers,
                c->n_heads,
                c->n_kv_heads,
                int32_t(group)};
    const size_t half = size_t(c->head_dim) / 2;
    CU_LAUNCH(d, angle_kernel, cu_blocks(batch->n_tokens * half, THREADS), THREADS, 0, d->batch, d->inv_freq, int(half),
              c->rope_attention_factor, d->cosine, d->sine);
}

static skv_backend table() {
    skv_backend b = {};
    b.name = "cuda";
    b.weight_types = 1u << SKV_F32 | 1u << SKV_BF16;
    b.variant = cu_variant;
    b.runs_here = cu_runs_here;
    b.open = cu_open;
    b.close = cu_close;
    b.alloc = cu_alloc;
    b.free = cu_free;
    b.write = cu_write;
    b.read = cu_read;
    b.copy = cu_copy;
    b.sync = cu_sync;
    b.reserve = cu_reserve;
    b.workspace = cu_workspace;
    b.pack = cu_pack;
    b.begin = cu_begin;
    b.embed = cu_embed;
    b.rmsnorm = cu_rmsnorm;
    b.linear = cu_linear;
    b.rope = cu_rope;
    b.append = cu_append;
    b.receive = cu_receive;
    b.keep_queries = cu_keep_queries;
    b.attention = cu_attention;
    b.steer = cu_steer;
    b.silu_mul = cu_silu_mul;
    b.add = cu_add;
    b.last = cu_last;
    b.project = cu_project;
    b.sum_sentences = cu_sum_sentences;
    b.similarities = cu_similarities;
    b.score = cu_score;
    b.fetch = cu_fetch;
    b.put_score = cu_put_score;
    b.select = cu_select;
    b.compact = cu_compact;
    b.limits = cu_limits;
    return b;
}

const skv_backend skv_cuda = table();

/* What the core opens the shared object for; NULL for a core of another version. */
extern "C" __attribute__((visibility("default"))) const skv_backend *skv_cuda_backend(size_t abi) {
    return abi == SKV_ABI ? &skv_cuda : nullptr;
}
