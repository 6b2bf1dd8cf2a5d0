/* The sentences of a row (METHOD.md §4): delimiters close them, the mean of their final hidden states is their vector, and a sentence that
 * a later one resembles is flagged. Also what steering and stopping need to know of the text: <think> … </think>, and N_o. */
#ifndef SKV_SENTENCES_H
#define SKV_SENTENCES_H

#include "policies.h"

/* What a vocabulary entry is. */
enum {
    SKV_DELIMITER = 1,
    SKV_MARKER = 2,
    SKV_PARAGRAPH = 4, /* holds "\n\n" */
    SKV_NEWLINE = 8,   /* a lone "\n" of a tokenizer that writes "\n\n" as two tokens: the second one counts as the blank line */
};

/* Longest way to write <think> or </think>, in tokens. */
enum { SKV_WAY = 8 };

/* Arrays of the caller's, which outlive the session. */
typedef struct skv_vocabulary {
    const uint8_t *flags;           /* [vocab], or NULL: no sentence ever ends */
    const int32_t (*runs)[3];       /* [n_runs, 3] markers spelled by two tokens (the first is −1) or three; ascending */
    const int32_t (*ways)[SKV_WAY]; /* [n_open + n_close, SKV_WAY] ids of <think>, then of </think>; −1 before the first */
    size_t n_runs, n_open, n_close;
} skv_vocabulary;

typedef struct skv_sentence {
    int32_t first, last; /* positions, both included; later delimiters extend `last` */
    int32_t closed;      /* position of the delimiter that closed it */
    int32_t vector;      /* index among the tracker's vectors, −1: none, or freed with its last slot */
    float lambda;        /* 0: not flagged */
    bool thought;        /* a non-execution sentence */
    bool repeats;        /* resembles an earlier one */
    bool alive;          /* some head holds a slot of it, as of the last compaction */
} skv_sentence;

typedef struct skv_tracker {
    skv_heap *heap;
    const skv_vocabulary *vocabulary;
    unsigned compat;
    size_t width; /* of a vector: hidden rounded up to 16 */
    int32_t n_tokens, n_prompt;
    int32_t first;           /* position of the open sentence's first token */
    int32_t n_open;          /* tokens summed for it */
    int32_t recent[SKV_WAY]; /* ids, the newest last */
    bool after_delimiter, marked, prompt_marked, inside;
    int32_t n_thoughts, n_thoughts_on_grid; /* N_o */
    int32_t n_thinking;                     /* tokens inside <think> … </think> */
    int32_t n_answer;                       /* tokens after the first </think>, outside */
    bool thought;                           /* there was a </think> */
    int32_t n_repeating;                    /* newest sentences in a row that each resemble an earlier one */
    skv_sentence *sentences;
    skv_penalty *penalties; /* [n_penalties] flagged sentences, as of the last comparison */
    size_t n_sentences, capacity, n_compared, n_closed, n_penalties;
    float *sum;     /* [width] hidden states of the open sentence */
    float **blocks; /* [n_blocks] of SKV_VECTORS vectors each */
    int32_t *free_vectors;
    size_t n_blocks, n_free;
} skv_tracker;

enum { SKV_VECTORS = 16 };

/* What a token does to the open sentence; its hidden state follows after the forward. */
typedef enum skv_mark { SKV_MARK_ADD, SKV_MARK_CLOSE, SKV_MARK_EXTEND } skv_mark;

bool skv_tracker_init(skv_tracker *tracker, skv_heap *heap, const skv_vocabulary *vocabulary, unsigned compat, size_t hidden,
                      int32_t n_prompt);
bool skv_tracker_copy(skv_tracker *to, const skv_tracker *from);
void skv_tracker_free(skv_tracker *tracker);

/* Room for the sentences that n more tokens can close. */
bool skv_tracker_reserve(skv_tracker *tracker, size_t n);

/* The next token's id, before its forward. *inside: whether it stands between <think> and </think>. */
skv_mark skv_tracker_read(skv_tracker *tracker, int32_t token, bool *inside);

/* Its final hidden state [hidden], after the forward. */
void skv_tracker_add(skv_tracker *tracker, skv_mark mark, const float *hidden, size_t n);

/* Compares the sentences finished since the last call with all earlier ones, and lists the flagged. */
void skv_tracker_compare(skv_tracker *tracker, const skv_backend *backend, float tau);

/* Frees the vectors of compared sentences that are not alive. */
void skv_tracker_prune(skv_tracker *tracker);

const float *skv_tracker_vector(const skv_tracker *tracker, size_t sentence);

#endif
