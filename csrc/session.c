#include "session.h"

#include <math.h>
#include <string.h>

const char *skv_op_name(size_t i) {
#define NAME(op, name) name,
    static const char *const names[] = {SKV_OPS(NAME)};
    return i < SKV_N_OPS ? names[i] : NULL;
}

void skv_lap(skv_session *s, skv_op op) {
    skv_error ignored; /* told again at the end of the forward */
    if (!s->timed) return;
    s->device->backend->sync(s->device, &ignored);
    const double now = skv_seconds();
    s->op_seconds[op] += now - s->lapped;
    s->lapped = now;
}

const double *skv_session_seconds(const skv_session *s) { return s->op_seconds; }

static size_t n_cache_heads(const skv_session *s) {
    return (size_t)s->model->config.n_layers * (size_t)s->model->config.n_kv_heads;
}

static void *device_alloc(skv_session *s, size_t n, size_t width) {
    return s->device->backend->alloc(s->device, skv_mul(n, width), sizeof(float));
}

/* The buffers of a forward; *count of them. */
typedef struct buffer {
    float **at;
    size_t width;
} buffer;

enum { N_BUFFERS = 8 };

static void list_buffers(skv_session *s, buffer *list) {
    const skv_config *c = &s->model->config;
    const size_t q = (size_t)c->n_heads * (size_t)c->head_dim, kv = (size_t)c->n_kv_heads * (size_t)c->head_dim;
    const size_t hidden = (size_t)c->hidden, ffn = (size_t)c->ffn;
    const buffer all[N_BUFFERS] = {{&s->x, hidden}, {&s->y, hidden}, {&s->q, q},      {&s->mixed, q},
                                   {&s->k, kv},     {&s->v, kv},     {&s->gate, ffn}, {&s->up, ffn}};
    memcpy(list, all, sizeof all);
}

static bool allocate_session(skv_session *s) {
    const size_t n_heads = n_cache_heads(s), n = s->max_tokens;
    buffer buffers[N_BUFFERS];
    list_buffers(s, buffers);
    for (size_t i = 0; i < N_BUFFERS; i++)
        if (!(*buffers[i].at = device_alloc(s, n, buffers[i].width))) return false;
    s->rows = skv_alloc(&s->heap, s->n_rows, sizeof *s->rows);
    s->parts = skv_alloc(&s->heap, s->n_rows, sizeof *s->parts);
    s->due_rows = skv_alloc(&s->heap, s->n_rows, sizeof *s->due_rows);
    s->budgets = skv_alloc(&s->heap, n_heads, sizeof *s->budgets);
    s->tokens = skv_alloc(&s->heap, n, sizeof *s->tokens);
    s->due = skv_alloc(&s->heap, s->work.n_due, sizeof *s->due);
    s->jobs = skv_alloc(&s->heap, skv_mul(s->work.n_due, n_heads), sizeof *s->jobs);
    return s->rows && s->parts && s->due_rows && s->budgets && s->tokens && s->due && s->jobs;
}

static size_t buffer_bytes(const skv_session *s) {
    const skv_config *c = &s->model->config;
    const size_t heads = (size_t)(c->n_heads + c->n_kv_heads) * (size_t)c->head_dim;
    return s->max_tokens * 2 * ((size_t)c->hidden + heads + (size_t)c->ffn) * sizeof(float);
}

/* Under the limit, of a session beside its rows: the buffers of a forward, and what the backend needs for its work. */
static size_t fixed_bytes(const skv_session *s, const skv_workload *work) {
    const skv_backend *ops = s->device->backend;
    return ops->workspace ? buffer_bytes(s) + ops->workspace(s->device, work) : 0;
}

static skv_status check_fixed(const skv_session *s, skv_error *error) {
    const size_t fixed = fixed_bytes(s, &s->work), buffers = buffer_bytes(s);
    if (fixed <= s->cache.limit_bytes) return SKV_OK;
    return skv_fail(error, SKV_CAPACITY,
                    "a session of %zu rows and %zu tokens a forward needs %zu bytes for activations and %zu for "
                    "workspace; memory_limit is %zu (the weights' %zu bytes stand apart)",
                    s->n_rows, s->max_tokens, buffers, fixed - buffers, s->cache.limit_bytes,
                    skv_model_bytes(s->model));
}

skv_session *skv_session_new(const skv_model *model, const skv_options *o, skv_error *error) {
    const skv_config *c = &model->config;
    const size_t n_heads = (size_t)c->n_layers * (size_t)c->n_kv_heads;
    const unsigned needs = skv_method_needs(&o->method);
    if (skv_method_check(&o->method, n_heads, (size_t)c->n_kv_heads, error)) return NULL;
    skv_device *device = skv_device_open(model->device->backend, model->device->variant, o->n_threads, error);
    if (!device) return NULL;
    skv_heap heap = {0};
    skv_session *s = skv_alloc(&heap, 1, sizeof *s);
    if (!s) goto out_of_memory;
    *s = (skv_session){.model = model,
                       .device = device,
                       .heap = heap,
                       .n_rows = o->n_rows,
                       .max_tokens = o->max_tokens,
                       .method = o->method,
                       .needs = needs,
                       .vocabulary = o->vocabulary,
                       .trace_level = o->trace,
                       .timed = o->timed};
    s->work = (skv_workload){.config = c,
                             .inv_freq = model->inv_freq,
                             .cache = skv_cache_shape_of(c->head_dim, o->cache_type, needs & 1u << SKV_SUMS),
                             .weights = model->type,
                             .n_rows = o->n_rows,
                             .n_tokens = o->max_tokens,
                             .window = o->method.window,
                             .needs = needs,
                             .reorders = o->method.compat & SKV_COMPAT_SCORE_ORDER,
                             .fetches = needs & SKV_CUSTOM || o->trace != SKV_TRACE_NONE,
                             .keep = skv_method_keeps(&o->method, o->trace == SKV_TRACE_SCORES)};
    if (needs & SKV_COMPACTS) s->work.n_due = o->n_rows < SKV_DUE ? o->n_rows : SKV_DUE;
    s->cache = (skv_cache){.shape = s->work.cache, .device = device, .heap = &s->heap, .limit_bytes = o->limit_bytes};
    if (check_fixed(s, error)) {
        skv_session_free(s);
        return NULL;
    }
    if (!allocate_session(s)) goto out_of_memory;
    if (device->backend->reserve(device, &s->work, error)) {
        skv_session_free(s);
        return NULL;
    }
    for (size_t h = 0; h < n_heads; h++) s->budgets[h] = o->method.budgets ? o->method.budgets[h] : 0;
    s->method.budgets = s->budgets;
    return s;

out_of_memory:
    skv_device_full(device, error, "a session of %zu rows and %zu tokens a forward", o->n_rows, o->max_tokens);
    if (!s) device->backend->close(device);
    skv_session_free(s);
    return NULL;
}

void skv_session_free(skv_session *s) {
    if (!s) return;
    const size_t n_rows = s->rows ? s->n_rows : 0;
    for (size_t r = 0; r < n_rows; r++)
        if (s->rows[r].open) skv_row_close(s, (int32_t)r);
    skv_cache_free(&s->cache);
    buffer buffers[N_BUFFERS];
    list_buffers(s, buffers);
    for (size_t i = 0; i < N_BUFFERS; i++) s->device->backend->free(s->device, *buffers[i].at);
    s->device->backend->close(s->device);
    void *const blocks[] = {s->rows, s->parts, s->due_rows, s->budgets,     s->tokens,
                            s->due,  s->jobs,  s->fetched,  s->trace.bytes, s->fetched_slots};
    for (size_t i = 0; i < sizeof blocks / sizeof *blocks; i++) skv_free(&s->heap, blocks[i]);
    skv_heap heap = s->heap;
    skv_free(&heap, s);
}

/* What the heads of a layer may hold together once they are compacted: their budgets. */
static int64_t layer_budget(const skv_session *s, size_t head) {
    const size_t n_kv = (size_t)s->model->config.n_kv_heads, first = head / n_kv * n_kv;
    int64_t sum = 0;
    for (size_t h = first; h < first + n_kv; h++) sum += s->budgets[h];
    return sum;
}

/* Most slots that a head holds at once, if it is compacted: all tokens, or those of the prompt, or a budget (of the
 * layer, where it is shared) and what comes before the next compaction. */
static size_t scored_slots(const skv_session *s, size_t head, int32_t capacity, int32_t n_prompt) {
    const int64_t budget = s->needs & SKV_BY_LAYER ? layer_budget(s, head) : s->budgets[head];
    const int64_t decoding = budget + s->method.interval, peak = decoding > n_prompt ? decoding : n_prompt;
    return (size_t)(peak < capacity ? peak : capacity);
}

/* Most slots that are in the cache for a head. */
static size_t cache_slots(const skv_session *s, size_t head, int32_t capacity, int32_t n_prompt) {
    const bool evicts = s->needs & SKV_COMPACTS && s->method.evict;
    return evicts ? scored_slots(s, head, capacity, n_prompt) : (size_t)capacity;
}

/* Most slots, and pages, of the heads of a layer together (METHOD.md §5). */
static size_t layer_slots(const skv_session *s, size_t layer, int32_t capacity, int32_t n_prompt, size_t *pages) {
    const size_t n_kv = (size_t)s->model->config.n_kv_heads, first = layer * n_kv;
    size_t slots = 0;
    *pages = 0;
    for (size_t h = first; h < first + n_kv; h++) {
        slots += scored_slots(s, h, capacity, n_prompt);
        *pages += skv_cache_pages(cache_slots(s, h, capacity, n_prompt));
    }
    if (!(s->needs & SKV_BY_LAYER)) return slots;
    /* Sharing heads cannot all be as long as one may be; each wastes less than a page. */
    const size_t prompt = n_kv * (size_t)(n_prompt < capacity ? n_prompt : capacity);
    const size_t decoding = (size_t)layer_budget(s, first) + n_kv * (size_t)s->method.interval;
    const size_t most = decoding > prompt ? decoding : prompt;
    const size_t whole = (most + n_kv * (SKV_PAGE - 1)) / SKV_PAGE;
    if (s->method.evict && whole < *pages) *pages = whole;
    return most < slots ? most : slots;
}

static size_t row_pages(const skv_session *s, int32_t capacity, int32_t n_prompt) {
    size_t sum = 0, pages;
    for (size_t layer = 0; layer < (size_t)s->model->config.n_layers; layer++) {
        layer_slots(s, layer, capacity, n_prompt, &pages);
        sum += pages;
    }
    return sum;
}

/* Whether a row has lists of what the method would hold. */
static bool keeps_lists(const skv_session *s) { return s->needs & SKV_COMPACTS && !s->method.evict; }

/* Most slots in a head's list. */
static size_t held_slots(const skv_session *s, size_t head, int32_t capacity) {
    const int64_t budget = s->needs & SKV_BY_LAYER ? layer_budget(s, head) : s->budgets[head];
    return (size_t)(budget < capacity ? budget : capacity);
}

static size_t ring_floats(const skv_session *s) {
    const skv_config *c = &s->model->config;
    if (!(s->needs & SKV_QUERIES)) return 0;
    return (size_t)c->n_layers * (size_t)s->method.window * (size_t)c->n_heads * (size_t)c->head_dim;
}

/* On the device, of a row beside its pages and the vectors of its sentences. */
static size_t ring_bytes(const skv_session *s, int32_t capacity, bool steered) {
    const size_t hidden = (size_t)s->model->config.hidden;
    size_t n = ring_floats(s) + skv_vector_width(hidden) + (steered ? hidden : 0);
    for (size_t h = 0; keeps_lists(s) && h < n_cache_heads(s); h++) n += held_slots(s, h, capacity);
    return n * sizeof(float);
}

/* Of the vectors that a row is opened with, which has n sentences already. */
static size_t opening_bytes(const skv_session *s, int32_t capacity, size_t n) {
    const size_t interval = (size_t)s->method.interval, left = (size_t)capacity;
    const size_t closing = n + skv_closing(s->method.compat, interval < left ? interval : left);
    const size_t copied = n ? skv_closing(s->method.compat, 2 * n + 2) : 0;
    return s->vocabulary.flags ? skv_vector_bytes((size_t)s->model->config.hidden, copied > closing ? copied : closing)
                               : 0;
}

size_t skv_row_bytes(const skv_session *s, int32_t capacity, int32_t n_prompt) {
    const size_t pages = row_pages(s, capacity, n_prompt) * s->cache.shape.page_bytes;
    if (!s->device->backend->workspace) return pages;
    return pages + ring_bytes(s, capacity, true) + opening_bytes(s, capacity, 0);
}

void skv_row_shrink(skv_session *s, skv_row *r) {
    const size_t pages = row_pages(s, r->capacity, 0);
    if (pages >= r->n_reserved) return;
    skv_cache_release(&s->cache, r->n_reserved - pages);
    r->n_reserved = pages;
}

static void at_least(size_t *most, size_t value) { *most = value > *most ? value : *most; }

/* The session's work with such a row beside the others. */
static skv_workload work_with(const skv_session *s, int32_t capacity, int32_t n_prompt) {
    skv_workload work = s->work;
    size_t due_slots = 0, pages;
    for (size_t h = 0; h < n_cache_heads(s); h++) {
        at_least(&work.head_slots, cache_slots(s, h, capacity, n_prompt));
        if (work.n_due) at_least(&work.scored_slots, scored_slots(s, h, capacity, n_prompt));
    }
    for (size_t layer = 0; layer < (size_t)s->model->config.n_layers; layer++)
        due_slots += layer_slots(s, layer, capacity, n_prompt, &pages);
    if (work.n_due) at_least(&work.due_slots, due_slots);
    if (s->vocabulary.flags) at_least(&work.n_sentences, skv_closing(s->method.compat, (size_t)capacity));
    return work;
}

size_t skv_session_bytes(const skv_session *s, int32_t capacity, int32_t n_prompt) {
    const skv_workload work = work_with(s, capacity, n_prompt);
    return fixed_bytes(s, &work);
}

/* What open rows hold on the device beside their pages. */
static void count_rows(const skv_session *s, size_t *rings, size_t *vectors) {
    const size_t hidden = (size_t)s->model->config.hidden;
    *rings = *vectors = 0;
    for (const skv_row *r = s->rows; r < s->rows + s->n_rows; r++) {
        if (!r->open) continue;
        *rings += ring_bytes(s, r->capacity, r->vector != NULL);
        *vectors += skv_vector_bytes(hidden, r->tracker.n_blocks * SKV_VECTORS);
    }
}

/* Whether a row with so many pages and sentences fits under a limit on all that the session takes of a device. The
 * vectors of sentences that rows close later are not held against it, but against new rows. */
static skv_status check_limit(skv_session *s, const skv_row *r, size_t pages, size_t n_sentences, skv_error *error) {
    skv_cache *cache = &s->cache;
    const size_t page = cache->shape.page_bytes, limit = cache->limit_bytes, reserved = cache->n_reserved + pages;
    size_t rings, vectors;
    if (!s->device->backend->workspace) return SKV_OK;
    count_rows(s, &rings, &vectors);
    const size_t fixed = skv_session_bytes(s, r->capacity, r->n_prompt);
    const size_t own =
        ring_bytes(s, r->capacity, r->steering.vector != NULL) + opening_bytes(s, r->capacity, n_sentences);
    const size_t all = fixed + rings + vectors + own;
    /* Pages that nobody has reserved may be what is in the way. */
    if (!cache->n_reserved && all + cache->n_pages * page > limit) skv_cache_free(cache);
    const size_t total = all + (reserved > cache->n_pages ? reserved : cache->n_pages) * page;
    if (total <= limit) return SKV_OK;
    return skv_fail(error, SKV_CAPACITY,
                    "a row of %d tokens needs %zu bytes beside %zu in use, workspace of %zu among them; memory_limit "
                    "is %zu",
                    r->capacity, own + pages * page, total - own - pages * page, fixed, limit);
}

/* What forwards and compactions with this row need of the session, beside the others'. */
static skv_status grow_workspace(skv_session *s, const skv_row *r, skv_error *error) {
    const skv_workload work = work_with(s, r->capacity, r->n_prompt);
    if (work.fetches && work.scored_slots > s->work.scored_slots) {
        float *floats = skv_alloc(&s->heap, skv_fetched_floats(&work, work.scored_slots), sizeof *floats);
        int32_t *slots = skv_alloc(&s->heap, 2 * work.scored_slots, sizeof *slots);
        skv_free(&s->heap, floats ? s->fetched : NULL);
        skv_free(&s->heap, slots ? s->fetched_slots : NULL);
        if (floats) s->fetched = floats;
        if (slots) s->fetched_slots = slots;
        if (!floats || !slots) return skv_fail(error, SKV_CAPACITY, "out of memory for the arrays of a head");
    }
    if (s->device->backend->reserve(s->device, &work, error)) return error->code;
    s->work = work;
    return SKV_OK;
}

/* The parts of a row whose size follows from its options; those it has are freed by skv_row_close. */
static bool allocate_row(skv_session *s, skv_row *r) {
    const size_t n_heads = n_cache_heads(s);
    size_t n_pages = 0;
    for (size_t h = 0; h < n_heads; h++) n_pages += skv_cache_pages(cache_slots(s, h, r->capacity, r->n_prompt));
    r->heads = skv_alloc(&s->heap, n_heads, sizeof *r->heads);
    r->pages = skv_alloc(&s->heap, n_pages, sizeof *r->pages);
    if (!r->heads || !r->pages) return false;
    for (size_t h = 0, at = 0; h < n_heads; h++) {
        r->heads[h].pages = r->pages + at;
        at += skv_cache_pages(cache_slots(s, h, r->capacity, r->n_prompt));
    }
    if (s->needs & SKV_QUERIES) {
        r->ring = device_alloc(s, ring_floats(s), 1);
        if (!r->ring) return false;
    }
    if (keeps_lists(s)) {
        r->held = skv_alloc(&s->heap, n_heads, sizeof *r->held);
        if (!r->held) return false;
        for (size_t h = 0; h < n_heads; h++) {
            r->held[h].slots = device_alloc(s, held_slots(s, h, r->capacity), 1);
            if (!r->held[h].slots) return false;
        }
    }
    if (s->method.compat & SKV_COMPAT_LOST_HEADS) {
        r->lost = skv_alloc(&s->heap, n_heads, sizeof *r->lost);
        if (!r->lost) return false;
    }
    return true;
}

static skv_status out_of_memory(skv_session *s, int32_t row, int32_t capacity, skv_error *error) {
    skv_row_close(s, row);
    return skv_device_full(s->device, error, "a row of %d tokens", capacity);
}

/* Waits for what a new row was given; without it there is no row. */
static skv_status opened(skv_session *s, int32_t row, skv_error *error) {
    const skv_status status = s->device->backend->sync(s->device, error);
    if (status) skv_row_close(s, row);
    return status;
}

/* A free row of this shape, its pages reserved; its tracker, with so many sentences, is still to be made. */
static skv_status open_row(skv_session *s, const skv_row *shape, size_t n_sentences, int32_t *row, skv_error *error) {
    const skv_config *c = &s->model->config;
    if (shape->capacity < 1 || shape->capacity > c->context)
        return skv_fail(error, SKV_CONFIG, "a row of %d tokens; this model's context allows 1 to %d", shape->capacity,
                        c->context);
    if (shape->n_prompt < 1 || shape->n_prompt > shape->capacity)
        return skv_fail(error, SKV_CONFIG, "a prompt of %d tokens; this row's capacity allows 1 to %d", shape->n_prompt,
                        shape->capacity);
    if (skv_method_check_prompt(&s->method, n_cache_heads(s), shape->n_prompt, shape->reserve, error))
        return error->code;
    size_t free_row = 0;
    while (free_row < s->n_rows && s->rows[free_row].open) free_row++;
    if (free_row == s->n_rows) return skv_fail(error, SKV_CAPACITY, "all %zu rows are taken", s->n_rows);
    const size_t pages = row_pages(s, shape->capacity, shape->n_prompt);
    if (check_limit(s, shape, pages, n_sentences, error) || skv_cache_reserve(&s->cache, pages, error))
        return error->code;
    skv_row *r = s->rows + free_row;
    *r = *shape;
    r->open = true;
    r->n_reserved = pages;
    *row = (int32_t)free_row;
    if (!allocate_row(s, r)) return out_of_memory(s, *row, shape->capacity, error);
    if (!grow_workspace(s, r, error)) return SKV_OK;
    skv_row_close(s, *row);
    return error->code;
}

skv_status skv_row_open(skv_session *s, const skv_row_options *o, int32_t *row, skv_error *error) {
    const size_t hidden = (size_t)s->model->config.hidden, decoding = (size_t)s->method.interval;
    const int32_t n_layers = s->model->config.n_layers;
    const skv_row shape = {.capacity = o->capacity,
                           .n_prompt = o->n_prompt,
                           .reserve = o->reserve,
                           .sequence = {o->sequence[0], o->sequence[1]},
                           .steering = o->steering};
    if (o->steering.vector && (o->steering.layer < 0 || o->steering.layer >= n_layers))
        return skv_fail(error, SKV_CONFIG, "steering layer is %d; allowed: 0 to %d", o->steering.layer, n_layers - 1);
    if (open_row(s, &shape, 0, row, error)) return error->code;
    skv_row *r = s->rows + *row;
    if (o->steering.vector) {
        r->vector = device_alloc(s, hidden, 1);
        if (!r->vector) return out_of_memory(s, *row, o->capacity, error);
        s->device->backend->write(s->device, r->vector, o->steering.vector, hidden * sizeof *r->vector);
    }
    if (!skv_tracker_init(&r->tracker, &s->heap, s->device, &s->vocabulary, s->method.compat, hidden, o->n_prompt) ||
        !skv_row_reserve_sentences(r, decoding))
        return out_of_memory(s, *row, o->capacity, error);
    return opened(s, *row, error);
}

skv_status skv_row_fork(skv_session *s, int32_t from, int32_t capacity, int64_t sample, int32_t *row,
                        skv_error *error) {
    const skv_config *c = &s->model->config;
    const skv_backend *ops = s->device->backend;
    const skv_row *parent = s->rows + from;
    if (capacity < parent->n_tokens)
        return skv_fail(error, SKV_CONFIG, "a fork of capacity %d; the row holds %d tokens already", capacity,
                        parent->n_tokens);
    const skv_row shape = {.failure = parent->failure,
                           .capacity = capacity,
                           .n_prompt = parent->n_prompt,
                           .reserve = parent->reserve,
                           .sequence = {parent->sequence[0], sample},
                           .steering = parent->steering,
                           .n_tokens = parent->n_tokens,
                           .n_steered = parent->n_steered,
                           .n_compactions = parent->n_compactions,
                           .n_evicted = parent->n_evicted,
                           .n_pairs = parent->n_pairs};
    if (open_row(s, &shape, parent->tracker.n_sentences, row, error)) return error->code;
    skv_row *r = s->rows + *row;
    for (size_t h = 0; h < n_cache_heads(s); h++) {
        const skv_head *head = parent->heads + h;
        skv_cache_extend(&s->cache, r->heads + h, (size_t)head->n_slots);
        for (int32_t page = 0; page < head->n_pages; page++)
            ops->copy(s->device, r->heads[h].pages[page], head->pages[page], s->cache.shape.page_bytes);
        if (r->held) {
            const skv_held *held = parent->held + h;
            r->held[h].n = held->n, r->held[h].end = held->end;
            ops->copy(s->device, r->held[h].slots, held->slots, (size_t)held->n * sizeof *held->slots);
        }
        if (r->lost) r->lost[h] = parent->lost[h];
    }
    r->n_pages = r->peak_pages = parent->n_pages;
    if (r->ring) {
        ops->copy(s->device, r->ring, parent->ring, ring_floats(s) * sizeof *r->ring);
    }
    if (parent->vector) {
        r->vector = device_alloc(s, (size_t)c->hidden, 1);
        if (!r->vector) return out_of_memory(s, *row, capacity, error);
        ops->copy(s->device, r->vector, parent->vector, (size_t)c->hidden * sizeof *r->vector);
    }
    if (!skv_tracker_copy(&r->tracker, &parent->tracker) || !skv_row_reserve_sentences(r, (size_t)s->method.interval))
        return out_of_memory(s, *row, capacity, error);
    return opened(s, *row, error);
}

void skv_row_close(skv_session *s, int32_t row) {
    skv_row *r = s->rows + row;
    for (size_t h = 0; h < n_cache_heads(s); h++) {
        if (r->heads) skv_cache_truncate(&s->cache, r->heads + h, 0);
        if (r->held) s->device->backend->free(s->device, r->held[h].slots);
    }
    skv_tracker_free(&r->tracker);
    s->device->backend->free(s->device, r->ring);
    s->device->backend->free(s->device, r->vector);
    void *const blocks[] = {r->heads, r->pages, r->held, r->lost};
    for (size_t i = 0; i < sizeof blocks / sizeof *blocks; i++) skv_free(&s->heap, blocks[i]);
    skv_cache_release(&s->cache, r->n_reserved);
    *r = (skv_row){0};
}

void skv_end_rows(skv_session *s, const skv_span *spans, size_t n_spans) {
    for (size_t i = 0; i < n_spans; i++) {
        skv_row *r = s->rows + spans[i].row;
        if (!r->failure) r->failure = "its forward failed";
    }
}

bool skv_row_is_open(const skv_session *s, int32_t row) {
    return row >= 0 && (size_t)row < s->n_rows && s->rows[row].open;
}

void skv_row_extend(skv_session *s, skv_row *r, size_t n) {
    for (size_t h = 0; h < n_cache_heads(s); h++) {
        const int32_t before = r->heads[h].n_pages;
        skv_cache_extend(&s->cache, r->heads + h, n);
        r->n_pages += (size_t)(r->heads[h].n_pages - before);
    }
    at_least(&r->peak_pages, r->n_pages);
}

bool skv_row_on_grid(const skv_session *s, const skv_row *r, int32_t n_tokens) {
    const int32_t interval = s->method.interval;
    return n_tokens == r->n_prompt || (n_tokens > r->n_prompt && n_tokens > 1 && n_tokens % interval == 1 % interval);
}

int32_t skv_row_chunk(const skv_session *s, int32_t row, int32_t n) {
    const skv_row *r = s->rows + row;
    for (int32_t i = 1; i < n; i++)
        if (skv_row_on_grid(s, r, r->n_tokens + i)) return i;
    return n;
}

void skv_row_brake(skv_session *s, int32_t row) {
    skv_steering *steering = &s->rows[row].steering;
    steering->alpha = steering->alpha_max;
}

skv_row_state skv_row_state_of(const skv_session *s, int32_t row) {
    const skv_row *r = s->rows + row;
    const skv_tracker *t = &r->tracker;
    skv_row_state state = {.n_tokens = r->n_tokens,
                           .n_prompt = r->n_prompt,
                           .live_bytes = r->n_pages * s->cache.shape.page_bytes,
                           .peak_bytes = r->peak_pages * s->cache.shape.page_bytes,
                           .n_compactions = r->n_compactions,
                           .n_evicted = r->n_evicted,
                           .n_pairs = r->n_pairs,
                           .n_sentences = t->n_sentences,
                           .n_thoughts = t->n_thoughts,
                           .n_thinking = t->n_thinking,
                           .n_answer = t->n_answer,
                           .n_repeating = t->n_repeating,
                           .n_steered = r->n_steered};
    for (size_t h = 0; h < n_cache_heads(s); h++) state.n_slots += (size_t)r->heads[h].n_slots;
    for (size_t i = 0; i < t->n_sentences; i++) state.n_flagged += t->facts[i].lambda > 0;
    return state;
}

size_t skv_row_positions(skv_session *s, int32_t row, size_t layer, size_t head, int32_t *positions, size_t room) {
    const skv_head *from = s->rows[row].heads + layer * (size_t)s->model->config.n_kv_heads + head;
    skv_error ignored;
    for (size_t i = 0, n; i < room && i < (size_t)from->n_slots; i += n) {
        n = room - i < SKV_PAGE ? room - i : SKV_PAGE;
        s->device->backend->read(s->device, positions + i, from->pages[i / SKV_PAGE] + s->cache.shape.positions_at,
                                 n * sizeof *positions);
    }
    s->device->backend->sync(s->device, &ignored);
    return (size_t)from->n_slots;
}

skv_sentence skv_row_sentence(skv_session *s, int32_t row, size_t i, float *vector) {
    const skv_tracker *t = &s->rows[row].tracker;
    const size_t hidden = (size_t)s->model->config.hidden;
    skv_error ignored;
    if (vector && t->vectors[i]) {
        s->device->backend->read(s->device, vector, t->vectors[i], hidden * sizeof *vector);
        s->device->backend->sync(s->device, &ignored);
    } else if (vector) {
        for (size_t k = 0; k < hidden; k++) vector[k] = NAN;
    }
    return skv_tracker_sentence(t, i);
}

bool skv_session_steered(const skv_session *s, size_t t, float *alpha) {
    *alpha = s->tokens[t].alpha;
    return s->tokens[t].steered;
}

const char *skv_session_trace(const skv_session *s, size_t *n_bytes) {
    *n_bytes = s->trace.n;
    return s->trace.bytes;
}

void skv_session_drop_trace(skv_session *s) { s->trace.n = 0; }

skv_ledger skv_session_ledger(const skv_session *s) {
    const size_t page = s->cache.shape.page_bytes, device = s->device->heap.live_bytes;
    size_t rings, vectors;
    count_rows(s, &rings, &vectors);
    return (skv_ledger){.live_bytes = (s->cache.n_pages - s->cache.n_free) * page,
                        .reserved_bytes = s->cache.n_reserved * page,
                        .pool_bytes = s->cache.n_pages * page,
                        .peak_bytes = s->cache.peak_pages * page,
                        .page_bytes = page,
                        .ring_bytes = rings,
                        .sentence_bytes = vectors,
                        .workspace_bytes = device - s->cache.n_pages * page - rings - vectors,
                        .heap_bytes = s->heap.live_bytes + device + s->device->idle_bytes,
                        .weight_bytes = skv_model_bytes(s->model),
                        .n_allocator_calls = s->heap.n_calls + s->device->heap.n_calls,
                        .evict_seconds = s->evict_seconds};
}
