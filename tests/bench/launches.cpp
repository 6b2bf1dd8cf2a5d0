/* Stand-ins for the CUDA runtime and cuBLAS that show what the backend would launch, for models of any size.
 *
 * Every launch is written down. While the corners are watched, the blocks at the corners of its grid are run by the
 * scheduler of tests/simt, too: those have the largest offsets, and none of their stores may miss.
 *
 * Device memory is a mapping of its own for each block, zero, with a page that nobody may touch behind it. The system
 * gives it pages as they are written to, so that hundreds of GB take nothing. What is copied from the host arrives
 * while the corners are watched or `copying` is on; copies on the device are left out, and products by cuBLAS, too.
 */
#include <cublas_v2.h>
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

#include <algorithm>
#include <unordered_map>
#include <vector>

#include "simt.h"

static FILE *out;
static bool copying = true, watching;
static std::unordered_map<void *, size_t> mappings;
constexpr size_t PAGE = 4096, MOST_SHARED = 227 << 10;

/* path: of a new file; NULL: on in the same. */
extern "C" __attribute__((visibility("default"))) void launches_watch(const char *path, bool copies, bool corners) {
    if (path && out) fclose(out);
    if (path) out = fopen(path, "w");
    copying = copies, watching = corners;
}

namespace simt {

static unsigned last_of(unsigned n) { return n - 1; }

/* The corners of the grid in a row of blocks. The scheduler numbers those; their threads are told the place of theirs.
 */
static void run_corners(const Launch &launch) {
    std::vector<uint3> places;
    for (unsigned corner = 0; corner < 8; corner++) {
        const uint3 at = {corner & 1 ? last_of(launch.grid.x) : 0, corner & 2 ? last_of(launch.grid.y) : 0,
                          corner & 4 ? last_of(launch.grid.z) : 0};
        const auto same = [&](const uint3 &p) { return p.x == at.x && p.y == at.y && p.z == at.z; };
        if (std::none_of(places.begin(), places.end(), same)) places.push_back(at);
    }
    size_t n_begun = 0;
    const size_t n_threads = size_t(launch.block.x) * launch.block.y * launch.block.z;
    Launch few = launch;
    few.grid = dim3(unsigned(places.size()));
    few.body = [&] {
        block_index = places[n_begun++ / n_threads]; /* a block's threads all begin before the next block does */
        grid_size = launch.grid;
        launch.body();
    };
    run(few);
}

cudaError_t enqueue(const Launch &l, cudaStream_t) {
    Dl_info image = {};
    dladdr(l.kernel, &image);
    if (out) {
        fprintf(out, "%zx %u %u %u %u %zu\n",
                size_t(static_cast<const char *>(l.kernel) - static_cast<const char *>(image.dli_fbase)), l.grid.x,
                l.grid.y, l.grid.z, l.block.x * l.block.y * l.block.z, l.shared_bytes);
        fflush(out); /* a block may end the process */
    }
    if (watching && l.grid.x && l.grid.y && l.grid.z && l.shared_bytes <= MOST_SHARED) run_corners(l);
    return cudaSuccess;
}

} // namespace simt

#define OK(name, ...)                                                                                                  \
    cudaError_t name(__VA_ARGS__) { return cudaSuccess; }

extern "C" {

cudaError_t cudaMalloc(void **p, size_t bytes) {
    const size_t whole = (bytes + PAGE - 1) / PAGE * PAGE;
    char *start = static_cast<char *>(
        mmap(nullptr, whole + PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (start == MAP_FAILED) return cudaErrorMemoryAllocation;
    mprotect(start + whole, PAGE, PROT_NONE);
    *p = start;
    mappings[start] = whole + PAGE;
    return cudaSuccess;
}

cudaError_t cudaFree(void *p) {
    munmap(p, mappings[p]);
    mappings.erase(p);
    return cudaSuccess;
}

cudaError_t cudaMallocHost(void **p, size_t bytes) { return *p = malloc(bytes), cudaSuccess; }
cudaError_t cudaFreeHost(void *p) { return free(p), cudaSuccess; }
cudaError_t cudaMemGetInfo(size_t *left, size_t *total) { return *left = *total = size_t(1) << 40, cudaSuccess; }

cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, cudaMemcpyKind kind, cudaStream_t) {
    if (copying && kind != cudaMemcpyDeviceToDevice) memcpy(to, from, bytes);
    return cudaSuccess;
}

/* Large blocks are fresh, or scratch. */
cudaError_t cudaMemsetAsync(void *to, int value, size_t bytes, cudaStream_t) {
    if (bytes <= 1 << 20) memset(to, value, bytes);
    return cudaSuccess;
}

cudaError_t cudaGetDeviceCount(int *n) { return *n = 1, cudaSuccess; }
cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr, int) { return *value = 132, cudaSuccess; }
cudaError_t cudaGetDeviceProperties(cudaDeviceProp *p, int) {
    *p = {};
    p->major = 9;
    return cudaSuccess;
}
const char *cudaGetErrorString(cudaError_t) { return "an error"; }
cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned) { return *stream = nullptr, cudaSuccess; }
cudaError_t cudaStreamEndCapture(cudaStream_t, cudaGraph_t *graph) { return *graph = nullptr, cudaSuccess; }
cudaError_t cudaGraphInstantiate(cudaGraphExec_t *graph, cudaGraph_t, unsigned long long) {
    return *graph = nullptr, cudaSuccess;
}
cudaError_t cudaEventCreate(cudaEvent_t *event) { return *event = nullptr, cudaSuccess; }
cudaError_t cudaEventElapsedTime(float *milliseconds, cudaEvent_t, cudaEvent_t) {
    return *milliseconds = 1, cudaSuccess;
}
OK(cudaGetLastError)
OK(cudaSetDevice, int)
OK(cudaStreamDestroy, cudaStream_t)
OK(cudaStreamSynchronize, cudaStream_t)
OK(cudaStreamBeginCapture, cudaStream_t, cudaStreamCaptureMode)
OK(cudaGraphDestroy, cudaGraph_t)
OK(cudaGraphExecDestroy, cudaGraphExec_t)
OK(cudaGraphLaunch, cudaGraphExec_t, cudaStream_t)
OK(cudaEventDestroy, cudaEvent_t)
OK(cudaEventRecord, cudaEvent_t, cudaStream_t)
OK(cudaEventSynchronize, cudaEvent_t)
OK(cudaFuncSetAttribute, const void *, cudaFuncAttribute, int)

cublasStatus_t cublasCreate_v2(cublasHandle_t *handle) { return *handle = nullptr, CUBLAS_STATUS_SUCCESS; }
cublasStatus_t cublasDestroy_v2(cublasHandle_t) { return CUBLAS_STATUS_SUCCESS; }
cublasStatus_t cublasSetStream_v2(cublasHandle_t, cudaStream_t) { return CUBLAS_STATUS_SUCCESS; }
cublasStatus_t cublasSetWorkspace_v2(cublasHandle_t, void *, size_t) { return CUBLAS_STATUS_SUCCESS; }
const char *cublasGetStatusString(cublasStatus_t) { return "an error"; }
cublasStatus_t cublasGemmEx(cublasHandle_t, cublasOperation_t, cublasOperation_t, int, int, int, const void *,
                            const void *, cudaDataType, int, const void *, cudaDataType, int, const void *, void *,
                            cudaDataType, int, cublasComputeType_t, cublasGemmAlgo_t) {
    return CUBLAS_STATUS_SUCCESS;
}
}
