/* CUDA's language of a kernel for a host compiler, so that unmodified .cu files run on the CPU.
 *
 * threadIdx and its like are globals that the scheduler (simt.cpp) sets at each switch of threads; barriers and warp
 * collectives are calls into it, with the place in the source that calls; everything else is inline. NVIDIA's own
 * headers give the types, the vectors, bf16 and fp16.
 */
#pragma once

#include <cuda_runtime_api.h>
#include <math.h>
#include <stdint.h>
#include <string.h>
#include <vector_functions.h>

#include <functional>
#include <tuple>
#include <type_traits>

#undef __constant__
#undef __device__
#undef __forceinline__
#undef __global__
#undef __grid_constant__
#undef __host__
#undef __launch_bounds__
#undef __noinline__
#undef __shared__
#define __constant__
#define __device__
#define __forceinline__ inline __attribute__((always_inline))
#define __global__
#define __grid_constant__
#define __host__
#define __launch_bounds__(...)
#define __noinline__ __attribute__((noinline))
#ifndef __restrict__
#define __restrict__ __restrict
#endif
/* Blocks run one after another, so one copy serves all. The section lets the scheduler poison it; g++ has none for
 * variables of templates, and AddressSanitizer none with red zones. */
#if defined(__clang__) && !defined(SIMT_ASAN)
#define __shared__ static __attribute__((section("simt_shared")))
#else
#define __shared__ static
#endif

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace simt {

struct Site {
    const char *file;
    int line;
    bool operator==(const Site &other) const {
        return line == other.line && (file == other.file || !strcmp(file, other.file));
    }
};
inline Site here(const char *file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }

enum Op {
    SYNCTHREADS,
    SYNCTHREADS_COUNT,
    SYNCTHREADS_AND,
    SYNCTHREADS_OR,
    SYNCWARP,
    SHFL,
    SHFL_UP,
    SHFL_DOWN,
    SHFL_XOR,
    ANY,
    ALL,
    BALLOT,
    REDUCE_ADD,
    REDUCE_MIN,
    REDUCE_MAX,
    MATCH_ANY,
    MMA,
    LDMATRIX,
    LDMATRIX_TRANS,
};

struct Launch {
    const char *name;
    const void *kernel;
    dim3 grid, block;
    size_t shared_bytes;
    std::function<void()> body; // one thread's work
};
void run(const Launch &launch);                                 // here and now
cudaError_t enqueue(const Launch &launch, cudaStream_t stream); // checked, and in its stream's turn

extern uint3 thread_index, block_index;
extern dim3 block_size, grid_size;
extern char dynamic_shared[];

int barrier(Op op, int predicate, Site site);
/* The last argument lies on the stack: a Site there, written in two parts and read in one, would hold up the caller. */
uint64_t collective(Op op, unsigned mask, uint64_t value, Site site, unsigned argument = 0, int width = 32);
void count_atomic(); // whoever does very many may wait for another thread, which then runs
void fence();
void poison(void *memory, size_t bytes); // NaN in each type of float, and not initialised to MemorySanitizer

struct Copy {
    uint4 *to;
    const uint4 *from;
};
void copy_later(Copy copy, Site site);
void commit_copies();
Copy due_copy(
    unsigned groups_left); // the next that must be done so that so many groups are left; {} when there is none

struct Fragments {
    float *d;
    const uint32_t *a, *b;
    const float *c;
};
struct Rows {
    uint32_t *r;
    uint4 row;
};

template <class T> uint64_t bits(T value) {
    static_assert(sizeof(T) <= 8 && std::is_trivially_copyable<T>::value, "a register or two");
    uint64_t all = 0;
    memcpy(&all, &value, sizeof value);
    return all;
}
template <class T> T from_bits(uint64_t all) {
    T value;
    memcpy(&value, &all, sizeof value);
    return value;
}

template <class... P, class... A>
cudaError_t launch(const char *name, void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes,
                   cudaStream_t stream, A &&...args) {
    std::tuple<P...> values(std::forward<A>(args)...);
    return enqueue({name, reinterpret_cast<const void *>(kernel), grid, block, shared_bytes,
                    [kernel, values] { std::apply(kernel, values); }},
                   stream);
}

/* CUDA's atomics are relaxed: they order nothing else. */
template <class T, class F> T update(T *p, F change) {
    using Word = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;
    auto *word = reinterpret_cast<Word *>(p);
    Word old = __atomic_load_n(word, __ATOMIC_RELAXED);
    count_atomic();
    while (!__atomic_compare_exchange_n(word, &old, static_cast<Word>(bits<T>(change(from_bits<T>(old)))), false,
                                        __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
    }
    return from_bits<T>(old);
}

} // namespace simt

/* ---- launch and memory, as <cuda_runtime.h> has them for C++ ---- */

#define CUDAX_LAUNCH(kernel, ...) ::simt::launch(#kernel, kernel, __VA_ARGS__)
#define CUDAX_SHARED(type, name) type *name = reinterpret_cast<type *>(::simt::dynamic_shared)

template <class T> cudaError_t cudaMalloc(T **p, size_t bytes) {
    return cudaMalloc(reinterpret_cast<void **>(p), bytes);
}
template <class T> cudaError_t cudaMallocHost(T **p, size_t bytes) {
    return cudaMallocHost(reinterpret_cast<void **>(p), bytes);
}
template <class T> cudaError_t cudaMallocAsync(T **p, size_t bytes, cudaStream_t stream) {
    return cudaMallocAsync(reinterpret_cast<void **>(p), bytes, stream);
}
template <class... P> cudaError_t cudaFuncSetAttribute(void (*kernel)(P...), cudaFuncAttribute attribute, int value) {
    return cudaFuncSetAttribute(reinterpret_cast<const void *>(kernel), attribute, value);
}
template <class... P> cudaError_t cudaFuncGetAttributes(cudaFuncAttributes *attributes, void (*kernel)(P...)) {
    return cudaFuncGetAttributes(attributes, reinterpret_cast<const void *>(kernel));
}
template <class... P>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, void (*kernel)(P...), int threads,
                                                          size_t shared_bytes) {
    return cudaOccupancyMaxActiveBlocksPerMultiprocessor(blocks, reinterpret_cast<const void *>(kernel), threads,
                                                         shared_bytes);
}

/* ---- places ---- */

#define threadIdx (::simt::thread_index)
#define blockIdx (::simt::block_index)
#define blockDim (::simt::block_size)
#define gridDim (::simt::grid_size)
constexpr int warpSize = 32;

/* ---- barriers and warp collectives ---- */

inline void __syncthreads(simt::Site site = simt::here()) { simt::barrier(simt::SYNCTHREADS, 0, site); }
inline int __syncthreads_count(int predicate, simt::Site site = simt::here()) {
    return simt::barrier(simt::SYNCTHREADS_COUNT, predicate, site);
}
inline int __syncthreads_and(int predicate, simt::Site site = simt::here()) {
    return simt::barrier(simt::SYNCTHREADS_AND, predicate, site);
}
inline int __syncthreads_or(int predicate, simt::Site site = simt::here()) {
    return simt::barrier(simt::SYNCTHREADS_OR, predicate, site);
}
inline void __syncwarp(unsigned mask = ~0u, simt::Site site = simt::here()) {
    simt::collective(simt::SYNCWARP, mask, 0, site);
}

#define SIMT_SHUFFLE(name, op, type)                                                                                   \
    template <class T> T name(unsigned mask, T value, type argument, int width = 32, simt::Site site = simt::here()) { \
        return simt::from_bits<T>(                                                                                     \
            simt::collective(op, mask, simt::bits(value), site, static_cast<unsigned>(argument), width));              \
    }
SIMT_SHUFFLE(__shfl_sync, simt::SHFL, int)
SIMT_SHUFFLE(__shfl_up_sync, simt::SHFL_UP, unsigned)
SIMT_SHUFFLE(__shfl_down_sync, simt::SHFL_DOWN, unsigned)
SIMT_SHUFFLE(__shfl_xor_sync, simt::SHFL_XOR, int)
#undef SIMT_SHUFFLE

#define SIMT_WARP(type, name, op, argument)                                                                            \
    inline type name(unsigned mask, argument value, simt::Site site = simt::here()) {                                  \
        return static_cast<type>(simt::collective(op, mask, static_cast<uint64_t>(value), site));                      \
    }
SIMT_WARP(int, __any_sync, simt::ANY, int)
SIMT_WARP(int, __all_sync, simt::ALL, int)
SIMT_WARP(unsigned, __ballot_sync, simt::BALLOT, int)
SIMT_WARP(unsigned, __reduce_add_sync, simt::REDUCE_ADD, unsigned)
SIMT_WARP(unsigned, __reduce_min_sync, simt::REDUCE_MIN, unsigned)
SIMT_WARP(unsigned, __reduce_max_sync, simt::REDUCE_MAX, unsigned)
SIMT_WARP(int, __reduce_add_sync, simt::REDUCE_ADD, int)
SIMT_WARP(int, __reduce_min_sync, simt::REDUCE_MIN, int)
SIMT_WARP(int, __reduce_max_sync, simt::REDUCE_MAX, int)
#undef SIMT_WARP
template <class T> unsigned __match_any_sync(unsigned mask, T value, simt::Site site = simt::here()) {
    return static_cast<unsigned>(simt::collective(simt::MATCH_ANY, mask, simt::bits(value), site));
}

/* ---- the wrappers of cudax.cuh ---- */

inline void cudax_copy16(void *shared, const void *global, simt::Site site = simt::here()) {
    simt::copy_later({static_cast<uint4 *>(shared), static_cast<const uint4 *>(global)}, site);
    *static_cast<uint4 *>(shared) =
        make_uint4(~0u, ~0u, ~0u, ~0u); // written here, not in the scheduler, for ThreadSanitizer to see it
    simt::poison(shared, 16);
}
inline void cudax_commit() { simt::commit_copies(); }
template <int N> void cudax_wait() {
    for (simt::Copy copy = simt::due_copy(N); copy.to; copy = simt::due_copy(N)) *copy.to = *copy.from;
}
inline void cudax_mma_16816(float d[4], const uint32_t a[4], const uint32_t b[2], const float c[4],
                            simt::Site site = simt::here()) {
    simt::Fragments mine = {d, a, b, c};
    simt::collective(simt::MMA, ~0u, simt::bits(&mine), site);
}
inline void cudax_ldmatrix_x4(uint32_t r[4], const void *shared, simt::Site site = simt::here()) {
    simt::Rows mine = {r, *static_cast<const uint4 *>(shared)};
    simt::collective(simt::LDMATRIX, ~0u, simt::bits(&mine), site);
}
inline void cudax_ldmatrix_x4_trans(uint32_t r[4], const void *shared, simt::Site site = simt::here()) {
    simt::Rows mine = {r, *static_cast<const uint4 *>(shared)};
    simt::collective(simt::LDMATRIX_TRANS, ~0u, simt::bits(&mine), site);
}

/* ---- atomics and fences ---- */

template <class T>
using simt_same = std::common_type_t<T>; // an argument that converts and does not take part in deduction

template <class T> T atomicAdd(T *p, simt_same<T> v) {
    return simt::update(p, [=](T old) { return static_cast<T>(old + v); });
}
template <class T> T atomicMax(T *p, simt_same<T> v) {
    return simt::update(p, [=](T old) { return old > v ? old : v; });
}
template <class T> T atomicMin(T *p, simt_same<T> v) {
    return simt::update(p, [=](T old) { return old < v ? old : v; });
}
template <class T> T atomicOr(T *p, simt_same<T> v) {
    return simt::update(p, [=](T old) { return old | v; });
}
template <class T> T atomicExch(T *p, simt_same<T> v) {
    return simt::update(p, [=](T) { return v; });
}
template <class T> T atomicCAS(T *p, simt_same<T> expected, simt_same<T> v) {
    return simt::update(p, [=](T old) { return old == expected ? v : old; });
}
inline void __threadfence() { simt::fence(); }
inline void __threadfence_block() { simt::fence(); }

/* ---- arithmetic ---- */

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __clz(int x) { return x ? __builtin_clz(static_cast<unsigned>(x)) : 32; }
inline int __clzll(long long x) { return x ? __builtin_clzll(static_cast<unsigned long long>(x)) : 64; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline unsigned __brev(unsigned x) {
    unsigned reversed = 0;
    for (int i = 0; i < 32; i++) reversed |= (x >> i & 1) << (31 - i);
    return reversed;
}
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(static_cast<uint64_t>(a) * b >> 32); }
inline int __float_as_int(float x) { return simt::from_bits<int>(simt::bits(x)); }
inline unsigned __float_as_uint(float x) { return simt::from_bits<unsigned>(simt::bits(x)); }
inline float __int_as_float(int x) { return simt::from_bits<float>(simt::bits(x)); }
inline float __uint_as_float(unsigned x) { return simt::from_bits<float>(simt::bits(x)); }

/* Macros: C libraries declare some of these names themselves. The device's are less exact. */
#define __expf(x) expf(x)
#define __exp10f(x) exp10f(x)
#define __logf(x) logf(x)
#define __log2f(x) log2f(x)
#define __log10f(x) log10f(x)
#define __sinf(x) sinf(x)
#define __cosf(x) cosf(x)
#define __powf(x, y) powf(x, y)
inline float __fdividef(float a, float b) { return a / b; }
inline float rsqrtf(float x) { return 1 / sqrtf(x); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __frcp_rn(float x) { return 1 / x; }
inline float __fsqrt_rn(float x) { return sqrtf(x); }
inline float __saturatef(float x) { return x > 0 ? fminf(x, 1) : 0; }
inline int __float2int_rn(float x) { return static_cast<int>(nearbyintf(x)); }
inline int __float2int_rd(float x) { return static_cast<int>(floorf(x)); }
inline int __float2int_rz(float x) { return static_cast<int>(x); }

template <class A, class B, class C = std::common_type_t<A, B>, class = std::enable_if_t<std::is_arithmetic<C>::value>>
constexpr C min(A a, B b) {
    return static_cast<C>(b) < static_cast<C>(a) || a != a ? static_cast<C>(b) : static_cast<C>(a);
}
template <class A, class B, class C = std::common_type_t<A, B>, class = std::enable_if_t<std::is_arithmetic<C>::value>>
constexpr C max(A a, B b) {
    return static_cast<C>(a) < static_cast<C>(b) || a != a ? static_cast<C>(b) : static_cast<C>(a);
}

/* ---- loads and stores with a hint ---- */

template <class T> T __ldg(const T *p) { return *p; }
template <class T> T __ldcg(const T *p) { return *p; }
template <class T> T __ldcs(const T *p) { return *p; }
template <class T> void __stcs(T *p, T value) { *p = value; }
template <class T> void __stcg(T *p, T value) { *p = value; }
