/* What a row's ids say (METHOD.md §4, §7): delimiters close sentences, <think> … </think>, N_o, α of steered
 * tokens. The vectors of sentences lie behind the seam; a sentence that a later one resembles is flagged. */
#ifndef SKV_SENTENCES_H
#define SKV_SENTENCES_H

#include "backend.h"
#include "skipkv.h"

/* What is known of a finished sentence beside its range and its vector. */
typedef struct skv_fact {
    int32_t closed; /* position of the delimiter that closed it */
    float lambda;
    bool thought, repeats;
} skv_fact;

typedef struct skv_tracker {
    skv_heap *heap;
    skv_device *device; /* NULL: no vectors */
    const skv_vocabulary *vocabulary;
    unsigned compat;
    size_t width; /* of a vector: hidden rounded up to 16 */
    int32_t n_tokens, n_prompt;
    int32_t first;      /* position of the open sentence's first token */
    int32_t n_open;     /* tokens summed for it */
    int32_t recent[3];  /* ids, the newest last */
    uint8_t matched[2]; /* bytes of </think>, of <think> that the text ends with */
    bool after_delimiter, marked, prompt_marked, inside;
    int32_t n_thoughts, n_thoughts_on_grid; /* N_o */
    int32_t n_thinking;                     /* tokens inside <think> … </think> */
    int32_t n_answer;                       /* tokens after the first </think>, outside */
    bool thought;                           /* there was a </think> */
    int32_t n_repeating;                    /* newest sentences in a row that each resemble an earlier one */
    size_t n_sentences, n_compared, capacity;
    skv_range *ranges;      /* [capacity], likewise below */
    skv_fact *facts;        /* */
    float **vectors;        /* device; NULL: freed with the sentence's last slot */
    uint8_t *alive;         /* whether some head holds a slot of it, as of the last compaction */
    float *similar;         /* [SKV_COMPARED, capacity] */
    skv_penalty *penalties; /* [n_penalties] flagged sentences, as of the last comparison */
    size_t n_penalties;
    float *sum;     /* device [width]: states of the open sentence */
    float **blocks; /* [n_blocks] device memory of SKV_VECTORS vectors each */
    float **free_vectors;
    size_t n_blocks, n_free;
} skv_tracker;

enum { SKV_VECTORS = 16 };

bool skv_tracker_init(skv_tracker *tracker, skv_heap *heap, skv_device *device, const skv_vocabulary *vocabulary,
                      unsigned compat, size_t hidden, int32_t n_prompt);
bool skv_tracker_copy(skv_tracker *to, const skv_tracker *from);
void skv_tracker_free(skv_tracker *tracker);

static inline size_t skv_vector_width(size_t hidden) { return (hidden + 15) / 16 * 16; }

/* Bytes of the blocks that hold so many vectors. */
static inline size_t skv_vector_bytes(size_t hidden, size_t n) {
    return (n + SKV_VECTORS - 1) / SKV_VECTORS * SKV_VECTORS * skv_vector_width(hidden) * sizeof(float);
}

/* Sentences that n tokens can close: every second one, but for the very first and where an empty one counts. */
static inline size_t skv_closing(unsigned compat, size_t n) {
    return compat & SKV_COMPAT_EMPTY_SENTENCES ? n : n / 2 + 1;
}

/* Room for the sentences that n more tokens can close. */
bool skv_tracker_reserve(skv_tracker *tracker, size_t n);

/* The next token, before its forward: what it does to the open sentence, and α if the row is steered. */
skv_token skv_tracker_read(skv_tracker *tracker, const skv_steering *steering, int32_t id);

/* Compares the sentences finished since the last call with all earlier ones, and lists the flagged. */
skv_status skv_tracker_compare(skv_tracker *tracker, float tau, skv_error *error);

/* Frees the vectors of compared sentences that are not alive. */
void skv_tracker_prune(skv_tracker *tracker);

skv_sentence skv_tracker_sentence(const skv_tracker *tracker, size_t i);

#endif
