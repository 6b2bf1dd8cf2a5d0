/* Devices and their memory, kernels' attributes and errors of the CUDA runtime, against NVIDIA's own prototypes.
 *
 * SIMT_DEVICES=n  devices there are (default 1)
 * SIMT_MEMORY=n   bytes of each (default 8 GiB); cudaMalloc fails beyond
 * SIMT_GUARD=1    device memory can be touched while work of a stream is done, not by host code in between, and an
 *                 overrun by 256 bytes hits a page that nobody may touch (0, default: neither)
 *
 * Each is read when it is needed. Fresh memory, of a device or pinned, is poisoned. What is not freed is a leak to
 * AddressSanitizer.
 *
 * A function returns the runtime's error and keeps it for cudaGetLastError. Calls of several host threads take turns.
 *
 * Not modelled: whose memory a kernel reads where there are several devices; a kernel's registers and occupancy, beyond
 * constants; errors that a kernel leaves (the scheduler aborts).
 */
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include <algorithm>
#include <vector>

#include "runtime.h"

namespace simt {

std::recursive_mutex lock;
thread_local cudaError_t last_error;
bool in_host_function;

long long setting(const char *name, long long otherwise) {
    const char *text = getenv(name);
    return text && *text ? atoll(text) : otherwise;
}
int n_devices() { return static_cast<int>(setting("SIMT_DEVICES", 1)); }

namespace {

constexpr size_t PAGE = 4096, ALIGNMENT = 256;

/* Vectors here and below: the C++ library's own trees are not built with MemorySanitizer. */
struct Allocation {
    char *start;
    size_t bytes;
    int device;
    char *mapping; // where guarded
    size_t mapping_bytes;
};
std::vector<Allocation> device_memory, pinned_memory;

std::vector<std::pair<const void *, size_t>> shared_limits; // of kernels that asked for more

thread_local int device;
unsigned n_working; // nested
long calls_left;    // of cudaMalloc and cudaMallocHost, until one is refused; 0: none will be

size_t device_bytes() { return static_cast<size_t>(setting("SIMT_MEMORY", 8ll << 30)); }
size_t free_bytes() {
    size_t used = 0;
    for (const Allocation &a : device_memory) used += a.device == device ? a.bytes : 0;
    return device_bytes() - std::min(device_bytes(), used);
}

void protect(int protection) {
    for (const Allocation &a : device_memory)
        if (a.mapping) mprotect(a.mapping, a.mapping_bytes, protection);
}

struct sigaction previous_action;

void on_fault(int signal, siginfo_t *info, void *) {
    auto *address = static_cast<char *>(info->si_addr);
    for (const Allocation &a : device_memory)
        if (a.mapping && address >= a.mapping && address < a.mapping + a.mapping_bytes + PAGE)
            fprintf(stderr, "simt: %s\n", n_working ? "overrun of device memory" : "host code touches device memory");
    sigaction(signal, &previous_action, nullptr); // the fault comes again, to whoever took it before
}

bool watch_faults() {
    struct sigaction action = {};
    action.sa_sigaction = on_fault;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    return !sigaction(SIGSEGV, &action, &previous_action);
}

/* Pages of its own, and one beyond that nobody may touch. */
bool map_guarded(Allocation *a) {
    static const bool watched = watch_faults();
    a->mapping_bytes = (a->bytes + PAGE - 1) / PAGE * PAGE;
    void *mapping = mmap(nullptr, a->mapping_bytes + PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (!watched || mapping == MAP_FAILED) return false;
    a->mapping = static_cast<char *>(mapping);
    a->start = a->mapping + (a->mapping_bytes - a->bytes) / ALIGNMENT * ALIGNMENT;
    mprotect(a->mapping + a->mapping_bytes, PAGE, PROT_NONE);
    return true;
}

bool is_refused() { return calls_left && !--calls_left; }

cudaError_t allocate(void **p, size_t bytes) {
    *p = nullptr;
    if (!bytes) return cudaSuccess;
    if (bytes > free_bytes()) return cudaErrorMemoryAllocation;
    Allocation a = {nullptr, bytes, device, nullptr, 0};
    void *start = nullptr;
    if (setting("SIMT_GUARD", 0) ? !map_guarded(&a) : posix_memalign(&start, ALIGNMENT, bytes))
        return cudaErrorMemoryAllocation;
    if (!a.mapping) a.start = static_cast<char *>(start);
    *p = a.start;
    poison(*p, bytes);
    device_memory.push_back(a);
    if (!n_working) protect(PROT_NONE);
    return cudaSuccess;
}

std::vector<Allocation>::iterator allocation_at(std::vector<Allocation> &memory, void *p) {
    return std::find_if(memory.begin(), memory.end(), [p](const Allocation &a) { return a.start == p; });
}

Where within(const std::vector<Allocation> &memory, const void *p, size_t bytes) {
    auto *start = static_cast<const char *>(p);
    for (const Allocation &a : memory)
        if (start >= a.start && start < a.start + a.bytes)
            return bytes <= static_cast<size_t>(a.start + a.bytes - start) ? INSIDE : OVERRUN;
    return NOWHERE;
}

} // namespace

Working::Working() {
    if (!n_working++) protect(PROT_READ | PROT_WRITE);
}
Working::~Working() {
    if (!--n_working) protect(PROT_NONE);
}

Where in_device_memory(const void *p, size_t bytes) { return within(device_memory, p, bytes); }
Where in_pinned_memory(const void *p, size_t bytes) { return within(pinned_memory, p, bytes); }

cudaError_t free_device_memory(void *p) {
    const auto a = allocation_at(device_memory, p);
    if (a == device_memory.end()) return cudaErrorInvalidValue;
    if (a->mapping)
        munmap(a->mapping, a->mapping_bytes + PAGE);
    else
        free(p);
    device_memory.erase(a);
    return cudaSuccess;
}

size_t most_shared_bytes(const void *kernel) {
    for (const auto &limit : shared_limits)
        if (limit.first == kernel) return std::max(SHARED_BYTES, limit.second);
    return SHARED_BYTES;
}

} // namespace simt

using namespace simt;

extern "C" {

/* ---- errors, devices ---- */

cudaError_t cudaGetLastError() {
    const cudaError_t error = last_error;
    last_error = cudaSuccess;
    return error;
}
cudaError_t cudaPeekAtLastError() { return last_error; }

#define SIMT_ERROR(error, text)                                                                                        \
    { error, #error, text }
static const struct {
    cudaError_t error;
    const char *name, *text;
} ERRORS[] = {
    SIMT_ERROR(cudaSuccess, "no error"),
    SIMT_ERROR(cudaErrorInvalidValue, "invalid argument"),
    SIMT_ERROR(cudaErrorMemoryAllocation, "out of memory"),
    SIMT_ERROR(cudaErrorInvalidConfiguration, "invalid configuration argument"),
    SIMT_ERROR(cudaErrorInvalidPitchValue, "invalid pitch argument"),
    SIMT_ERROR(cudaErrorNoDevice, "no CUDA-capable device is detected"),
    SIMT_ERROR(cudaErrorInvalidDevice, "invalid device ordinal"),
    SIMT_ERROR(cudaErrorInvalidResourceHandle, "invalid resource handle"),
    SIMT_ERROR(cudaErrorIllegalState, "the operation cannot be performed in the present state"),
    SIMT_ERROR(cudaErrorNotReady, "device not ready"),
    SIMT_ERROR(cudaErrorNotPermitted, "operation not permitted"),
    SIMT_ERROR(cudaErrorStreamCaptureUnsupported, "operation not permitted when stream is capturing"),
    SIMT_ERROR(cudaErrorStreamCaptureInvalidated, "operation failed due to a previous error during capture"),
    SIMT_ERROR(cudaErrorStreamCaptureUnmatched, "capture was not ended in the same stream as it began"),
    SIMT_ERROR(cudaErrorStreamCaptureUnjoined, "capturing stream has unjoined work"),
    SIMT_ERROR(cudaErrorStreamCaptureIsolation, "dependency created on uncaptured work in another stream"),
    SIMT_ERROR(cudaErrorStreamCaptureImplicit,
               "operation would make the legacy stream depend on a capturing blocking stream"),
    SIMT_ERROR(cudaErrorCapturedEvent, "operation not permitted on an event last recorded in a capturing stream"),
    SIMT_ERROR(cudaErrorGraphExecUpdateFailure,
               "the graph update was not performed because it included changes which violated constraints specific to "
               "instantiated graph update"),
};
#undef SIMT_ERROR
const char *cudaGetErrorName(cudaError_t error) {
    for (auto &each : ERRORS)
        if (each.error == error) return each.name;
    return "unrecognized error code";
}
const char *cudaGetErrorString(cudaError_t error) {
    for (auto &each : ERRORS)
        if (each.error == error) return each.text;
    return "unrecognized error code";
}

cudaError_t cudaGetDeviceCount(int *count) {
    *count = n_devices();
    return call([&] { return cudaSuccess; });
}
cudaError_t cudaSetDevice(int which) {
    return call([&] {
        if (which < 0 || which >= n_devices()) return cudaErrorInvalidDevice;
        device = which;
        return cudaSuccess;
    });
}
cudaError_t cudaGetDevice(int *which) {
    return call([&] {
        *which = device;
        return cudaSuccess;
    });
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp *properties, int which) {
    return call([&] {
        if (which < 0 || which >= n_devices()) return cudaErrorInvalidDevice;
        memset(properties, 0, sizeof *properties);
        strcpy(properties->name, "SIMT on the host");
        properties->major = 9;
        properties->totalGlobalMem = device_bytes();
        properties->multiProcessorCount = 4;
        properties->warpSize = 32;
        properties->sharedMemPerBlock = SHARED_BYTES;
        properties->sharedMemPerBlockOptin = MOST_SHARED_BYTES;
        properties->sharedMemPerMultiprocessor = MOST_SHARED_BYTES + 1024;
        properties->reservedSharedMemPerBlock = 1024;
        properties->regsPerBlock = properties->regsPerMultiprocessor = 65536;
        properties->maxThreadsPerBlock = 1024;
        properties->maxThreadsPerMultiProcessor = 2048;
        properties->maxBlocksPerMultiProcessor = 32;
        properties->l2CacheSize = 50 << 20;
        const int most[] = {1024, 1024, 64}, grid[] = {0x7FFFFFFF, 65535, 65535};
        memcpy(properties->maxThreadsDim, most, sizeof most);
        memcpy(properties->maxGridSize, grid, sizeof grid);
        return cudaSuccess;
    });
}
cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr attribute, int which) {
    cudaDeviceProp p;
    const cudaError_t error = cudaGetDeviceProperties(&p, which);
    if (error != cudaSuccess) return error;
    const struct {
        cudaDeviceAttr attribute;
        int value;
    } known[] = {
        {cudaDevAttrMultiProcessorCount, p.multiProcessorCount},
        {cudaDevAttrComputeCapabilityMajor, p.major},
        {cudaDevAttrComputeCapabilityMinor, p.minor},
        {cudaDevAttrMaxSharedMemoryPerBlock, static_cast<int>(p.sharedMemPerBlock)},
        {cudaDevAttrMaxSharedMemoryPerBlockOptin, static_cast<int>(p.sharedMemPerBlockOptin)},
        {cudaDevAttrMaxThreadsPerBlock, p.maxThreadsPerBlock},
        {cudaDevAttrL2CacheSize, p.l2CacheSize},
    };
    return call([&] {
        for (const auto &each : known)
            if (each.attribute == attribute) return *value = each.value, cudaSuccess;
        return cudaErrorInvalidValue;
    });
}
cudaError_t cudaMemGetInfo(size_t *available, size_t *total) {
    return call([&] {
        *total = device_bytes();
        *available = free_bytes();
        return cudaSuccess;
    });
}

/* ---- memory ---- */

/* For tests: the k-th call from now that allocates fails; 0: none. How many are left until then. */
void simt_refuse(long k) { calls_left = k; }
long simt_left() { return calls_left; }

cudaError_t cudaMalloc(void **p, size_t bytes) {
    return unsafe_call([&] { return is_refused() ? cudaErrorMemoryAllocation : allocate(p, bytes); });
}
cudaError_t cudaFree(void *p) {
    return unsafe_call([&] {
        drain_all();
        return p ? free_device_memory(p) : cudaSuccess;
    });
}
cudaError_t cudaMallocHost(void **p, size_t bytes) {
    return unsafe_call([&] {
        if (is_refused() || posix_memalign(p, ALIGNMENT, bytes)) return cudaErrorMemoryAllocation;
        poison(*p, bytes);
        pinned_memory.push_back({static_cast<char *>(*p), bytes, 0, nullptr, 0});
        return cudaSuccess;
    });
}
cudaError_t cudaFreeHost(void *p) {
    return unsafe_call([&] {
        const auto a = allocation_at(pinned_memory, p);
        if (!p) return cudaSuccess;
        if (a == pinned_memory.end()) return cudaErrorInvalidValue;
        drain_all();
        free(p);
        pinned_memory.erase(a);
        return cudaSuccess;
    });
}
cudaError_t cudaMallocAsync(void **p, size_t bytes, cudaStream_t stream) {
    return call([&] { return capturing(stream) ? cudaErrorStreamCaptureUnsupported : allocate(p, bytes); });
}
cudaError_t cudaFreeAsync(void *p, cudaStream_t stream) {
    return call([&] {
        if (capturing(stream)) return cudaErrorStreamCaptureUnsupported;
        if (allocation_at(device_memory, p) == device_memory.end()) return cudaErrorInvalidValue;
        return enqueue(stream, {"free", nullptr, [p] { free_device_memory(p); }});
    });
}

/* ---- kernels ---- */

cudaError_t cudaFuncSetAttribute(const void *kernel, cudaFuncAttribute attribute, int value) {
    return call([&] {
        if (attribute == cudaFuncAttributePreferredSharedMemoryCarveout) return cudaSuccess;
        if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize || value < 0 ||
            static_cast<size_t>(value) > MOST_SHARED_BYTES)
            return cudaErrorInvalidValue;
        const auto same = [kernel](const auto &limit) { return limit.first == kernel; };
        shared_limits.erase(std::remove_if(shared_limits.begin(), shared_limits.end(), same), shared_limits.end());
        shared_limits.emplace_back(kernel, value);
        return cudaSuccess;
    });
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes *attributes, const void *kernel) {
    return call([&] {
        memset(attributes, 0, sizeof *attributes);
        attributes->maxThreadsPerBlock = 1024;
        attributes->numRegs = 32;
        attributes->maxDynamicSharedSizeBytes = static_cast<int>(most_shared_bytes(kernel));
        return cudaSuccess;
    });
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, const void *, int threads, size_t shared_bytes) {
    return call([&] {
        if (threads < 1 || threads > 1024) return cudaErrorInvalidValue;
        *blocks = std::min(32, 2048 / ((threads + 31) / 32 * 32));
        *blocks = std::min(*blocks, static_cast<int>((MOST_SHARED_BYTES + 1024) / (shared_bytes + 1024)));
        return cudaSuccess;
    });
}

} // extern "C"
