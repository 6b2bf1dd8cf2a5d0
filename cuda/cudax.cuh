/* What the .cu files share: CUDA's headers and the few instructions that have no C++ name, as functions.
 *
 * Under nvcc each wrapper is the plain instruction. Under a host compiler simt.h (tests/simt, by include path) gives
 * the language, the launch and a twin of each wrapper.
 */
#pragma once

#ifdef __CUDACC__

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <stdint.h>

/* An expression of type cudaError_t. A kernel whose name holds commas stands in parentheses. */
#define CUDAX_LAUNCH(kernel, ...) cudax_launch(kernel, __VA_ARGS__)
template <class... P, class... A>
cudaError_t cudax_launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
                         A &&...arguments) {
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream;
    const cudaError_t error = cudaLaunchKernelEx(&config, kernel, static_cast<P>(arguments)...);
    return error == cudaSuccess ? cudaGetLastError() : (cudaGetLastError(), error);
}

/* The block's dynamic shared memory, the same at each use. */
#define CUDAX_SHARED(type, name)                                                                                       \
    extern __shared__ __align__(16) unsigned char cudax_shared_[];                                                     \
    type *name = reinterpret_cast<type *>(cudax_shared_)

__device__ __forceinline__ uint32_t cudax_shared_address(const void *shared) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

/* 16 bytes, both addresses aligned to 16, on their way until the group that holds them has been waited for. */
__device__ __forceinline__ void cudax_copy16(void *shared, const void *global) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(cudax_shared_address(shared)), "l"(global)
                 : "memory");
}

/* Closes a group of this thread's copies. */
__device__ __forceinline__ void cudax_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

/* Waits until at most N of this thread's latest groups are on their way; other threads' copies need a barrier, too. */
template <int N> __device__ __forceinline__ void cudax_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

/* d [16, 8] = a [16, 16] b [16, 8] + c of a warp: bf16 products, f32 sums, fragments as in PTX for m16n8k16. */
__device__ __forceinline__ void cudax_mma_16816(float d[4], const uint32_t a[4], const uint32_t b[2],
                                                const float c[4]) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};"
                 : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]), "f"(c[2]),
                   "f"(c[3]));
}

/* Four matrices of 8 rows of 16 bytes; lanes 8j … 8j + 7 give the rows of matrix j, a lane gets 32 bits of each. */
__device__ __forceinline__ void cudax_ldmatrix_x4(uint32_t r[4], const void *shared) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(cudax_shared_address(shared))
                 : "memory");
}

/* The same with each matrix of 16-bit elements transposed. */
__device__ __forceinline__ void cudax_ldmatrix_x4_trans(uint32_t r[4], const void *shared) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(cudax_shared_address(shared))
                 : "memory");
}

#else

#include "simt.h"

#endif
