/* Keys, values and queries: written, attended to, remembered. */
#include <math.h>
#include <string.h>

#include "cpu.h"

const float *cpu_keys(const cpu_device *d, const skv_head *head, size_t page, size_t at, size_t n, float *scratch) {
    const skv_cache_shape *cache = &d->work.cache;
    const size_t stride = (size_t)cache->stride;
    const char *keys = page_keys(head, page) + at * cache->slot_bytes;
    if (cache->type == SKV_F32) return (const float *)(const void *)keys;
    if (cache->type == SKV_BF16) d->kernels->widen((const uint16_t *)(const void *)keys, n * stride, scratch);
    if (cache->type == SKV_Q8)
        for (size_t i = 0; i < n; i++)
            skv_dequantise((const int8_t *)keys + i * stride, page_scales(cache, head, page)[at + i], stride,
                           scratch + i * stride);
    return scratch;
}

/* The heads of one layer of a part's row. */
static skv_head *heads_of(const cpu_device *d, const skv_part *part, size_t layer) {
    return part->heads + layer * (size_t)d->work.config->n_kv_heads;
}

/* One slot's vector ← x [head_dim], zero up to the stride; *scale ← its scale if it has one. */
static void store(const skv_cache_shape *cache, char *to, float *scale, const float *x) {
    const skv_dtype_info *type = skv_dtypes + cache->type;
    const size_t dim = (size_t)cache->head_dim;
    if (cache->type == SKV_Q8)
        *scale = skv_quantise(x, dim, (int8_t *)to);
    else
        type->narrow(x, dim, to);
    memset(to + dim * type->size, 0, cache->slot_bytes - dim * type->size);
}

typedef struct append_job {
    const cpu_device *device;
    const skv_part *part;
    size_t layer;
    const float *k, *v;
} append_job;

static void append_tokens(const void *argument, cpu_range r) {
    const append_job *j = argument;
    const skv_part *part = j->part;
    const skv_cache_shape *cache = &j->device->work.cache;
    const size_t dim = (size_t)cache->head_dim, n_kv = (size_t)j->device->work.config->n_kv_heads;
    for (size_t i = r.first; i < r.end; i++)
        for (size_t h = 0; h < n_kv; h++) {
            const skv_head *head = heads_of(j->device, part, j->layer) + h;
            const size_t slot = (size_t)head->n_slots - part->n + i, page = slot / SKV_PAGE, at = slot % SKV_PAGE;
            const size_t from = ((part->first + i) * n_kv + h) * dim;
            float *scale = page_scales(cache, head, page) + at;
            store(cache, page_keys(head, page) + at * cache->slot_bytes, scale, j->k + from);
            store(cache, page_values(cache, head, page) + at * cache->slot_bytes, scale + SKV_PAGE, j->v + from);
            page_positions(cache, head, page)[at] = part->position + (int32_t)i;
            if (cache->sums) page_sums(cache, head, page)[at] = 0;
        }
}

void cpu_append(skv_device *base, size_t layer, const float *k, const float *v) {
    const cpu_device *d = cpu_of(base);
    const size_t width = (size_t)d->work.config->n_kv_heads * (size_t)d->work.cache.head_dim;
    for (const skv_part *part = d->batch->parts; part < d->batch->parts + d->batch->n_parts; part++)
        cpu_run(d->threads, part->n, part->n * width, append_tokens, &(append_job){d, part, layer, k, v});
}

void cpu_keep_queries(skv_device *base, size_t layer, const float *q) {
    const cpu_device *d = cpu_of(base);
    const size_t width = (size_t)d->work.config->n_heads * (size_t)d->work.config->head_dim;
    const size_t window = (size_t)d->work.window;
    for (const skv_part *part = d->batch->parts; part < d->batch->parts + d->batch->n_parts; part++) {
        if (!part->ring) continue;
        for (size_t t = part->n > window ? part->n - window : 0; t < part->n; t++)
            memcpy(part->ring + (layer * window + ((size_t)part->position + t) % window) * width,
                   q + (part->first + t) * width, width * sizeof *q);
    }
}

/* Attention is a list of tasks: one KV head, its group's queries of a block of tokens, and all the pages that these
 * see. The pages are in as many equal shares as there are threads, so a long task of a decode step may be cut: the
 * share of its first pages adds up what it has, the others leave theirs page by page, and all is merged in the order of
 * the pages, as without a cut. */
enum { BLOCK_TOKENS = 16, UNCUT = 8 /* pages that are not worth a cut */ };

typedef struct attention_task {
    const skv_part *part;
    const skv_head *head;
    size_t kv_head, first, n; /* tokens of the part */
    size_t n_pages;
    size_t at, cost; /* of all the tasks' pages, weighted by tokens */
} attention_task;

/* The pages of a task that lie in one share: [first, end). */
typedef struct page_range {
    size_t first, end;
} page_range;

size_t cpu_task_floats(const skv_workload *work) {
    return work->n_tokens * (size_t)work->config->n_kv_heads * sizeof(attention_task) / sizeof(float);
}

static size_t group_of(const skv_workload *work) { return (size_t)(work->config->n_heads / work->config->n_kv_heads); }

/* queries and sums [BLOCK_TOKENS, group, stride], totals [BLOCK_TOKENS, group], acc [SKV_QUERY_TILE, stride], but at
 * least keys [SKV_PAGE, stride] and a query, for receive_head */
size_t cpu_attention_floats(const skv_workload *work) {
    const size_t stride = (size_t)work->cache.stride, n = BLOCK_TOKENS * group_of(work);
    return (SKV_PAGE + 1 + 2 * n + SKV_QUERY_TILE) * stride + 2 * n;
}

/* A share's partials: of a page acc [group, stride], then parts [group]. */
size_t cpu_partial_floats(const skv_workload *work) {
    const size_t pages = (work->head_slots + SKV_PAGE - 1) / SKV_PAGE;
    return pages * group_of(work) * ((size_t)work->cache.stride + 2);
}

typedef struct attention_work {
    float *queries, *sums, *acc;
    skv_partial *totals;
    float *partials;
} attention_work;

static attention_work work_of(const cpu_device *d, size_t share) {
    const size_t stride = (size_t)d->work.cache.stride, n = BLOCK_TOKENS * group_of(&d->work);
    float *queries = d->attending + share * cpu_attention_floats(&d->work), *acc = queries + 2 * n * stride;
    return (attention_work){.queries = queries,
                            .sums = queries + n * stride,
                            .acc = acc,
                            .totals = (skv_partial *)(void *)(acc + SKV_QUERY_TILE * stride),
                            .partials = d->partials + share * cpu_partial_floats(&d->work)};
}

/* Where query i of a task lies in the batch's. */
static size_t query_at(const cpu_device *d, const attention_task *task, size_t i) {
    const size_t n_heads = (size_t)d->work.config->n_heads, group = group_of(&d->work);
    const size_t token = task->part->first + task->first + i / group;
    return (token * n_heads + task->kv_head * group + i % group) * (size_t)d->work.cache.head_dim;
}

/* Queries `from` … `end` − 1 of a task meet the page. Results go to the totals, or with partials there. */
static void attend_page(const cpu_device *d, const attention_work *w, const skv_page *page, size_t from, size_t end,
                        float *partials) {
    const size_t stride = (size_t)d->work.cache.stride;
    const float scale = 1.0f / sqrtf((float)d->work.cache.head_dim);
    skv_partial parts[SKV_QUERY_TILE], *to = parts;
    float *acc = w->acc;
    for (size_t i = from, n; i < end; i += n) {
        const size_t tiles = (end - i + SKV_QUERY_TILE - 1) / SKV_QUERY_TILE;
        n = (end - i) / tiles; /* as even as can be */
        if (partials) acc = partials + i * stride, to = (skv_partial *)(void *)(partials + end * stride) + i;
        d->kernels->attend[d->work.cache.type](page, stride, w->queries + i * stride, n, scale, to, acc);
        for (size_t k = 0; !partials && k < n; k++)
            d->kernels->merge(w->totals + i + k, w->sums + (i + k) * stride, parts[k], acc + k * stride, stride);
    }
}

static void finish(const cpu_device *d, const attention_task *task, const attention_work *w, size_t i, float *out) {
    const size_t stride = (size_t)d->work.cache.stride, dim = (size_t)d->work.cache.head_dim;
    float *to = out + query_at(d, task, i);
    const float inverse = 1.0f / w->totals[i].sum;
    for (size_t c = 0; c < dim; c++) to[c] = w->sums[i * stride + c] * inverse;
}

static void attend(const cpu_device *d, const attention_task *task, page_range range, const attention_work *w,
                   const float *q, float *out) {
    const skv_cache_shape *cache = &d->work.cache;
    const size_t stride = (size_t)cache->stride, dim = (size_t)cache->head_dim, group = group_of(&d->work);
    const size_t seen = (size_t)task->head->n_slots - task->part->n + task->first + 1; /* by the first token */
    for (size_t i = 0; i < task->n * group; i++) {
        memcpy(w->queries + i * stride, q + query_at(d, task, i), dim * sizeof *q);
        memset(w->queries + i * stride + dim, 0, (stride - dim) * sizeof *q);
        w->totals[i] = (skv_partial){0};
    }
    for (size_t p = range.first; p < range.end; p++) {
        const size_t before = p * SKV_PAGE;
        const size_t next = p + 1 < range.end ? p + 1 : p;
        const float *scales = page_scales(cache, task->head, p);
        skv_page page = {.keys = page_keys(task->head, p),
                         .values = page_values(cache, task->head, p),
                         .next_keys = page_keys(task->head, next),
                         .next_values = page_values(cache, task->head, next),
                         .key_scales = scales,
                         .value_scales = scales + SKV_PAGE};
        float *partials = range.first ? w->partials + (p - range.first) * group * (stride + 2) : NULL;
        for (size_t t = seen > before ? 0 : before + 1 - seen, end; t < task->n; t = end) {
            const bool full = seen + t >= before + SKV_PAGE; /* then it is full for the later tokens, too */
            page.n = full ? SKV_PAGE : seen + t - before;
            end = full ? task->n : t + 1;
            attend_page(d, w, &page, t * group, end * group, partials);
        }
    }
    if (range.first > 0 || range.end < task->n_pages) return;
    for (size_t i = 0; i < task->n * group; i++) finish(d, task, w, i, out);
}

/* Fills the list of tasks and returns their number. */
static size_t list_tasks(const cpu_device *d, size_t layer, attention_task *tasks) {
    size_t n = 0, at = 0;
    for (const skv_part *part = d->batch->parts; part < d->batch->parts + d->batch->n_parts; part++)
        for (size_t first = 0; first < part->n; first += BLOCK_TOKENS)
            for (size_t h = 0; h < (size_t)d->work.config->n_kv_heads; h++) {
                attention_task t = {.part = part, .head = heads_of(d, part, layer) + h, .kv_head = h, .first = first};
                t.n = part->n - first < BLOCK_TOKENS ? part->n - first : BLOCK_TOKENS;
                t.n_pages = ((size_t)t.head->n_slots - part->n + first + t.n + SKV_PAGE - 1) / SKV_PAGE;
                t.at = at, t.cost = t.n_pages * t.n;
                at += t.cost;
                tasks[n++] = t;
            }
    return n;
}

/* A share's part of a task: what lies between `low` and `high` where it may be cut, else all where it begins there. */
static page_range range_of(const attention_task *t, size_t low, size_t high) {
    const size_t end = t->at + t->cost;
    if (t->n > 1 || t->n_pages <= UNCUT) return (page_range){0, t->at >= low && t->at < high ? t->n_pages : 0};
    if (end <= low || t->at >= high) return (page_range){0};
    return (page_range){low > t->at ? low - t->at : 0, (high < end ? high : end) - t->at};
}

typedef struct attention_job {
    const cpu_device *device;
    const attention_task *tasks;
    size_t n_tasks, total, n_shares;
    const float *q;
    float *out;
} attention_job;

static page_range share_of(const attention_job *j, const attention_task *task, size_t share) {
    return range_of(task, j->total * share / j->n_shares, j->total * (share + 1) / j->n_shares);
}

static void attend_shares(const void *argument, cpu_range r) {
    const attention_job *j = argument;
    for (size_t share = r.first; share < r.end; share++) {
        const attention_work w = work_of(j->device, share);
        for (const attention_task *task = j->tasks; task < j->tasks + j->n_tasks; task++) {
            const page_range range = share_of(j, task, share);
            if (range.end > range.first) attend(j->device, task, range, &w, j->q, j->out);
        }
    }
}

/* What other shares left of a task that a share has begun: query i. */
static void merge_cut(const attention_job *j, const attention_task *task, size_t share, size_t i) {
    const cpu_device *d = j->device;
    const size_t stride = (size_t)d->work.cache.stride, group = group_of(&d->work);
    const attention_work w = work_of(d, share);
    for (size_t other = share + 1; other < j->n_shares; other++) {
        const page_range range = share_of(j, task, other);
        const float *from = work_of(d, other).partials;
        for (size_t page = range.first; page < range.end; page++, from += group * (stride + 2)) {
            skv_partial part;
            memcpy(&part, from + group * stride + 2 * i, sizeof part);
            d->kernels->merge(w.totals + i, w.sums + i * stride, part, from + i * stride, stride);
        }
    }
    finish(d, task, &w, i, j->out);
}

/* Of every share the task that it has begun but not ended, query by query. */
static void merge_shares(const void *argument, cpu_range r) {
    const attention_job *j = argument;
    const size_t group = group_of(&j->device->work);
    for (size_t item = r.first; item < r.end; item++) {
        const size_t share = item / group, end = j->total * (share + 1) / j->n_shares;
        const attention_task *task = j->tasks;
        while (task < j->tasks + j->n_tasks && task->at + task->cost <= end) task++;
        if (task == j->tasks + j->n_tasks) continue;
        const page_range range = share_of(j, task, share);
        if (range.end > range.first && !range.first && range.end < task->n_pages)
            merge_cut(j, task, share, item % group);
    }
}

void cpu_attention(skv_device *base, size_t layer, const float *q, float *out) {
    const cpu_device *d = cpu_of(base);
    attention_task *tasks = (attention_task *)(void *)d->tasks;
    const size_t n = list_tasks(d, layer, tasks), total = tasks[n - 1].at + tasks[n - 1].cost;
    const attention_job job = {d, tasks, n, total, (size_t)base->n_threads, q, out};
    bool cuts = false;
    for (size_t i = 0; i < n; i++) cuts |= tasks[i].n == 1 && tasks[i].n_pages > UNCUT;
    cpu_run(d->threads, job.n_shares, total > 1 ? SIZE_MAX : 0, attend_shares, &job);
    if (cuts) cpu_run(d->threads, job.n_shares * group_of(&d->work), SIZE_MAX, merge_shares, &job);
}

/* Every query adds its probabilities to the slots it sees, queries in order of position and heads in order, whatever
 * the chunk. */
static void receive_head(const cpu_device *d, const skv_part *part, const skv_head *head, size_t kv_head,
                         const float *q, float *scratch, float *logits) {
    const skv_cache_shape *cache = &d->work.cache;
    const size_t n_heads = (size_t)d->work.config->n_heads, group = n_heads / (size_t)d->work.config->n_kv_heads;
    const size_t stride = (size_t)cache->stride, dim = (size_t)cache->head_dim;
    const float scale = 1.0f / sqrtf((float)dim);
    float *query = scratch + SKV_PAGE * stride, *probability = logits + padded(d->work.head_slots);
    for (size_t t = 0; t < part->n; t++)
        for (size_t g = 0; g < group; g++) {
            const size_t visible = (size_t)head->n_slots - part->n + t + 1;
            memcpy(query, q + ((part->first + t) * n_heads + kv_head * group + g) * dim, dim * sizeof *q);
            memset(query + dim, 0, (stride - dim) * sizeof *q);
            for (size_t page = 0; page * SKV_PAGE < visible; page++) {
                const size_t left = visible - page * SKV_PAGE, n = left < SKV_PAGE ? left : SKV_PAGE;
                const float *keys = cpu_keys(d, head, page, 0, n, scratch);
                d->kernels->inner(query, keys, n, stride, logits + page * SKV_PAGE);
            }
            for (size_t j = 0; j < visible; j++) logits[j] *= scale;
            memset(probability, 0, padded(visible) * sizeof *probability);
            d->kernels->add_softmax(logits, visible, probability);
            for (size_t j = 0; j < visible; j++) page_sums(cache, head, j / SKV_PAGE)[j % SKV_PAGE] += probability[j];
        }
}

typedef struct receive_job {
    const cpu_device *device;
    size_t layer;
    const float *q;
} receive_job;

static void receive_heads(const void *argument, cpu_range r) {
    const receive_job *j = argument;
    const cpu_device *d = j->device;
    const size_t n_kv = (size_t)d->work.config->n_kv_heads;
    float *scratch = d->attending + r.thread * cpu_attention_floats(&d->work);
    float *logits = d->received + r.thread * 2 * padded(d->work.head_slots);
    for (size_t i = r.first; i < r.end; i++) {
        const skv_part *part = d->batch->parts + i / n_kv;
        receive_head(d, part, heads_of(d, part, j->layer) + i % n_kv, i % n_kv, j->q, scratch, logits);
    }
}

void cpu_receive(skv_device *base, size_t layer, const float *q) {
    const cpu_device *d = cpu_of(base);
    const size_t n = d->batch->n_parts * (size_t)d->work.config->n_kv_heads;
    cpu_run(d->threads, n, SIZE_MAX, receive_heads, &(receive_job){d, layer, q});
}
