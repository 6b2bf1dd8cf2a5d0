/* Correct kernels, one for each thing that test_simt.py compares with what CUDA's documents say. Launchers take device
 * memory and return the launch's error. */
#include "cudax.cuh"

typedef unsigned long long ull;

/* ---- places and schedules ---- */

__global__ void places(int *out) {
    const int block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
    const int thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
    out[block * blockDim.x * blockDim.y * blockDim.z + thread] += block * 1000 + thread;
}

/* The order in which threads get by, without a barrier and behind one. */
__global__ void order(int *out, int *place) {
    const int id = blockIdx.x * blockDim.x + threadIdx.x, n = gridDim.x * blockDim.x;
    out[atomicAdd(place, 1)] = id;
    __syncthreads();
    out[n + atomicAdd(place + 1, 1)] = id;
}

/* ---- barriers and collectives ---- */

__global__ void barriers(const int *x, int *count, int *all, int *any) {
    count[threadIdx.x] = __syncthreads_count(x[threadIdx.x]);
    all[threadIdx.x] = __syncthreads_and(x[threadIdx.x] >= 0);
    any[threadIdx.x] = __syncthreads_or(x[threadIdx.x] > 8);
}

__global__ void shuffles(const float *x, float *out, int argument) {
    const int i = threadIdx.x;
    const float v = x[i];
    const unsigned n = blockDim.x;
    out[i] = __shfl_sync(~0u, v, argument);
    out[n + i] = __shfl_up_sync(~0u, v, argument);
    out[2 * n + i] = __shfl_down_sync(~0u, v, argument);
    out[3 * n + i] = __shfl_xor_sync(~0u, v, argument);
    out[4 * n + i] = __shfl_sync(~0u, v, argument, 8);
    out[5 * n + i] = __shfl_down_sync(~0u, v, argument, 8);
    const double wide = __shfl_xor_sync(~0u, static_cast<double>(v) + 1e-12, 1);
    out[6 * n + i] = wide > static_cast<double>(static_cast<float>(wide)) ? 1 : 0;
}

/* Votes of the even and of the odd lanes, apart. */
__global__ void votes(const int *x, int *out) {
    const int i = threadIdx.x, n = blockDim.x;
    const unsigned mask = i % 2 ? 0xAAAAAAAAu : 0x55555555u;
    if (i % 2) {
        out[i] = __ballot_sync(mask, x[i] > 0);
    } else {
        out[i] = __ballot_sync(mask, x[i] > 0);
    }
    out[n + i] = __any_sync(mask, x[i] > 8);
    out[2 * n + i] = __all_sync(mask, x[i] > -9);
    out[3 * n + i] = __reduce_add_sync(mask, x[i]);
    out[4 * n + i] = __reduce_min_sync(mask, x[i]);
    out[5 * n + i] = __reduce_max_sync(mask, x[i]);
    out[6 * n + i] = static_cast<int>(__reduce_min_sync(mask, static_cast<unsigned>(x[i])));
    out[7 * n + i] = static_cast<int>(__match_any_sync(mask, x[i]));
    __syncwarp(mask);
}

/* ---- memory ---- */

/* Reverses x within blocks, through static and dynamic shared memory, tile by tile with a copy ahead. */
__global__ void copies(const float4 *x, float4 *out, int n_tiles) {
    CUDAX_SHARED(float4, tile); // [2][blockDim.x]
    const int i = threadIdx.x, n = blockDim.x;
    cudax_copy16(&tile[i], &x[i]);
    cudax_commit();
    for (int t = 0; t < n_tiles; t++) {
        if (t + 1 < n_tiles) cudax_copy16(&tile[(t + 1) % 2 * n + i], &x[(t + 1) * n + i]);
        cudax_commit();
        cudax_wait<1>();
        __syncthreads();
        out[t * n + i] = tile[t % 2 * n + n - 1 - i];
        __syncthreads();
    }
}

__global__ void fresh_shared(unsigned *out) {
    __shared__ unsigned fixed[32];
    CUDAX_SHARED(unsigned, dynamic);
    CUDAX_SHARED(unsigned, same);
    out[threadIdx.x] = fixed[threadIdx.x];
    out[32 + threadIdx.x] = dynamic[threadIdx.x];
    fixed[threadIdx.x] = dynamic[threadIdx.x] = 1;
    out[64 + threadIdx.x] = same[threadIdx.x];
}

__global__ void atomics(const int *x, int *i, unsigned *u, ull *l, float *f) {
    const int v = x[threadIdx.x];
    atomicAdd(&i[0], v);
    atomicMax(&i[1], v);
    atomicMin(&i[2], v);
    atomicOr(&i[3], 1 << (v & 31));
    if (atomicCAS(&i[4], 0, v) == 0) atomicExch(&i[5], v);
    atomicAdd(&u[0], static_cast<unsigned>(v));
    atomicMax(&u[1], static_cast<unsigned>(v));
    atomicMin(&u[2], static_cast<unsigned>(v));
    atomicAdd(l, static_cast<ull>(v) << 32);
    atomicAdd(f, 0.5f * static_cast<float>(v));
}

/* The last block to arrive adds what all have left, by fences and an atomic count. */
__global__ void last_block(float *partial, unsigned *arrived, float *out) {
    __shared__ bool last;
    if (threadIdx.x == 0) {
        partial[blockIdx.x] = 1 + blockIdx.x;
        __threadfence();
        last = atomicAdd(arrived, 1u) == gridDim.x - 1;
        __threadfence();
    }
    __syncthreads();
    if (last && threadIdx.x == 0) {
        float sum = 0;
        for (unsigned i = 0; i < gridDim.x; i++) sum += partial[i];
        *out = sum;
    }
}

/* A lock that threads of one block wait for. */
__global__ void spin_lock(int *lock, int *count) {
    for (bool done = false; !done;) {
        if (atomicCAS(lock, 0, 1) == 0) {
            __threadfence();
            *count += 1;
            __threadfence();
            atomicExch(lock, 0);
            done = true;
        }
    }
}

/* ---- arithmetic ---- */

__global__ void integers(const unsigned *x, unsigned *out, int n) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    out[i] = __popc(x[i]);
    out[n + i] = __clz(x[i]);
    out[2 * n + i] = __ffs(x[i]);
    out[3 * n + i] = __brev(x[i]);
    out[4 * n + i] = __umulhi(x[i], x[i]);
    out[5 * n + i] = __float_as_uint(__uint_as_float(x[i]));
    out[6 * n + i] = static_cast<unsigned>(min(static_cast<int>(x[i]), 7));
    out[7 * n + i] = max(x[i], 7u);
}

__global__ void floats(const float *x, float *out, int n) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    out[i] = __expf(x[i]);
    out[n + i] = rsqrtf(x[i]);
    out[2 * n + i] = __frcp_rn(x[i]);
    out[3 * n + i] = __fdividef(1.0f, x[i]);
    out[4 * n + i] = __fmaf_rn(x[i], x[i], -1.0f);
    out[5 * n + i] = __logf(__ldg(&x[i]));
    const __nv_bfloat162 pair = __floats2bfloat162_rn(x[i], -x[i]);
    const float2 back = __bfloat1622float2(pair);
    out[6 * n + i] = back.x;
    out[7 * n + i] = back.y + __bfloat162float(__float2bfloat16(x[i]));
}

/* ---- tensor cores ---- */

__global__ void fragments(const unsigned *a, const unsigned *b, const float *c, float *d) {
    const int lane = threadIdx.x;
    cudax_mma_16816(d + lane * 4, a + lane * 4, b + lane * 2, c + lane * 4);
}

__global__ void matrices(const uint4 *x, unsigned *plain, unsigned *transposed) {
    __shared__ uint4 rows[32];
    const int lane = threadIdx.x;
    rows[lane] = x[lane];
    __syncwarp();
    unsigned r[4];
    cudax_ldmatrix_x4(r, &rows[lane]);
    for (int i = 0; i < 4; i++) plain[lane * 4 + i] = r[i];
    cudax_ldmatrix_x4_trans(r, &rows[lane]);
    for (int i = 0; i < 4; i++) transposed[lane * 4 + i] = r[i];
}

/* ---- launches ---- */

template <int ADD, int TIMES> __global__ void add(int *x) {
    for (int i = 0; i < TIMES; i++) x[blockIdx.x * blockDim.x + threadIdx.x] += ADD;
}
__global__ void nothing() {}

extern "C" {
cudaError_t run_places(int *out, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz) {
    return CUDAX_LAUNCH(places, dim3(gx, gy, gz), dim3(bx, by, bz), 0, 0, out);
}
cudaError_t run_order(int *out, int *place) { return CUDAX_LAUNCH(order, 4, 64, 0, 0, out, place); }
cudaError_t run_barriers(const int *x, int *count, int *all, int *any) {
    return CUDAX_LAUNCH(barriers, 1, 96, 0, 0, x, count, all, any);
}
cudaError_t run_shuffles(const float *x, float *out, int argument) {
    return CUDAX_LAUNCH(shuffles, 1, 64, 0, 0, x, out, argument);
}
cudaError_t run_votes(const int *x, int *out) { return CUDAX_LAUNCH(votes, 1, 32, 0, 0, x, out); }
cudaError_t run_copies(const float4 *x, float4 *out, int n_tiles) {
    return CUDAX_LAUNCH(copies, 1, 64, 2 * 64 * sizeof(float4), 0, x, out, n_tiles);
}
cudaError_t run_fresh_shared(unsigned *out) { return CUDAX_LAUNCH(fresh_shared, 2, 32, 128, 0, out); }
cudaError_t run_atomics(const int *x, int *i, unsigned *u, ull *l, float *f) {
    return CUDAX_LAUNCH(atomics, 1, 128, 0, 0, x, i, u, l, f);
}
cudaError_t run_last_block(float *partial, unsigned *arrived, float *out) {
    return CUDAX_LAUNCH(last_block, 16, 32, 0, 0, partial, arrived, out);
}
cudaError_t run_spin_lock(int *lock, int *count) { return CUDAX_LAUNCH(spin_lock, 1, 64, 0, 0, lock, count); }
cudaError_t run_integers(const unsigned *x, unsigned *out, int n) {
    return CUDAX_LAUNCH(integers, (n + 63) / 64, 64, 0, 0, x, out, n);
}
cudaError_t run_floats(const float *x, float *out, int n) {
    return CUDAX_LAUNCH(floats, (n + 63) / 64, 64, 0, 0, x, out, n);
}
cudaError_t run_fragments(const unsigned *a, const unsigned *b, const float *c, float *d) {
    return CUDAX_LAUNCH(fragments, 1, 32, 0, 0, a, b, c, d);
}
cudaError_t run_matrices(const uint4 *x, unsigned *plain, unsigned *transposed) {
    return CUDAX_LAUNCH(matrices, 1, 32, 0, 0, x, plain, transposed);
}
cudaError_t run_add(int *x, cudaStream_t stream) { return CUDAX_LAUNCH((add<2, 3>), 1, 32, 0, stream, x); }
cudaError_t run_other(int *x, cudaStream_t stream) { return CUDAX_LAUNCH((add<1, 1>), 1, 32, 0, stream, x); }
cudaError_t run_nothing(unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, size_t shared) {
    return CUDAX_LAUNCH(nothing, dim3(gx, gy, gz), dim3(bx, by, bz), shared, 0);
}
cudaError_t allow_shared(int bytes) {
    return cudaFuncSetAttribute(nothing, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
}
}
