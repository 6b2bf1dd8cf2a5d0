/* What the scheduler (simt.cpp) and the warp's collectives (warp.cpp) share. */
#pragma once

#include "sanitizers.h"
#include "simt.h"

namespace simt {

constexpr unsigned MAX_THREADS = 1024, WARP = 32;
constexpr unsigned LAPS = 4; // sets of ThreadSanitizer's threads, for blocks in turn

struct Fiber;
struct Thread;
struct Warp {
    Thread *lanes[WARP];
    unsigned present, exited, waiting; // masks
};

enum State { READY, AT_BARRIER, AT_COLLECTIVE, EXITED };

struct Thread {
    uint3 index;
    unsigned id, lane, yields;
    Warp *warp;
    Fiber *fiber; // none before the thread's start
    State state;
    Op op; // what it waits at
    Site site;
    unsigned mask, argument;
    int width;
    uint64_t value, result;
    unsigned copies_begun, copies_done, group; // asynchronous ones, and the group of the next
    void *tsan[LAPS];
};

extern Thread *current;
extern unsigned lap;
extern const char *const NAMES[]; // of Op

const char *base_name(const char *path);
[[noreturn]] __attribute__((format(printf, 1, 2))) void fault(const char *format, ...); // reports where all threads are

void wait();                                // the current thread, until somebody wakes it
void wake(Thread *t);                       // behind those that can go on
void wake(const Warp &warp, unsigned mask); // before them, so that a warp's stacks stay in the cache

} // namespace simt
