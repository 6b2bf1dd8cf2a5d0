/* Streams, copies, events and graphs of the CUDA runtime, against NVIDIA's own prototypes.
 *
 * SIMT_LAZY=1 (default): a stream's work is done by the synchronisation that needs it, and no other's; 0: at once.
 * Copies are as asynchronous as they may be: the source is read, and the target written, when the work is done; the
 * target of a copy to the host is poisoned until then.
 *
 * Checked: the addresses of copies, the limits of launches, what a capture forbids, calls within host functions.
 *
 * Not modelled: memory nodes in graphs; a graph's freedom to reorder (it is replayed in the order of its capture).
 */
#include <string.h>

#include <algorithm>
#include <chrono>
#include <deque>
#include <memory>
#include <thread>
#include <vector>

#include "runtime.h"

using namespace simt;

namespace {

struct Capture {
    cudaStream_t origin;
    cudaStreamCaptureMode mode;
    std::thread::id thread;
    std::vector<Work> work;
    std::vector<cudaStream_t> joined; // whose work the origin has not waited for
    bool broken, ended;
};

/* A point in a stream's work. */
struct Mark {
    cudaStream_t stream;
    std::shared_ptr<Capture> capture; // if it was recorded in one
    bool done;
    std::chrono::steady_clock::time_point time;
};

} // namespace

struct CUstream_st {
    std::deque<Work> queue;
    bool with_default; // ordered with the default stream
    std::shared_ptr<Capture> capture;
};
struct CUevent_st {
    std::shared_ptr<Mark> mark;
    bool timed;
};
struct CUgraph_st {
    std::vector<Work> work;
};
struct CUgraphExec_st {
    std::shared_ptr<std::vector<Work>> work;
};

namespace {

CUstream_st default_stream{{}, false, nullptr};
std::vector<cudaStream_t> streams{&default_stream};

template <class T> bool contains(const std::vector<T> &all, const T &one) {
    return std::find(all.begin(), all.end(), one) != all.end();
}
template <class T> void remove(std::vector<T> *all, const T &one) {
    all->erase(std::remove(all->begin(), all->end(), one), all->end());
}

/* nullptr: not a stream, or not one any more. */
cudaStream_t stream_of(cudaStream_t stream) {
    if (!stream || stream == cudaStreamLegacy) return &default_stream;
    return contains(streams, stream) ? stream : nullptr;
}

void step(cudaStream_t stream) {
    Work work = std::move(stream->queue.front());
    stream->queue.pop_front();
    work.run();
}
void drain(cudaStream_t stream) {
    Working working;
    while (!stream->queue.empty()) step(stream);
}
void drain_until(const std::shared_ptr<Mark> &mark) {
    Working working;
    while (!mark->done) step(mark->stream);
}

cudaError_t break_capture(cudaStream_t stream, cudaError_t error) {
    stream->capture->broken = true;
    return error;
}

cudaError_t check(const Launch &launch) {
    const dim3 grid = launch.grid, block = launch.block;
    const bool grid_fits = grid.x <= 0x7FFFFFFF && grid.y <= 65535 && grid.z <= 65535;
    const bool block_fits = block.x <= 1024 && block.y <= 1024 && block.z <= 64;
    const bool something = grid.x && grid.y && grid.z && block.x && block.y && block.z;
    return something && grid_fits && block_fits && block.x * block.y * block.z <= 1024 &&
                   launch.shared_bytes <= most_shared_bytes(launch.kernel)
               ? cudaSuccess
               : cudaErrorInvalidConfiguration;
}

bool may_copy(const void *to, const void *from, size_t to_bytes, size_t from_bytes, cudaMemcpyKind kind) {
    const Where target = in_device_memory(to, to_bytes), source = in_device_memory(from, from_bytes);
    if (target == OVERRUN || source == OVERRUN) return false;
    if (in_pinned_memory(to, to_bytes) == OVERRUN || in_pinned_memory(from, from_bytes) == OVERRUN) return false;
    const bool to_device = kind == cudaMemcpyHostToDevice || kind == cudaMemcpyDeviceToDevice;
    const bool from_device = kind == cudaMemcpyDeviceToHost || kind == cudaMemcpyDeviceToDevice;
    return kind == cudaMemcpyDefault || (to_device == (target == INSIDE) && from_device == (source == INSIDE));
}

cudaError_t copy_rows(void *to, size_t to_pitch, const void *from, size_t from_pitch, size_t width, size_t height,
                      cudaMemcpyKind kind, cudaStream_t where) {
    if (!width || !height) return cudaSuccess;
    if (width > to_pitch || width > from_pitch) return cudaErrorInvalidPitchValue;
    const size_t to_bytes = (height - 1) * to_pitch + width, from_bytes = (height - 1) * from_pitch + width;
    if (!may_copy(to, from, to_bytes, from_bytes, kind)) return cudaErrorInvalidValue;
    auto *target = static_cast<char *>(to);
    auto *source = static_cast<const char *>(from);
    const auto copy = [=] {
        for (size_t row = 0; row < height; row++) memcpy(target + row * to_pitch, source + row * from_pitch, width);
    };
    const cudaError_t error = simt::enqueue(where, {"copy", nullptr, copy});
    const bool pending = error == cudaSuccess && !stream_of(where)->queue.empty();
    if (pending && in_device_memory(from, 1) && !in_device_memory(to, 1))
        for (size_t row = 0; row < height; row++) poison(target + row * to_pitch, width);
    return error;
}

} // namespace

namespace simt {

cudaError_t enqueue(cudaStream_t where, Work work) {
    cudaStream_t stream = stream_of(where);
    if (!stream) return cudaErrorInvalidResourceHandle;
    if (stream == &default_stream)
        for (cudaStream_t each : streams) {
            if (each->with_default && each->capture) return break_capture(each, cudaErrorStreamCaptureImplicit);
            if (each->with_default) drain(each);
        }
    if (stream->capture) {
        if (stream->capture->broken) return cudaErrorStreamCaptureInvalidated;
        stream->capture->work.push_back(std::move(work));
        return cudaSuccess;
    }
    if (stream->with_default) drain(&default_stream);
    stream->queue.push_back(std::move(work));
    if (!setting("SIMT_LAZY", 1)) drain(stream);
    return cudaSuccess;
}

cudaError_t enqueue(const Launch &launch, cudaStream_t stream) {
    call([&] {
        const cudaError_t error = check(launch);
        return error ? error : enqueue(stream, {"kernel", launch.kernel, [launch] { run(launch); }});
    });
    return cudaGetLastError();
}

bool capturing(cudaStream_t stream) { return stream_of(stream) && stream_of(stream)->capture; }

bool breaks_capture() {
    for (cudaStream_t each : streams)
        if (each->capture && (each->capture->mode == cudaStreamCaptureModeGlobal ||
                              (each->capture->mode == cudaStreamCaptureModeThreadLocal &&
                               each->capture->thread == std::this_thread::get_id())))
            return each->capture->broken = true;
    return false;
}

void drain_all() {
    for (cudaStream_t stream : streams) drain(stream);
}

} // namespace simt

/* A call with a stream, which `body` gets. */
template <class F> static cudaError_t on_stream(cudaStream_t where, F body) {
    return call([&] { return stream_of(where) ? body(stream_of(where)) : cudaErrorInvalidResourceHandle; });
}

extern "C" {

cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, cudaMemcpyKind kind, cudaStream_t stream) {
    return call([&] { return copy_rows(to, bytes, from, bytes, bytes, 1, kind, stream); });
}
cudaError_t cudaMemcpy(void *to, const void *from, size_t bytes, cudaMemcpyKind kind) {
    return call([&] {
        const cudaError_t error = copy_rows(to, bytes, from, bytes, bytes, 1, kind, nullptr);
        drain(&default_stream);
        return error;
    });
}
cudaError_t cudaMemcpy2DAsync(void *to, size_t to_pitch, const void *from, size_t from_pitch, size_t width,
                              size_t height, cudaMemcpyKind kind, cudaStream_t stream) {
    return call([&] { return copy_rows(to, to_pitch, from, from_pitch, width, height, kind, stream); });
}
cudaError_t cudaMemsetAsync(void *p, int value, size_t bytes, cudaStream_t stream) {
    return call([&] {
        if (bytes && in_device_memory(p, bytes) != INSIDE) return cudaErrorInvalidValue;
        return enqueue(stream, {"memset", nullptr, [=] { memset(p, value, bytes); }});
    });
}
cudaError_t cudaMemset(void *p, int value, size_t bytes) { return cudaMemsetAsync(p, value, bytes, nullptr); }

/* ---- streams and events ---- */

cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned flags) {
    return call([&] {
        if (flags > cudaStreamNonBlocking) return cudaErrorInvalidValue;
        *stream = new CUstream_st{{}, flags == cudaStreamDefault, nullptr};
        streams.push_back(*stream);
        return cudaSuccess;
    });
}
cudaError_t cudaStreamCreate(cudaStream_t *stream) { return cudaStreamCreateWithFlags(stream, cudaStreamDefault); }
cudaError_t cudaStreamDestroy(cudaStream_t where) {
    return on_stream(where, [&](cudaStream_t stream) {
        if (stream == &default_stream) return cudaErrorInvalidResourceHandle;
        if (stream->capture) stream->capture->broken = true;
        drain(stream);
        remove(&streams, stream);
        delete stream;
        return cudaSuccess;
    });
}
cudaError_t cudaStreamSynchronize(cudaStream_t where) {
    return on_stream(where, [&](cudaStream_t stream) {
        if (stream->capture) return break_capture(stream, cudaErrorStreamCaptureUnsupported);
        drain(stream);
        return cudaSuccess;
    });
}
cudaError_t cudaDeviceSynchronize() {
    return unsafe_call([&] {
        drain_all();
        return cudaSuccess;
    });
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags) {
    return call([&] {
        *event = new CUevent_st{nullptr, !(flags & cudaEventDisableTiming)};
        return cudaSuccess;
    });
}
cudaError_t cudaEventCreate(cudaEvent_t *event) { return cudaEventCreateWithFlags(event, cudaEventDefault); }
cudaError_t cudaEventDestroy(cudaEvent_t event) {
    return call([&] {
        delete event;
        return cudaSuccess;
    });
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t where) {
    return on_stream(where, [&](cudaStream_t stream) {
        auto mark = std::make_shared<Mark>(Mark{stream, stream->capture, false, {}});
        const auto reach = [mark] {
            mark->time = std::chrono::steady_clock::now();
            mark->done = true;
        };
        const cudaError_t error = enqueue(stream, {"event", nullptr, reach});
        if (error == cudaSuccess) event->mark = mark;
        return error;
    });
}
cudaError_t cudaEventSynchronize(cudaEvent_t event) {
    return call([&] {
        if (!event->mark) return cudaSuccess;
        if (event->mark->capture) return cudaErrorCapturedEvent;
        drain_until(event->mark);
        return cudaSuccess;
    });
}
cudaError_t cudaEventElapsedTime(float *milliseconds, cudaEvent_t start, cudaEvent_t end) {
    return call([&] {
        if (!start->timed || !end->timed || !start->mark || !end->mark) return cudaErrorInvalidResourceHandle;
        if (!start->mark->done || !end->mark->done) return cudaErrorNotReady;
        *milliseconds = std::chrono::duration<float, std::milli>(end->mark->time - start->mark->time).count();
        return cudaSuccess;
    });
}
cudaError_t cudaStreamWaitEvent(cudaStream_t where, cudaEvent_t event, unsigned) {
    return on_stream(where, [&](cudaStream_t stream) {
        auto mark = event->mark;
        if (!mark) return cudaSuccess;
        auto capture = mark->capture;
        if (!capture && stream->capture) return break_capture(stream, cudaErrorStreamCaptureIsolation);
        if (!capture) return enqueue(stream, {"wait", nullptr, [mark] { drain_until(mark); }});
        if (capture->ended) return cudaErrorCapturedEvent;
        if (stream->capture && stream->capture != capture) return cudaErrorStreamCaptureIsolation;
        if (!stream->capture) capture->joined.push_back(stream);
        if (stream == capture->origin) remove(&capture->joined, mark->stream);
        stream->capture = capture;
        return cudaSuccess;
    });
}

cudaError_t cudaLaunchHostFunc(cudaStream_t where, cudaHostFn_t function, void *data) {
    const auto run = [=] {
        in_host_function = true;
        function(data);
        in_host_function = false;
    };
    return call([&] { return enqueue(where, {"host", reinterpret_cast<const void *>(function), run}); });
}

/* ---- graphs ---- */

cudaError_t cudaStreamBeginCapture(cudaStream_t where, cudaStreamCaptureMode mode) {
    return on_stream(where, [&](cudaStream_t stream) {
        if (stream == &default_stream) return cudaErrorStreamCaptureUnsupported;
        if (stream->capture) return cudaErrorIllegalState;
        const auto thread = std::this_thread::get_id();
        stream->capture = std::make_shared<Capture>(Capture{stream, mode, thread, {}, {}, false, false});
        return cudaSuccess;
    });
}
cudaError_t cudaStreamEndCapture(cudaStream_t where, cudaGraph_t *graph) {
    return on_stream(where, [&](cudaStream_t stream) {
        auto capture = stream->capture;
        *graph = nullptr;
        if (!capture) return cudaErrorIllegalState;
        if (capture->origin != stream) return break_capture(stream, cudaErrorStreamCaptureUnmatched);
        capture->ended = true;
        for (cudaStream_t each : streams)
            if (each->capture == capture) each->capture = nullptr;
        if (capture->broken) return cudaErrorStreamCaptureInvalidated;
        if (!capture->joined.empty()) return cudaErrorStreamCaptureUnjoined;
        *graph = new CUgraph_st{std::move(capture->work)};
        return cudaSuccess;
    });
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t *exec, cudaGraph_t graph, unsigned long long) {
    return call([&] {
        *exec = new CUgraphExec_st{std::make_shared<std::vector<Work>>(graph->work)};
        return cudaSuccess;
    });
}
cudaError_t cudaGraphExecUpdate(cudaGraphExec_t exec, cudaGraph_t graph, cudaGraphExecUpdateResultInfo *info) {
    const auto alike = [](const Work &a, const Work &b) { return !strcmp(a.kind, b.kind) && a.function == b.function; };
    return call([&] {
        const auto &old = *exec->work, &work = graph->work;
        const bool same = std::equal(old.begin(), old.end(), work.begin(), work.end(), alike);
        *info = {same ? cudaGraphExecUpdateSuccess : cudaGraphExecUpdateErrorTopologyChanged, nullptr, nullptr};
        if (!same) return cudaErrorGraphExecUpdateFailure;
        exec->work = std::make_shared<std::vector<Work>>(work); // launches on their way keep theirs
        return cudaSuccess;
    });
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t stream) {
    auto work = exec->work;
    const auto replay = [work] {
        for (const Work &each : *work) each.run();
    };
    return call([&] { return enqueue(stream, {"graph", nullptr, replay}); });
}
cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
    return call([&] {
        delete graph;
        return cudaSuccess;
    });
}
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec) {
    return call([&] {
        delete exec;
        return cudaSuccess;
    });
}

} // extern "C"
