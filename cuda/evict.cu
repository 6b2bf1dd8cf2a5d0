/* Which slots of a compaction stay (METHOD.md §5), and the moves.
 *
 * kernel           grid, block                moves                               why
 * select_kernel    [heads, or layers], 256    scores: four passes of the radix    exact thresholds, ties to the lower
 *                                             select, one that writes             slot, no sort
 * compact_kernel   [jobs, 2], 256             each moved slot once                in place: slots only move down; keys
 *                                                                                 and positions, values and sums
 * reorder_kernel   [64], 256                  each slot twice, through scratch    slots in order of score (compat)
 */
#include <cstring>

#include "jobs.cuh"

/* ---- selection ---- */

/* Unsigned numbers in the order of the scores; −0 and 0 are equal. */
static __device__ __forceinline__ uint32_t ordered(float score) {
    const uint32_t bits = __float_as_uint(score + 0.0f);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

static __device__ __forceinline__ bool is_free(const cu_job &job, int32_t j) { return job.positions[j] >= job.first; }

/* How many threads before this one, and how many of the block, say yes. scratch [WARPS] shared. */
static __device__ int32_t block_rank(bool yes, int32_t *scratch, int32_t *total) {
    const uint32_t ballot = __ballot_sync(0xffffffffu, yes), lane = threadIdx.x % WARP;
    __syncthreads();
    if (lane == 0) scratch[threadIdx.x / WARP] = __popc(ballot);
    __syncthreads();
    int32_t before = 0, sum = 0;
    for (int32_t w = 0; w < WARPS; w++) {
        before += w < int32_t(threadIdx.x / WARP) ? scratch[w] : 0;
        sum += scratch[w];
    }
    *total = sum;
    return before + __popc(ballot & ((1u << lane) - 1));
}

/* A head whose candidates take part in a search for a threshold: those below `most`, of those equal to it all but
 * `taken`; none at all if it is closed. */
struct head_share {
    uint32_t most;
    int32_t taken, sure, wanted;
    bool closed;
};

/* The k-th largest (k ≥ 1) of the free candidates of n_heads jobs that their shares leave. hist [256 + 2] shared. */
static __device__ uint32_t kth_largest(const cu_job *jobs, const head_share *shares, int32_t n_heads, int32_t k,
                                       int32_t *hist) {
    uint32_t prefix = 0, mask = 0;
    for (int shift = 24; shift >= 0; shift -= 8) {
        __syncthreads();
        for (int32_t i = int32_t(threadIdx.x); i < 256; i += THREADS) hist[i] = 0;
        __syncthreads();
        for (int32_t h = 0; h < n_heads; h++) {
            const cu_job &job = jobs[h];
            if (shares[h].closed) continue;
            for (int32_t j = int32_t(threadIdx.x); j < job.n_candidates; j += THREADS) {
                const uint32_t key = ordered(job.score[j]);
                if (is_free(job, j) && key <= shares[h].most && (key & mask) == prefix)
                    atomicAdd(hist + (key >> shift & 255), 1);
            }
            if (threadIdx.x == 0 && shares[h].taken && (shares[h].most & mask) == prefix)
                atomicAdd(hist + (shares[h].most >> shift & 255), -shares[h].taken);
        }
        __syncthreads();
        if (threadIdx.x == 0) {
            int32_t left = k, bin = 255;
            while (bin > 0 && hist[bin] < left) left -= hist[bin--];
            hist[256] = bin, hist[257] = left;
        }
        __syncthreads();
        prefix |= uint32_t(hist[256]) << shift;
        mask |= 255u << shift;
        k = hist[257];
    }
    return prefix;
}

/* Free candidates above and at a threshold. counts [2] shared. */
static __device__ int2 count_above(const cu_job &job, uint32_t threshold, int32_t *counts) {
    __syncthreads();
    if (threadIdx.x < 2) counts[threadIdx.x] = 0;
    __syncthreads();
    for (int32_t j = int32_t(threadIdx.x); j < job.n_candidates; j += THREADS) {
        const uint32_t key = ordered(job.score[j]);
        if (is_free(job, j) && key >= threshold) atomicAdd(counts + (key == threshold), 1);
    }
    __syncthreads();
    return make_int2(counts[0], counts[1]);
}

static __device__ int32_t count_free(const cu_job &job, int32_t *scratch) {
    int32_t n = 0, total;
    for (int32_t first = 0; first < job.n_candidates; first += THREADS) {
        const int32_t j = first + int32_t(threadIdx.x);
        block_rank(j < job.n_candidates && is_free(job, j), scratch, &total);
        n += total;
    }
    return n;
}

/* How many of a head's n_free unprotected candidates fill `places`. */
static __device__ int32_t wanted_of(const cu_job &job, int32_t n_free, int32_t places) {
    return min(max(places - (job.n_slots - n_free), 0), n_free);
}

/* shares[h].wanted ← how many unprotected candidates of each head of a layer stay: each has a fifth of its budget for
 * sure, what is left of all budgets goes to the best of all, ties to the lower head. */
static __device__ void share_budget(const cu_job *jobs, int32_t n_heads, head_share *shares, int32_t *hist) {
    int32_t budget = 0, taken = 0, pool = 0;
    for (int32_t h = 0; h < n_heads; h++) {
        const cu_job &job = jobs[h];
        const int32_t n_free = count_free(job, hist), sure = wanted_of(job, n_free, (job.budget + 4) / 5);
        head_share share = {0xffffffffu, 0, sure, sure, sure == n_free};
        __syncthreads();
        if (threadIdx.x == 0) shares[h] = {0xffffffffu, 0, 0, 0, false}; /* for this search all of them */
        __syncthreads();
        if (sure && sure < n_free) {
            share.most = kth_largest(jobs + h, shares + h, 1, sure, hist);
            share.taken = sure - count_above(job, share.most, hist).x;
        }
        __syncthreads();
        if (threadIdx.x == 0) shares[h] = share;
        budget += job.budget, taken += job.n_slots - n_free + sure, pool += n_free - sure;
    }
    __syncthreads();
    int32_t left = min(max(budget - taken, 0), pool);
    if (!left) return;
    const uint32_t threshold = kth_largest(jobs, shares, n_heads, left, hist);
    /* Pool members above and at the threshold, head by head. */
    for (int pass = 0; pass < 2; pass++)
        for (int32_t h = 0; h < n_heads; h++) {
            const head_share share = shares[h];
            int2 n = share.closed ? make_int2(0, 0) : count_above(jobs[h], threshold, hist);
            if (share.sure && !share.closed) { /* those that stay for sure are no members */
                const bool at = share.most == threshold;
                n.x -= share.most > threshold ? share.sure : at ? share.sure - share.taken : 0;
                n.y -= at ? share.taken : 0;
                if (share.most < threshold) n = make_int2(0, 0);
            }
            const int32_t more = pass == 0 ? n.x : min(n.y, left);
            left -= more;
            __syncthreads();
            if (threadIdx.x == 0) shares[h].wanted += more;
        }
    __syncthreads();
}

/* kept ← what is protected, and the `wanted` best of the others, ties to the lower slot; ascending. */
static __device__ int32_t keep_best(const cu_job &job, int32_t n_free, int32_t wanted, head_share *share,
                                    int32_t *hist) {
    uint32_t threshold = 0;
    int32_t ties = n_free, kept = 0;
    __syncthreads();
    if (threadIdx.x == 0) *share = {0xffffffffu, 0, 0, 0, false};
    __syncthreads();
    if (wanted < n_free) {
        threshold = wanted ? kth_largest(&job, share, 1, wanted, hist) : 0xffffffffu;
        ties = wanted - (wanted ? count_above(job, threshold, hist).x : 0);
    }
    for (int32_t first = 0; first < job.n_slots; first += THREADS) {
        const int32_t j = first + int32_t(threadIdx.x);
        const bool candidate = j < job.n_candidates && is_free(job, j);
        const uint32_t key = candidate ? ordered(job.score[j]) : 0;
        int32_t n_ties, n_stay;
        const int32_t tie = block_rank(candidate && key == threshold, hist, &n_ties);
        const bool stays = j < job.n_slots && (!candidate || key > threshold || (key == threshold && tie < ties));
        const int32_t at = block_rank(stays, hist, &n_stay);
        if (stays) job.kept[kept + at] = j;
        ties = max(ties - n_ties, 0);
        kept += n_stay;
    }
    __syncthreads();
    return kept;
}

/* Candidates in order of score (compat), ties to the lower slot; the newest stay behind them. */
static __device__ void order_by_score(const cu_job &job, int32_t kept) {
    const int32_t n = kept - (job.n_slots - job.n_candidates);
    for (int32_t i = int32_t(threadIdx.x); i < n; i += THREADS) job.hit[i] = job.kept[i];
    __syncthreads();
    for (int32_t i = int32_t(threadIdx.x); i < n; i += THREADS) {
        const float score = job.score[job.hit[i]];
        int32_t rank = 0;
        for (int32_t k = 0; k < n; k++) {
            const float other = job.score[job.hit[k]];
            rank += other > score || (other == score && k < i);
        }
        job.kept[rank] = job.hit[i];
    }
    __syncthreads();
}

/* Marks the sentences of which a slot stays; whether there is any. */
static __device__ bool mark_alive(const cu_job &job, int32_t kept) {
    bool any = false;
    for (int32_t i = int32_t(threadIdx.x); i < kept; i += THREADS) {
        const int32_t at = job.positions[job.scored ? job.kept[i] : i];
        int32_t low = 0, high = job.n_sentences; /* the first that ends at this position or later */
        while (low < high) {
            const int32_t middle = (low + high) / 2;
            if (job.sentences[middle].last < at)
                low = middle + 1;
            else
                high = middle;
        }
        if (low == job.n_sentences || job.sentences[low].first > at) continue;
        any = true;
        job.alive[low] = 1; /* whoever else writes, writes the same */
    }
    return __syncthreads_or(any);
}

static __global__ void __launch_bounds__(THREADS, 1)
    select_kernel(const cu_job *jobs, cu_cache cache, int32_t heads, bool by_score, cu_result *results) {
    CUDAX_SHARED(head_share, shares); /* [heads] */
    __shared__ int32_t hist[256 + 2];
    jobs += size_t(blockIdx.x) * size_t(heads), results += size_t(blockIdx.x) * size_t(heads);
    for (int32_t h = 0; h < heads; h++)
        for (int32_t j = int32_t(threadIdx.x); j < jobs[h].n_slots; j += THREADS)
            jobs[h].positions[j] = job_position(cache, jobs[h], j);
    __syncthreads();
    const bool shared = heads > 1 && jobs->scored;
    if (shared) share_budget(jobs, heads, shares, hist);
    for (int32_t h = 0; h < heads; h++) {
        const cu_job &job = jobs[h];
        int32_t kept = job.n_slots;
        if (job.scored) {
            const int32_t n_free = count_free(job, hist);
            const int32_t wanted = shared ? shares[h].wanted : wanted_of(job, n_free, job.budget);
            kept = keep_best(job, n_free, wanted, shares + h, hist);
            if (by_score && (shared || job.n_slots >= job.budget)) order_by_score(job, kept);
        }
        const bool any = mark_alive(job, kept);
        if (threadIdx.x == 0) results[h].n_kept = kept, results[h].any_sentence = any;
    }
}

void cu_select(skv_device *base, const skv_scoring *s, skv_job *jobs, size_t n_jobs) {
    cu_device *d = cu_of(base);
    const size_t heads = s->needs & SKV_BY_LAYER ? size_t(d->work.config->n_kv_heads) : 1; /* selected together */
    if (!cu_upload_jobs(d, s, jobs, n_jobs)) return;
    CU_LAUNCH(d, select_kernel, unsigned(n_jobs / heads), THREADS, heads * sizeof(head_share), cu_jobs(d), d->cache,
              int32_t(heads), (s->method->compat & SKV_COMPAT_SCORE_ORDER) != 0,
              static_cast<cu_result *>(d->results.data));
    size_t n_alive = 0;
    for (const cu_alive &part : d->sentences) n_alive += part.due->n_sentences;
    d->found.resize(n_jobs);
    d->alive.resize(n_alive);
    base->backend->read(base, d->found.data(), d->results.data, n_jobs * sizeof(cu_result));
    n_alive = 0;
    for (const cu_alive &part : d->sentences) {
        base->backend->read(base, d->alive.data() + n_alive, static_cast<char *>(d->page_lists.data) + part.at,
                            part.due->n_sentences);
        n_alive += part.due->n_sentences;
    }
    d->selected = jobs, d->n_selected = n_jobs;
}

void cu_deliver(cu_device *d) {
    size_t at = 0;
    if (!d->selected) return;
    for (size_t i = 0; i < d->n_selected; i++) {
        skv_job *job = d->selected + i;
        job->n_kept = d->found[i].n_kept;
        job->any_sentence |= d->found[i].any_sentence != 0;
        if (job->scored) job->n_pairs += d->found[i].n_pairs;
    }
    for (const cu_alive &part : d->sentences)
        for (size_t i = 0; i < part.due->n_sentences; i++) part.due->alive[i] |= d->alive[at++];
    d->selected = nullptr;
}

/* ---- moves ---- */

/* Slots are moved in groups of so many bytes of keys, or of values: four vectors a thread. */
constexpr int MOVED = 4 * 16 * THREADS;

static __device__ __forceinline__ char *vector_of(const cu_cache &cache, const cu_job &job, int32_t slot, size_t at,
                                                  int32_t i) {
    return job.pages[slot / SKV_PAGE] + at + size_t(slot % SKV_PAGE) * cache.slot_bytes + 16 * size_t(i);
}

/* Keys or values of slots 0 … n − 1 ← those of kept, ascending: a group reads at or above what it writes. */
static __device__ void close_vectors(const cu_cache &cache, const cu_job &job, int32_t n, size_t at) {
    const int32_t chunks = int32_t(cache.slot_bytes / 16), group = MOVED / int32_t(cache.slot_bytes);
    for (int32_t first = 0; first < n; first += group) {
        const int32_t vectors = min(group, n - first) * chunks;
        uint4 held[4];
#pragma unroll
        for (int k = 0; k < 4; k++) {
            const int32_t i = int32_t(threadIdx.x) + k * THREADS;
            if (i < vectors)
                held[k] = *reinterpret_cast<const uint4 *>(
                    vector_of(cache, job, job.kept[first + i / chunks], at, i % chunks));
        }
        __syncthreads();
#pragma unroll
        for (int k = 0; k < 4; k++) {
            const int32_t i = int32_t(threadIdx.x) + k * THREADS;
            if (i < vectors)
                *reinterpret_cast<uint4 *>(vector_of(cache, job, first + i / chunks, at, i % chunks)) = held[k];
        }
        __syncthreads();
    }
}

/* The same of positions, or of sums: one word a slot. */
static __device__ void close_words(const cu_job &job, int32_t n, size_t at) {
    for (int32_t first = 0; first < n; first += THREADS) {
        const int32_t i = first + int32_t(threadIdx.x);
        uint32_t held = 0;
        if (i < n) {
            const int32_t slot = job.kept[i];
            held = reinterpret_cast<const uint32_t *>(job.pages[slot / SKV_PAGE] + at)[slot % SKV_PAGE];
        }
        __syncthreads();
        if (i < n) reinterpret_cast<uint32_t *>(job.pages[i / SKV_PAGE] + at)[i % SKV_PAGE] = held;
        __syncthreads();
    }
}

/* A virtual set's list ← the slots that stay, which may be in any order. */
static __device__ void relist(const cu_job &job, int32_t n) {
    for (int32_t i = int32_t(threadIdx.x); i < n; i += THREADS) job.hit[i] = job_slot(job, job.kept[i]);
    __syncthreads();
    for (int32_t i = int32_t(threadIdx.x); i < n; i += THREADS) job.held[i] = job.hit[i];
}

static __global__ void __launch_bounds__(THREADS, 1)
    compact_kernel(const cu_job *jobs, cu_cache cache, const cu_result *results) {
    __shared__ cu_job job;
    load_job(jobs + blockIdx.x, &job);
    const int32_t n = results[blockIdx.x].n_kept;
    const bool first = blockIdx.y == 0;
    if (!job.scored) return; /* the whole block */
    if (job.held) {
        if (first) relist(job, n);
        return;
    }
    close_vectors(cache, job, n, first ? 0 : cache.values_at);
    if (first || cache.sums) close_words(job, n, first ? cache.positions_at : cache.sums_at);
}

/* One part of the slots, `words` uint32 wide each and at `at` in its page, in any order, through scratch. */
static __device__ void reorder(const cu_job &job, int32_t n, size_t at, int32_t words, uint32_t *scratch) {
    for (int pass = 0; pass < 2; pass++) {
        for (int32_t i = int32_t(threadIdx.x); i < n * words; i += THREADS) {
            const int32_t slot = pass ? i / words : job.kept[i / words];
            auto *place =
                reinterpret_cast<uint32_t *>(job.pages[slot / SKV_PAGE] + at) + slot % SKV_PAGE * words + i % words;
            if (pass)
                *place = scratch[i];
            else
                scratch[i] = *place;
        }
        __syncthreads();
    }
}

static __global__ void __launch_bounds__(THREADS, 1)
    reorder_kernel(const cu_job *jobs, size_t n_jobs, cu_cache cache, const cu_result *results, size_t each,
                   uint32_t *scratch) {
    __shared__ cu_job job;
    scratch += blockIdx.x * each;
    for (size_t i = blockIdx.x; i < n_jobs; i += gridDim.x) {
        __syncthreads(); /* the one before is done with */
        load_job(jobs + i, &job);
        const int32_t n = results[i].n_kept, words = int32_t(cache.slot_bytes / 4);
        if (!job.scored) continue;
        if (job.held) {
            relist(job, n);
            continue;
        }
        reorder(job, n, 0, words, scratch);
        reorder(job, n, cache.values_at, words, scratch);
        reorder(job, n, cache.positions_at, 1, scratch);
        if (cache.sums) reorder(job, n, cache.sums_at, 1, scratch);
    }
}

void cu_compact(skv_device *base, const skv_scoring *s, const skv_job *jobs, size_t n_jobs) {
    cu_device *d = cu_of(base);
    if (!cu_upload_jobs(d, s, jobs, n_jobs)) return;
    const auto *results = static_cast<const cu_result *>(d->results.data);
    if (!(s->method->compat & SKV_COMPAT_SCORE_ORDER)) {
        CU_LAUNCH(d, compact_kernel, dim3(unsigned(n_jobs), 2), THREADS, 0, cu_jobs(d), d->cache, results);
        return;
    }
    size_t most = 0;
    for (size_t i = 0; i < n_jobs; i++) most = size_t(jobs[i].n_slots) > most ? size_t(jobs[i].n_slots) : most;
    const size_t blocks = cu_orders(n_jobs), each = most * d->cache.slot_bytes / 4;
    if (!cu_grow(d, &d->order, blocks * each * 4)) return;
    CU_LAUNCH(d, reorder_kernel, unsigned(blocks), THREADS, 0, cu_jobs(d), n_jobs, d->cache, results, each,
              static_cast<uint32_t *>(d->order.data));
}
