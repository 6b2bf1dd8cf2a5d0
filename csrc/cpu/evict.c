/* Compaction on the CPU (METHOD.md §2, §3, §5, §6): every head's terms and score, which slots stay, and the moves. One
 * thread works on a head at a time. */
#include <math.h>
#include <omp.h>
#include <stdlib.h>
#include <string.h>

#include "../random.h"
#include "cpu.h"

/* Rows of products computed at a time. */
enum { ROWS = 48 };

/* A thread's arrays for one head of L slots, [padded(L)] each unless said otherwise. */
typedef struct head_work {
    const cpu_device *device;
    const skv_scoring *scoring;
    skv_job *job;
    size_t n_slots, n_candidates, n_queries, group, dim, stride;
    float *keys;    /* [L, stride] float32, zero beyond dim */
    float *unit;    /* [L, stride] keys of length 1 */
    float *queries; /* [n_queries, group, stride], oldest first */
    float *terms[SKV_N_TERMS];
    float *z;           /* [window, padded(L)] logits; of every query head where they count one by one */
    float *panel;       /* [dim, SKV_COLUMNS] */
    float *products;    /* [ROWS, SKV_COLUMNS] */
    float *sum;         /* [stride] Σ unit */
    float *self, *lost; /* unit · unit; see search_hits */
    float *scratch;     /* [2 padded(L)], of all heads of a layer where they share their budgets */
    int32_t *active;    /* rows without a hit so far */
    int32_t *positions;
    int32_t *wanted, *ends; /* [n_kv_heads] see share_budget */
} head_work;

/* Lays the arrays out from block on, if it is not NULL; returns the floats they take. */
static size_t lay_out(const skv_workload *work, head_work *w, float *block) {
    const size_t stride = (size_t)work->cache.stride, n = work->scored_slots, row = padded(n);
    const size_t n_kv = (size_t)work->config->n_kv_heads, group = (size_t)work->config->n_heads / n_kv;
    const size_t rows = (size_t)work->window * (work->needs & SKV_QUERY_HEADS ? group : 1);
    const size_t pooled = work->needs & SKV_BY_LAYER ? n_kv : 1;
    struct {
        float **floats;
        int32_t **integers;
        size_t n;
    } const parts[] = {
        {&w->keys, NULL, n * stride},
        {&w->unit, NULL, n * stride},
        {&w->queries, NULL, (size_t)work->window * group * stride},
        {&w->z, NULL, rows * row},
        {&w->panel, NULL, stride * SKV_COLUMNS},
        {&w->products, NULL, ROWS * SKV_COLUMNS},
        {&w->sum, NULL, stride},
        {&w->self, NULL, row},
        {&w->lost, NULL, row},
        {&w->scratch, NULL, 2 * row * pooled},
        {NULL, &w->active, row},
        {NULL, &w->positions, row},
        {NULL, &w->wanted, n_kv},
        {NULL, &w->ends, n_kv},
    };
    size_t at = 0;
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++) {
        if (block && parts[i].floats) *parts[i].floats = block + at;
        if (block && parts[i].integers) *parts[i].integers = (int32_t *)(void *)(block + at);
        at += (parts[i].n + 15) / 16 * 16;
    }
    for (size_t i = 0; i < SKV_N_TERMS; i++, at += row)
        if (block) w->terms[i] = block + at;
    return at;
}

size_t cpu_scoring_floats(const skv_workload *work) { return lay_out(work, &(head_work){0}, NULL); }

/* A job's area: its score, its kept terms in order, and its kept slots; padded(L) each. */
static size_t area_parts(unsigned keep) { return 2 + (size_t)__builtin_popcount(keep); }

size_t cpu_scores_floats(const skv_workload *work) {
    const size_t n_heads = (size_t)work->config->n_layers * (size_t)work->config->n_kv_heads;
    return work->n_due * (work->due_slots + 32 * n_heads) * area_parts(work->keep);
}

static float *score_of(const cpu_device *d, const skv_job *job) { return d->scores + job->at; }

static float *kept_term(const cpu_device *d, const skv_scoring *s, const skv_job *job, unsigned term) {
    const unsigned before = s->keep & ((1u << term) - 1);
    return d->scores + job->at + (1 + (size_t)__builtin_popcount(before)) * padded((size_t)job->n_slots);
}

static int32_t *keep_of(const cpu_device *d, const skv_scoring *s, const skv_job *job) {
    const size_t before = area_parts(s->keep) - 1;
    return (int32_t *)(void *)(d->scores + job->at + before * padded((size_t)job->n_slots));
}

/* The slot that is the i-th held one. */
static size_t held_slot(const skv_job *job, size_t i) {
    if (!job->held) return i;
    return i < (size_t)job->n_held ? (size_t)job->held[i] : (size_t)job->end + i - (size_t)job->n_held;
}

/* keys [L, stride] as float32, positions [L], sums [L] ← the held slots; keys and sums may be NULL. */
static void gather(const cpu_device *d, const skv_job *job, float *keys, int32_t *positions, float *sums) {
    const skv_cache_shape *cache = &d->work.cache;
    const size_t n = (size_t)job->n_slots, stride = (size_t)cache->stride;
    for (size_t i = 0, run; i < n; i += run) {
        const size_t slot = held_slot(job, i), page = slot / SKV_PAGE, at = slot % SKV_PAGE;
        run = job->held ? 1 : n - i < SKV_PAGE ? n - i : SKV_PAGE; /* without a list page by page */
        memcpy(positions + i, page_positions(cache, job->head, page) + at, run * sizeof *positions);
        if (sums) memcpy(sums + i, page_sums(cache, job->head, page) + at, run * sizeof *sums);
        if (!keys) continue;
        const float *from = page_f32(d, page_keys(job->head, page) + at * cache->slot_bytes, run, keys + i * stride);
        if (from != keys + i * stride) memcpy(keys + i * stride, from, run * stride * sizeof *keys);
    }
}

static size_t n_queries_of(const cpu_device *d, const skv_job *job) {
    const size_t window = (size_t)d->work.window, fed = (size_t)job->due->n_tokens;
    return fed < window ? fed : window;
}

/* The i-th of the n newest queries of a head of the job's group, oldest first. */
static const float *query_of(const cpu_device *d, const skv_job *job, size_t n, size_t i, size_t g) {
    const skv_config *c = d->work.config;
    const size_t window = (size_t)d->work.window, n_heads = (size_t)c->n_heads, group = n_heads / (size_t)c->n_kv_heads;
    const size_t place = ((size_t)job->due->n_tokens - n + i) % window;
    const size_t query = ((size_t)job->layer * window + place) * n_heads + (size_t)job->kv_head * group + g;
    return job->due->ring + query * (size_t)c->head_dim;
}

static void load_queries(head_work *w) {
    w->n_queries = n_queries_of(w->device, w->job);
    for (size_t i = 0; i < w->n_queries; i++)
        for (size_t g = 0; g < w->group; g++) {
            float *to = w->queries + (i * w->group + g) * w->stride;
            memcpy(to, query_of(w->device, w->job, w->n_queries, i, g), w->dim * sizeof *to);
            memset(to + w->dim, 0, (w->stride - w->dim) * sizeof *to);
        }
}

/* panel [dim, SKV_COLUMNS] ← n rows of the given distance as its columns, zero beyond */
static void load_panel(const float *rows, size_t stride, size_t dim, size_t n, float *panel) {
    for (size_t j = 0; j < n; j++)
        for (size_t k = 0; k < dim; k++) panel[k * SKV_COLUMNS + j] = rows[j * stride + k];
    for (size_t j = n; j < SKV_COLUMNS; j++)
        for (size_t k = 0; k < dim; k++) panel[k * SKV_COLUMNS + j] = 0;
}

/* z [rows, padded(L)] ← logits of the candidates: the group's maximum, or a row for each query head. Returns the rows.
 */
static size_t load_logits(head_work *w, size_t ld) {
    const skv_kernels *kernels = w->device->kernels;
    const size_t n = w->n_candidates, n_queries = w->n_queries * w->group;
    const size_t share = w->scoring->needs & SKV_QUERY_HEADS ? 1 : w->group; /* queries that share a row */
    const float scale = 1.0f / sqrtf((float)w->dim);
    for (size_t first = 0; first < n_queries; first += SKV_COLUMNS) { /* sixteen queries against all keys */
        const size_t columns = n_queries - first < SKV_COLUMNS ? n_queries - first : SKV_COLUMNS;
        load_panel(w->queries + first * w->stride, w->stride, w->dim, columns, w->panel);
        for (size_t row0 = 0; row0 < n; row0 += ROWS) {
            const size_t rows = n - row0 < ROWS ? n - row0 : ROWS;
            const float *key[ROWS];
            for (size_t r = 0; r < rows; r++) key[r] = w->keys + (row0 + r) * w->stride;
            kernels->products(w->panel, key, rows, w->dim, w->products);
            for (size_t c = 0; c < columns; c++) {
                float *z = w->z + (first + c) / share * ld + row0;
                const bool fresh = (first + c) % share == 0;
                for (size_t r = 0; r < rows; r++) {
                    const float logit = w->products[r * SKV_COLUMNS + c] * scale;
                    z[r] = fresh || logit > z[r] ? logit : z[r];
                }
            }
        }
    }
    return n_queries / share;
}

static void importance(head_work *w, float *out) {
    const size_t n = w->n_candidates, ld = padded(w->n_slots), half = (size_t)w->scoring->method->kernel / 2;
    load_queries(w);
    const size_t rows = load_logits(w, ld);
    float *mean = w->scratch;
    memset(mean, 0, ld * sizeof *mean);
    if (!n) return;
    for (size_t q = 0; q < rows; q++) w->device->kernels->add_softmax(w->z + q * ld, n, mean);
    for (size_t j = 0; j < n; j++) mean[j] /= (float)rows;
    for (size_t j = 0; j < n; j++) {
        float max = 0;
        for (size_t i = j < half ? 0 : j - half; i < n && i <= j + half; i++) max = mean[i] > max ? mean[i] : max;
        out[j] = max;
    }
}

/* unit, sum and self of the keys. */
static void normalise(head_work *w) {
    const skv_kernels *kernels = w->device->kernels;
    double sums[SKV_MAX_HEAD_DIM] = {0};
    for (size_t i = 0; i < w->n_slots; i += ROWS) {
        const size_t rows = w->n_slots - i < ROWS ? w->n_slots - i : ROWS;
        float *unit = w->unit + i * w->stride;
        kernels->normalise(w->keys + i * w->stride, rows, w->stride, unit, w->sum);
        for (size_t k = 0; k < w->dim; k++) sums[k] += (double)w->sum[k];
        for (size_t r = 0; r < rows; r++) {
            const float *key = unit + r * w->stride;
            kernels->inner(key, key, 1, w->stride, w->self + i + r);
        }
    }
    for (size_t k = 0; k < w->dim; k++) w->sum[k] = (float)sums[k];
}

/* r(i) of every slot i (METHOD.md §3): the last key similar to it is searched from the newest key downwards, sixteen
 * keys at a time, and a row leaves the search once it has found its own. lost[j] ← Σ of S[i, r(i)] over the rows with
 * r(i) = j. */
static void search_hits(head_work *w) {
    const skv_kernels *kernels = w->device->kernels;
    size_t n_active = w->n_slots;
    for (size_t i = 0; i < w->n_slots; i++) w->active[i] = (int32_t)i, w->lost[i] = 0;
    for (size_t end = w->n_slots, first; end > 0 && n_active > 0; end = first) {
        /* Blocks end at multiples of their size, so that the last one holds key 0 and no key is looked at twice. */
        first = (end - 1) / SKV_COLUMNS * SKV_COLUMNS;
        const size_t columns = end - first;
        const float *keys = w->unit + first * w->stride;
        const bool few = n_active < 8; /* a panel would cost more than it saves */
        if (!few) load_panel(keys, w->stride, w->dim, columns, w->panel);
        w->job->n_pairs += n_active * columns;
        size_t still = 0;
        for (size_t row0 = 0; row0 < n_active; row0 += ROWS) {
            const size_t rows = n_active - row0 < ROWS ? n_active - row0 : ROWS;
            const float *row[ROWS];
            for (size_t r = 0; r < rows; r++) {
                row[r] = w->unit + (size_t)w->active[row0 + r] * w->stride;
                if (few) kernels->inner(row[r], keys, columns, w->stride, w->products + r * SKV_COLUMNS);
            }
            if (!few) kernels->products(w->panel, row, rows, w->dim, w->products);
            for (size_t r = 0; r < rows; r++) {
                const size_t i = (size_t)w->active[row0 + r];
                const float *cosine = w->products + r * SKV_COLUMNS;
                size_t j = columns;
                while (j > 0 && !(cosine[j - 1] > 0.5f && first + j - 1 != i)) j--;
                if (j > 0)
                    w->lost[first + j - 1] += cosine[j - 1];
                else if (first > 0)
                    w->active[still++] = (int32_t)i;
                else if (i > 0) /* no hit at all: the row loses its first entry */
                    w->lost[0] += cosine[0];
            }
        }
        n_active = still;
    }
}

/* Without the L × L matrix: the column sums of S come from one vector sum, and only r(i) is searched for. */
static void redundancy(head_work *w, float *out) {
    const skv_kernels *kernels = w->device->kernels;
    const size_t n = w->n_slots;
    normalise(w);
    search_hits(w);
    float *c = w->scratch;
    kernels->inner(w->sum, w->unit, n, w->stride, c);
    for (size_t j = 0; j < n; j++) c[j] = (c[j] - w->self[j] - w->lost[j]) / (float)n;
    memset(out, 0, padded(n) * sizeof *out);
    kernels->add_softmax(c, n, out);
}

/* First slot at or after a position; positions ascend. */
static size_t lower_bound(const int32_t *positions, size_t n, int32_t position) {
    size_t low = 0, high = n;
    while (low < high) {
        const size_t middle = (low + high) / 2;
        if (positions[middle] < position)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

/* The slots of one sentence where they stand in order of score. */
static void penalise_everywhere(const head_work *w, const skv_penalty *p, bool pairs, float *out) {
    const skv_range range = p->positions;
    size_t n = 0;
    for (size_t j = 0; j < w->n_slots; j++) n += w->positions[j] >= range.first && w->positions[j] <= range.last;
    if (pairs && n < 2) return;
    for (size_t j = 0; j < w->n_slots; j++)
        if (w->positions[j] >= range.first && w->positions[j] <= range.last) out[j] = p->lambda;
}

static void penalty(head_work *w, float *out) {
    const skv_due *due = w->job->due;
    const unsigned compat = w->scoring->method->compat;
    const bool pairs = compat & SKV_COMPAT_PAIRS;
    memset(out, 0, w->n_slots * sizeof *out);
    if (!w->job->penalised) return;
    for (const skv_penalty *p = due->penalties; p < due->penalties + due->n_penalties; p++) {
        if (compat & SKV_COMPAT_SCORE_ORDER) {
            penalise_everywhere(w, p, pairs, out);
            continue;
        }
        const size_t first = lower_bound(w->positions, w->n_slots, p->positions.first);
        const size_t end = lower_bound(w->positions, w->n_slots, p->positions.last + 1);
        if (pairs && end - first < 2) continue;
        for (size_t j = first; j < end; j++) out[j] = p->lambda;
    }
}

static void position(head_work *w, float *out) {
    for (size_t j = 0; j < w->n_slots; j++) out[j] = (float)w->positions[j];
}

static void noise(head_work *w, float *out) {
    const skv_job *job = w->job;
    const uint64_t layer = (uint64_t)(job->due->first_layer + job->layer);
    const uint64_t parts[] = {(uint64_t)job->due->sequence[0], (uint64_t)job->due->sequence[1], layer,
                              (uint64_t)job->kv_head};
    uint64_t x = skv_splitmix64((uint64_t)w->scoring->method->seed);
    for (size_t i = 0; i < 4; i++) x = skv_splitmix64(x ^ parts[i]);
    for (size_t j = 0; j < w->n_slots; j++)
        out[j] = (float)(skv_splitmix64(x ^ (uint64_t)w->positions[j]) >> 40) * 0x1p-24f;
}

static void key_norm(head_work *w, float *out) {
    for (size_t j = 0; j < w->n_slots; j++) {
        const float *key = w->keys + j * w->stride;
        w->device->kernels->inner(key, key, 1, w->stride, out + j);
        out[j] = sqrtf(out[j]);
    }
}

/* unit · s / ‖s‖ with s the sum of all unit keys */
static void key_likeness(head_work *w, float *out) {
    const skv_kernels *kernels = w->device->kernels;
    float squares;
    normalise(w);
    kernels->inner(w->sum, w->sum, 1, w->stride, &squares);
    const float norm = squares > 0 ? sqrtf(squares) : 1;
    kernels->inner(w->sum, w->unit, w->n_slots, w->stride, out);
    for (size_t j = 0; j < w->n_slots; j++) out[j] /= norm;
}

/* SKV_SUMS is gathered. */
static void (*const term_kernels[SKV_N_TERMS])(head_work *w, float *out) = {
    [SKV_POSITION] = position,         [SKV_IMPORTANCE] = importance, [SKV_REDUNDANCY] = redundancy,
    [SKV_PENALTY] = penalty,           [SKV_NOISE] = noise,           [SKV_KEY_NORM] = key_norm,
    [SKV_KEY_LIKENESS] = key_likeness,
};

/* Terms that need the keys as float32. */
enum { OF_KEYS = 1 << SKV_IMPORTANCE | 1 << SKV_REDUNDANCY | 1 << SKV_KEY_NORM | 1 << SKV_KEY_LIKENESS };

static void score_head(head_work *w, skv_job *job) {
    const skv_scoring *s = w->scoring;
    w->job = job;
    w->n_slots = (size_t)job->n_slots;
    w->n_candidates = skv_job_candidates(job);
    float *terms[SKV_N_TERMS], *score = score_of(w->device, job);
    for (unsigned term = 0; term < SKV_N_TERMS; term++)
        terms[term] = s->keep & 1u << term ? kept_term(w->device, s, job, term) : w->terms[term];
    gather(w->device, job, s->needs & OF_KEYS ? w->keys : NULL, w->positions,
           s->needs & 1u << SKV_SUMS ? terms[SKV_SUMS] : NULL);
    bool first = true;
    for (unsigned term = 0; term < SKV_N_TERMS; term++) {
        if (!(s->needs & 1u << term)) continue;
        if (term_kernels[term]) term_kernels[term](w, terms[term]);
        const float weight = s->weights[term], *values = terms[term];
        if (weight == 0) continue;
        for (size_t j = 0; j < w->n_candidates; j++) {
            const float part = weight * values[j];
            score[j] = first ? part : score[j] + part;
        }
        first = false;
    }
}

/* Every head of a layer ← the mean of its heads' scores. */
static void share_scores(const cpu_device *d, const skv_job *jobs, size_t n_heads) {
    const size_t n = skv_job_candidates(jobs);
    float *mean = score_of(d, jobs);
    for (size_t h = 1; h < n_heads; h++)
        for (size_t j = 0; j < n; j++) mean[j] += score_of(d, jobs + h)[j];
    for (size_t j = 0; j < n; j++) mean[j] /= (float)n_heads;
    for (size_t h = 1; h < n_heads; h++) memcpy(score_of(d, jobs + h), mean, n * sizeof *mean);
}

void cpu_score(skv_device *base, const skv_scoring *s, skv_job *jobs, size_t n_jobs) {
    const cpu_device *d = cpu_of(base);
    const skv_config *c = d->work.config;
    const size_t per_thread = cpu_scoring_floats(&d->work), n_kv = (size_t)c->n_kv_heads;
    for (size_t i = 0, at = 0; i < n_jobs; i++) {
        jobs[i].at = at;
        at += area_parts(s->keep) * padded((size_t)jobs[i].n_slots);
    }
#pragma omp parallel num_threads(base->n_threads)
    {
        head_work w = {.device = d,
                       .scoring = s,
                       .group = (size_t)(c->n_heads / c->n_kv_heads),
                       .dim = (size_t)c->head_dim,
                       .stride = (size_t)d->work.cache.stride};
        lay_out(&d->work, &w, d->scoring + (size_t)omp_get_thread_num() * per_thread);
#pragma omp for schedule(dynamic)
        for (size_t i = 0; i < n_jobs; i++)
            if (jobs[i].scored) score_head(&w, jobs + i);
    }
    if (!(s->needs & SKV_SHARED)) return;
    for (size_t i = 0; i < n_jobs; i += n_kv)
        if (jobs[i].scored) share_scores(d, jobs + i, n_kv);
}

void cpu_put_score(skv_device *base, const skv_job *job, const float *score) {
    memcpy(score_of(cpu_of(base), job), score, skv_job_candidates(job) * sizeof *score);
}

/* The k-th largest of n numbers (k ≥ 1), which are reordered. */
static float kth_largest(float *x, size_t n, size_t k) {
    size_t low = 0, high = n - 1, target = k - 1;
    while (low < high) {
        const float pivot = x[low + (high - low) / 2];
        size_t i = low, j = high;
        for (;;) { /* larger numbers to the left */
            while (x[i] > pivot) i++;
            while (x[j] < pivot) j--;
            if (i >= j) break;
            const float swapped = x[i];
            x[i++] = x[j];
            x[j--] = swapped;
        }
        if (target <= j)
            high = j;
        else
            low = j + 1;
    }
    return x[target];
}

typedef struct scored_slot {
    float score;
    int32_t slot;
} scored_slot;

static int by_descending_score(const void *a, const void *b) {
    const scored_slot *x = a, *y = b;
    return x->score != y->score ? (x->score < y->score) - (x->score > y->score)
                                : (x->slot > y->slot) - (x->slot < y->slot);
}

/* scores ← those of the candidates that are not protected; returns their number. */
static size_t free_scores(const head_work *w, float *scores) {
    const float *score = score_of(w->device, w->job);
    size_t n = 0;
    for (size_t j = 0; j < w->n_candidates; j++)
        if (w->positions[j] >= w->job->due->first) scores[n++] = score[j];
    return n;
}

/* keep ← what is protected, and the `wanted` highest of the n_free others, ties to the lower slot; ascending.
 * free_score [n_free] is reordered. Returns how many there are. */
static size_t keep_best(const head_work *w, float *free_score, size_t n_free, size_t wanted, int32_t *keep) {
    const float *score = score_of(w->device, w->job);
    const int32_t first = w->job->due->first;
    float threshold = -INFINITY;
    size_t ties = n_free, kept = 0;
    if (wanted < n_free) {
        threshold = wanted ? kth_largest(free_score, n_free, wanted) : INFINITY;
        ties = wanted;
        for (size_t j = 0; j < w->n_candidates; j++) ties -= w->positions[j] >= first && score[j] > threshold;
    }
    for (size_t j = 0; j < w->n_slots; j++) {
        bool stays = j >= w->n_candidates || w->positions[j] < first || score[j] > threshold;
        if (!stays && score[j] == threshold && ties > 0) {
            ties--;
            stays = true;
        }
        if (stays) keep[kept++] = (int32_t)j;
    }
    return kept;
}

/* Candidates in order of score (compat); the newest stay behind them. */
static void order_by_score(const head_work *w, int32_t *keep, size_t kept) {
    const float *score = score_of(w->device, w->job);
    scored_slot *order = (scored_slot *)(void *)w->scratch;
    const size_t n = kept - (w->n_slots - w->n_candidates);
    for (size_t i = 0; i < n; i++) order[i] = (scored_slot){score[keep[i]], keep[i]};
    qsort(order, n, sizeof *order, by_descending_score);
    for (size_t i = 0; i < n; i++) keep[i] = order[i].slot;
}

/* Marks the sentences of which a slot stays; keep NULL: all stay. */
static void mark_alive(const head_work *w, const int32_t *keep) {
    const skv_due *due = w->job->due;
    int32_t before = -1;
    for (size_t i = 0, sentence = 0; i < (size_t)w->job->n_kept; i++) {
        const int32_t at = w->positions[keep ? (size_t)keep[i] : i];
        if (at < before) sentence = 0; /* slots in order of score */
        before = at;
        while (sentence < due->n_sentences && due->sentences[sentence].last < at) sentence++;
        if (sentence == due->n_sentences || due->sentences[sentence].first > at) continue;
        w->job->any_sentence = true;
        __atomic_store_n(due->alive + sentence, 1, __ATOMIC_RELAXED); /* other heads of the row may mark it, too */
    }
}

static void take(head_work *w, skv_job *job) {
    w->job = job;
    w->n_slots = (size_t)job->n_slots;
    w->n_candidates = skv_job_candidates(job);
    gather(w->device, job, NULL, w->positions, NULL);
}

/* How many of a head's n_free unprotected candidates fill `places`. */
static size_t wanted_of(const head_work *w, size_t n_free, size_t places) {
    const size_t fixed = w->n_slots - n_free, wanted = places > fixed ? places - fixed : 0;
    return wanted < n_free ? wanted : n_free;
}

/* What stays of one head: `wanted` of its unprotected candidates, or with NULL as many as its budget has room for. */
static void select_head(head_work *w, skv_job *job, const int32_t *wanted) {
    take(w, job);
    if (!job->scored) {
        job->n_kept = job->n_slots;
        mark_alive(w, NULL);
        return;
    }
    int32_t *keep = keep_of(w->device, w->scoring, job);
    const size_t n_free = free_scores(w, w->scratch);
    const size_t n_best = wanted ? (size_t)*wanted : wanted_of(w, n_free, (size_t)job->budget);
    job->n_kept = (int32_t)keep_best(w, w->scratch, n_free, n_best, keep);
    if (w->scoring->method->compat & SKV_COMPAT_SCORE_ORDER && (wanted || job->n_slots >= job->budget))
        order_by_score(w, keep, (size_t)job->n_kept);
    mark_alive(w, keep);
}

/* allocate="layer" (METHOD.md §5): w->wanted ← how many unprotected candidates of each head stay. Each has a fifth of
 * its budget for sure; what is left of all budgets goes to the best of all, ties to the lower head. */
static void share_budget(head_work *w, skv_job *jobs, size_t n_heads) {
    float *pool = w->scratch; /* scores of those that are not sure to stay, head by head up to `ends` */
    size_t n_pool = 0, budget = 0, taken = 0;
    for (size_t h = 0; h < n_heads; h++) {
        float *scores = pool + n_pool;
        take(w, jobs + h);
        const size_t n_free = free_scores(w, scores), sure = wanted_of(w, n_free, ((size_t)jobs[h].budget + 4) / 5);
        if (sure && sure < n_free) kth_largest(scores, n_free, sure); /* brings the best to the front */
        memmove(scores, scores + sure, (n_free - sure) * sizeof *scores);
        n_pool += n_free - sure;
        budget += (size_t)jobs[h].budget, taken += w->n_slots - n_free + sure;
        w->wanted[h] = (int32_t)sure, w->ends[h] = (int32_t)n_pool;
    }
    size_t left = budget > taken ? budget - taken : 0;
    if (left > n_pool) left = n_pool;
    if (!left) return;
    float *sorted = pool + n_pool;
    memcpy(sorted, pool, n_pool * sizeof *pool);
    const float threshold = kth_largest(sorted, n_pool, left);
    for (size_t j = 0; j < n_pool; j++) left -= pool[j] > threshold;
    for (size_t j = 0, h = 0; j < n_pool; j++) {
        while (j >= (size_t)w->ends[h]) h++;
        const bool tie = pool[j] == threshold && left > 0;
        left -= tie;
        w->wanted[h] += tie || pool[j] > threshold;
    }
}

void cpu_select(skv_device *base, const skv_scoring *s, skv_job *jobs, size_t n_jobs) {
    const cpu_device *d = cpu_of(base);
    const size_t per_thread = cpu_scoring_floats(&d->work);
    const size_t heads = s->needs & SKV_BY_LAYER ? (size_t)d->work.config->n_kv_heads : 1; /* selected together */
#pragma omp parallel num_threads(base->n_threads)
    {
        head_work w = {.device = d, .scoring = s};
        lay_out(&d->work, &w, d->scoring + (size_t)omp_get_thread_num() * per_thread);
#pragma omp for schedule(dynamic)
        for (size_t i = 0; i < n_jobs / heads; i++) {
            skv_job *first = jobs + i * heads;
            const bool shared = (s->needs & SKV_BY_LAYER) && first->scored;
            if (shared) share_budget(&w, first, heads);
            for (size_t h = 0; h < heads; h++) select_head(&w, first + h, shared ? w.wanted + h : NULL);
        }
    }
}

/* Slots 0 … n − 1 of one part of the pages ← the slots keep; scratch [n, width] bytes. */
static void move(const skv_job *job, const int32_t *keep, size_t at, size_t width, bool ascending, char *scratch) {
    char *const *pages = job->head->pages;
    const size_t n = (size_t)job->n_kept;
    for (size_t i = 0; i < n; i++) { /* ascending slots only move down: nothing is overwritten before it has moved */
        const size_t from = (size_t)keep[i];
        const char *source = pages[from / SKV_PAGE] + at + from % SKV_PAGE * width;
        char *to = ascending ? pages[i / SKV_PAGE] + at + i % SKV_PAGE * width : scratch + i * width;
        if (to != source) memcpy(to, source, width);
    }
    if (ascending) return;
    for (size_t i = 0; i < n; i++) memcpy(pages[i / SKV_PAGE] + at + i % SKV_PAGE * width, scratch + i * width, width);
}

static void compact_head(const cpu_device *d, const skv_scoring *s, const skv_job *job, head_work *w) {
    const skv_cache_shape *cache = &d->work.cache;
    const int32_t *keep = keep_of(d, s, job);
    const size_t n = (size_t)job->n_kept;
    if (job->held) { /* keep may be in any order, so the new list is made beside the old one */
        for (size_t i = 0; i < n; i++) w->active[i] = (int32_t)held_slot(job, (size_t)keep[i]);
        memcpy(job->held, w->active, n * sizeof *w->active);
        return;
    }
    bool ascending = true;
    for (size_t i = 1; i < n; i++) ascending &= keep[i - 1] < keep[i];
    if (ascending && job->n_kept == job->n_slots) return;
    char *scratch = (char *)w->keys;
    move(job, keep, 0, cache->slot_bytes, ascending, scratch);
    move(job, keep, cache->values_at, cache->slot_bytes, ascending, scratch);
    move(job, keep, cache->positions_at, sizeof(int32_t), ascending, scratch);
    if (cache->sums) move(job, keep, cache->sums_at, sizeof(float), ascending, scratch);
}

void cpu_compact(skv_device *base, const skv_scoring *s, const skv_job *jobs, size_t n_jobs) {
    const cpu_device *d = cpu_of(base);
    const size_t per_thread = cpu_scoring_floats(&d->work);
#pragma omp parallel num_threads(base->n_threads)
    {
        head_work w;
        lay_out(&d->work, &w, d->scoring + (size_t)omp_get_thread_num() * per_thread);
#pragma omp for schedule(dynamic)
        for (size_t i = 0; i < n_jobs; i++)
            if (jobs[i].scored) compact_head(d, s, jobs + i, &w);
    }
}

void cpu_fetch(skv_device *base, const skv_scoring *s, const skv_job *job, skv_fetched *to) {
    const cpu_device *d = cpu_of(base);
    const size_t n = (size_t)job->n_slots, candidates = skv_job_candidates(job), stride = (size_t)d->work.cache.stride;
    const size_t dim = (size_t)d->work.config->head_dim;
    const size_t group = (size_t)(d->work.config->n_heads / d->work.config->n_kv_heads);
    head_work w;
    lay_out(&d->work, &w, d->scoring);
    gather(d, job, to->keys ? w.keys : NULL, w.positions, NULL);
    if (to->positions) memcpy(to->positions, w.positions, n * sizeof *w.positions);
    for (size_t i = 0; i < n; i++)
        if (to->keys) memcpy(to->keys + i * dim, w.keys + i * stride, dim * sizeof *w.keys);
    to->n_queries = n_queries_of(d, job);
    for (size_t i = 0; i < to->n_queries; i++)
        for (size_t g = 0; g < group; g++)
            if (to->queries)
                memcpy(to->queries + (g * to->n_queries + i) * dim, query_of(d, job, to->n_queries, i, g),
                       dim * sizeof *to->queries);
    for (unsigned term = 0; term < SKV_N_TERMS; term++)
        if (to->terms[term]) memcpy(to->terms[term], kept_term(d, s, job, term), n * sizeof(float));
    if (to->score) memcpy(to->score, score_of(d, job), candidates * sizeof *to->score);
    if (to->kept) memcpy(to->kept, keep_of(d, s, job), (size_t)job->n_kept * sizeof *to->kept);
}
