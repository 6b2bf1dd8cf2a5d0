/* Scores of one KV head on the CPU (METHOD.md §2, §3), the attention that h2o adds up, and the moves of a compaction. Runs on one thread:
 * evict.c splits layers over threads. */
#include <math.h>
#include <omp.h>
#include <string.h>

#include "pages.h"
#include "score.h"

/* Rows of products computed at a time. */
enum { ROWS = 48 };

/* The parts of skv_scoring.work, by number of floats. */
typedef struct score_work {
    float *unit;        /* [L, stride] keys of length 1 */
    float *z;           /* [window, L + 16] */
    float *panel;       /* [dim, SKV_COLUMNS] */
    float *products;    /* [ROWS, SKV_COLUMNS] */
    float *sum;         /* [stride] */
    float *self, *lost; /* [L + 16] */
    int32_t *active;    /* [L] rows without a hit so far */
} score_work;

static size_t padded(size_t n) { return (n + 31) / 16 * 16; }

/* Lays the parts out from work on; returns the floats they take. */
static size_t lay_out(score_work *w, float *work, size_t n_slots, size_t stride, size_t window) {
    const size_t sizes[] = {n_slots * stride, window * padded(n_slots), stride * SKV_COLUMNS, ROWS * SKV_COLUMNS,
                            stride,           padded(n_slots),          padded(n_slots),      padded(n_slots)};
    float **const parts[] = {&w->unit, &w->z, &w->panel, &w->products, &w->sum, &w->self, &w->lost};
    size_t at = 0;
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        if (work && i < 7) *parts[i] = work + at;
        if (work && i == 7) w->active = (int32_t *)(void *)(work + at);
        at += (sizes[i] + 15) / 16 * 16;
    }
    return at;
}

size_t cpu_score_work(size_t n_slots, size_t stride, size_t window) { return lay_out(&(score_work){0}, NULL, n_slots, stride, window); }

/* panel [dim, SKV_COLUMNS] ← n rows of the given distance as its columns, zero beyond */
static void load_panel(const float *rows, size_t stride, size_t dim, size_t n, float *panel) {
    for (size_t j = 0; j < n; j++)
        for (size_t k = 0; k < dim; k++) panel[k * SKV_COLUMNS + j] = rows[j * stride + k];
    for (size_t j = n; j < SKV_COLUMNS; j++)
        for (size_t k = 0; k < dim; k++) panel[k * SKV_COLUMNS + j] = 0;
}

void cpu_importance(skv_scoring *s) {
    const skv_kernels *kernels = s->backend->kernels;
    const size_t n = s->n_candidates, ld = padded(s->n_slots), n_queries = s->n_queries * s->group;
    const float scale = 1.0f / sqrtf((float)s->dim);
    score_work w;
    lay_out(&w, s->work, s->n_slots, s->stride, (size_t)s->method->window);
    for (size_t first = 0; first < n_queries; first += SKV_COLUMNS) { /* sixteen queries against all keys */
        const size_t columns = n_queries - first < SKV_COLUMNS ? n_queries - first : SKV_COLUMNS;
        load_panel(s->queries + first * s->stride, s->stride, s->dim, columns, w.panel);
        for (size_t row0 = 0; row0 < n; row0 += ROWS) {
            const size_t rows = n - row0 < ROWS ? n - row0 : ROWS;
            const float *key[ROWS];
            for (size_t r = 0; r < rows; r++) key[r] = s->keys + (row0 + r) * s->stride;
            kernels->products(w.panel, key, rows, s->dim, w.products);
            for (size_t c = 0; c < columns; c++) { /* the group's maximum on the raw logits */
                float *z = w.z + (first + c) / s->group * ld + row0;
                const bool fresh = (first + c) % s->group == 0;
                for (size_t r = 0; r < rows; r++) {
                    const float logit = w.products[r * SKV_COLUMNS + c] * scale;
                    z[r] = fresh || logit > z[r] ? logit : z[r];
                }
            }
        }
    }
    float *mean = w.self;
    memset(mean, 0, ld * sizeof *mean);
    if (n)
        for (size_t q = 0; q < s->n_queries; q++) kernels->add_softmax(w.z + q * ld, n, mean);
    for (size_t j = 0; j < n; j++) mean[j] /= (float)s->n_queries;
    const size_t half = (size_t)s->method->kernel / 2;
    for (size_t j = 0; j < n; j++) {
        float max = 0;
        for (size_t i = j < half ? 0 : j - half; i < n && i <= j + half; i++) max = mean[i] > max ? mean[i] : max;
        s->importance[j] = max;
    }
}

/* r(i) of every slot i (METHOD.md §3): the last key similar to it is searched from the newest key downwards, sixteen keys at a time, and a
 * row leaves the search once it has found its own. w->lost[j] ← Σ of S[i, r(i)] over the rows i with r(i) = j. */
static void search_hits(skv_scoring *s, score_work *w) {
    const skv_kernels *kernels = s->backend->kernels;
    const size_t n = s->n_slots, stride = s->stride;
    size_t n_active = n;
    for (size_t i = 0; i < n; i++) w->active[i] = (int32_t)i, w->lost[i] = 0;
    for (size_t end = n; end > 0 && n_active > 0;) {
        /* Blocks end at multiples of their size, so that the last one holds key 0 and no key is looked at twice. */
        const size_t first = (end - 1) / SKV_COLUMNS * SKV_COLUMNS, columns = end - first;
        const bool few = n_active < 8; /* a panel would cost more than it saves */
        if (!few) load_panel(w->unit + first * stride, stride, s->dim, columns, w->panel);
        s->n_pairs += n_active * columns;
        size_t still = 0;
        for (size_t row0 = 0; row0 < n_active; row0 += ROWS) {
            const size_t rows = n_active - row0 < ROWS ? n_active - row0 : ROWS;
            const float *row[ROWS];
            for (size_t r = 0; r < rows; r++) row[r] = w->unit + (size_t)w->active[row0 + r] * stride;
            if (!few) kernels->products(w->panel, row, rows, s->dim, w->products);
            for (size_t r = 0; few && r < rows; r++)
                kernels->inner(row[r], w->unit + first * stride, columns, stride, w->products + r * SKV_COLUMNS);
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
        end = first;
    }
}

/* Without the L × L matrix: the column sums of S come from one vector sum, and only r(i) is searched for. */
void cpu_redundancy(skv_scoring *s) {
    const skv_kernels *kernels = s->backend->kernels;
    const size_t n = s->n_slots, stride = s->stride;
    score_work w;
    lay_out(&w, s->work, n, stride, (size_t)s->method->window);
    double sums[512] = {0}; /* head_dim is at most 512 */
    for (size_t i = 0; i < n; i += ROWS) {
        const size_t rows = n - i < ROWS ? n - i : ROWS;
        kernels->normalise(s->keys + i * stride, rows, stride, w.unit + i * stride, w.sum);
        for (size_t k = 0; k < s->dim; k++) sums[k] += (double)w.sum[k];
        for (size_t r = i; r < i + rows; r++) kernels->inner(w.unit + r * stride, w.unit + r * stride, 1, stride, w.self + r);
    }
    for (size_t k = 0; k < s->dim; k++) w.sum[k] = (float)sums[k];
    search_hits(s, &w);

    kernels->inner(w.sum, w.unit, n, stride, s->redundancy);
    float *c = s->redundancy, max = -INFINITY;
    for (size_t j = 0; j < n; j++) {
        c[j] = (c[j] - w.self[j] - w.lost[j]) / (float)n;
        max = c[j] > max ? c[j] : max;
    }
    memcpy(w.z, c, n * sizeof *c);
    memset(c, 0, padded(n) * sizeof *c);
    kernels->add_softmax(w.z, n, c);
}

static char *part_keys(const skv_cache_shape *cache, const skv_head *head, size_t page) {
    (void)cache;
    return page_keys(head, page);
}

static char *part_values(const skv_cache_shape *cache, const skv_head *head, size_t page) { return page_values(cache, head, page); }

static char *part_positions(const skv_cache_shape *cache, const skv_head *head, size_t page) {
    return (char *)(void *)page_positions(cache, head, page);
}

static char *part_sums(const skv_cache_shape *cache, const skv_head *head, size_t page) {
    return (char *)(void *)page_sums(cache, head, page);
}

void cpu_gather(const skv_backend *backend, const skv_cache_shape *cache, const skv_head *head, const int32_t *slots, size_t n, float *keys,
                int32_t *positions, float *sums) {
    const skv_kernels *kernels = backend->kernels;
    const size_t stride = (size_t)cache->stride, width = stride * skv_dtype_size(cache->type);
    for (size_t i = 0; i < n;) {
        /* Without a list of slots, page by page. */
        const size_t slot = slots ? (size_t)slots[i] : i, page = slot / SKV_PAGE, at = slot % SKV_PAGE;
        const size_t run = slots ? 1 : n - i < SKV_PAGE ? n - i : SKV_PAGE;
        memcpy(positions + i, page_positions(cache, head, page) + at, run * sizeof *positions);
        if (sums) memcpy(sums + i, page_sums(cache, head, page) + at, run * sizeof *sums);
        const char *from = page_keys(head, page) + at * width;
        if (keys && cache->type == SKV_F32) memcpy(keys + i * stride, from, run * width);
        if (keys && cache->type == SKV_BF16) kernels->widen((const uint16_t *)(const void *)from, run * stride, keys + i * stride);
        i += run;
    }
}

void cpu_compact(const skv_cache_shape *cache, const skv_head *head, const int32_t *keep, size_t n, void *scratch) {
    const size_t bytes = (size_t)cache->stride * skv_dtype_size(cache->type);
    const size_t widths[] = {bytes, bytes, sizeof(int32_t), sizeof(float)};
    char *(*const parts[])(const skv_cache_shape *, const skv_head *, size_t) = {part_keys, part_values, part_positions, part_sums};
    bool ascending = true;
    for (size_t i = 1; i < n; i++) ascending &= keep[i - 1] < keep[i];
    for (size_t part = 0; part < (cache->sums ? 4 : 3); part++) {
        const size_t width = widths[part];
        for (size_t i = 0; i < n; i++) { /* ascending slots only ever move down: nothing is overwritten before it has moved */
            const size_t from = (size_t)keep[i];
            char *to = ascending ? parts[part](cache, head, i / SKV_PAGE) + i % SKV_PAGE * width : (char *)scratch + i * width;
            const char *source = parts[part](cache, head, from / SKV_PAGE) + from % SKV_PAGE * width;
            if (to != source) memcpy(to, source, width);
        }
        for (size_t i = 0; !ascending && i < n; i++)
            memcpy(parts[part](cache, head, i / SKV_PAGE) + i % SKV_PAGE * width, (char *)scratch + i * width, width);
    }
}

/* Every query adds its probabilities to the slots it sees, queries in order of position and heads in order, whatever the chunk. */
void cpu_receive(const skv_exec *exec, const skv_cache_shape *cache, const skv_span_view *spans, size_t n_spans, size_t n_heads,
                 size_t n_kv_heads, const float *q, float *logits, size_t ld) {
    const skv_kernels *kernels = exec->backend->kernels;
    const size_t group = n_heads / n_kv_heads, stride = (size_t)cache->stride, dim = (size_t)cache->head_dim;
    const float scale = 1.0f / sqrtf((float)dim);
#pragma omp parallel for schedule(dynamic) num_threads(exec->n_threads)
    for (size_t task = 0; task < n_spans * n_kv_heads; task++) {
        const skv_span_view *span = spans + task / n_kv_heads;
        const size_t kv_head = task % n_kv_heads;
        const skv_head *head = span->heads + kv_head;
        const size_t before = (size_t)head->n_slots - span->n;
        float *scratch = exec->scratch + (size_t)omp_get_thread_num() * exec->scratch_per_thread, *query = scratch + SKV_PAGE * stride;
        float *z = logits + (size_t)omp_get_thread_num() * 2 * ld, *probability = z + ld;
        for (size_t t = 0; t < span->n; t++)
            for (size_t g = 0; g < group; g++) {
                const size_t visible = before + t + 1;
                memcpy(query, q + ((span->first + t) * n_heads + kv_head * group + g) * dim, dim * sizeof *q);
                memset(query + dim, 0, (stride - dim) * sizeof *q);
                for (size_t page = 0; page * SKV_PAGE < visible; page++) {
                    const size_t n = visible - page * SKV_PAGE < SKV_PAGE ? visible - page * SKV_PAGE : SKV_PAGE;
                    kernels->inner(query, page_f32(kernels, cache, page_keys(head, page), n, scratch), n, stride, z + page * SKV_PAGE);
                }
                for (size_t j = 0; j < visible; j++) z[j] *= scale;
                memset(probability, 0, padded(visible) * sizeof *probability);
                kernels->add_softmax(z, visible, probability);
                for (size_t j = 0; j < visible; j++) page_sums(cache, head, j / SKV_PAGE)[j % SKV_PAGE] += probability[j];
            }
    }
}
