/* A short run of the engine on the CUDA backend without Python, for sanitizers that none can be loaded under: random
 * weights, and rows of three lengths that are prefilled over a page's edge, steered, scored by all terms, compacted and
 * forked. Every number that comes back is looked at. With ON_CPU the same on the CPU, by two threads at once whose
 * sessions of one model open and close while the other computes. */
#include <math.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "backend.h"
#include "random.h"
#include "skipkv.h"

enum { LAYERS = 1, HEADS = 4, KV_HEADS = 2, HEAD_DIM = 24, HIDDEN = 40, VOCAB = 50, ROWS = 4, TEXT = 76 };

/* What the core knows by name. */
#ifdef ON_CPU
#include "cpu/kernels/kernels.h"
const skv_kernels skv_kernels_avx512bf16 = {.name = ""}, skv_kernels_avx512vnni = {.name = ""},
                  skv_kernels_avx512 = {.name = ""}, skv_kernels_avx2 = {.name = ""};
static const skv_backend *skv_cuda_backend(size_t abi) { return abi ? NULL : NULL; }
enum { CALLERS = 2, THREADS = 4 };
#else
const skv_backend *skv_cuda_backend(size_t abi);
const skv_backend skv_cpu = {0};
enum { CALLERS = 1, THREADS = 1 };
#endif

static const struct run {
    const char *variant, *method;
    skv_dtype weights, cache;
    unsigned compat;
    bool evict, by_layer;
} RUNS[] = {
    {"cuda:0", "blend", SKV_BF16, SKV_BF16, 0, true, false},
    {"cuda:0", "blend", SKV_F32, SKV_F32, SKV_COMPAT_SCORE_ORDER | SKV_COMPAT_PAIRS, true, true},
    {"cuda:0:deterministic", "blend", SKV_BF16, SKV_F32, 0, false, false},
    {"cuda:0:deterministic", "tova", SKV_F32, SKV_BF16, 0, true, false},
};

/* Between −1 and 1. */
static float noise(uint64_t seed, size_t i) { return (float)(skv_splitmix64(seed ^ i << 8) >> 40) * 0x1p-23f - 1; }

static void check(bool ok, const char *what) {
    if (ok) return;
    fprintf(stderr, "%s\n", what);
    exit(1);
}

static skv_model *model_of(const struct run *run) {
    skv_error error;
    skv_config config = {.family = skv_family_find("qwen3"), .n_layers = LAYERS, .n_heads = HEADS};
    config.n_kv_heads = KV_HEADS, config.head_dim = HEAD_DIM, config.hidden = HIDDEN, config.ffn = 24;
    config.vocab = VOCAB, config.context = 512, config.norm_eps = 1e-6f, config.rope_theta = 1e4;
    config.rope_attention_factor = config.rope_factor = 1;
    const char *variant = THREADS > 1 ? "generic" : run->variant;
    skv_model *model = skv_model_new(&config, skv_cuda_backend(SKV_ABI), variant, run->weights, &error);
    check(model, error.text);
    int32_t rows, columns;
    for (size_t i = 0; skv_model_tensor(model, i, &rows, &columns); i++) {
        const size_t n = (size_t)rows * (size_t)(columns ? columns : 1);
        float *data = malloc(n * sizeof *data);
        for (size_t k = 0; k < n; k++) data[k] = (columns ? 0 : 1) + 0.3f * noise(i, k);
        check(!skv_model_bind(model, skv_model_tensor(model, i, &rows, &columns), SKV_F32, (int64_t[]){rows, columns},
                              columns ? 2 : 1, data, THREADS, &error),
              error.text);
        free(data);
    }
    return model;
}

static skv_method method_of(const struct run *run, const int32_t *budgets) {
    skv_error error;
    skv_method method = skv_method_of(skv_policy_find(run->method));
    for (size_t t = 0; t < SKV_N_TERMS && !strcmp(run->method, "blend"); t++)
        check(!skv_method_set(&method, skv_term_names[t], t ? 0.5 - 0.2 * (double)t : 1e-3, &error), error.text);
    method.interval = 4, method.tau = 0, method.budgets = budgets;
    method.compat = run->compat, method.evict = run->evict, method.by_layer = run->by_layer;
    return method;
}

/* Feeds row's next tokens, at most n of them; how many. */
static int32_t feed(skv_session *session, int32_t row, int32_t n, float *logits) {
    skv_error error;
    int32_t tokens[TEXT];
    const int32_t at = skv_row_state_of(session, row).n_tokens;
    n = skv_row_chunk(session, row, n < TEXT - at ? n : TEXT - at);
    for (int32_t i = 0; i < n; i++) tokens[i] = (int32_t)(skv_splitmix64((uint64_t)(at + i) << 2 | 1) % VOCAB);
    check(!skv_forward(session, &(skv_span){row, n}, 1, tokens, true, logits, NULL, NULL, &error), error.text);
    for (int32_t i = 0; i < n * VOCAB; i++) check(isfinite(logits[i]), "a logit is no number");
    return n;
}

/* Whoever looks at the bytes of the trace. */
static unsigned look_at_trace(skv_session *session) {
    size_t n;
    unsigned odd = 0;
    const char *bytes = skv_session_trace(session, &n);
    for (size_t i = 0; i < n; i++)
        if (bytes[i] & 1) odd++;
    skv_session_drop_trace(session);
    return odd;
}

typedef struct caller {
    pthread_t thread;
    const struct run *run;
    const skv_model *model;
} caller;

static void *play(void *argument) {
    const struct run *run = ((caller *)argument)->run;
    const skv_model *model = ((caller *)argument)->model;
    skv_error error;
    uint8_t flags[VOCAB] = {[3] = SKV_DELIMITER, [11] = SKV_DELIMITER, [20] = SKV_DELIMITER | SKV_PARAGRAPH};
    int64_t starts[VOCAB + 1] = {0};
    int32_t budgets[LAYERS * KV_HEADS] = {24, 24};
    float vector[HIDDEN], logits[TEXT * VOCAB];
    for (size_t i = 0; i < HIDDEN; i++) vector[i] = noise(99, i);
    const skv_options options = {.cache_type = run->cache,
                                 .n_rows = ROWS,
                                 .max_tokens = TEXT,
                                 .limit_bytes = SIZE_MAX,
                                 .n_threads = THREADS,
                                 .method = method_of(run, budgets),
                                 .trace = SKV_TRACE_SCORES,
                                 .vocabulary = {flags, NULL, 0, (const uint8_t *)"", starts}};
    skv_session *session = skv_session_new(model, &options, &error);
    check(session, error.text);
    const int32_t prompts[] = {66, 1, 12};
    int32_t rows[ROWS];
    for (int32_t r = 0; r < 3; r++) {
        const skv_row_options row = {.capacity = TEXT,
                                     .n_prompt = prompts[r],
                                     .sequence = {r, 0},
                                     .steering = {vector, 0, 0.5f, 0.1f, 2, SKV_SCOPE_ALL}};
        check(!skv_row_open(session, &row, rows + r, &error), error.text);
        for (int32_t left = prompts[r]; left > 0;) left -= feed(session, rows[r], left, logits);
    }
    check(!skv_row_fork(session, rows[2], TEXT, 1, rows + 3, &error), error.text);
    unsigned odd = look_at_trace(session), evicted = 0;
    for (int step = 0; step < 9; step++) { /* all rows in one forward, then each by itself */
        skv_span spans[ROWS];
        for (int32_t r = 0; r < ROWS; r++) spans[r] = (skv_span){rows[r], 1};
        if (step % 4 == 3)
            for (int32_t r = 0; r < ROWS; r++) feed(session, rows[r], 1, logits);
        else
            check(!skv_forward(session, spans, ROWS, (int32_t[]){step, 3, 30, 11}, true, logits, NULL, NULL, &error),
                  error.text);
        for (int32_t i = 0; i < VOCAB; i++) check(isfinite(logits[i]), "a logit is no number");
        odd += look_at_trace(session);
    }
    for (int32_t r = 0; r < ROWS; r++) evicted += (unsigned)skv_row_state_of(session, rows[r]).n_evicted;
    check(odd && evicted, "nothing was compacted");
    skv_session_free(session);
    return NULL;
}

int main(void) {
    for (const struct run *run = RUNS; run < RUNS + sizeof RUNS / sizeof *RUNS; run++) {
        skv_model *model = model_of(run);
        caller callers[CALLERS];
        for (caller *c = callers; c < callers + CALLERS; c++) {
            *c = (caller){.run = run, .model = model};
            check(c == callers || !pthread_create(&c->thread, NULL, play, c), "a thread cannot be started");
        }
        play(callers);
        for (caller *c = callers + 1; c < callers + CALLERS; c++) pthread_join(c->thread, NULL);
        skv_model_free(model);
    }
    puts("ok");
    return 0;
}
