/* Items are cut into chunks, of which every thread has an equal share. It takes its own from the front, then those of
 * others from the end: one that has no processor holds up no more than the chunk that it is in. Who comes late may
 * even come in the next op: a chunk is taken by a compare-and-swap, and what is to be done is read after it, as an op
 * does not end before all that was taken is done.
 *
 * Who waits spins for about as long as the serial ops of a step take, then sleeps. */
#include "threads.h"

#include <pthread.h>
#include <stdatomic.h>
#include <unistd.h>

#include "../backend.h"

enum { SMALL = 1 << 14 /* elements that another thread costs more for than it saves */ };
enum { CHUNKS = 8 /* of a thread, at most */, LINE = 64 /* bytes that processors pass on together */ };
static const double SPIN = 60e-6; /* s */

/* A number that threads wait for to change. */
typedef struct event {
    atomic_uint value, sleepers;
    pthread_cond_t changed;
} event;

typedef struct worker {
    cpu_threads *team;
    pthread_t id;
    _Alignas(LINE) _Atomic uint64_t share; /* chunks that nobody took: the first << 32 | the end */
} worker;

struct cpu_threads {
    size_t n, n_started; /* threads; workers beside the caller */
    pid_t process;
    cpu_work *work;
    const void *argument;
    size_t n_items, n_chunks;
    pthread_mutex_t mutex; /* of those who sleep */
    atomic_bool closing;
    _Alignas(LINE) event begun; /* counts the ops */
    _Alignas(LINE) event left;  /* chunks of the op that are not done */
    worker workers[];           /* [n], the caller's unused but for its share */
};

static bool changes_soon(const event *e, unsigned from) {
    const double end = skv_seconds() + SPIN;
    do {
        for (int i = 0; i < 32; i++) {
            if (atomic_load_explicit(&e->value, memory_order_acquire) != from) return true;
#if defined(__x86_64__)
            __builtin_ia32_pause();
#endif
        }
    } while (skv_seconds() < end);
    return false;
}

static void wait_while(cpu_threads *t, event *e, unsigned from) {
    if (changes_soon(e, from)) return;
    pthread_mutex_lock(&t->mutex);
    atomic_fetch_add(&e->sleepers, 1); /* before the last look, as `wake` looks after the change */
    while (atomic_load(&e->value) == from) pthread_cond_wait(&e->changed, &t->mutex);
    atomic_fetch_sub(&e->sleepers, 1);
    pthread_mutex_unlock(&t->mutex);
}

static void wake(cpu_threads *t, event *e) {
    if (!atomic_load(&e->sleepers)) return;
    pthread_mutex_lock(&t->mutex);
    pthread_cond_broadcast(&e->changed);
    pthread_mutex_unlock(&t->mutex);
}

/* One chunk of a share, the first or the last of those left. */
static bool take(_Atomic uint64_t *share, bool from_end, size_t *chunk) {
    uint64_t left = atomic_load_explicit(share, memory_order_relaxed), rest;
    do {
        const uint32_t first = (uint32_t)(left >> 32), end = (uint32_t)left;
        if (first >= end) return false;
        *chunk = from_end ? end - 1 : first;
        rest = from_end ? left - 1 : left + (UINT64_C(1) << 32);
    } while (!atomic_compare_exchange_weak_explicit(share, &left, rest, memory_order_acquire, memory_order_relaxed));
    return true;
}

static void help(cpu_threads *t, size_t thread) {
    unsigned done = 0;
    size_t chunk;
    for (size_t i = 0; i < t->n; i++)
        for (worker *w = t->workers + (thread + i) % t->n; take(&w->share, i > 0, &chunk); done++)
            t->work(t->argument,
                    (cpu_range){t->n_items * chunk / t->n_chunks, t->n_items * (chunk + 1) / t->n_chunks, thread});
    if (done && atomic_fetch_sub(&t->left.value, done) == done) wake(t, &t->left);
}

static void *run_worker(void *argument) {
    const worker *me = argument;
    cpu_threads *t = me->team;
    for (unsigned seen = 0; !atomic_load(&t->closing); seen = atomic_load(&t->begun.value)) {
        help(t, (size_t)(me - t->workers));
        wait_while(t, &t->begun, seen);
    }
    return NULL;
}

static void start(cpu_threads *t) {
    t->process = getpid();
    pthread_mutex_init(&t->mutex, NULL);
    for (event *e = &t->begun; e; e = e == &t->begun ? &t->left : NULL) {
        atomic_init(&e->value, 0);
        atomic_init(&e->sleepers, 0);
        pthread_cond_init(&e->changed, NULL);
    }
    for (size_t i = 0; i < t->n; i++) atomic_init(&t->workers[i].share, 0);
    for (t->n_started = 0; t->n_started + 1 < t->n; t->n_started++) {
        worker *w = t->workers + t->n_started + 1;
        w->team = t;
        if (pthread_create(&w->id, NULL, run_worker, w)) return;
    }
}

cpu_threads *cpu_threads_new(skv_heap *heap, size_t n, size_t *started) {
    *started = 1;
    cpu_threads *t = n > 1 ? skv_alloc(heap, 1, sizeof *t + n * sizeof *t->workers) : NULL;
    if (!t) return NULL;
    t->n = n;
    start(t);
    *started += t->n_started;
    return t;
}

void cpu_threads_free(skv_heap *heap, cpu_threads *t) {
    if (t && t->process == getpid()) {
        atomic_store(&t->closing, true);
        atomic_fetch_add(&t->begun.value, 1);
        wake(t, &t->begun);
        for (size_t i = 1; i <= t->n_started; i++) pthread_join(t->workers[i].id, NULL);
    }
    skv_free(heap, t);
}

void cpu_threads_after_fork(cpu_threads *t) {
    if (t && t->process != getpid()) start(t);
}

void cpu_run(cpu_threads *t, size_t n, size_t cost, cpu_work *work, const void *argument) {
    const size_t n_threads = t && cost > SMALL ? t->n : 1, most = cost / SMALL / n_threads;
    if (n_threads == 1 || n < 2) {
        if (n) work(argument, (cpu_range){0, n, 0});
        return;
    }
    const size_t chunks = n_threads * (most < 1 ? 1 : most < CHUNKS ? most : CHUNKS);
    t->work = work, t->argument = argument;
    t->n_items = n, t->n_chunks = chunks < n ? chunks : n;
    atomic_store_explicit(&t->left.value, (unsigned)t->n_chunks, memory_order_relaxed);
    for (size_t i = 0; i < n_threads; i++) {
        const uint64_t first = t->n_chunks * i / n_threads, end = t->n_chunks * (i + 1) / n_threads;
        atomic_store_explicit(&t->workers[i].share, first << 32 | end, memory_order_release);
    }
    atomic_fetch_add(&t->begun.value, 1);
    wake(t, &t->begun);
    help(t, 0);
    for (unsigned left; (left = atomic_load_explicit(&t->left.value, memory_order_acquire));)
        wait_while(t, &t->left, left);
}
