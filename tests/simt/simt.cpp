/* The scheduler: runs a grid on the calling thread, block after block, a fiber for each thread that waits.
 *
 * Checked, with kernel, block, threads and lines in the report, then abort():
 *   - a barrier that not every thread of the block reaches, or at different lines;
 *   - a warp collective whose lanes disagree about mask, operation or line, whose mask lacks the calling lane or names
 *     one that has exited, or that reads a lane that takes no part; lanes beyond the block may be named, not read;
 *   - threads that wait for each other;
 *   - a thread that does atomics without end, as one does that waits for a block which has not begun;
 *   - an asynchronous copy that is not aligned, and more than 512 of a thread on their way.
 * A block starts with poisoned shared memory (static arrays: under clang++ only, and not with AddressSanitizer).
 * An asynchronous copy is done by the wait that needs it; until then its target is poisoned.
 *
 * SIMT_SCHEDULE  forward (default) and reverse take a block's threads, and the blocks, from one end or the other;
 *                random takes any that can go on, and blocks in any order, which SIMT_SEED alone decides.
 *
 * AddressSanitizer sees overruns of static and dynamic shared memory. MemorySanitizer follows values from lane to lane.
 * ThreadSanitizer takes each CUDA thread for one, ordered by __syncthreads, __syncwarp, __threadfence and the ends of
 * kernels only: atomics, shuffles and the order of blocks order nothing. Of a launch's blocks, those whose numbers in
 * the schedule are a multiple of LAPS apart count as ordered.
 *
 * Not modelled: blocks that run together; a switch of threads anywhere but at a barrier, a collective or one of many
 * atomics; the order in which a device sees stores; registers and the size of static shared memory; the speed of
 * anything.
 */
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include <algorithm>
#include <vector>

#include "threads.h"

#undef blockDim
#undef blockIdx
#undef gridDim
#undef threadIdx

/* Pushes what the caller must find again, keeps its stack in *from, goes on with the stack `to`. */
extern "C" void simt_switch(void **from, void *to);
asm(R"(
    .text
    .globl simt_switch
    .type simt_switch, @function
simt_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
    .size simt_switch, .-simt_switch
)");

/* Static shared arrays, where the compiler can gather them. */
extern "C" char __start_simt_shared[] __attribute__((weak)), __stop_simt_shared[] __attribute__((weak));

namespace simt {

uint3 thread_index, block_index;
dim3 block_size, grid_size;
alignas(128) char dynamic_shared[227 << 10];

Thread *current;
unsigned lap;
const char *const NAMES[] = {
    "__syncthreads",    "__syncthreads_count", "__syncthreads_and", "__syncthreads_or",        "__syncwarp",
    "__shfl_sync",      "__shfl_up_sync",      "__shfl_down_sync",  "__shfl_xor_sync",         "__any_sync",
    "__all_sync",       "__ballot_sync",       "__reduce_add_sync", "__reduce_min_sync",       "__reduce_max_sync",
    "__match_any_sync", "cudax_mma_16816",     "cudax_ldmatrix_x4", "cudax_ldmatrix_x4_trans",
};

namespace {

constexpr unsigned MAX_YIELDS = 1024;
constexpr size_t STACK_BYTES = 256 << 10, USED_BYTES = 8 << 10; // of a thread's stack; what kernels use of it

} // namespace

struct Fiber {
    void *stack_pointer;
    char *stack;
    void *fake_stack; // AddressSanitizer's
};

namespace {

Thread threads[MAX_THREADS];
Warp warps[MAX_THREADS / WARP];
unsigned n_threads, n_exited, n_arrived, n_atomics;
int arrived_result;

const Launch *grid; // in flight
Fiber host;
void *host_tsan;
const void *host_stack;
size_t host_stack_bytes;
Fiber fibers[MAX_THREADS], *idle[MAX_THREADS]; // nothing on the heap: ThreadSanitizer would see it, too
unsigned n_idle;

/* ThreadSanitizer orders what releases before what acquires the same eight bytes. */
uint64_t start_sync, end_sync, fence_sync, barrier_sync[LAPS][2];
unsigned phase; // of barriers, so that one that comes early at the next is not taken for one at this

} // namespace

/* ---- reports ---- */

const char *base_name(const char *path) {
    const char *slash = strrchr(path, '/');
    return slash ? slash + 1 : path;
}

static bool alike(const Thread &a, const Thread &b) {
    return a.state == b.state &&
           (a.state == READY || a.state == EXITED || (a.op == b.op && a.site == b.site && a.mask == b.mask));
}

void fault(const char *format, ...) {
    fprintf(stderr, "simt: %s, block (%u, %u, %u): ", grid->name, block_index.x, block_index.y, block_index.z);
    va_list arguments;
    va_start(arguments, format);
    vfprintf(stderr, format, arguments);
    va_end(arguments);
    fprintf(stderr, "\n");
    for (unsigned first = 0, last; first < n_threads; first = last + 1) {
        const Thread &t = threads[first];
        for (last = first; last + 1 < n_threads && alike(t, threads[last + 1]);) last++;
        fprintf(stderr, "  threads %u to %u ", first, last);
        if (t.state == READY) fprintf(stderr, "can go on\n");
        if (t.state == EXITED) fprintf(stderr, "have exited\n");
        if (t.state == AT_BARRIER)
            fprintf(stderr, "wait at %s, %s:%d\n", NAMES[t.op], base_name(t.site.file), t.site.line);
        if (t.state == AT_COLLECTIVE)
            fprintf(stderr, "wait at %s, mask %08x, %s:%d\n", NAMES[t.op], t.mask, base_name(t.site.file), t.site.line);
    }
    fflush(stderr);
    abort();
}

namespace {

/* ---- who runs ---- */

enum Schedule { FORWARD, REVERSE, RANDOM } schedule;
uint64_t random_state;

uint64_t random_number() {
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return random_state;
}

void read_schedule() {
    const char *name = getenv("SIMT_SCHEDULE"), *seed = getenv("SIMT_SEED");
    schedule = !name || !strcmp(name, "forward") ? FORWARD : !strcmp(name, "reverse") ? REVERSE : RANDOM;
    if (schedule == RANDOM && strcmp(name, "random"))
        fault("SIMT_SCHEDULE is \"%s\"; allowed: forward, reverse, random", name);

    random_state = (seed ? strtoull(seed, nullptr, 10) + 1 : 1) * 0x9E3779B97F4A7C15; // each launch starts anew
}

/* Threads that can go on, a ring. The schedule takes from the front, from the back or anywhere. */
struct Ready {
    Thread *ring[MAX_THREADS];
    unsigned first, count;

    Thread *&at(unsigned i) { return ring[(first + i) % MAX_THREADS]; }
    void push_back(Thread *t) { at(count++) = t; }
    void push_front(Thread *t) {
        first = (first + MAX_THREADS - 1) % MAX_THREADS;
        count++;
        at(0) = t;
    }
    Thread *take() {
        if (!count) return nullptr;
        if (schedule == REVERSE) return at(--count);
        if (schedule == RANDOM) std::swap(at(0), at(static_cast<unsigned>(random_number() % count)));
        Thread *t = at(0);
        first = (first + 1) % MAX_THREADS;
        count--;
        return t;
    }
} ready;

void arrive(void *fake_stack) {
    const void *bottom = nullptr;
    size_t bytes = 0;
    enter_stack(fake_stack, &bottom, &bytes);
    if (!host_stack) host_stack = bottom, host_stack_bytes = bytes; // the first switch of a launch comes from there
}

void switch_stack(Fiber *from, Fiber *to) {
    const void *bottom = to == &host ? host_stack : to->stack;
    leave_stack(&from->fake_stack, bottom, to == &host ? host_stack_bytes : STACK_BYTES);
    simt_switch(&from->stack_pointer, to->stack_pointer);
    arrive(from->fake_stack);
}

void become(Thread *t) {
    current = t;
    thread_index = t->index;
    switch_thread(t->tsan[lap]);
}

void run_threads();

Fiber *take_fiber() {
    static unsigned n_made;
    if (n_idle) return idle[--n_idle];
    const size_t page = 4096, colour = n_made % 16 * 256; // else the tops of all stacks share a few lines of the cache
    Fiber *fiber = &fibers[n_made++];
    void *mapping =
        mmap(nullptr, page + STACK_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapping == MAP_FAILED) fault("no memory for the stack of another thread");
    mprotect(mapping, page, PROT_NONE);
    fiber->stack = static_cast<char *>(mapping) + page;
    auto **top = reinterpret_cast<void **>(fiber->stack + STACK_BYTES - colour);
    *--top = nullptr; // what run_threads would return to
    *--top = reinterpret_cast<void *>(run_threads);
    fiber->stack_pointer = top - 6; // the registers that simt_switch pops, 0 in a fresh mapping
    return fiber;
}

/* Leaves the stack `from` for that of another thread. */
void go_on(Fiber *from, Thread *next) {
    if (!next->fiber) next->fiber = take_fiber();
    become(next);
    switch_stack(from, next->fiber);
}

} // namespace

void wait() {
    Thread *me = current, *next = ready.take();
    if (!next) fault("deadlock: no thread can go on");
    if (next != me) go_on(me->fiber, next);
}

void wake(Thread *t) {
    t->state = READY;
    ready.push_back(t);
}

void wake(const Warp &warp, unsigned mask) {
    for (unsigned i = 0; i < WARP; i++) {
        const unsigned lane = schedule == REVERSE ? i : WARP - 1 - i;
        if (!(mask >> lane & 1)) continue;
        warp.lanes[lane]->state = READY;
        schedule == REVERSE ? ready.push_back(warp.lanes[lane]) : ready.push_front(warp.lanes[lane]);
    }
}

namespace {

void leave(Thread *me) {
    Warp &warp = *me->warp;
    if (n_arrived) fault("thread %u has exited, others wait at a barrier for all threads of the block", me->id);
    me->state = EXITED;
    n_exited++;
    warp.exited |= 1u << me->lane;
    for (unsigned left = warp.waiting; left; left &= left - 1) {
        const Thread &t = *warp.lanes[__builtin_ctz(left)];
        if (t.mask >> me->lane & 1)
            fault("thread %u has exited, thread %u waits for its lane %u", me->id, t.id, me->lane);
    }
}

/* A fiber's life: threads from their start on, one after another while none of them waits. */
void run_threads() {
    arrive(nullptr);
    for (;;) {
        Thread *me = current;
        acquire(&start_sync);
        forget_accesses(static_cast<char *>(__builtin_frame_address(0)) - USED_BYTES, USED_BYTES); // another thread's
        grid->body();
        release(&end_sync);
        leave(me);
        Fiber *mine = me->fiber;
        Thread *next = ready.take();
        if (next && !next->fiber) {
            next->fiber = mine;
            become(next);
            continue;
        }
        if (!next && n_exited < n_threads) fault("deadlock: no thread can go on");
        idle[n_idle++] = mine;
        if (next) {
            go_on(mine, next);
        } else {
            current = nullptr;
            switch_thread(host_tsan);
            switch_stack(mine, &host);
        }
    }
}

/* ---- blocks ---- */

void forget(char *memory, size_t bytes) {
    poison(memory, bytes);
    forget_accesses(memory, bytes);
}

void run_block(size_t number) {
    block_index = {static_cast<unsigned>(number % grid_size.x),
                   static_cast<unsigned>(number / grid_size.x % grid_size.y),
                   static_cast<unsigned>(number / grid_size.x / grid_size.y)};
    lap = (lap + 1) % LAPS;
    if (grid->shared_bytes) forget(dynamic_shared, grid->shared_bytes);
    const auto static_bytes = static_cast<size_t>(__stop_simt_shared - __start_simt_shared);
    if (static_bytes) forget(__start_simt_shared, static_bytes);
    n_exited = n_arrived = 0;
    for (Warp &warp : warps) warp.exited = warp.waiting = 0;
    for (unsigned id = 0; id < n_threads; id++) {
        Thread &t = threads[id];
        t.fiber = nullptr;
        t.yields = 0;
        t.copies_begun = t.copies_done = t.group = 0;
        make_thread(&t.tsan[lap]);
        wake(&t);
    }
    go_on(&host, ready.take());
}

} // namespace

void run(const Launch &what) {
    grid = &what;
    grid_size = what.grid;
    block_size = what.block;
    n_threads = block_size.x * block_size.y * block_size.z;
    n_atomics = 0;
    read_schedule();
    host_stack = nullptr; // each host thread has its own
    host_tsan = this_thread();
    for (unsigned id = 0; id < n_threads; id++) {
        Thread &t = threads[id];
        Warp &warp = warps[id / WARP];
        t.id = id;
        t.lane = id % WARP;
        t.index = {id % block_size.x, id / block_size.x % block_size.y, id / block_size.x / block_size.y};
        t.warp = &warp;
        warp.lanes[t.lane] = &t;
        warp.present = (t.lane ? warp.present : 0) | 1u << t.lane;
    }
    forbid(dynamic_shared + what.shared_bytes, sizeof dynamic_shared - what.shared_bytes);
    release(&start_sync);
    const size_t n_blocks = static_cast<size_t>(grid_size.x) * grid_size.y * grid_size.z;
    std::vector<size_t> order(schedule == RANDOM ? n_blocks : 0);
    for (size_t i = 0; i < order.size(); i++) {
        const size_t other = random_number() % (i + 1);
        order[i] = order[other];
        order[other] = i;
    }
    for (size_t i = 0; i < n_blocks; i++)
        run_block(schedule == RANDOM ? order[i] : schedule == REVERSE ? n_blocks - 1 - i : i);
    acquire(&end_sync);
    allow(dynamic_shared, sizeof dynamic_shared);
}

void count_atomic() {
    Thread *me = current;
    if (++n_atomics % 4096) return;
    if (++me->yields > MAX_YIELDS)
        fault("thread %u does atomics without end; blocks run one after another, so one never waits for another",
              me->id);
    schedule == REVERSE ? ready.push_front(me) : ready.push_back(me);
    wait();
}

void fence() {
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    acquire(&fence_sync);
    release(&fence_sync);
}

/* Bytes by an instruction, not by memset: ThreadSanitizer would take that for a write of the program's. */
void poison(void *memory, size_t bytes) {
    void *to = memory;
    size_t left = bytes;
    asm volatile("rep stosb" : "+D"(to), "+c"(left) : "a"(0xFF) : "memory");
    uninitialise(memory, bytes);
}

/* ---- barriers ---- */

int barrier(Op op, int predicate, Site site) {
    Thread *me = current;
    if (n_exited)
        fault("thread %u is at a barrier, %s:%d, and others have exited", me->id, base_name(site.file), site.line);
    me->op = op;
    me->site = site;
    me->state = AT_BARRIER;
    me->mask = 0;
    static Op first_op;
    static Site first;
    if (!n_arrived) {
        first_op = op;
        first = site;
        arrived_result = op == SYNCTHREADS_AND;
    } else if (op != first_op || !(site == first)) {
        fault("divergent barrier: thread %u is at %s, %s:%d, others at %s, %s:%d", me->id, NAMES[op],
              base_name(site.file), site.line, NAMES[first_op], base_name(first.file), first.line);
    }
    if (op == SYNCTHREADS_COUNT) arrived_result += predicate != 0;
    if (op == SYNCTHREADS_AND) arrived_result &= predicate != 0;
    if (op == SYNCTHREADS_OR) arrived_result |= predicate != 0;
    uint64_t *sync = &barrier_sync[lap][phase];
    release(sync);
    if (++n_arrived == n_threads) {
        n_arrived = 0;
        phase ^= 1;
        for (unsigned id = 0; id < n_threads; id++) {
            threads[id].result = static_cast<uint64_t>(arrived_result);
            wake(&threads[id]);
        }
    }
    wait();
    acquire(sync);
    return static_cast<int>(me->result);
}

} // namespace simt
