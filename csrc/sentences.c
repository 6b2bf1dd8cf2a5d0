#include "sentences.h"

#include <string.h>

const char *const skv_scope_names[SKV_N_SCOPES] = {"think", "generation", "all"};

bool skv_tracker_init(skv_tracker *t, skv_heap *heap, skv_device *device, const skv_vocabulary *vocabulary,
                      unsigned compat, size_t hidden, int32_t n_prompt) {
    *t =
        (skv_tracker){.heap = heap, .device = device, .vocabulary = vocabulary, .compat = compat, .n_prompt = n_prompt};
    t->width = skv_vector_width(hidden);
    for (size_t i = 0; i < 3; i++) t->recent[i] = -2; /* equals no id and no −1 */
    if (device) t->sum = device->backend->alloc(device, t->width, sizeof *t->sum);
    return !device || t->sum;
}

void skv_tracker_free(skv_tracker *t) {
    if (!t->heap) return;
    for (size_t i = 0; i < t->n_blocks; i++) t->device->backend->free(t->device, t->blocks[i]);
    if (t->device) t->device->backend->free(t->device, t->sum);
    void *const blocks[] = {t->ranges,  t->facts,     t->vectors, t->alive,
                            t->similar, t->penalties, t->blocks,  t->free_vectors};
    for (size_t i = 0; i < sizeof blocks / sizeof *blocks; i++) skv_free(t->heap, blocks[i]);
    *t = (skv_tracker){0};
}

static bool grow_vectors(skv_tracker *t) {
    skv_device *device = t->device;
    const size_t n = t->n_blocks;
    if (!skv_regrow(t->heap, &t->blocks, n, n + 1, sizeof *t->blocks) ||
        !skv_regrow(t->heap, &t->free_vectors, t->n_free, (n + 1) * SKV_VECTORS, sizeof *t->free_vectors))
        return false;
    float *block = device->backend->alloc(device, SKV_VECTORS * t->width, sizeof *block);
    if (!block) return false;
    for (size_t i = SKV_VECTORS; i-- > 0;) t->free_vectors[t->n_free++] = block + i * t->width;
    t->blocks[t->n_blocks++] = block;
    return true;
}

bool skv_tracker_reserve(skv_tracker *t, size_t n) {
    if (!t->vocabulary->flags) return true;
    const size_t closing = skv_closing(t->compat, n), have = t->n_sentences;
    if (have + closing > t->capacity) {
        const size_t capacity = have + 2 * closing;
        if (!skv_regrow(t->heap, &t->ranges, have, capacity, sizeof *t->ranges) ||
            !skv_regrow(t->heap, &t->facts, have, capacity, sizeof *t->facts) ||
            !skv_regrow(t->heap, &t->vectors, have, capacity, sizeof *t->vectors) ||
            !skv_regrow(t->heap, &t->alive, 0, capacity, sizeof *t->alive) ||
            !skv_regrow(t->heap, &t->similar, 0, skv_mul(SKV_COMPARED, capacity), sizeof *t->similar) ||
            !skv_regrow(t->heap, &t->penalties, t->n_penalties, capacity, sizeof *t->penalties))
            return false;
        t->capacity = capacity;
    }
    while (t->device && t->n_free < closing)
        if (!grow_vectors(t)) return false;
    return true;
}

bool skv_tracker_copy(skv_tracker *to, const skv_tracker *from) {
    skv_device *device = from->device;
    const size_t bytes = from->width * sizeof(float), n = from->n_sentences;
    *to = *from;
    to->ranges = NULL, to->facts = NULL, to->vectors = NULL, to->alive = NULL, to->similar = NULL, to->penalties = NULL;
    to->blocks = NULL, to->free_vectors = NULL;
    to->capacity = to->n_blocks = to->n_free = to->n_sentences = to->n_penalties = 0;
    to->sum = device->backend->alloc(device, to->width, sizeof *to->sum);
    if (!to->sum || !skv_tracker_reserve(to, 2 * n + 2)) return false;
    device->backend->copy(device, to->sum, from->sum, bytes);
    if (from->n_penalties) memcpy(to->penalties, from->penalties, from->n_penalties * sizeof *to->penalties);
    for (size_t i = 0; i < n; i++) {
        to->ranges[i] = from->ranges[i];
        to->facts[i] = from->facts[i];
        if (!from->vectors[i]) continue;
        to->vectors[i] = to->free_vectors[--to->n_free];
        device->backend->copy(device, to->vectors[i], from->vectors[i], bytes);
    }
    to->n_sentences = n, to->n_penalties = from->n_penalties;
    return true;
}

static bool is_run(const skv_vocabulary *v, int32_t a, int32_t b, int32_t c) {
    const int32_t run[3] = {a, b, c};
    size_t low = 0, high = v->n_runs;
    while (low < high) {
        const size_t middle = (low + high) / 2;
        int order = 0;
        for (size_t i = 0; i < 3 && !order; i++) order = (v->runs[middle][i] > run[i]) - (v->runs[middle][i] < run[i]);
        if (!order) return true;
        if (order < 0)
            low = middle + 1;
        else
            high = middle;
    }
    return false;
}

/* Whether a marker ends with the newest token, inside the open sentence. */
static bool ends_marker(const skv_tracker *t, int32_t position) {
    const skv_vocabulary *v = t->vocabulary;
    const int32_t *id = t->recent + 2, length = position - t->first + 1;
    return (v->flags[id[0]] & SKV_MARKER) || (length >= 2 && is_run(v, -1, id[-1], id[0])) ||
           (length >= 3 && is_run(v, id[-2], id[-1], id[0]));
}

/* Reads <think> and </think> byte by byte, as a tokenizer may merge their ends with any neighbour; whether the newest
 * token stands between them. A token that completes a marker does not; of several in it the last one decides. */
static bool read_think(skv_tracker *t) {
    static const char *const markers[] = {[false] = "</think>", [true] = "<think>"}; /* what makes inside which */
    const skv_vocabulary *v = t->vocabulary;
    bool completes = false;
    for (int64_t i = v->starts[t->recent[2]]; i < v->starts[t->recent[2] + 1]; i++) {
        for (int inside = 0; inside < 2; inside++) {
            const char *marker = markers[inside];
            uint8_t *n = t->matched + inside;
            /* '<' stands at a marker's start only, so a mismatch leaves at most that. */
            *n = v->bytes[i] == (uint8_t)marker[*n] ? (uint8_t)(*n + 1) : v->bytes[i] == '<';
            if (marker[*n]) continue;
            *n = 0;
            completes = true;
            t->inside = inside;
            t->thought |= !inside;
        }
    }
    if (completes) return false;
    t->n_thinking += t->inside;
    t->n_answer += t->thought && !t->inside;
    return t->inside;
}

/* Closes the open sentence with the token at this position, or extends the last one. */
static void close_sentence(skv_tracker *t, int32_t position, bool inside, skv_token *token) {
    if (t->after_delimiter && !(t->compat & SKV_COMPAT_EMPTY_SENTENCES)) {
        t->ranges[t->n_sentences - 1].last = position;
        token->mark = SKV_MARK_EXTEND;
    } else {
        const size_t i = t->n_sentences++;
        token->mark = SKV_MARK_CLOSE;
        token->length = t->n_open + 1;
        token->vector = t->device ? t->free_vectors[--t->n_free] : NULL;
        t->ranges[i] = (skv_range){t->first, position};
        t->facts[i] = (skv_fact){.closed = position, .thought = t->marked};
        t->vectors[i] = token->vector;
        t->n_thoughts += t->marked && (inside || (t->compat & SKV_COMPAT_THOUGHTS_ANYWHERE));
        t->n_open = 0;
        t->after_delimiter = true;
    }
    t->first = position + 1;
    t->marked = false;
}

/* Whether the newest token ends a blank line. */
static bool is_paragraph(const skv_tracker *t) {
    const int32_t *id = t->recent + 2;
    const uint8_t *flags = t->vocabulary->flags;
    if (flags[id[0]] & SKV_PARAGRAPH) return true;
    bool newline[3];
    for (int i = 0; i < 3; i++) newline[i] = id[-i] >= 0 && (flags[id[-i]] & SKV_NEWLINE);
    return newline[0] && newline[1] && !newline[2];
}

/* α of the newest token, if it is steered. */
static void steer(const skv_tracker *t, const skv_steering *s, bool inside, skv_token *token) {
    const int32_t position = t->n_tokens - 1;
    if (!s->vector || !is_paragraph(t)) return;
    if (s->scope == SKV_SCOPE_THINK && !inside) return;
    if (s->scope == SKV_SCOPE_GENERATION && position < t->n_prompt) return;
    if ((t->compat & SKV_COMPAT_STEER_PROMPT_END) && position < t->n_prompt - 1) return;
    const bool on_grid = t->compat & SKV_COMPAT_THOUGHTS_ON_GRID;
    const float raised = s->alpha + s->gamma * (float)(on_grid ? t->n_thoughts_on_grid : t->n_thoughts);
    token->alpha = raised < s->alpha_max ? raised : s->alpha_max;
    token->steered = true;
}

skv_token skv_tracker_read(skv_tracker *t, const skv_steering *steering, int32_t id) {
    const skv_vocabulary *v = t->vocabulary;
    const int32_t position = t->n_tokens++;
    skv_token token = {.id = id, .mark = SKV_MARK_NONE};
    if (!v->flags) return token;

    t->recent[0] = t->recent[1], t->recent[1] = t->recent[2], t->recent[2] = id;
    const bool inside = read_think(t);
    const bool only_first = t->compat & SKV_COMPAT_PROMPT_MARKER && position < t->n_prompt;
    if (ends_marker(t, position) && !(only_first && t->prompt_marked)) {
        t->marked = true;
        t->prompt_marked |= position < t->n_prompt;
    }
    if (v->flags[id] & SKV_DELIMITER) {
        close_sentence(t, position, inside, &token);
    } else {
        token.mark = SKV_MARK_ADD;
        t->after_delimiter = false;
        t->n_open++;
    }
    steer(t, steering, inside, &token);
    return token;
}

/* Sentence j against all before it; similar [j]. */
static void compare_one(skv_tracker *t, size_t j, const float *similar, float tau) {
    skv_fact *later = t->facts + j;
    for (size_t i = 0; i < j; i++) {
        if (!t->vectors[i] || !(similar[i] > tau)) continue;
        later->repeats = true;
        if ((t->compat & SKV_COMPAT_LATEST_FLAG) || similar[i] > t->facts[i].lambda) t->facts[i].lambda = similar[i];
    }
    t->n_repeating = later->repeats ? t->n_repeating + 1 : 0;
}

skv_status skv_tracker_compare(skv_tracker *t, float tau, skv_error *error) {
    const skv_backend *ops = t->device->backend;
    for (size_t end; t->n_compared < t->n_sentences; t->n_compared = end) {
        end = t->n_compared + SKV_COMPARED < t->n_sentences ? t->n_compared + SKV_COMPARED : t->n_sentences;
        ops->similarities(t->device, t->vectors, t->width, t->n_compared, end, t->similar);
        if (ops->sync(t->device, error)) return error->code;
        for (size_t j = t->n_compared; j < end; j++) compare_one(t, j, t->similar + (j - t->n_compared) * end, tau);
    }
    t->n_thoughts_on_grid = t->n_thoughts;
    t->n_penalties = 0;
    for (size_t i = 0; i < t->n_sentences; i++)
        if (t->facts[i].lambda > 0) t->penalties[t->n_penalties++] = (skv_penalty){t->ranges[i], t->facts[i].lambda};
    return SKV_OK;
}

void skv_tracker_prune(skv_tracker *t) {
    for (size_t i = 0; i < t->n_compared; i++) {
        if (t->alive[i] || !t->vectors[i]) continue;
        t->free_vectors[t->n_free++] = t->vectors[i];
        t->vectors[i] = NULL;
    }
}

skv_sentence skv_tracker_sentence(const skv_tracker *t, size_t i) {
    const skv_range *range = t->ranges + i;
    const skv_fact *fact = t->facts + i;
    return (skv_sentence){range->first, range->last, fact->closed, fact->lambda, fact->thought, fact->repeats};
}

skv_status skv_segment(const skv_vocabulary *vocabulary, unsigned compat, const int32_t *ids, size_t n,
                       int32_t n_prompt, skv_sentence *sentences, size_t *n_sentences, bool *inside, skv_error *error) {
    skv_tracker t;
    skv_heap heap = {0};
    const skv_steering none = {0};
    skv_tracker_init(&t, &heap, NULL, vocabulary, compat, 1, n_prompt);
    skv_status status = SKV_OK;
    if (skv_tracker_reserve(&t, n))
        for (size_t i = 0; i < n; i++) {
            const int32_t before = t.n_thinking;
            skv_tracker_read(&t, &none, ids[i]);
            inside[i] = t.n_thinking > before;
        }
    else
        status = skv_fail(error, SKV_CAPACITY, "out of memory for the sentences of %zu tokens", n);
    *n_sentences = t.n_sentences;
    for (size_t i = 0; i < t.n_sentences; i++) sentences[i] = skv_tracker_sentence(&t, i);
    skv_tracker_free(&t);
    return status;
}

skv_status skv_flag_repeats(const float *vectors, size_t n, size_t width, float tau, unsigned compat, float *lambda,
                            skv_error *error) {
    static const uint8_t flags[1] = {SKV_DELIMITER};
    static const int64_t starts[2] = {0};
    const skv_vocabulary vocabulary = {.flags = flags, .starts = starts};
    const skv_config config = {.n_heads = 1, .n_kv_heads = 1, .head_dim = 2, .hidden = (int32_t)width};
    const float inv_freq = 0;
    const skv_workload work = {.config = &config, .inv_freq = &inv_freq, .n_rows = 1, .n_tokens = 1};
    const skv_steering none = {0};
    skv_tracker t = {0};
    skv_heap heap = {0};
    skv_device *device = skv_device_open(NULL, NULL, 1, error);
    if (!device) return error->code;
    const skv_backend *ops = device->backend;
    float *x = ops->alloc(device, width, sizeof *x);
    skv_status status = ops->reserve(device, &work, error);
    /* Every vector is a sentence of one token. */
    if (!x || !skv_tracker_init(&t, &heap, device, &vocabulary, compat | SKV_COMPAT_EMPTY_SENTENCES, width, 0) ||
        !skv_tracker_reserve(&t, n))
        status = skv_fail(error, SKV_CAPACITY, "out of memory for %zu sentence vectors", n);
    for (size_t i = 0; !status && i < n; i++) {
        const skv_token token = skv_tracker_read(&t, &none, 0);
        const skv_part part = {.n = 1, .sum = t.sum};
        ops->write(device, x, vectors + i * width, width * sizeof *x);
        ops->begin(device, &(skv_batch){&token, &part, 1, 1});
        ops->sum_sentences(device, x);
        status = ops->sync(device, error);
    }
    if (!status) status = skv_tracker_compare(&t, tau, error);
    for (size_t i = 0; i < n; i++) lambda[i] = status ? 0 : t.facts[i].lambda;
    skv_tracker_free(&t);
    ops->free(device, x);
    ops->close(device);
    return status;
}
