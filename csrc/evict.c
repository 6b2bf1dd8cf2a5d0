#include "evict.h"

#include <string.h>

static skv_scoring scoring_of(const skv_method *m, unsigned keep) {
    skv_scoring scoring = {.method = m, .needs = skv_method_needs(m), .keep = keep};
    skv_method_weights(m, scoring.weights);
    return scoring;
}

/* Asks the caller for the score of one head. */
static bool ask(skv_device *device, const skv_workload *work, const skv_scoring *scoring, const skv_job *job,
                float *block, int32_t *positions) {
    skv_error ignored;
    const skv_config *c = work->config;
    const size_t n = (size_t)job->n_slots;
    skv_fetched f = skv_fetched_in(work, scoring->keep, n, block);
    float *score = f.score;
    f.score = NULL;
    f.positions = positions;
    if (!(scoring->needs & SKV_QUERIES)) f.queries = NULL;
    device->backend->fetch(device, scoring, job, &f);
    if (device->backend->sync(device, &ignored)) return false;
    skv_candidates candidates = {.layer = (size_t)job->layer,
                                 .head = (size_t)job->kv_head,
                                 .n_slots = n,
                                 .n_candidates = skv_job_candidates(job),
                                 .group = (size_t)(c->n_heads / c->n_kv_heads),
                                 .n_queries = f.n_queries,
                                 .head_dim = (size_t)c->head_dim,
                                 .keys = f.keys,
                                 .queries = f.queries,
                                 .positions = positions};
    for (size_t term = 0; term < SKV_N_TERMS; term++) candidates.terms[term] = f.terms[term];
    if (!scoring->method->custom(scoring->method->context, &candidates, score)) return false;
    device->backend->put_score(device, job, score);
    return true;
}

/* Slots that a head holds, with virtual sets too. */
static int32_t held_slots(const skv_row *r, size_t head) {
    return r->held ? r->held[head].n + r->heads[head].n_slots - r->held[head].end : r->heads[head].n_slots;
}

static size_t n_jobs_of(const skv_session *s) {
    return (size_t)s->model->config.n_layers * (size_t)s->model->config.n_kv_heads;
}

/* Whether a head, or with shared budgets its layer, holds its budget. */
static bool is_due(const skv_session *s, const skv_row *r, size_t head) {
    if (!(s->needs & SKV_BY_LAYER)) return held_slots(r, head) >= skv_row_budget(s, r, head);
    const size_t n_kv = (size_t)s->model->config.n_kv_heads, first = head / n_kv * n_kv;
    int64_t held = 0, budget = 0;
    for (size_t h = first; h < first + n_kv; h++) held += held_slots(r, h), budget += skv_row_budget(s, r, h);
    return held >= budget;
}

/* Jobs of all heads of a row; false: none is due. */
static bool list_jobs(const skv_session *s, skv_row *r, skv_due *due, skv_job *jobs) {
    const skv_tracker *t = &r->tracker;
    const size_t n_kv = (size_t)s->model->config.n_kv_heads;
    bool any = false;
    *due = (skv_due){.ring = r->ring,
                     .n_tokens = r->n_tokens,
                     .first = skv_method_protected(&s->method, r->n_prompt),
                     .sequence = {r->sequence[0], r->sequence[1]},
                     .penalties = t->penalties,
                     .n_penalties = t->n_penalties,
                     .sentences = t->ranges,
                     .n_sentences = t->n_compared,
                     .alive = t->alive};
    if (t->n_compared) memset(t->alive, 0, t->n_compared);
    for (size_t h = 0; h < n_jobs_of(s); h++) {
        const int32_t budget = skv_row_budget(s, r, h);
        jobs[h] = (skv_job){.due = due,
                            .head = r->heads + h,
                            .layer = (int32_t)(h / n_kv),
                            .kv_head = (int32_t)(h % n_kv),
                            .n_slots = held_slots(r, h),
                            .n_newest = skv_method_newest(&s->method, budget),
                            .budget = budget,
                            .scored = is_due(s, r, h),
                            .penalised = !r->lost || !r->lost[h]};
        if (r->held) jobs[h].held = r->held[h].slots, jobs[h].n_held = r->held[h].n, jobs[h].end = r->held[h].end;
        any |= jobs[h].scored;
    }
    return any;
}

static skv_record record_of(const skv_session *s, int32_t row, const skv_job *job) {
    return (skv_record){.row = row,
                        .step = job->due->n_tokens,
                        .layer = job->layer,
                        .head = job->kv_head,
                        .n_before = job->n_slots,
                        .n_kept = job->n_kept,
                        .n_candidates = (int32_t)skv_job_candidates(job),
                        .given = skv_method_gives(&s->method),
                        .scored = s->trace_level == SKV_TRACE_SCORES};
}

/* Adds the records of a row's jobs, for which there is room. */
static void record(skv_session *s, const skv_scoring *scoring, int32_t row, const skv_job *jobs) {
    const skv_backend *ops = s->device->backend;
    skv_error ignored;
    for (const skv_job *job = jobs; job < jobs + n_jobs_of(s); job++) {
        if (!job->scored) continue;
        const skv_record r = record_of(s, row, job);
        int32_t *positions = s->fetched_slots, *kept = positions + r.n_before;
        skv_fetched f = skv_fetched_in(&s->work, r.given, (size_t)r.n_before, s->fetched);
        f.keys = f.queries = NULL;
        f.positions = positions;
        f.kept = kept;
        if (!r.scored) f = (skv_fetched){.positions = positions, .kept = kept};
        ops->fetch(s->device, scoring, job, &f);
        ops->sync(s->device, &ignored);
        for (int32_t i = 0; i < r.n_kept; i++) kept[i] = positions[kept[i]];
        skv_trace_add(&s->trace, &r, kept, f.terms, f.score);
    }
}

/* What the jobs made of a row: slots, pages, counts, and the sentences that no head holds any more. */
static void finish(skv_session *s, skv_row *r, const skv_job *jobs) {
    for (size_t h = 0; h < n_jobs_of(s); h++) {
        const skv_job *job = jobs + h;
        if (r->lost && job->due->n_sentences) r->lost[h] |= !job->any_sentence;
        if (!job->scored) continue;
        r->n_evicted += (uint64_t)(job->n_slots - job->n_kept);
        r->n_pairs += job->n_pairs;
        if (r->held) {
            r->held[h].n = job->n_kept;
            r->held[h].end = r->heads[h].n_slots;
            continue;
        }
        const int32_t before = r->heads[h].n_pages;
        skv_cache_truncate(&s->cache, r->heads + h, (size_t)job->n_kept);
        r->n_pages -= (size_t)(before - r->heads[h].n_pages);
    }
    r->n_compactions++;
    if (!r->held) skv_tracker_prune(&r->tracker);
}

/* The caller's scores of a row; where its function fails the row ends as it is. */
static void ask_for_row(skv_session *s, const skv_scoring *scoring, skv_row *r, skv_job *jobs) {
    for (size_t h = 0; h < n_jobs_of(s); h++) {
        if (!jobs[h].scored || r->failure) continue;
        if (!ask(s->device, &s->work, scoring, jobs + h, s->fetched, s->fetched_slots))
            r->failure = "its custom score failed";
    }
    if (!r->failure) return;
    for (size_t h = 0; h < n_jobs_of(s); h++) jobs[h].scored = false;
}

/* Compacts up to SKV_DUE rows. */
static skv_status compact_rows(skv_session *s, const int32_t *rows, size_t n, skv_error *error) {
    const skv_backend *ops = s->device->backend;
    const skv_scoring scoring = scoring_of(&s->method, s->work.keep);
    int32_t due[SKV_DUE];
    size_t n_due = 0, per_row = n_jobs_of(s), bytes = 0;
    for (size_t i = 0; i < n; i++)
        if (list_jobs(s, s->rows + rows[i], s->due + n_due, s->jobs + n_due * per_row)) due[n_due++] = rows[i];
    if (!n_due) return SKV_OK;
    ops->score(s->device, &scoring, s->jobs, n_due * per_row);
    skv_lap(s, SKV_OP_SCORE);
    if (scoring.needs & SKV_CUSTOM)
        for (size_t i = 0; i < n_due; i++) ask_for_row(s, &scoring, s->rows + due[i], s->jobs + i * per_row);
    ops->select(s->device, &scoring, s->jobs, n_due * per_row);
    skv_lap(s, SKV_OP_SELECT);
    if (ops->sync(s->device, error)) return error->code;
    if (s->trace_level != SKV_TRACE_NONE) {
        for (size_t i = 0; i < n_due * per_row; i++) {
            const skv_record r = record_of(s, 0, s->jobs + i);
            if (s->jobs[i].scored) bytes = skv_add(bytes, skv_trace_bytes(&r));
        }
        if (!skv_trace_reserve(&s->trace, &s->heap, bytes))
            return skv_fail(error, SKV_CAPACITY, "out of memory for %zu bytes of trace", bytes);
        for (size_t i = 0; i < n_due; i++) record(s, &scoring, due[i], s->jobs + i * per_row);
    }
    ops->compact(s->device, &scoring, s->jobs, n_due * per_row);
    skv_lap(s, SKV_OP_COMPACT);
    for (size_t i = 0; i < n_due; i++)
        if (!s->rows[due[i]].failure) finish(s, s->rows + due[i], s->jobs + i * per_row);
    return SKV_OK;
}

/* Compares, compacts and makes room for what comes before the next time. */
static skv_status evict(skv_session *s, size_t n, skv_error *error) {
    bool caller_failed = false;
    for (size_t i = 0; i < n; i++)
        if (skv_tracker_compare(&s->rows[s->due_rows[i]].tracker, (float)s->method.tau, error)) return error->code;
    skv_lap(s, SKV_OP_COMPARE);
    for (size_t i = 0; i < n; i += SKV_DUE)
        if (s->needs & SKV_COMPACTS && compact_rows(s, s->due_rows + i, n - i < SKV_DUE ? n - i : SKV_DUE, error))
            return error->code;
    for (size_t i = 0; i < n; i++) {
        skv_row *r = s->rows + s->due_rows[i];
        caller_failed |= r->failure != NULL;
        if (r->failure) continue;
        skv_row_shrink(s, r);
        if (!skv_row_reserve_sentences(r, (size_t)s->method.interval))
            return skv_device_full(s->device, error, "sentence vectors");
    }
    return caller_failed ? skv_fail(error, SKV_CALLER, "the custom score failed") : SKV_OK;
}

skv_status skv_evict(skv_session *s, size_t n, skv_error *error) {
    skv_error ignored;
    s->device->backend->sync(s->device, &ignored); /* what came before is not the compaction's time */
    const double begin = skv_seconds();
    const skv_status status = evict(s, n, error);
    s->evict_seconds += skv_seconds() - begin;
    return status;
}

/* A head's slots in pages of its own; page: host memory for one. */
static bool fill_head(skv_device *device, const skv_cache_shape *shape, const skv_slots *in, size_t h, skv_head *head,
                      char *page) {
    const size_t dim = in->head_dim;
    for (size_t first = 0; first < in->n_slots; first += SKV_PAGE, head->n_pages++) {
        const size_t from = h * in->n_slots + first, left = in->n_slots - first, n = left < SKV_PAGE ? left : SKV_PAGE;
        memset(page, 0, shape->page_bytes);
        for (size_t i = 0; i < n; i++)
            memcpy(page + i * shape->slot_bytes, in->keys + (from + i) * dim, dim * sizeof *in->keys);
        memcpy(page + shape->positions_at, in->positions + from, n * sizeof *in->positions);
        if (shape->sums) memcpy(page + shape->sums_at, in->sums + from, n * sizeof *in->sums);
        char *to = head->pages[head->n_pages] = device->backend->alloc(device, 1, shape->page_bytes);
        if (!to) return false;
        device->backend->write(device, to, page, shape->page_bytes);
    }
    head->n_slots = (int32_t)in->n_slots;
    return true;
}

/* What skv_select allocates. */
typedef struct selecting {
    skv_heap heap;
    skv_device *device;
    skv_head *heads;
    skv_job *jobs;
    skv_penalty *penalties;
    char **pages, *page;
    float *ring;
} selecting;

static bool allocate(selecting *a, const skv_cache_shape *shape, const skv_slots *in, size_t window) {
    const size_t n_pages = skv_cache_pages(in->n_slots);
    a->heads = skv_alloc(&a->heap, in->n_kv_heads, sizeof *a->heads);
    a->jobs = skv_alloc(&a->heap, in->n_kv_heads, sizeof *a->jobs);
    a->penalties = skv_alloc(&a->heap, in->n_penalties, sizeof *a->penalties);
    a->pages = skv_alloc(&a->heap, skv_mul(in->n_kv_heads, n_pages), sizeof *a->pages);
    a->page = skv_alloc(&a->heap, 1, shape->page_bytes);
    a->ring = a->device->backend->alloc(a->device, skv_mul(window, in->n_heads), in->head_dim * sizeof *a->ring);
    if (!a->heads || !a->jobs || !a->penalties || !a->pages || !a->page || !a->ring) return false;
    for (size_t h = 0; h < in->n_kv_heads; h++) {
        a->heads[h].pages = a->pages + h * n_pages;
        if (!fill_head(a->device, shape, in, h, a->heads + h, a->page)) return false;
    }
    const size_t n = in->n_queries < window ? in->n_queries : window, bytes = in->head_dim * sizeof *a->ring;
    for (size_t i = 0; i < n; i++)
        for (size_t q = 0; q < in->n_heads; q++)
            a->device->backend->write(a->device, a->ring + (i * in->n_heads + q) * in->head_dim,
                                      in->queries + (q * in->n_queries + in->n_queries - n + i) * in->head_dim, bytes);
    for (size_t i = 0; i < in->n_penalties; i++) {
        const float *from = in->penalties + 3 * i;
        a->penalties[i] = (skv_penalty){{(int32_t)from[0], (int32_t)from[1]}, from[2]};
    }
    return true;
}

static void release(selecting *a, const skv_slots *in) {
    const size_t n_heads = a->heads ? in->n_kv_heads : 0;
    for (size_t h = 0; h < n_heads; h++)
        for (int32_t page = 0; page < a->heads[h].n_pages; page++)
            a->device->backend->free(a->device, a->heads[h].pages[page]);
    a->device->backend->free(a->device, a->ring);
    a->device->backend->close(a->device);
    void *const blocks[] = {a->heads, a->jobs, a->penalties, a->pages, a->page};
    for (size_t i = 0; i < sizeof blocks / sizeof *blocks; i++) skv_free(&a->heap, blocks[i]);
}

/* Scores and selects a layer's heads and reads what is asked for. */
static skv_status select_layer(const selecting *a, const skv_workload *work, const skv_method *m, const skv_slots *in,
                               skv_due *due, skv_selection *out, skv_error *error) {
    const skv_backend *ops = a->device->backend;
    const unsigned needs = work->needs, given = skv_method_gives(m);
    const skv_scoring scoring = scoring_of(m, work->keep);
    for (size_t h = 0; h < in->n_kv_heads; h++) {
        const int32_t budget = m->budgets[h];
        a->jobs[h] = (skv_job){.due = due,
                               .head = a->heads + h,
                               .kv_head = (int32_t)h,
                               .n_slots = (int32_t)in->n_slots,
                               .n_newest = skv_method_newest(m, budget),
                               .budget = budget,
                               .scored = true,
                               .penalised = true};
    }
    ops->score(a->device, &scoring, a->jobs, in->n_kv_heads);
    if (needs & SKV_CUSTOM) {
        skv_heap heap = {0};
        float *floats = skv_alloc(&heap, skv_fetched_floats(work, in->n_slots), sizeof *floats);
        int32_t *positions = skv_alloc(&heap, in->n_slots, sizeof *positions);
        const bool room = floats && positions;
        bool ok = room;
        for (size_t h = 0; ok && h < in->n_kv_heads; h++)
            ok = ask(a->device, work, &scoring, a->jobs + h, floats, positions);
        skv_free(&heap, floats);
        skv_free(&heap, positions);
        if (!room) return skv_fail(error, SKV_CAPACITY, "out of memory for the arrays of a head");
        if (!ok) return skv_fail(error, SKV_CALLER, "the custom score failed");
    }
    ops->select(a->device, &scoring, a->jobs, in->n_kv_heads);
    for (size_t h = 0; h < in->n_kv_heads; h++) {
        out[h].n_kept = (size_t)a->jobs[h].n_kept;
        out[h].n_candidates = skv_job_candidates(a->jobs + h);
        skv_fetched f = {.score = out[h].score, .kept = out[h].kept};
        for (unsigned term = 0; term < SKV_N_TERMS; term++)
            if (given & 1u << term) f.terms[term] = out[h].terms[term];
        ops->fetch(a->device, &scoring, a->jobs + h, &f);
    }
    return ops->sync(a->device, error);
}

skv_status skv_select(const skv_method *m, const skv_slots *in, skv_selection *out, skv_error *error) {
    const unsigned needs = skv_method_needs(m);
    const skv_config config = {.n_layers = 1,
                               .n_heads = (int32_t)in->n_heads,
                               .n_kv_heads = (int32_t)in->n_kv_heads,
                               .head_dim = (int32_t)in->head_dim,
                               .hidden = 1};
    const skv_workload work = {.config = &config,
                               .cache = skv_cache_shape_of(config.head_dim, SKV_F32, needs & 1u << SKV_SUMS),
                               .n_due = 1,
                               .scored_slots = in->n_slots,
                               .due_slots = skv_mul(in->n_slots, in->n_kv_heads),
                               .window = m->window,
                               .needs = needs,
                               .keep = skv_method_keeps(m, true)};
    selecting a = {.device = skv_device_open(NULL, NULL, 1, error)};
    if (!a.device) return error->code;
    const size_t window = (size_t)m->window;
    skv_status status = a.device->backend->reserve(a.device, &work, error);
    if (!status && !allocate(&a, &work.cache, in, window))
        status = skv_fail(error, SKV_CAPACITY, "out of memory for %zu slots", in->n_slots);
    skv_due due = {.ring = a.ring,
                   .n_tokens = (int32_t)(in->n_queries < window ? in->n_queries : window),
                   .first = skv_method_protected(m, in->n_prompt),
                   .first_layer = in->layer,
                   .sequence = {in->sequence[0], in->sequence[1]},
                   .penalties = a.penalties,
                   .n_penalties = in->n_penalties};
    if (!status) status = select_layer(&a, &work, m, in, &due, out, error);
    release(&a, in);
    return status;
}
