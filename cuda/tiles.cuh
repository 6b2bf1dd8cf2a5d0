/* What sums of attention received and scores have in common: a block's query rows against the keys of one page. */
#ifndef SKV_TILES_CUH
#define SKV_TILES_CUH

#include "cuda.cuh"

/* A lane's share of a vector: pairs 2 (lane + 32 i), i < PAIRS. Enough for strides up to 64 PAIRS. */
template <int PAIRS> struct lane_vector { float2 of[PAIRS]; };

/* From float32 memory, zero beyond dim. */
template <int PAIRS> static __device__ __forceinline__ lane_vector<PAIRS> load_query(const float *x, int32_t dim) {
    lane_vector<PAIRS> v;
#pragma unroll
    for (int i = 0; i < PAIRS; i++) {
        const int32_t c = 2 * (int32_t(threadIdx.x % WARP) + WARP * i);
        v.of[i] = c < dim ? load_pair(x + c) : make_float2(0, 0); /* dim is even */
    }
    return v;
}

/* Sums eight numbers over a warp: lane l ends up with that of row (l / 4) in which bit 2 is l's 16, bit 1 its 8, bit 0
 * its 4. A butterfly that halves the rows at every step: 9 shuffles instead of 40. */
static __device__ __forceinline__ float sum_eight(float (&x)[QUERIES]) {
    const int lane = threadIdx.x % WARP;
#pragma unroll
    for (int half = QUERIES / 2, offset = WARP / 2; half > 0; half /= 2, offset /= 2) {
        const bool high = lane & offset;
#pragma unroll
        for (int i = 0; i < half; i++) {
            const float send = high ? x[i] : x[i + half], keep = high ? x[i + half] : x[i];
            x[i] = keep + __shfl_xor_sync(0xffffffffu, send, offset);
        }
    }
    x[0] += __shfl_xor_sync(0xffffffffu, x[0], 2);
    return x[0] + __shfl_xor_sync(0xffffffffu, x[0], 1);
}

/* The row whose sum a lane has. */
static __device__ __forceinline__ int row_of_lane() { return int(threadIdx.x % WARP) / 4; }

/* logits [SKV_PAGE, QUERIES] shared ← scale · q · K of n slots; a warp a slot, all rows at once. q: alike in
 * every warp. */
template <typename T, int PAIRS>
static __device__ void page_logits(const cu_cache &cache, const lane_vector<PAIRS> (&q)[QUERIES], const char *page,
                                   int32_t n, float scale, float *logits) {
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    for (int32_t slot = warp; slot < n; slot += WARPS) {
        const T *key = reinterpret_cast<const T *>(page + size_t(slot) * cache.slot_bytes);
        float sums[QUERIES] = {};
#pragma unroll
        for (int i = 0; i < PAIRS; i++) {
            const int32_t c = 2 * (lane + WARP * i);
            if (c >= cache.stride) continue;
            const float2 k = load_pair(key + c);
#pragma unroll
            for (int r = 0; r < QUERIES; r++) sums[r] = fmaf(k.y, q[r].of[i].y, fmaf(k.x, q[r].of[i].x, sums[r]));
        }
        const float sum = sum_eight(sums);
        if (lane % 4 == 0) logits[slot * QUERIES + row_of_lane()] = sum * scale;
    }
}

/* A page's bytes [from, from + n) to shared memory, 16 at a time; done after cudax_wait and a barrier. */
static __device__ __forceinline__ void copy_bytes(char *to, const char *from, size_t n) {
    for (size_t i = 16 * threadIdx.x; i < n; i += 16 * THREADS) cudax_copy16(to + i, from + i);
}

/* The instance of a template for this stride, which takes <T, PAIRS>. */
#define BY_STRIDE(d, T, call)                                                                                          \
    ((d)->cache.stride <= 64    ? call<T, 1>                                                                           \
     : (d)->cache.stride <= 128 ? call<T, 2>                                                                           \
     : (d)->cache.stride <= 256 ? call<T, 4>                                                                           \
                                : call<T, 8>)
#define BY_CACHE(d, call)                                                                                              \
    ((d)->work.cache.type == SKV_F32 ? BY_STRIDE(d, float, call) : BY_STRIDE(d, __nv_bfloat16, call))

#endif
