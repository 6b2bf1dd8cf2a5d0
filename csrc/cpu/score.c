/* The terms of a head (METHOD.md §2, §3, §5, §6) and their weighted sum. One thread works on a head at a time. */
#include <math.h>
#include <string.h>

#include "../random.h"
#include "heads.h"

static void load_queries(head_work *w) {
    w->n_queries = head_queries(w->device, w->job);
    for (size_t i = 0; i < w->n_queries; i++)
        for (size_t g = 0; g < w->group; g++) {
            float *to = w->queries + (i * w->group + g) * w->stride;
            memcpy(to, head_query(w->device, w->job, i, g), w->dim * sizeof *to);
            memset(to + w->dim, 0, (w->stride - w->dim) * sizeof *to);
        }
}

/* z [rows, padded(L)] ← logits of the candidates: the group's maximum, or a row for each query head. */
static size_t load_logits(head_work *w, size_t ld) {
    const skv_kernels *kernels = w->device->kernels;
    const size_t n = w->n_candidates, n_queries = w->n_queries * w->group;
    const size_t share = w->scoring->needs & SKV_QUERY_HEADS ? 1 : w->group; /* queries that share a row */
    const float scale = 1.0f / sqrtf((float)w->dim);
    for (size_t first = 0; first < n_queries; first += SKV_COLUMNS) { /* sixteen queries against all keys */
        const size_t columns = n_queries - first < SKV_COLUMNS ? n_queries - first : SKV_COLUMNS;
        kernels->columns(w->queries + first * w->stride, w->stride, columns, w->panel);
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
    /* The largest of the neighbours, one distance after the other: a loop over all slots that vectors can do. */
    memset(out, 0, n * sizeof *out);
    for (size_t shift = 0; shift <= half && shift < n; shift++) {
        for (size_t j = 0; j + shift < n; j++) out[j] = mean[j + shift] > out[j] ? mean[j + shift] : out[j];
        for (size_t j = shift; j < n; j++) out[j] = mean[j - shift] > out[j] ? mean[j - shift] : out[j];
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
 * keys at a time, and a row leaves the search once it has found its own. lost[j] ← Σ of S[i, r(i)] over the rows
 * with r(i) = j. */
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
        if (!few) kernels->columns(keys, w->stride, columns, w->panel);
        w->job->n_pairs += n_active * columns;
        size_t still = 0;
        for (size_t row0 = 0; row0 < n_active; row0 += ROWS) {
            const size_t rows = n_active - row0 < ROWS ? n_active - row0 : ROWS;
            const float *row[ROWS];
            bool hit[ROWS];
            for (size_t r = 0; r < rows; r++) {
                row[r] = w->unit + (size_t)w->active[row0 + r] * w->stride;
                if (few) kernels->inner(row[r], keys, columns, w->stride, w->products + r * SKV_COLUMNS);
            }
            if (!few) kernels->products(w->panel, row, rows, w->dim, w->products);
            kernels->exceed(w->products, rows, 0.5f, hit);
            for (size_t r = 0; r < rows; r++) {
                const size_t i = (size_t)w->active[row0 + r];
                const float *cosine = w->products + r * SKV_COLUMNS;
                size_t j = hit[r] ? columns : 0;
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
    float *terms[SKV_N_TERMS], *score = head_score(w->device, job);
    for (unsigned term = 0; term < SKV_N_TERMS; term++)
        terms[term] = s->keep & 1u << term ? head_term(w->device, s, job, term) : w->terms[term];
    head_gather(w->device, job, s->needs & OF_KEYS ? w->keys : NULL, w->positions,
                s->needs & 1u << SKV_SUMS ? terms[SKV_SUMS] : NULL);
    bool first = true;
    for (unsigned term = 0; term < SKV_N_TERMS; term++) {
        if (!(s->needs & 1u << term)) continue;
        if (term_kernels[term]) term_kernels[term](w, terms[term]);
        const float weight = s->weights[term], *values = terms[term];
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
    float *mean = head_score(d, jobs);
    for (size_t h = 1; h < n_heads; h++)
        for (size_t j = 0; j < n; j++) mean[j] += head_score(d, jobs + h)[j];
    for (size_t j = 0; j < n; j++) mean[j] /= (float)n_heads;
    for (size_t h = 1; h < n_heads; h++) memcpy(head_score(d, jobs + h), mean, n * sizeof *mean);
}

static void score_heads(const void *argument, cpu_range r) {
    const head_jobs *j = argument;
    head_work w = head_of_thread(j->device, j->scoring, r.thread);
    for (size_t i = r.first; i < r.end; i++)
        if (j->jobs[i].scored) score_head(&w, j->jobs + i);
}

void cpu_score(skv_device *base, const skv_scoring *s, skv_job *jobs, size_t n_jobs) {
    const cpu_device *d = cpu_of(base);
    const size_t n_kv = (size_t)d->work.config->n_kv_heads;
    for (size_t i = 0, at = 0; i < n_jobs; at += head_area(s, jobs + i++)) jobs[i].at = at;
    cpu_run(d->threads, n_jobs, SIZE_MAX, score_heads, &(head_jobs){d, s, jobs, 1});
    if (!(s->needs & SKV_SHARED)) return;
    for (size_t i = 0; i < n_jobs; i += n_kv)
        if (jobs[i].scored) share_scores(d, jobs + i, n_kv);
}

void cpu_put_score(skv_device *base, const skv_job *job, const float *score) {
    memcpy(head_score(cpu_of(base), job), score, skv_job_candidates(job) * sizeof *score);
}
