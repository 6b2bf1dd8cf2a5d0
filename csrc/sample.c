#include "sample.h"

#include <math.h>
#include <stdbool.h>

#include "random.h"

int32_t skv_argmax(const float *logits, size_t vocab) {
    size_t best = 0;
    for (size_t i = 1; i < vocab; i++)
        if (logits[i] > logits[best]) best = i;
    return (int32_t)best;
}

static bool before(skv_candidate a, skv_candidate b) {
    return a.weight != b.weight ? a.weight > b.weight : a.id < b.id;
}

static void sift_down(skv_candidate *heap, size_t n, size_t at) {
    for (;;) {
        size_t best = at;
        for (size_t child = 2 * at + 1; child <= 2 * at + 2 && child < n; child++)
            if (before(heap[child], heap[best])) best = child;
        if (best == at) return;
        const skv_candidate moved = heap[at];
        heap[at] = heap[best];
        heap[best] = moved;
        at = best;
    }
}

/* Takes the best candidate off the heap and puts it behind its new end. */
static skv_candidate pop(skv_candidate *heap, size_t *n) {
    const skv_candidate best = heap[0];
    heap[0] = heap[--*n];
    heap[*n] = best;
    sift_down(heap, *n, 0);
    return best;
}

int32_t skv_sample(const float *logits, size_t vocab, const skv_sampling *s, const int64_t *sequence,
                   skv_candidate *scratch) {
    const int32_t best = skv_argmax(logits, vocab);
    if (!(s->temperature > 0)) return best;
    uint64_t x = skv_splitmix64(s->seed);
    for (size_t i = 0; i < 3; i++) x = skv_splitmix64(x ^ (uint64_t)sequence[i]);
    const double u = (double)(x >> 11) * 0x1p-53;

    double total = 0;
    for (size_t i = 0; i < vocab; i++) {
        scratch[i] = (skv_candidate){expf((logits[i] - logits[best]) / s->temperature), (int32_t)i};
        total += (double)scratch[i].weight;
    }
    /* The candidates that stay stand at the end of scratch, the best one last; without a filter all of them, in order
     * of id. */
    size_t first = 0;
    if (s->top_k > 0 || s->top_p < 1) {
        size_t heap = vocab;
        for (size_t i = vocab / 2; i-- > 0;) sift_down(scratch, heap, i);
        const size_t most = s->top_k > 0 && (size_t)s->top_k < vocab ? (size_t)s->top_k : vocab;
        double sum = 0;
        if (most < vocab) {
            total = 0;
            while (vocab - heap < most) total += (double)pop(scratch, &heap).weight;
            first = vocab;
            while (first > heap && (first == vocab || sum < (double)s->top_p * total))
                sum += (double)scratch[--first].weight;
        } else {
            while (heap > 0 && (heap == vocab || sum < (double)s->top_p * total))
                sum += (double)pop(scratch, &heap).weight;
            first = heap;
        }
    }
    total = 0;
    for (size_t i = first; i < vocab; i++) total += scratch[i].weight >= s->min_p ? (double)scratch[i].weight : 0;
    double left = u * total;
    for (size_t i = vocab; i-- > first;) {
        if (scratch[i].weight < s->min_p) continue;
        left -= (double)scratch[i].weight;
        if (left < 0) return scratch[i].id;
    }
    return best; /* rounding left a remainder */
}
