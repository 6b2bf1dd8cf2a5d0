#define _DEFAULT_SOURCE /* clock_gettime */
#include "evict.h"

#include <math.h>
#include <omp.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

/* A thread's arrays for one head: [L + 32] each, but for keys [L, stride] and queries [window, group, stride]. */
typedef struct workspace {
    float *keys, *queries, *sums, *importance, *redundancy, *penalty, *score, *scratch, *work;
    int32_t *positions, *slots, *keep;
} workspace;

static size_t lay_out(const skv_session *s, workspace *w, float *block, size_t n_slots) {
    const skv_config *c = &s->model->config;
    const size_t stride = (size_t)s->cache.shape.stride, row = (n_slots + 47) / 16 * 16, window = (size_t)s->method.window;
    float *unused;
    float **const parts[] = {&w->keys,  &w->queries, &w->sums, &w->importance, &w->redundancy, &w->penalty,
                             &w->score, &w->scratch, &w->work, &unused,        &unused,        &unused};
    int32_t **const integers[] = {&w->positions, &w->slots, &w->keep};
    const size_t sizes[] = {n_slots * stride, window * (size_t)(c->n_heads / c->n_kv_heads) * stride, row, row, row, row, row,
                            2 * row,          s->model->backend->score_work(n_slots, stride, window), row, row, row};
    size_t at = 0;
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        if (block && i < 9) *parts[i] = block + at;
        if (block && i >= 9) *integers[i - 9] = (int32_t *)(void *)(block + at);
        at += (sizes[i] + 15) / 16 * 16;
    }
    return at;
}

size_t skv_evict_workspace(const skv_session *s, size_t n_slots) { return lay_out(s, &(workspace){0}, NULL, n_slots); }

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
    return x->score != y->score ? (x->score < y->score) - (x->score > y->score) : (x->slot > y->slot) - (x->slot < y->slot);
}

size_t skv_select(const float *score, const int32_t *positions, size_t n_slots, size_t n_newest, int32_t first, size_t budget,
                  bool by_score, float *scratch, int32_t *keep) {
    const size_t window = n_slots < n_newest ? 0 : n_slots - n_newest;
    size_t free_slots = 0, kept = 0;
    for (size_t j = 0; j < window; j++)
        if (positions[j] >= first) scratch[free_slots++] = score[j];
    const size_t fixed = n_slots - free_slots, wanted = budget > fixed ? budget - fixed : 0;
    float threshold = -INFINITY;
    size_t ties = free_slots;
    if (n_slots > budget) {
        threshold = wanted ? kth_largest(scratch, free_slots, wanted) : INFINITY;
        ties = wanted;
        for (size_t j = 0; j < window; j++) ties -= positions[j] >= first && score[j] > threshold;
    }
    for (size_t j = 0; j < n_slots; j++) {
        bool stays = j >= window || positions[j] < first || score[j] > threshold;
        if (!stays && score[j] == threshold && ties > 0) {
            ties--;
            stays = true;
        }
        if (stays) keep[kept++] = (int32_t)j;
    }
    if (by_score && n_slots >= budget) {
        scored_slot *order = (scored_slot *)(void *)scratch;
        const size_t candidates = kept - (n_slots - window);
        for (size_t i = 0; i < candidates; i++) order[i] = (scored_slot){score[keep[i]], keep[i]};
        qsort(order, candidates, sizeof *order, by_descending_score);
        for (size_t i = 0; i < candidates; i++) keep[i] = order[i].slot;
    }
    return kept;
}

/* Slots that a head holds, with virtual sets too. */
static size_t held_slots(const skv_row *r, size_t head) {
    return r->held ? (size_t)(r->held[head].n + r->heads[head].n_slots - r->held[head].end) : (size_t)r->heads[head].n_slots;
}

/* slots [n_slots] ← those that a head virtually holds */
static void list_held(const skv_row *r, size_t head, size_t n_slots, int32_t *slots) {
    const skv_held *held = r->held + head;
    for (size_t i = 0; i < n_slots; i++) slots[i] = i < (size_t)held->n ? held->slots[i] : held->end + (int32_t)i - held->n;
}

static bool is_due(const skv_session *s, const skv_row *r, size_t head) {
    return held_slots(r, head) >= (size_t)skv_row_budget(s, r, head);
}

static size_t newest_of(const skv_session *s, const skv_row *r, size_t head) {
    return (size_t)s->method.policy->newest(&s->method, skv_row_budget(s, r, head));
}

/* The arrays that a record at SKV_TRACE_SCORES holds before the score. */
static unsigned given(const skv_session *s) {
    return skv_method_needs(&s->method) & (SKV_GIVES_IMPORTANCE | SKV_GIVES_REDUNDANCY | SKV_NEEDS_SENTENCES);
}

static size_t record_bytes(const skv_session *s, const skv_row *r, size_t n_slots, size_t head) {
    if (s->trace_level == SKV_TRACE_NONE) return 0;
    const size_t budget = (size_t)skv_row_budget(s, r, head), kept = n_slots < budget ? n_slots : budget, newest = newest_of(s, r, head);
    const size_t arrays = s->trace_level == SKV_TRACE_SCORES ? 1 + (size_t)__builtin_popcount(given(s)) : 0;
    return sizeof(skv_record) + 4 * (kept + arrays * (n_slots > newest ? n_slots - newest : 0));
}

static void write_record(const skv_session *s, int32_t row, size_t layer, size_t head, const skv_scoring *scoring, const workspace *w,
                         size_t kept, char *to) {
    skv_record record = {.row = row,
                         .step = s->rows[row].n_tokens,
                         .layer = (int32_t)layer,
                         .head = (int32_t)head,
                         .n_before = (int32_t)scoring->n_slots,
                         .n_kept = (int32_t)kept};
    const bool scores = s->trace_level == SKV_TRACE_SCORES;
    record.n_candidates = (int32_t)scoring->n_candidates, record.given = given(s), record.scored = scores;
    memcpy(to, &record, sizeof record);
    to += sizeof record;
    for (size_t i = 0; i < kept; i++, to += sizeof(int32_t)) memcpy(to, w->positions + w->keep[i], sizeof(int32_t));
    const float *const arrays[] = {w->importance, w->redundancy, w->penalty, w->score};
    const unsigned bits[] = {SKV_GIVES_IMPORTANCE, SKV_GIVES_REDUNDANCY, SKV_NEEDS_SENTENCES, ~0u};
    for (size_t i = 0; scores && i < 4; i++)
        if (bits[i] == ~0u || (record.given & bits[i])) {
            memcpy(to, arrays[i], scoring->n_candidates * sizeof(float));
            to += scoring->n_candidates * sizeof(float);
        }
}

/* The row's newest queries of one KV head's group, oldest first; returns how many. */
static size_t load_queries(const skv_session *s, const skv_row *r, size_t layer, size_t head, float *queries) {
    const skv_config *c = &s->model->config;
    const size_t window = (size_t)s->method.window, dim = (size_t)c->head_dim, stride = (size_t)s->cache.shape.stride,
                 n_heads = (size_t)c->n_heads;
    const size_t group = n_heads / (size_t)c->n_kv_heads, n = (size_t)r->n_tokens < window ? (size_t)r->n_tokens : window;
    for (size_t i = 0; i < n; i++)
        for (size_t g = 0; g < group; g++) {
            const size_t place = ((size_t)r->n_tokens - n + i) % window;
            float *to = queries + (i * group + g) * stride;
            memcpy(to, r->ring + ((layer * window + place) * n_heads + head * group + g) * dim, dim * sizeof *to);
            memset(to + dim, 0, (stride - dim) * sizeof *to);
        }
    return n;
}

/* Leaves only the slots w->keep in a head, really or virtually. */
static void compact(skv_session *s, skv_row *r, size_t head, size_t n_slots, const workspace *w, size_t kept) {
    if (!r->held) {
        if (kept < n_slots || (s->method.compat & SKV_COMPAT_SCORE_ORDER))
            s->model->backend->compact(&s->cache.shape, r->heads + head, w->keep, kept, w->work);
        return;
    }
    /* w->slots lists what was held; keep may be in any order, so the new list is made beside it. */
    int32_t *to = (int32_t *)(void *)w->scratch;
    for (size_t i = 0; i < kept; i++) to[i] = w->slots[w->keep[i]];
    memcpy(r->held[head].slots, to, kept * sizeof *to);
    r->held[head].n = (int32_t)kept;
    r->held[head].end = r->heads[head].n_slots;
}

/* Scores and compacts the due heads of one layer of a row. */
static bool evict_layer(skv_session *s, int32_t row, size_t layer, skv_layer_task *task, float *block) {
    char *trace = s->trace.bytes + task->trace;
    const skv_config *c = &s->model->config;
    const size_t n_kv = (size_t)c->n_kv_heads;
    const unsigned needs = skv_method_needs(&s->method);
    skv_row *r = s->rows + row;
    workspace w;
    lay_out(s, &w, block, s->scoring_slots);
    for (size_t h = 0; h < n_kv; h++) {
        const size_t head = layer * n_kv + h, n_slots = held_slots(r, head), newest = newest_of(s, r, head);
        if (!is_due(s, r, head)) continue;
        if (r->held) list_held(r, head, n_slots, w.slots);
        s->model->backend->gather(s->model->backend, &s->cache.shape, r->heads + head, r->held ? w.slots : NULL, n_slots, w.keys,
                                  w.positions, needs & SKV_NEEDS_SUMS ? w.sums : NULL);
        skv_scoring scoring = {.backend = s->model->backend,
                               .method = &s->method,
                               .layer = layer,
                               .head = h,
                               .n_kv_heads = n_kv,
                               .group = (size_t)(c->n_heads / c->n_kv_heads),
                               .n_slots = n_slots,
                               .n_candidates = n_slots > newest ? n_slots - newest : 0,
                               .dim = (size_t)c->head_dim,
                               .stride = (size_t)s->cache.shape.stride,
                               .keys = w.keys,
                               .positions = w.positions,
                               .sums = w.sums,
                               .queries = w.queries,
                               .penalties = r->tracker.penalties,
                               .n_penalties = r->lost && r->lost[head] ? 0 : r->tracker.n_penalties,
                               .sequence = r->sequence,
                               .importance = w.importance,
                               .redundancy = w.redundancy,
                               .penalty = w.penalty,
                               .score = w.score,
                               .work = w.work};
        if (needs & SKV_NEEDS_QUERIES) scoring.n_queries = load_queries(s, r, layer, h, w.queries);
        if (!s->method.policy->score(&scoring)) return false;
        task->n_pairs += scoring.n_pairs;
        if ((needs & SKV_SHARED) && h + 1 < n_kv) continue;
        const size_t kept = skv_select(w.score, w.positions, n_slots, newest, skv_method_protected(&s->method, r->n_prompt),
                                       (size_t)skv_row_budget(s, r, head), s->method.compat & SKV_COMPAT_SCORE_ORDER, w.scratch, w.keep);
        for (size_t shared = needs & SKV_SHARED ? 0 : h; shared <= h; shared++) {
            if (s->trace_level) {
                write_record(s, row, layer, shared, &scoring, &w, kept, trace);
                trace += record_bytes(s, r, n_slots, layer * n_kv + shared);
            }
            compact(s, r, layer * n_kv + shared, n_slots, &w, kept);
            task->n_evicted += n_slots - kept;
        }
    }
    return true;
}

/* Vectors of sentences that no head holds a slot of are freed (not where sets are virtual); a head that holds none of any is lost to the
 * penalty (official). */
static void prune(const skv_session *s, skv_row *r) {
    skv_tracker *t = &r->tracker;
    const size_t n = t->n_compared, n_heads = (size_t)s->model->config.n_layers * (size_t)s->model->config.n_kv_heads;
    workspace w;
    lay_out(s, &w, s->scoring, s->scoring_slots);
    for (size_t i = 0; i < n; i++) t->sentences[i].alive = false;
    for (size_t h = 0; h < n_heads; h++) {
        const size_t n_slots = held_slots(r, h);
        bool any = false;
        if (r->held) list_held(r, h, n_slots, w.slots);
        s->model->backend->gather(s->model->backend, &s->cache.shape, r->heads + h, r->held ? w.slots : NULL, n_slots, NULL, w.positions,
                                  NULL);
        for (size_t i = 0, sentence = 0; i < n_slots; i++) {
            if (i && w.positions[i] < w.positions[i - 1]) sentence = 0; /* slots in order of score */
            while (sentence < n && t->sentences[sentence].last < w.positions[i]) sentence++;
            if (sentence == n || t->sentences[sentence].first > w.positions[i]) continue;
            t->sentences[sentence].alive = any = true;
        }
        if (r->lost && n) r->lost[h] |= !any;
    }
    if (!r->held) skv_tracker_prune(t);
}

/* Where the records of every task will stand: in order of row, layer and head, whichever thread writes them. */
static skv_status plan(skv_session *s, size_t n_due, skv_error *error) {
    const size_t n_kv = (size_t)s->model->config.n_kv_heads, n_layers = (size_t)s->model->config.n_layers;
    size_t need = s->trace.n;
    for (size_t i = 0; i < n_due * n_layers; i++) {
        s->tasks[i] = (skv_layer_task){.trace = need};
        const skv_row *r = s->rows + s->due[i / n_layers];
        for (size_t head = i % n_layers * n_kv; head < (i % n_layers + 1) * n_kv; head++)
            if (is_due(s, r, head)) need += record_bytes(s, r, held_slots(r, head), head);
    }
    if (need > s->trace.capacity) {
        const size_t capacity = need + need / 2;
        char *bytes = skv_alloc(&s->heap, capacity, 1);
        if (!bytes) return skv_fail(error, SKV_CAPACITY, "out of memory for %zu bytes of trace", capacity);
        if (s->trace.n) memcpy(bytes, s->trace.bytes, s->trace.n);
        skv_free(&s->heap, s->trace.bytes);
        s->trace.bytes = bytes;
        s->trace.capacity = capacity;
    }
    s->trace.n = need;
    return SKV_OK;
}

/* Bytes from … to − 1 were planned and never written. */
static void cut_records(skv_trace *trace, size_t from, size_t to) {
    if (to == from) return;
    memmove(trace->bytes + from, trace->bytes + to, trace->n - to);
    trace->n -= to - from;
}

/* Pages beyond the slots that stayed go back to the pool. */
static void finish(skv_session *s, skv_row *r, const skv_layer_task *tasks) {
    const size_t n_kv = (size_t)s->model->config.n_kv_heads, n_layers = (size_t)s->model->config.n_layers;
    bool any = false;
    for (size_t head = 0; head < n_layers * n_kv; head++) {
        if (!is_due(s, r, head)) continue;
        any = true;
        if (r->held) continue;
        const int32_t before = r->heads[head].n_pages;
        skv_cache_truncate(&s->cache, r->heads + head, (size_t)skv_row_budget(s, r, head));
        r->n_pages -= (size_t)(before - r->heads[head].n_pages);
    }
    for (size_t layer = 0; layer < n_layers; layer++) {
        r->n_evicted += tasks[layer].n_evicted;
        r->n_pairs += tasks[layer].n_pairs;
    }
    r->n_compactions += any;
    if (any && (!r->held || r->lost)) prune(s, r);
}

skv_status skv_evict(skv_session *s, size_t n_due, skv_error *error) {
    const size_t n_layers = (size_t)s->model->config.n_layers;
    struct timespec begin, end;
    clock_gettime(CLOCK_MONOTONIC, &begin);
    for (size_t i = 0; i < n_due; i++) skv_tracker_compare(&s->rows[s->due[i]].tracker, s->model->backend, (float)s->method.tau);
    if (s->method.policy->needs & SKV_COMPACTS) {
        if (plan(s, n_due, error)) return error->code;
        const bool caller = s->method.policy->needs & SKV_NEEDS_CALLER;
#pragma omp parallel for schedule(dynamic) num_threads(s->exec.n_threads) if (!caller)
        for (size_t i = 0; i < n_due * n_layers; i++) {
            s->tasks[i].failed = caller && i % n_layers && s->tasks[i - 1].failed; /* what is left of a failed row */
            if (!s->tasks[i].failed)
                s->tasks[i].failed = !evict_layer(s, s->due[i / n_layers], i % n_layers, s->tasks + i,
                                                  s->scoring + (size_t)omp_get_thread_num() * s->scoring_per_thread);
        }
        for (size_t i = n_due; i-- > 0;) { /* the last first: records that are cut out move those behind them */
            s->rows[s->due[i]].failed = s->tasks[(i + 1) * n_layers - 1].failed;
            if (s->rows[s->due[i]].failed)
                cut_records(&s->trace, s->tasks[i * n_layers].trace, i + 1 < n_due ? s->tasks[(i + 1) * n_layers].trace : s->trace.n);
            else
                finish(s, s->rows + s->due[i], s->tasks + i * n_layers);
        }
    }
    bool failed = false;
    for (size_t i = 0; i < n_due; i++) {
        failed |= s->rows[s->due[i]].failed;
        skv_row *r = s->rows + s->due[i];
        skv_row_shrink(s, r);
        if (!skv_row_reserve_sentences(r, (size_t)s->method.interval))
            return skv_fail(error, SKV_CAPACITY, "out of memory for sentence vectors");
    }
    clock_gettime(CLOCK_MONOTONIC, &end);
    s->evict_seconds += (double)(end.tv_sec - begin.tv_sec) + 1e-9 * (double)(end.tv_nsec - begin.tv_nsec);
    return failed ? skv_fail(error, SKV_CALLER, "the custom score failed") : SKV_OK;
}
