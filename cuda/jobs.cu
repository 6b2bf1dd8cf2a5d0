/* What is uploaded of a compaction, and what of it is read back for traces and custom scores.
 *
 * kernel         grid, block        moves                                        why
 * fetch_kernel   [slots], 128       a head's keys as float32
 */
#include <cstring>

#include "jobs.cuh"

/* Arrays of padded(L) numbers in a job's area: score, kept, norm, mean, cosine, positions, hit, and the terms. */
constexpr size_t AREA = 7, KEPT = 1;

/* Terms that stand in a job's area. */
static unsigned area_terms(const skv_scoring *s) { return (s->needs | s->keep) & ((1u << SKV_N_TERMS) - 1); }

static size_t area_arrays(unsigned terms) { return AREA + size_t(__builtin_popcount(terms)); }

/* Of a job's area: its arrays, and behind them the sum of its unit keys. */
static size_t area_floats(const cu_device *d, const skv_scoring *s, const skv_job *job) {
    return area_arrays(area_terms(s)) * cu_padded(size_t(job->n_slots)) + size_t(d->cache.stride);
}

size_t cu_area_bytes(const skv_workload *w) {
    const size_t n_heads = size_t(w->config->n_layers) * size_t(w->config->n_kv_heads);
    const unsigned terms = (w->needs | w->keep) & ((1u << SKV_N_TERMS) - 1);
    const size_t stride = size_t(w->cache.stride);
    return w->n_due * ((w->due_slots + 16 * n_heads) * area_arrays(terms) + n_heads * stride) * sizeof(float);
}

size_t cu_list_bytes(const skv_workload *w, size_t n_pages) {
    const size_t lists = 3 + size_t(w->config->n_layers) * size_t(w->config->n_kv_heads); /* each at a multiple of 16 */
    return w->n_sentences * (sizeof(skv_penalty) + sizeof(skv_range) + 1) + n_pages * sizeof(char *) + 16 * lists;
}

size_t cu_order_bytes(const skv_workload *w) {
    const size_t jobs = cu_orders(w->n_due * size_t(w->config->n_layers) * size_t(w->config->n_kv_heads));
    const size_t ordered = w->reorders ? jobs * w->scored_slots * w->cache.slot_bytes : 0;
    const size_t fetched = w->fetches ? w->scored_slots * (size_t(w->config->head_dim) + 1) * sizeof(float) : 0;
    return ordered > fetched ? ordered : fetched;
}

void cu_place_jobs(const cu_device *d, const skv_scoring *s, skv_job *jobs, size_t n_jobs) {
    size_t at = 0;
    for (skv_job *job = jobs; job < jobs + n_jobs; job++) {
        job->at = at;
        at += area_floats(d, s, job);
    }
}

/* Host copies, one behind the other in one upload. */
struct lists {
    std::vector<char> bytes;
    /* Where n values lie in it. */
    template <typename V> size_t add(const V *values, size_t n) {
        const size_t at = (bytes.size() + 15) / 16 * 16;
        bytes.resize(at + n * sizeof *values);
        if (n) memcpy(bytes.data() + at, values, n * sizeof *values);
        return at;
    }
};

bool cu_upload_jobs(cu_device *d, const skv_scoring *s, const skv_job *jobs, size_t n_jobs) {
    const skv_config *c = d->work.config;
    const int32_t n_heads = c->n_heads, window = d->work.window;
    if (d->base.error.code || !cu_check(d, cudaSetDevice(d->index), "cudaSetDevice")) return false;
    lists l;
    std::vector<cu_job> there(n_jobs);
    std::vector<size_t> page_at(n_jobs), due_at(n_jobs);
    struct place {
        size_t penalties, sentences, alive;
    };
    std::vector<place> places;
    size_t area = 0;
    d->sentences.clear();
    for (size_t i = 0; i < n_jobs; i++) {
        const skv_job *job = jobs + i;
        if (!i || job->due != jobs[i - 1].due) {
            const std::vector<uint8_t> none(job->due->n_sentences);
            places.push_back({l.add(job->due->penalties, job->due->n_penalties),
                              l.add(job->due->sentences, job->due->n_sentences), l.add(none.data(), none.size())});
            d->sentences.push_back({job->due, places.back().alive});
        }
        due_at[i] = places.size() - 1;
        page_at[i] = l.add(job->head->pages, size_t(job->head->n_pages));
        const size_t end = job->at + area_floats(d, s, job);
        area = end > area ? end : area;
    }
    if (!cu_grow(d, &d->areas, area * sizeof(float)) || !cu_grow(d, &d->page_lists, l.bytes.size()) ||
        !cu_grow(d, &d->jobs, n_jobs * sizeof(cu_job)) || !cu_grow(d, &d->results, n_jobs * sizeof(cu_result)))
        return false;
    char *base = static_cast<char *>(d->page_lists.data);
    for (size_t i = 0; i < n_jobs; i++) {
        const skv_job *job = jobs + i;
        const skv_due *due = job->due;
        const size_t padded = cu_padded(size_t(job->n_slots));
        cu_job *to = &there[i];
        float *at = static_cast<float *>(d->areas.data) + job->at;
        const auto take = [&at, padded] {
            float *array = at;
            at += padded;
            return array;
        };
        *to = {};
        to->pages = reinterpret_cast<char *const *>(base + page_at[i]);
        to->held = job->held;
        to->penalties = reinterpret_cast<const skv_penalty *>(base + places[due_at[i]].penalties);
        to->sentences = reinterpret_cast<const skv_range *>(base + places[due_at[i]].sentences);
        to->alive = reinterpret_cast<uint8_t *>(base + places[due_at[i]].alive);
        to->score = take();
        to->kept = reinterpret_cast<int32_t *>(take());
        to->norm = take(), to->mean = take(), to->cosine = take();
        to->positions = reinterpret_cast<int32_t *>(take());
        to->hit = reinterpret_cast<int32_t *>(take());
        for (unsigned term = 0; term < SKV_N_TERMS; term++)
            if (area_terms(s) & 1u << term) to->terms[term] = take();
        to->sum = at;
        to->n_queries = due->n_tokens < window ? due->n_tokens : window;
        to->oldest = (due->n_tokens - to->n_queries) % window;
        to->queries = due->ring
                          ? due->ring + size_t(job->layer) * size_t(window) * size_t(n_heads) * size_t(c->head_dim)
                          : nullptr;
        const uint64_t parts[] = {uint64_t(due->sequence[0]), uint64_t(due->sequence[1]),
                                  uint64_t(int64_t(due->first_layer + job->layer)), uint64_t(int64_t(job->kv_head))};
        to->noise = skv_splitmix64(uint64_t(s->method->seed));
        for (const uint64_t part : parts) to->noise = skv_splitmix64(to->noise ^ part);
        to->n_slots = job->n_slots;
        to->n_candidates = int32_t(skv_job_candidates(job));
        to->n_held = job->n_held, to->end = job->end, to->first = due->first, to->budget = job->budget;
        to->kv_head = job->kv_head;
        to->n_penalties = int32_t(due->n_penalties), to->n_sentences = int32_t(due->n_sentences);
        to->scored = job->scored, to->penalised = job->penalised;
    }
    d->base.backend->write(&d->base, d->page_lists.data, l.bytes.data(), l.bytes.size());
    d->base.backend->write(&d->base, d->jobs.data, there.data(), n_jobs * sizeof(cu_job));
    return !d->base.error.code;
}

static float *area_of(const cu_device *d, const skv_job *job, size_t array) {
    return static_cast<float *>(d->areas.data) + job->at + array * cu_padded(size_t(job->n_slots));
}

void cu_put_score(skv_device *base, const skv_job *job, const float *score) {
    base->backend->write(base, area_of(cu_of(base), job, 0), score, skv_job_candidates(job) * sizeof *score);
}

template <typename T>
static __global__ void fetch_kernel(const cu_job *jobs, size_t i, cu_cache cache, float *keys, int32_t *positions) {
    const cu_job job = jobs[i];
    const int32_t slot = int32_t(blockIdx.x);
    if (threadIdx.x == 0) positions[slot] = job_position(cache, job, slot);
    for (int32_t c = int32_t(threadIdx.x); c < cache.dim; c += int32_t(blockDim.x))
        keys[size_t(slot) * size_t(cache.dim) + size_t(c)] = widen(job_key<T>(cache, job, slot)[c]);
}

void cu_fetch(skv_device *base, const skv_scoring *s, const skv_job *job, skv_fetched *to) {
    cu_device *d = cu_of(base);
    const skv_backend *ops = base->backend;
    const skv_config *c = d->work.config;
    const size_t n = size_t(job->n_slots), dim = size_t(c->head_dim), group = size_t(c->n_heads / c->n_kv_heads);
    const size_t window = size_t(d->work.window), fed = size_t(job->due->n_tokens);
    to->n_queries = fed < window ? fed : window;
    if (!cu_upload_jobs(d, s, job, 1)) return;
    if (to->keys || to->positions) {
        if (!cu_grow(d, &d->order, n * (dim + 1) * sizeof(float))) return;
        float *keys = static_cast<float *>(d->order.data);
        int32_t *positions = reinterpret_cast<int32_t *>(keys + n * dim);
        if (d->work.cache.type == SKV_F32)
            CU_LAUNCH(d, fetch_kernel<float>, unsigned(n), 128, 0, cu_jobs(d), size_t(0), d->cache, keys, positions);
        else
            CU_LAUNCH(d, fetch_kernel<__nv_bfloat16>, unsigned(n), 128, 0, cu_jobs(d), size_t(0), d->cache, keys,
                      positions);
        if (to->keys) ops->read(base, to->keys, keys, n * dim * sizeof *keys);
        if (to->positions) ops->read(base, to->positions, positions, n * sizeof *positions);
    }
    for (size_t g = 0; to->queries && g < group; g++)
        for (size_t i = 0; i < to->n_queries; i++) {
            const size_t place = (fed - to->n_queries + i) % window;
            const size_t query =
                (size_t(job->layer) * window + place) * size_t(c->n_heads) + size_t(job->kv_head) * group + g;
            ops->read(base, to->queries + (g * to->n_queries + i) * dim, job->due->ring + query * dim,
                      dim * sizeof(float));
        }
    for (unsigned term = 0; term < SKV_N_TERMS; term++) {
        const unsigned before = area_terms(s) & ((1u << term) - 1);
        if (to->terms[term])
            ops->read(base, to->terms[term], area_of(d, job, AREA + size_t(__builtin_popcount(before))),
                      n * sizeof(float));
    }
    if (to->score) ops->read(base, to->score, area_of(d, job, 0), skv_job_candidates(job) * sizeof *to->score);
    if (to->kept) ops->read(base, to->kept, area_of(d, job, KEPT), size_t(job->n_kept) * sizeof *to->kept);
}
