#include "sentences.h"

#include <math.h>
#include <string.h>

bool skv_tracker_init(skv_tracker *t, skv_heap *heap, const skv_vocabulary *vocabulary, unsigned compat, size_t hidden, int32_t n_prompt) {
    *t = (skv_tracker){.heap = heap, .vocabulary = vocabulary, .compat = compat, .width = (hidden + 15) / 16 * 16, .n_prompt = n_prompt};
    for (size_t i = 0; i < SKV_WAY; i++) t->recent[i] = -2; /* equals no id and no −1 */
    t->sum = skv_alloc(heap, t->width, sizeof *t->sum);
    return t->sum != NULL;
}

void skv_tracker_free(skv_tracker *t) {
    if (!t->heap) return;
    for (size_t i = 0; i < t->n_blocks; i++) skv_free(t->heap, t->blocks[i]);
    void *const blocks[] = {t->blocks, t->free_vectors, t->sentences, t->penalties, t->sum};
    for (size_t i = 0; i < sizeof blocks / sizeof *blocks; i++) skv_free(t->heap, blocks[i]);
    *t = (skv_tracker){0};
}

/* *block ← room for `to` items, its first `from` ones kept. */
static bool regrow(skv_heap *heap, void *block, size_t from, size_t to, size_t size) {
    void **at = block;
    void *larger = skv_alloc(heap, to, size);
    if (!larger) return false;
    if (from) memcpy(larger, *at, from * size);
    skv_free(heap, *at);
    *at = larger;
    return true;
}

bool skv_tracker_reserve(skv_tracker *t, size_t n) {
    if (!t->vocabulary->flags) return true;
    /* At most every second token closes a sentence, but for the very first and where an empty one counts. */
    const size_t closing = t->compat & SKV_COMPAT_EMPTY_SENTENCES ? n : n / 2 + 1;
    if (t->n_sentences + closing > t->capacity) {
        const size_t capacity = t->n_sentences + 2 * closing;
        if (!regrow(t->heap, &t->sentences, t->n_sentences, capacity, sizeof *t->sentences) ||
            !regrow(t->heap, &t->penalties, t->n_penalties, capacity, sizeof *t->penalties))
            return false;
        t->capacity = capacity;
    }
    const size_t pending = t->n_sentences - t->n_closed; /* closed by their ids, vectors still to come */
    while (t->n_free < closing + pending) {
        if (!regrow(t->heap, &t->blocks, t->n_blocks, t->n_blocks + 1, sizeof *t->blocks) ||
            !regrow(t->heap, &t->free_vectors, t->n_free, (t->n_blocks + 1) * SKV_VECTORS, sizeof *t->free_vectors))
            return false;
        t->blocks[t->n_blocks] = skv_alloc(t->heap, SKV_VECTORS * t->width, sizeof(float));
        if (!t->blocks[t->n_blocks]) return false;
        for (size_t i = 0; i < SKV_VECTORS; i++) t->free_vectors[t->n_free++] = (int32_t)(t->n_blocks * SKV_VECTORS + SKV_VECTORS - 1 - i);
        t->n_blocks++;
    }
    return true;
}

static float *vector_at(const skv_tracker *t, int32_t vector) {
    return t->blocks[vector / SKV_VECTORS] + (size_t)(vector % SKV_VECTORS) * t->width;
}

const float *skv_tracker_vector(const skv_tracker *t, size_t sentence) {
    return t->sentences[sentence].vector < 0 ? NULL : vector_at(t, t->sentences[sentence].vector);
}

bool skv_tracker_copy(skv_tracker *to, const skv_tracker *from) {
    *to = *from;
    to->blocks = NULL, to->free_vectors = NULL, to->sentences = NULL, to->penalties = NULL;
    to->capacity = to->n_blocks = to->n_free = to->n_sentences = to->n_penalties = to->n_closed = 0;
    to->sum = skv_alloc(to->heap, to->width, sizeof *to->sum);
    if (!to->sum || !skv_tracker_reserve(to, 2 * from->n_sentences + 2)) return false;
    memcpy(to->sum, from->sum, to->width * sizeof *to->sum);
    if (from->n_penalties) memcpy(to->penalties, from->penalties, from->n_penalties * sizeof *to->penalties);
    for (size_t i = 0; i < from->n_sentences; i++) {
        to->sentences[i] = from->sentences[i];
        if (from->sentences[i].vector < 0) continue;
        to->sentences[i].vector = to->free_vectors[--to->n_free];
        memcpy(vector_at(to, to->sentences[i].vector), vector_at(from, from->sentences[i].vector), to->width * sizeof(float));
    }
    to->n_sentences = from->n_sentences, to->n_penalties = from->n_penalties, to->n_closed = from->n_closed;
    return true;
}

/* Whether the newest ids are one of the ways first … first + n − 1. */
static bool ends_with(const skv_tracker *t, size_t first, size_t n) {
    for (size_t way = first; way < first + n; way++) {
        bool same = true;
        for (size_t i = 0; i < SKV_WAY && same; i++) same = t->vocabulary->ways[way][i] < 0 || t->vocabulary->ways[way][i] == t->recent[i];
        if (same) return true;
    }
    return false;
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
    const int32_t *id = t->recent + SKV_WAY - 1, length = position - t->first + 1;
    return (v->flags[id[0]] & SKV_MARKER) || (length >= 2 && is_run(v, -1, id[-1], id[0])) ||
           (length >= 3 && is_run(v, id[-2], id[-1], id[0]));
}

skv_mark skv_tracker_read(skv_tracker *t, int32_t token, bool *inside) {
    const skv_vocabulary *v = t->vocabulary;
    const int32_t position = t->n_tokens++;
    const bool empty_counts = t->compat & SKV_COMPAT_EMPTY_SENTENCES;
    memmove(t->recent, t->recent + 1, (SKV_WAY - 1) * sizeof *t->recent);
    t->recent[SKV_WAY - 1] = token;
    *inside = false;
    if (ends_with(t, 0, v->n_open)) {
        t->inside = true;
    } else if (ends_with(t, v->n_open, v->n_close)) {
        t->inside = false;
        t->thought = true;
    } else {
        *inside = t->inside;
        t->n_thinking += t->inside;
        t->n_answer += t->thought && !t->inside;
    }
    if (!v->flags) return SKV_MARK_ADD;

    if (ends_marker(t, position) && !((t->compat & SKV_COMPAT_PROMPT_MARKER) && position < t->n_prompt && t->prompt_marked)) {
        t->marked = true;
        t->prompt_marked |= position < t->n_prompt;
    }
    if (!(v->flags[token] & SKV_DELIMITER)) {
        t->after_delimiter = false;
        return SKV_MARK_ADD;
    }
    if (t->after_delimiter && !empty_counts) {
        t->sentences[t->n_sentences - 1].last = position;
        t->first = position + 1;
        t->marked = false;
        return SKV_MARK_EXTEND;
    }
    t->sentences[t->n_sentences++] =
        (skv_sentence){.first = t->first, .last = position, .closed = position, .vector = -1, .thought = t->marked};
    t->n_thoughts += t->marked && (*inside || (t->compat & SKV_COMPAT_THOUGHTS_ANYWHERE));
    t->first = position + 1;
    t->marked = false;
    t->after_delimiter = true;
    return SKV_MARK_CLOSE;
}

void skv_tracker_add(skv_tracker *t, skv_mark mark, const float *hidden, size_t n) {
    if (!t->vocabulary->flags || mark == SKV_MARK_EXTEND) return;
    for (size_t i = 0; i < n; i++) t->sum[i] += hidden[i];
    t->n_open++;
    if (mark != SKV_MARK_CLOSE) return;
    skv_sentence *sentence = t->sentences + t->n_closed++;
    sentence->vector = t->free_vectors[--t->n_free];
    float *vector = vector_at(t, sentence->vector);
    double squares = 0;
    for (size_t i = 0; i < n; i++) {
        vector[i] = t->sum[i] / (float)t->n_open;
        squares += (double)vector[i] * (double)vector[i];
    }
    const float length = squares > 0 ? (float)sqrt(squares) : 1;
    for (size_t i = 0; i < n; i++) vector[i] /= length;
    memset(vector + n, 0, (t->width - n) * sizeof *vector);
    memset(t->sum, 0, t->width * sizeof *t->sum);
    t->n_open = 0;
}

void skv_tracker_compare(skv_tracker *t, const skv_backend *backend, float tau) {
    for (size_t j = t->n_compared; j < t->n_closed; j++) {
        skv_sentence *later = t->sentences + j;
        for (size_t i = 0; i < j; i++) {
            skv_sentence *earlier = t->sentences + i;
            if (earlier->vector < 0) continue;
            const float similarity = backend->dot(backend, vector_at(t, earlier->vector), vector_at(t, later->vector), t->width);
            if (!(similarity > tau)) continue;
            later->repeats = true;
            if ((t->compat & SKV_COMPAT_LATEST_FLAG) || similarity > earlier->lambda) earlier->lambda = similarity;
        }
        t->n_repeating = later->repeats ? t->n_repeating + 1 : 0;
    }
    t->n_compared = t->n_closed;
    t->n_thoughts_on_grid = t->n_thoughts;
    t->n_penalties = 0;
    for (size_t i = 0; i < t->n_closed; i++)
        if (t->sentences[i].lambda > 0)
            t->penalties[t->n_penalties++] = (skv_penalty){t->sentences[i].first, t->sentences[i].last, t->sentences[i].lambda};
}

void skv_tracker_prune(skv_tracker *t) {
    for (size_t i = 0; i < t->n_compared; i++)
        if (!t->sentences[i].alive && t->sentences[i].vector >= 0) {
            t->free_vectors[t->n_free++] = t->sentences[i].vector;
            t->sentences[i].vector = -1;
        }
}
