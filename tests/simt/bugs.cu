/* Kernels with one bug each, and their corrected twins: bugs NAME [fixed] runs one and checks what it leaves. */
#include <stdio.h>
#include <string.h>

#include "cudax.cuh"

constexpr unsigned ALL = 0xFFFFFFFFu;
constexpr int N = 64; // threads, and floats of x, y and z

/* x[i] = i; y is to be i reversed, or what the kernel says. */
template <bool FIXED> __global__ void missing_syncthreads(const float *x, float *y) {
    __shared__ float s[N];
    s[threadIdx.x] = x[threadIdx.x];
    if (FIXED) __syncthreads();
    y[threadIdx.x] = s[N - 1 - threadIdx.x];
}
template <bool FIXED> __global__ void missing_second_syncthreads(const float *x, float *y) {
    __shared__ float s[N];
    for (int round = 0; round < 2; round++) {
        s[threadIdx.x] = x[threadIdx.x] * round;
        __syncthreads();
        y[threadIdx.x] = s[N - 1 - threadIdx.x];
        if (FIXED) __syncthreads();
    }
}
template <bool FIXED> __global__ void missing_syncwarp(const float *x, float *y) {
    __shared__ float s[N];
    s[threadIdx.x ^ 1] = x[threadIdx.x];
    if (FIXED) __syncwarp();
    y[N - 1 - (threadIdx.x ^ 1)] = s[threadIdx.x];
}
template <bool FIXED> __global__ void ldmatrix_without_barrier(const float *x, float *y) {
    __shared__ float4 s[32];
    unsigned r[4];
    if (threadIdx.x < 32) s[threadIdx.x ^ 16] = make_float4(x[threadIdx.x], 0, 0, 0);
    if (FIXED) __syncthreads();
    if (threadIdx.x < 32) cudax_ldmatrix_x4(r, &s[threadIdx.x]);
    y[threadIdx.x] = x[N - 1 - threadIdx.x];
}
template <bool FIXED> __global__ void race_between_blocks(const float *x, float *y) {
    if (threadIdx.x < N / 2) {
        const unsigned i = blockIdx.x * N / 2 + threadIdx.x;
        y[N - 1 - i] = x[i];
    }
    if (FIXED) {
        if (threadIdx.x == 0) atomicAdd(&y[N], 1.0f);
    } else {
        if (threadIdx.x == 0) y[N] += 1;
    }
}
template <bool FIXED> __global__ void missing_fence(const float *x, float *y) {
    __shared__ int ready;
    if (threadIdx.x == 0) ready = 0;
    __syncthreads();
    if (threadIdx.x == 0) {
        y[N] = 1;
        if (FIXED) __threadfence();
        atomicExch(&ready, 1);
    }
    if (threadIdx.x == N - 1) {
        while (!atomicAdd(&ready, 0)) {
        }
        __threadfence();
        y[N + 1] = y[N];
    }
    y[threadIdx.x] = x[N - 1 - threadIdx.x];
}
template <bool FIXED> __global__ void global_overrun(const float *x, float *y) {
    if (!FIXED && threadIdx.x == 0) y[2 * N] = x[0];
    y[threadIdx.x] = x[N - 1 - threadIdx.x];
}
template <bool FIXED> __global__ void shared_overrun(const float *x, float *y) {
    __shared__ float s[N];
    float *p = s + (FIXED ? 0 : 1);
    p[threadIdx.x] = x[threadIdx.x];
    __syncthreads();
    y[threadIdx.x] = p[N - 1 - threadIdx.x];
}
template <bool FIXED> __global__ void dynamic_shared_overrun(const float *x, float *y) {
    CUDAX_SHARED(float, s);
    float *p = s + (FIXED ? 0 : 1);
    p[threadIdx.x] = x[threadIdx.x];
    __syncthreads();
    y[threadIdx.x] = p[N - 1 - threadIdx.x];
}
template <bool FIXED> __global__ void misaligned_vector(const float *x, float *y) {
    const float4 v = *reinterpret_cast<const float4 *>(x + (FIXED ? 0 : 1));
    y[threadIdx.x] = x[N - 1 - threadIdx.x] + v.x - x[FIXED ? 0 : 1];
}
template <bool FIXED> __global__ void misaligned_copy16(const float *x, float *y) {
    __shared__ float4 s;
    if (threadIdx.x == 0) cudax_copy16(&s, x + (FIXED ? 0 : 1));
    cudax_commit();
    cudax_wait<0>();
    y[threadIdx.x] = x[N - 1 - threadIdx.x];
}
template <bool FIXED> __global__ void uninitialised_shared(const float *x, float *y) {
    __shared__ float s[N];
    if (FIXED || threadIdx.x) s[threadIdx.x] = x[threadIdx.x];
    __syncthreads();
    y[threadIdx.x] = s[N - 1 - threadIdx.x] > 0 ? x[N - 1 - threadIdx.x] : 0;
}
template <bool FIXED> __global__ void uninitialised_dynamic_shared(const float *x, float *y) {
    CUDAX_SHARED(float, s);
    if (FIXED || threadIdx.x) s[threadIdx.x] = x[threadIdx.x];
    __syncthreads();
    y[threadIdx.x] = s[N - 1 - threadIdx.x] > 0 ? x[N - 1 - threadIdx.x] : 0;
}
template <bool FIXED> __global__ void uninitialised_global(const float *x, float *y) {
    if (FIXED) y[N + threadIdx.x] = 1;
    y[threadIdx.x] = y[N + threadIdx.x] > 0 ? x[N - 1 - threadIdx.x] : 0;
}
template <bool FIXED> __global__ void missing_copy_wait(const float *x, float *y) {
    __shared__ __align__(16) float s[N];
    if (threadIdx.x % 4 == 0) cudax_copy16(&s[threadIdx.x], &x[threadIdx.x]);
    cudax_commit();
    if (FIXED) cudax_wait<0>();
    __syncthreads();
    y[threadIdx.x] = s[N - 1 - threadIdx.x];
}
template <bool FIXED> __global__ void copy_wait_one_group_short(const float *x, float *y) {
    __shared__ __align__(16) float s[N];
    if (threadIdx.x % 4 == 0) cudax_copy16(&s[threadIdx.x], &x[threadIdx.x]);
    cudax_commit();
    cudax_wait<FIXED ? 0 : 1>();
    __syncthreads();
    y[threadIdx.x] = s[N - 1 - threadIdx.x];
}
template <bool FIXED> __global__ void divergent_syncthreads(const float *x, float *y) {
    if (FIXED) __syncthreads();
    if (!FIXED && threadIdx.x < 32) {
        __syncthreads();
    } else if (!FIXED) {
        __syncthreads();
    }
    y[threadIdx.x] = x[N - 1 - threadIdx.x];
}
template <bool FIXED> __global__ void syncthreads_after_exit(const float *x, float *y) {
    y[threadIdx.x] = x[N - 1 - threadIdx.x];
    if (!FIXED && threadIdx.x >= 48) return;
    __syncthreads();
}
template <bool FIXED> __global__ void shuffle_in_branch(const float *x, float *y) {
    float v = x[N - 1 - threadIdx.x];
    if (FIXED || threadIdx.x % 32 < 16) v += __shfl_xor_sync(ALL, 0.0f, 1);
    y[threadIdx.x] = v;
}
template <bool FIXED> __global__ void shuffle_after_exit(const float *x, float *y) {
    y[threadIdx.x] = x[N - 1 - threadIdx.x];
    if (!FIXED && threadIdx.x >= 24) return;
    y[threadIdx.x] += __shfl_xor_sync(ALL, 0.0f, 1);
}
template <bool FIXED> __global__ void shuffle_from_inactive_lane(const float *x, float *y) {
    float v = x[N - 1 - threadIdx.x];
    if (threadIdx.x % 32 < 8) v += __shfl_down_sync(0xFFu, 0.0f, 4, FIXED ? 8 : 32);
    y[threadIdx.x] = v;
}
template <bool FIXED> __global__ void lane_outside_its_mask(const float *x, float *y) {
    const unsigned mask = FIXED ? ALL : 0xFFFFu;
    y[threadIdx.x] = x[N - 1 - threadIdx.x] + __shfl_sync(mask, 0.0f, 0);
}
template <bool FIXED> __global__ void masks_disagree(const float *x, float *y) {
    const unsigned mask = FIXED || threadIdx.x % 32 < 31 ? ALL : ALL << 1;
    __syncwarp(mask);
    y[threadIdx.x] = x[N - 1 - threadIdx.x];
}
template <bool FIXED> __global__ void different_collectives(const float *x, float *y) {
    if (FIXED || threadIdx.x % 2) {
        __any_sync(ALL, 1);
    } else {
        __ballot_sync(ALL, 1);
    }
    y[threadIdx.x] = x[N - 1 - threadIdx.x];
}
template <bool FIXED> __global__ void deadlock(const float *x, float *y) {
    if (FIXED || threadIdx.x % 2) __syncthreads();
    __syncwarp();
    if (!FIXED && threadIdx.x % 2 == 0) __syncthreads();
    y[threadIdx.x] = x[N - 1 - threadIdx.x];
}
template <bool FIXED> __global__ void waits_for_another_block(const float *x, float *y) {
    int *arrived = reinterpret_cast<int *>(y + N);
    if (threadIdx.x == 0) {
        atomicAdd(arrived, 1);
        while (!FIXED && atomicAdd(arrived, 0) % 2) {
        }
    }
    y[threadIdx.x] = x[N - 1 - threadIdx.x];
}
template <bool FIXED> __global__ void plain(const float *x, float *y) { y[threadIdx.x] = x[N - 1 - threadIdx.x]; }

/* ---- bugs of the host ---- */

struct Data {
    float *x, *y;
    cudaStream_t stream;
    float result[2 * N];
};

static cudaError_t read_back(Data *d) {
    const cudaError_t error = cudaMemcpyAsync(d->result, d->y, sizeof d->result, cudaMemcpyDeviceToHost, d->stream);
    return error ? error : cudaStreamSynchronize(d->stream);
}
template <bool FIXED> static cudaError_t missing_synchronisation(Data *d) {
    CUDAX_LAUNCH(plain<FIXED>, 1, N, 0, d->stream, d->x, d->y);
    if (FIXED) return read_back(d);
    return cudaMemcpyAsync(d->result, d->y, sizeof d->result, cudaMemcpyDeviceToHost, d->stream);
}
template <bool FIXED> static cudaError_t early_reuse(Data *d) {
    float x[N];
    for (int i = 0; i < N; i++) x[i] = static_cast<float>(i);
    cudaMemcpyAsync(d->x, x, sizeof x, cudaMemcpyHostToDevice, d->stream);
    if (FIXED) cudaStreamSynchronize(d->stream);
    memset(x, 0, sizeof x);
    CUDAX_LAUNCH(plain<FIXED>, 1, N, 0, d->stream, d->x, d->y);
    return read_back(d);
}
template <bool FIXED> static cudaError_t streams_without_event(Data *d) {
    cudaStream_t other;
    cudaEvent_t event;
    cudaStreamCreateWithFlags(&other, cudaStreamNonBlocking);
    cudaEventCreateWithFlags(&event, cudaEventDisableTiming);
    CUDAX_LAUNCH(plain<FIXED>, 1, N, 0, other, d->x, d->y);
    cudaEventRecord(event, other);
    if (FIXED) cudaStreamWaitEvent(d->stream, event, 0);
    const cudaError_t error = read_back(d);
    cudaEventDestroy(event);
    cudaStreamDestroy(other);
    return error;
}
template <bool FIXED> static cudaError_t host_touches_device(Data *d) {
    CUDAX_LAUNCH(plain<FIXED>, 1, N, 0, d->stream, d->x, d->y);
    cudaStreamSynchronize(d->stream);
    if (!FIXED) d->y[0] = 0;
    return read_back(d);
}
template <bool FIXED> static cudaError_t use_after_free(Data *d) {
    float *gone;
    cudaMalloc(&gone, N * sizeof(float));
    if (!FIXED) cudaFree(gone);
    CUDAX_LAUNCH(plain<FIXED>, 1, N, 0, d->stream, d->x, gone);
    CUDAX_LAUNCH(plain<FIXED>, 1, N, 0, d->stream, d->x, d->y);
    const cudaError_t error = read_back(d);
    if (FIXED) cudaFree(gone);
    return error;
}
template <bool FIXED> static cudaError_t device_leak(Data *d) {
    void *lost;
    cudaMalloc(&lost, 100);
    if (FIXED) cudaFree(lost);
    CUDAX_LAUNCH(plain<FIXED>, 1, N, 0, d->stream, d->x, d->y);
    return read_back(d);
}
template <bool FIXED> static cudaError_t too_much_shared(Data *d) {
    const cudaError_t error = CUDAX_LAUNCH(plain<FIXED>, 1, N, FIXED ? 48 << 10 : 48 << 10 | 4, d->stream, d->x, d->y);
    return error ? error : read_back(d);
}
template <bool FIXED> static cudaError_t bad_grid(Data *d) {
    const cudaError_t error = CUDAX_LAUNCH(plain<FIXED>, FIXED ? 1 : 0, N, 0, d->stream, d->x, d->y);
    return error ? error : read_back(d);
}
template <bool FIXED> __global__ void read_next_lane(const float *x, float *y) {
    y[threadIdx.x] = x[N - 1 - threadIdx.x] + __shfl_down_sync(ALL, 0.0f, FIXED ? 0 : 1);
}
template <bool FIXED> static cudaError_t lane_beyond_the_block(Data *d) {
    CUDAX_LAUNCH(plain<FIXED>, 1, N, 0, d->stream, d->x, d->y);
    CUDAX_LAUNCH(read_next_lane<FIXED>, 1, 40, 0, d->stream, d->x, d->y);
    return read_back(d);
}
template <bool FIXED> static cudaError_t copy_overrun(Data *d) {
    CUDAX_LAUNCH(plain<FIXED>, 1, N, 0, d->stream, d->x, d->y);
    const cudaError_t error = cudaMemsetAsync(d->y, 0, FIXED ? 0 : sizeof d->result + 1, d->stream);
    return error ? error : read_back(d);
}

/* Those of kernels.cu, for every tool to find nothing in. */
extern "C" {
cudaError_t run_order(int *out, int *place);
cudaError_t run_barriers(const int *x, int *count, int *all, int *any);
cudaError_t run_votes(const int *x, int *out);
cudaError_t run_copies(const float4 *x, float4 *out, int n_tiles);
cudaError_t run_atomics(const int *x, int *i, unsigned *u, unsigned long long *l, float *f);
cudaError_t run_last_block(float *partial, unsigned *arrived, float *out);
cudaError_t run_spin_lock(int *lock, int *count);
cudaError_t run_fragments(const unsigned *a, const unsigned *b, const float *c, float *d);
cudaError_t run_matrices(const uint4 *x, unsigned *plain, unsigned *transposed);
}
template <bool FIXED> static cudaError_t correct_kernels(Data *d) {
    constexpr size_t PART = 8192;
    char *memory;
    cudaMalloc(&memory, 8 * PART);
    cudaMemset(memory, 0, 8 * PART);
    const auto at = [&](size_t part) { return reinterpret_cast<int *>(memory + part * PART); };
    const auto real = [&](size_t part) { return reinterpret_cast<float *>(at(part)); };
    const auto word = [&](size_t part) { return reinterpret_cast<unsigned *>(at(part)); };
    cudaError_t errors[] = {
        run_order(at(0), at(1)),
        run_barriers(at(0), at(2), at(3), at(4)),
        run_votes(at(0), at(2)),
        run_copies(reinterpret_cast<float4 *>(at(0)), reinterpret_cast<float4 *>(at(2)), 5),
        run_atomics(at(0), at(3), word(4), reinterpret_cast<unsigned long long *>(at(5)), real(6)),
        run_last_block(real(0), word(7), real(1)),
        run_spin_lock(at(7) + 1, at(7) + 2),
        run_fragments(word(0), word(1), real(2), real(3)),
        run_matrices(reinterpret_cast<uint4 *>(at(0)), word(4), word(5)),
    };
    cudaDeviceSynchronize();
    cudaFree(memory);
    for (cudaError_t error : errors)
        if (error) return error;
    CUDAX_LAUNCH(plain<FIXED>, 1, N, 0, d->stream, d->x, d->y);
    return read_back(d);
}

template <bool FIXED> static cudaError_t run(const char *name, Data *d) {
#define KERNEL(kernel, grid)                                                                                           \
    if (!strcmp(name, #kernel)) {                                                                                      \
        const cudaError_t error = CUDAX_LAUNCH(kernel<FIXED>, grid, N, N * sizeof(float), d->stream, d->x, d->y);      \
        return error ? error : read_back(d);                                                                           \
    }
#define HOST(function)                                                                                                 \
    if (!strcmp(name, #function)) return function<FIXED>(d);
    KERNEL(missing_syncthreads, 1)
    KERNEL(missing_second_syncthreads, 1)
    KERNEL(missing_syncwarp, 1)
    KERNEL(ldmatrix_without_barrier, 1)
    KERNEL(race_between_blocks, 2)
    KERNEL(missing_fence, 1)
    KERNEL(global_overrun, 1)
    KERNEL(shared_overrun, 1)
    KERNEL(dynamic_shared_overrun, 1)
    KERNEL(misaligned_vector, 1)
    KERNEL(misaligned_copy16, 1)
    KERNEL(uninitialised_shared, 1)
    KERNEL(uninitialised_dynamic_shared, 1)
    KERNEL(uninitialised_global, 1)
    KERNEL(missing_copy_wait, 1)
    KERNEL(copy_wait_one_group_short, 1)
    KERNEL(divergent_syncthreads, 1)
    KERNEL(syncthreads_after_exit, 1)
    KERNEL(shuffle_in_branch, 1)
    KERNEL(shuffle_after_exit, 1)
    KERNEL(shuffle_from_inactive_lane, 1)
    KERNEL(lane_outside_its_mask, 1)
    KERNEL(masks_disagree, 1)
    KERNEL(different_collectives, 1)
    KERNEL(deadlock, 1)
    KERNEL(waits_for_another_block, 2)
    HOST(missing_synchronisation)
    HOST(early_reuse)
    HOST(streams_without_event)
    HOST(host_touches_device)
    HOST(use_after_free)
    HOST(device_leak)
    HOST(too_much_shared)
    HOST(bad_grid)
    HOST(copy_overrun)
    HOST(lane_beyond_the_block)
    HOST(correct_kernels)
    return cudaErrorUnknown;
}

int main(int argc, char **argv) {
    Data d = {};
    float x[N];
    for (int i = 0; i < N; i++) x[i] = static_cast<float>(i);
    cudaMalloc(&d.x, sizeof x);
    cudaMalloc(&d.y, sizeof d.result);
    cudaStreamCreateWithFlags(&d.stream, cudaStreamNonBlocking);
    cudaMemcpy(d.x, x, sizeof x, cudaMemcpyHostToDevice);
    if (strcmp(argv[1], "uninitialised_global")) cudaMemset(d.y, 0, sizeof d.result);
    cudaDeviceSynchronize();
    const cudaError_t error = argc > 2 ? run<true>(argv[1], &d) : run<false>(argv[1], &d);
    int wrong = 0;
    for (int i = 0; i < N; i++) wrong += !(d.result[i] == static_cast<float>(N - 1 - i));
    printf("%s\n", error ? cudaGetErrorName(error) : wrong ? "wrong result" : "ok");
    cudaFree(d.x);
    cudaFree(d.y);
    cudaStreamDestroy(d.stream);
    return error || wrong;
}
