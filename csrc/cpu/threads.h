/* A team of threads that share the items of an op. The caller is thread 0 and works, too. */
#ifndef SKV_CPU_THREADS_H
#define SKV_CPU_THREADS_H

#include "../heap.h"

typedef struct cpu_threads cpu_threads;

/* Items first … end − 1 of what was asked for, and which thread does them: for scratch, never for a result. */
typedef struct cpu_range {
    size_t first, end, thread;
} cpu_range;

typedef void cpu_work(const void *argument, cpu_range range);

/* n threads with the caller, of which *started there are: fewer where the process may not start more. NULL, which is
 * the caller alone, for one or if memory is out. */
cpu_threads *cpu_threads_new(skv_heap *heap, size_t n, size_t *started);
void cpu_threads_free(skv_heap *heap, cpu_threads *threads);

/* In the child of a fork, which has none of the parent's: starts as many as it may. */
void cpu_threads_after_fork(cpu_threads *threads);

/* Does items 0 … n − 1, one caller at a time; where their `cost`, in elements, is small, the caller does all. */
void cpu_run(cpu_threads *threads, size_t n, size_t cost, cpu_work *work, const void *argument);

#endif
