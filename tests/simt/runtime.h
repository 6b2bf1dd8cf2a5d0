/* What the stand-ins for the CUDA runtime (device.cpp, stream.cpp) and for cuBLAS (cublas.cpp) share. */
#pragma once

#include <cuda_runtime_api.h>

#include <functional>
#include <mutex>

#include "simt.h"

namespace simt {

constexpr size_t SHARED_BYTES = 48 << 10, MOST_SHARED_BYTES = 227 << 10; // of a block: at once, and if it asks

/* device.cpp */

enum Where { NOWHERE, INSIDE, OVERRUN }; // of device memory, or beginning there and going beyond
Where in_device_memory(const void *p, size_t bytes);
Where in_pinned_memory(const void *p, size_t bytes);
cudaError_t free_device_memory(void *p);
size_t most_shared_bytes(const void *kernel);

/* While one lives, device memory can be touched. */
struct Working {
    Working();
    ~Working();
};

long long setting(const char *name, long long otherwise); // of the environment
int n_devices();

/* Every function of the runtime: one at a time, and its error is kept. */
extern std::recursive_mutex lock;
extern thread_local cudaError_t last_error;
extern bool in_host_function;
template <class F> cudaError_t call(F body) {
    std::lock_guard<std::recursive_mutex> hold(lock);
    const cudaError_t error = n_devices() == 0 ? cudaErrorNoDevice : in_host_function ? cudaErrorNotPermitted : body();
    if (error != cudaSuccess) last_error = error;
    return error;
}

/* stream.cpp */

/* One entry of a stream's queue or of a graph. */
struct Work {
    const char *kind;
    const void *function; // the kernel, where it is one
    std::function<void()> run;
};
cudaError_t enqueue(cudaStream_t stream, Work work); // within a call
bool capturing(cudaStream_t stream);
bool breaks_capture(); // whether a capture is on that an unsafe call of this thread breaks
void drain_all();

/* Those that must not be called during a capture. */
template <class F> cudaError_t unsafe_call(F body) {
    return call([&] { return breaks_capture() ? cudaErrorStreamCaptureUnsupported : body(); });
}

} // namespace simt
