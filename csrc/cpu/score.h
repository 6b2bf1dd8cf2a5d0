/* Ops of backend.h that score and compact (score.c). */
#ifndef SKV_CPU_SCORE_H
#define SKV_CPU_SCORE_H

#include "../policies.h"

size_t cpu_score_work(size_t n_slots, size_t stride, size_t window);
void cpu_importance(skv_scoring *scoring);
void cpu_redundancy(skv_scoring *scoring);
void cpu_gather(const skv_backend *backend, const skv_cache_shape *cache, const skv_head *head, const int32_t *slots, size_t n, float *keys,
                int32_t *positions, float *sums);
void cpu_compact(const skv_cache_shape *cache, const skv_head *head, const int32_t *keep, size_t n, void *scratch);
void cpu_receive(const skv_exec *exec, const skv_cache_shape *cache, const skv_span_view *spans, size_t n_spans, size_t n_heads,
                 size_t n_kv_heads, const float *q, float *logits, size_t ld);

#endif
