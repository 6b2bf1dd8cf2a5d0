/* The slots of one job of a compaction, as its block of THREADS sees them. */
#ifndef SKV_JOBS_CUH
#define SKV_JOBS_CUH

#include "cuda.cuh"

/* The block's job, in shared memory; ends with a barrier. */
static __device__ __forceinline__ void load_job(const cu_job *jobs, cu_job *job) {
    static_assert(sizeof(cu_job) % 4 == 0, "copied by words");
    const auto *from = reinterpret_cast<const uint32_t *>(jobs);
    auto *to = reinterpret_cast<uint32_t *>(job);
    for (size_t i = threadIdx.x; i < sizeof(cu_job) / 4; i += THREADS) to[i] = from[i];
    __syncthreads();
}

/* The slot that is the i-th held one. */
static __device__ __forceinline__ int32_t job_slot(const cu_job &job, int32_t i) {
    if (!job.held) return i;
    return i < job.n_held ? job.held[i] : job.end + i - job.n_held;
}

template <typename T>
static __device__ __forceinline__ const T *job_key(const cu_cache &c, const cu_job &job, int32_t i) {
    const int32_t slot = job_slot(job, i);
    return page_key<T>(c, job.pages[slot / SKV_PAGE], slot % SKV_PAGE);
}

static __device__ __forceinline__ int32_t job_position(const cu_cache &c, const cu_job &job, int32_t i) {
    const int32_t slot = job_slot(job, i);
    return page_positions(c, job.pages[slot / SKV_PAGE])[slot % SKV_PAGE];
}

/* Jobs whose slots are put in another order at the same time. */
static inline size_t cu_orders(size_t n_jobs) { return n_jobs < 64 ? n_jobs : 64; }

/* Where each job's area lies. */
void cu_place_jobs(const cu_device *d, const skv_scoring *s, skv_job *jobs, size_t n_jobs);

/* Uploads the jobs of a call, [row, layer, head]; false with the error set. */
bool cu_upload_jobs(cu_device *d, const skv_scoring *s, const skv_job *jobs, size_t n_jobs);

static inline const cu_job *cu_jobs(const cu_device *d) { return static_cast<const cu_job *>(d->jobs.data); }

#endif
