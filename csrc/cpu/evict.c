/* Which slots of a compaction stay (METHOD.md §5), and the moves. One thread works on a head at a time. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "heads.h"

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
    const float *score = head_score(w->device, w->job);
    size_t n = 0;
    for (size_t j = 0; j < w->n_candidates; j++)
        if (w->positions[j] >= w->job->due->first) scores[n++] = score[j];
    return n;
}

/* keep ← what is protected, and the `wanted` highest of the n_free others, ties to the lower slot; ascending.
 * free_score [n_free] is reordered. Returns how many there are. */
static size_t keep_best(const head_work *w, float *free_score, size_t n_free, size_t wanted, int32_t *keep) {
    const float *score = head_score(w->device, w->job);
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
    const float *score = head_score(w->device, w->job);
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
    head_gather(w->device, job, NULL, w->positions, NULL);
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
    int32_t *keep = head_kept(w->device, w->scoring, job);
    const size_t n_free = free_scores(w, w->scratch);
    const size_t n_best = wanted ? (size_t)*wanted : wanted_of(w, n_free, (size_t)job->budget);
    job->n_kept = (int32_t)keep_best(w, w->scratch, n_free, n_best, keep);
    if (w->scoring->method->compat & SKV_COMPAT_SCORE_ORDER && (wanted || job->n_slots >= job->budget))
        order_by_score(w, keep, (size_t)job->n_kept);
    mark_alive(w, keep);
}

/* allocate="layer" (METHOD.md §5): w->wanted ← how many unprotected candidates of each head stay. Each has a fifth
 * of its budget for sure; what is left of all budgets goes to the best of all, ties to the lower head. */
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

static void select_heads(const void *argument, cpu_range r) {
    const head_jobs *j = argument;
    head_work w = head_of_thread(j->device, j->scoring, r.thread);
    for (size_t i = r.first; i < r.end; i++) {
        skv_job *first = j->jobs + i * j->together;
        const bool shared = (j->scoring->needs & SKV_BY_LAYER) && first->scored;
        if (shared) share_budget(&w, first, j->together);
        for (size_t h = 0; h < j->together; h++) select_head(&w, first + h, shared ? w.wanted + h : NULL);
    }
}

void cpu_select(skv_device *base, const skv_scoring *s, skv_job *jobs, size_t n_jobs) {
    const cpu_device *d = cpu_of(base);
    const size_t together = s->needs & SKV_BY_LAYER ? (size_t)d->work.config->n_kv_heads : 1;
    cpu_run(d->threads, n_jobs / together, SIZE_MAX, select_heads, &(head_jobs){d, s, jobs, together});
}

/* What a slot has in its page, `width` bytes wide from `at` on. */
typedef struct slot_part {
    size_t at, width;
} slot_part;

enum { MOST_PARTS = 6 };

static size_t parts_of(const skv_cache_shape *cache, slot_part *parts) {
    size_t n = 0;
    parts[n++] = (slot_part){0, cache->slot_bytes};
    parts[n++] = (slot_part){cache->values_at, cache->slot_bytes};
    parts[n++] = (slot_part){cache->positions_at, sizeof(int32_t)};
    if (cache->sums) parts[n++] = (slot_part){cache->sums_at, sizeof(float)};
    if (cache->type != SKV_Q8) return n;
    parts[n++] = (slot_part){cache->scales_at, sizeof(float)};
    parts[n++] = (slot_part){cache->scales_at + SKV_PAGE * sizeof(float), sizeof(float)};
    return n;
}

/* One part of the slots from … from + n − 1 goes to `to` and on; neither run leaves its page. */
static void move(char *const *pages, size_t to, size_t from, size_t n, slot_part p) {
    memmove(pages[to / SKV_PAGE] + p.at + to % SKV_PAGE * p.width,
            pages[from / SKV_PAGE] + p.at + from % SKV_PAGE * p.width, n * p.width);
}

/* Slots 0 … n − 1 ← keep, ascending: they only move down, so nothing is overwritten before it has moved. Runs of
 * slots that stay together move together, those before the first one that goes not at all. */
static void close_gaps(const skv_head *head, const int32_t *keep, size_t n, const slot_part *parts, size_t n_parts) {
    for (size_t i = 0, run; i < n; i += run) {
        const size_t from = (size_t)keep[i], left = SKV_PAGE - from % SKV_PAGE;
        const size_t room = SKV_PAGE - i % SKV_PAGE, most = left < room ? left : room;
        for (run = 1; i + run < n && (size_t)keep[i + run] == from + run && run < most;) run++;
        if (from == i) continue;
        for (size_t p = 0; p < n_parts; p++) move(head->pages, i, from, run, parts[p]);
    }
}

/* The same of slots in any order, through scratch [n, width] bytes. */
static void reorder(const skv_head *head, const int32_t *keep, size_t n, slot_part p, char *scratch) {
    char *const *pages = head->pages;
    for (size_t i = 0; i < n; i++) {
        const size_t from = (size_t)keep[i];
        memcpy(scratch + i * p.width, pages[from / SKV_PAGE] + p.at + from % SKV_PAGE * p.width, p.width);
    }
    for (size_t i = 0; i < n; i++)
        memcpy(pages[i / SKV_PAGE] + p.at + i % SKV_PAGE * p.width, scratch + i * p.width, p.width);
}

static void compact_head(const head_work *w, const skv_job *job) {
    const int32_t *keep = head_kept(w->device, w->scoring, job);
    slot_part parts[MOST_PARTS];
    const size_t n_parts = parts_of(&w->device->work.cache, parts);
    const size_t n = (size_t)job->n_kept;
    if (job->held) { /* keep may be in any order, so the new list is made beside the old one */
        for (size_t i = 0; i < n; i++) w->active[i] = (int32_t)head_slot(job, (size_t)keep[i]);
        memcpy(job->held, w->active, n * sizeof *w->active);
        return;
    }
    bool ascending = true;
    for (size_t i = 1; i < n; i++) ascending &= keep[i - 1] < keep[i];
    if (ascending) {
        close_gaps(job->head, keep, n, parts, n_parts);
        return;
    }
    for (size_t p = 0; p < n_parts; p++) reorder(job->head, keep, n, parts[p], (char *)w->keys);
}

typedef struct compact_job {
    const cpu_device *device;
    const skv_scoring *scoring;
    const skv_job *end;
} compact_job;

static void compact_heads(const void *argument, cpu_range r) {
    const compact_job *j = argument;
    const head_work w = head_of_thread(j->device, j->scoring, r.thread);
    for (size_t i = r.first; i < r.end; i++) {
        const skv_job *job = j->end - 1 - i; /* the last ones scored are still in the caches */
        if (job->scored) compact_head(&w, job);
    }
}

void cpu_compact(skv_device *base, const skv_scoring *s, const skv_job *jobs, size_t n_jobs) {
    const cpu_device *d = cpu_of(base);
    cpu_run(d->threads, n_jobs, SIZE_MAX, compact_heads, &(compact_job){d, s, jobs + n_jobs});
}

void cpu_fetch(skv_device *base, const skv_scoring *s, const skv_job *job, skv_fetched *to) {
    const cpu_device *d = cpu_of(base);
    const head_work w = head_of_thread(d, s, 0);
    const size_t n = (size_t)job->n_slots, n_queries = head_queries(d, job), key = w.dim * sizeof(float);
    head_gather(d, job, to->keys ? w.keys : NULL, w.positions, NULL);
    if (to->positions) memcpy(to->positions, w.positions, n * sizeof *w.positions);
    if (to->keys)
        for (size_t i = 0; i < n; i++) memcpy(to->keys + i * w.dim, w.keys + i * w.stride, key);
    if (to->queries)
        for (size_t i = 0; i < n_queries * w.group; i++)
            memcpy(to->queries + i * w.dim, head_query(d, job, i % n_queries, i / n_queries), key);
    for (unsigned term = 0; term < SKV_N_TERMS; term++)
        if (to->terms[term]) memcpy(to->terms[term], head_term(d, s, job, term), n * sizeof(float));
    if (to->score) memcpy(to->score, head_score(d, job), skv_job_candidates(job) * sizeof *to->score);
    if (to->kept) memcpy(to->kept, head_kept(d, s, job), (size_t)job->n_kept * sizeof *to->kept);
    to->n_queries = n_queries;
}
