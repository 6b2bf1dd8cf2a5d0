"""The stand-ins for the CUDA runtime and for cuBLAS: memory, launches, streams, events, graphs, products."""

import ctypes
from concurrent.futures import ThreadPoolExecutor
from ctypes import byref

import numpy as np
import pytest

pytestmark = pytest.mark.simt
TO_DEVICE, TO_HOST = 1, 2  # kinds of copies
NON_BLOCKING, NO_TIMING = 1, 2
F32, BF16, COMPUTE_F32 = 0, 14, 68


@pytest.fixture
def x(device):
    return device.put(np.zeros(32, np.int32))


@pytest.fixture
def other(device):
    """Another stream."""
    handle = device.made("cudaStreamCreateWithFlags", NON_BLOCKING)
    yield handle
    device.ok("cudaStreamDestroy", handle)


@pytest.fixture
def event(device):
    handle = device.made("cudaEventCreateWithFlags", 0)
    yield handle
    device.ok("cudaEventDestroy", handle)


def memory(device):
    """(free, total) bytes."""
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    device.ok("cudaMemGetInfo", byref(free), byref(total))
    return free.value, total.value


def test_a_device_has_so_much_memory(device, monkeypatch):
    monkeypatch.setenv("SIMT_MEMORY", "1000000")
    assert device.fails("cudaMalloc", byref(ctypes.c_void_p()), 1000001) == "cudaErrorMemoryAllocation"
    assert device.error() == "cudaSuccess"
    device.empty(600000)
    assert memory(device) == (400000, 1000000)
    assert device.fails("cudaMalloc", byref(ctypes.c_void_p()), 400001) == "cudaErrorMemoryAllocation"


def test_there_are_so_many_devices(device, monkeypatch):
    count = ctypes.c_int()
    monkeypatch.setenv("SIMT_DEVICES", "2")
    device.ok("cudaGetDeviceCount", byref(count))
    assert count.value == 2
    device.ok("cudaSetDevice", 1)
    device.ok("cudaSetDevice", 0)
    assert device.fails("cudaSetDevice", 2) == "cudaErrorInvalidDevice"
    monkeypatch.setenv("SIMT_DEVICES", "0")
    assert device.fails("cudaGetDeviceCount", byref(count)) == "cudaErrorNoDevice" and count.value == 0
    assert device.fails("cudaMalloc", byref(ctypes.c_void_p()), 4) == "cudaErrorNoDevice"


def test_a_device_says_what_it_is(device):
    value, properties = ctypes.c_int(), ctypes.create_string_buffer(8192)
    device.ok("cudaGetDeviceProperties", properties, 0)
    assert properties.value == b"SIMT on the host"
    device.ok("cudaDeviceGetAttribute", byref(value), 97, 0)  # shared memory that a block may ask for
    assert value.value == 227 << 10
    assert device.fails("cudaDeviceGetAttribute", byref(value), 97, 1) == "cudaErrorInvalidDevice"
    device.ok("cudaOccupancyMaxActiveBlocksPerMultiprocessor", byref(value), None, 256, 0)
    assert value.value == 8


@pytest.mark.parametrize(
    "grid, block, shared, accepted",
    [
        ((1, 1, 1), (1024, 1, 1), 48 << 10, True),
        ((1, 65535, 1), (1, 1, 1), 0, True),
        ((1, 65536, 1), (1, 1, 1), 0, False),
        ((1, 1, 65536), (1, 1, 1), 0, False),
        ((2**31, 1, 1), (1, 1, 1), 0, False),
        ((0, 1, 1), (1, 1, 1), 0, False),
        ((1, 1, 1), (0, 1, 1), 0, False),
        ((1, 1, 1), (1025, 1, 1), 0, False),
        ((1, 1, 1), (64, 32, 1), 0, False),
        ((1, 1, 1), (1, 1, 65), 0, False),
        ((1, 1, 1), (1, 1, 1), (48 << 10) + 1, False),
    ],
)
def test_a_launch_that_a_device_would_refuse_is_refused(device, grid, block, shared, accepted):
    status = device.call("run_nothing", *grid, *block, shared)
    assert status == (0 if accepted else 9) and device.error() == "cudaSuccess"  # 9: cudaErrorInvalidConfiguration
    device.ok("cudaDeviceSynchronize")


def test_a_kernel_may_ask_for_more_shared_memory(device):
    most = 227 << 10
    assert device.fails("allow_shared", most + 1) == "cudaErrorInvalidValue"
    device.ok("allow_shared", most)
    device.ok("run_nothing", 1, 1, 1, 32, 1, 1, most)
    device.ok("cudaDeviceSynchronize")
    device.ok("allow_shared", 0)


def copy_back(device, array, pointer, stream):
    device.ok("cudaMemcpyAsync", array.ctypes.data, pointer, array.nbytes, TO_HOST, stream)


def test_memory_in_a_streams_order(device, stream, monkeypatch):
    monkeypatch.setenv("SIMT_MEMORY", "128")
    x, host = device.made("cudaMallocAsync", 128, stream), device.made("cudaMallocHost", 128)
    device.ok("cudaMemsetAsync", x, 0, 128, stream)
    device.ok("run_add", x, stream)
    device.ok("cudaMemcpyAsync", host, x, 128, TO_HOST, stream)
    device.ok("cudaFreeAsync", x, stream)
    assert memory(device)[0] == 0
    device.ok("cudaStreamSynchronize", stream)
    assert memory(device)[0] == 128 and (ctypes.c_int * 32).from_address(host)[:] == [6] * 32
    assert device.fails("cudaMemcpy", host + 4, host, 128, 0) == "cudaErrorInvalidValue"  # beyond its end
    device.ok("cudaFreeHost", host)


@pytest.mark.parametrize("lazy", ["0", "1"])
def test_a_streams_work_is_done_when_it_must_be(device, stream, x, monkeypatch, lazy):
    monkeypatch.setenv("SIMT_LAZY", lazy)
    host = np.zeros(32, np.int32)
    device.ok("run_add", x, stream)
    copy_back(device, host, x, stream)
    assert (host == (-1 if lazy == "1" else 6)).all()  # poison, where it is on its way
    device.ok("cudaStreamSynchronize", stream)
    assert (host == 6).all()


def test_a_stream_waits_for_another_ones_event_only(device, stream, other, event, x):
    y, first, second = device.put(np.zeros(32, np.int32)), np.zeros(32, np.int32), np.zeros(32, np.int32)
    milliseconds = ctypes.c_float()
    device.ok("run_add", x, other)
    device.ok("cudaEventRecord", event, other)
    device.ok("run_add", y, other)
    device.ok("cudaStreamWaitEvent", stream, event, 0)
    copy_back(device, first, x, stream)
    copy_back(device, second, y, stream)
    assert device.fails("cudaEventElapsedTime", byref(milliseconds), event, event) == "cudaErrorNotReady"
    device.ok("cudaStreamSynchronize", stream)
    assert (first == 6).all() and (second == 0).all()
    device.ok("cudaEventElapsedTime", byref(milliseconds), event, event)


def test_a_streams_end(device, event, x):
    stream, host = device.made("cudaStreamCreateWithFlags", NON_BLOCKING), np.zeros(32, np.int32)
    device.ok("run_add", x, stream)
    copy_back(device, host, x, stream)
    device.ok("cudaEventRecord", event, stream)
    device.ok("cudaStreamDestroy", stream)
    device.ok("cudaEventSynchronize", event)
    assert (host == 6).all()
    assert device.fails("cudaStreamSynchronize", stream) == "cudaErrorInvalidResourceHandle"


def test_the_default_stream_waits_for_blocking_streams_only(device, stream):
    blocking = device.made("cudaStreamCreateWithFlags", 0)
    for handle, seen in ((blocking, 6), (stream, 0)):
        x, host = device.put(np.zeros(32, np.int32)), np.zeros(32, np.int32)
        device.ok("run_add", x, handle)
        device.ok("cudaMemcpy", host.ctypes.data, x, host.nbytes, TO_HOST)
        assert (host == seen).all()
    device.ok("cudaStreamDestroy", blocking)


def test_two_threads_of_the_host_may_launch(device, stream, other):
    def work(x, stream):
        for _ in range(50):
            device.ok("run_add", x, stream)
            device.ok("cudaStreamSynchronize", stream)

    arrays = [device.put(np.zeros(32, np.int32)) for _ in range(2)]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(work, arrays, [stream, other]))
    assert all((device.get(x, 32, np.int32) == 300).all() for x in arrays)


def test_copies_check_their_addresses(device):
    x, array = device.empty(64), np.zeros(17, np.int32).ctypes.data
    for name, *arguments in (
        ("cudaMemcpy", array, x, 68, TO_HOST),
        ("cudaMemcpy", array, x, 64, TO_DEVICE),
        ("cudaMemcpy", x, array, 64, TO_HOST),
        ("cudaMemset", array, 0, 4),
        ("cudaFree", x + 4),
    ):
        assert device.fails(name, *arguments) == "cudaErrorInvalidValue"
    rows = np.arange(6, dtype=np.int32)
    copy = ("cudaMemcpy2DAsync", x, 16, rows.ctypes.data)
    assert device.fails(*copy, 7, 8, 3, TO_DEVICE, None) == "cudaErrorInvalidPitchValue"
    device.ok("cudaMemset", x, 0, 64)
    device.ok(*copy, 8, 8, 3, TO_DEVICE, None)
    assert device.get(x, (4, 4), np.int32).tolist() == [[0, 1, 0, 0], [2, 3, 0, 0], [4, 5, 0, 0], [0] * 4]


def test_host_functions_run_in_their_streams_turn(device, stream, x):
    seen, host = [], np.zeros(32, np.int32)
    look = lambda _: seen.append((host[0], device.fails("cudaDeviceSynchronize")))  # noqa: E731
    function = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(look)
    device.ok("run_add", x, stream)
    copy_back(device, host, x, stream)
    device.ok("cudaLaunchHostFunc", stream, function, None)
    assert not seen
    device.ok("cudaStreamSynchronize", stream)
    assert seen == [(6, "cudaErrorNotPermitted")]


def test_a_graph_replays_what_a_capture_saw(device, stream, x):
    def captured(pointer, *kernels):
        device.ok("cudaStreamBeginCapture", stream, 0)
        for kernel in kernels:
            device.ok(kernel, pointer, stream)
        graph = ctypes.c_void_p()
        device.ok("cudaStreamEndCapture", stream, byref(graph))
        return graph.value

    y, result = device.put(np.zeros(32, np.int32)), ctypes.create_string_buffer(64)
    graphs = [captured(x, "run_add", "run_other"), captured(y, "run_add", "run_other"), captured(y, "run_add")]
    assert (device.get(x, 32, np.int32) == 0).all()
    graph = device.made("cudaGraphInstantiate", graphs[0], 0)
    for _ in range(3):
        device.ok("cudaGraphLaunch", graph, stream)
    device.ok("cudaGraphExecUpdate", graph, graphs[1], result)  # those that are on their way go on as they were
    assert device.fails("cudaGraphExecUpdate", graph, graphs[2], result) == "cudaErrorGraphExecUpdateFailure"
    device.ok("cudaGraphLaunch", graph, stream)
    assert (device.get(x, 32, np.int32) == 21).all() and (device.get(y, 32, np.int32) == 7).all()
    device.ok("cudaGraphExecDestroy", graph)
    for graph in graphs:
        device.ok("cudaGraphDestroy", graph)


def test_what_a_capture_forbids_is_an_error_and_breaks_it(device, stream, event, x):
    graph, blocking = ctypes.c_void_p(), device.made("cudaStreamCreateWithFlags", 0)
    device.ok("cudaEventRecord", event, None)
    for handle, error, *call in (
        (stream, "cudaErrorStreamCaptureUnsupported", "cudaMalloc", byref(ctypes.c_void_p()), 4),
        (stream, "cudaErrorStreamCaptureUnsupported", "cudaFree", x),
        (stream, "cudaErrorStreamCaptureUnsupported", "cudaStreamSynchronize", stream),
        (stream, "cudaErrorStreamCaptureUnsupported", "cudaDeviceSynchronize"),
        (stream, "cudaErrorStreamCaptureIsolation", "cudaStreamWaitEvent", stream, event, 0),
        (blocking, "cudaErrorStreamCaptureImplicit", "cudaMemset", x, 0, 4),
    ):
        device.ok("cudaStreamBeginCapture", handle, 0)
        assert device.fails(*call) == error
        assert device.fails("cudaStreamEndCapture", handle, byref(graph)) == "cudaErrorStreamCaptureInvalidated"
        assert graph.value is None
    device.ok("cudaStreamDestroy", blocking)


@pytest.mark.parametrize("joined", [True, False])
def test_a_capture_takes_in_streams_that_wait_for_its_events(device, stream, other, event, x, joined):
    join, graph = device.made("cudaEventCreateWithFlags", NO_TIMING), ctypes.c_void_p()
    device.ok("cudaStreamBeginCapture", stream, 0)
    device.ok("cudaEventRecord", event, stream)
    device.ok("cudaStreamWaitEvent", other, event, 0)
    device.ok("run_add", x, other)
    device.ok("cudaEventRecord", join, other)
    if joined:
        device.ok("cudaStreamWaitEvent", stream, join, 0)
        device.ok("cudaStreamEndCapture", stream, byref(graph))
        replay = device.made("cudaGraphInstantiate", graph.value, 0)
        device.ok("cudaGraphLaunch", replay, stream)
        device.ok("cudaGraphExecDestroy", replay)
        device.ok("cudaGraphDestroy", graph.value)
    else:
        assert device.fails("cudaStreamEndCapture", stream, byref(graph)) == "cudaErrorStreamCaptureUnjoined"
    assert device.fails("cudaEventSynchronize", join) == "cudaErrorCapturedEvent"
    assert (device.get(x, 32, np.int32) == (6 if joined else 0)).all()
    device.ok("cudaEventDestroy", join)


@pytest.mark.parametrize("type_, type_c", [(BF16, F32), (BF16, BF16), (F32, F32)])
@pytest.mark.parametrize("ops", [(0, 0), (1, 0), (0, 1), (1, 1)])
def test_gemm(device, rng, ops, type_, type_c):
    m, n, k, alpha, beta = 5, 7, 19, ctypes.c_float(0.5), ctypes.c_float(2)

    def store(array, type_):
        """Column-major, below each column two elements of padding; its pointer and leading dimension."""
        columns = np.ascontiguousarray(np.pad(array, ((0, 2), (0, 0))).T)
        bits = columns if type_ == F32 else (columns.view(np.uint32) >> 16).astype(np.uint16)
        return device.put(bits), len(array) + 2

    a, b, c = (rng.integers(-8, 9, shape).astype(np.float32) for shape in ((m, k), (k, n), (m, n)))  # exact in bf16
    handle = device.made("cublasCreate_v2")
    left, right = store(a.T if ops[0] else a, type_), store(b.T if ops[1] else b, type_)
    out, ldc = store(c, type_c)
    shape = (handle, *ops, m, n, k, byref(alpha), left[0], type_, left[1], right[0], type_, right[1], byref(beta))
    device.ok("cublasGemmEx", *shape, out, type_c, ldc, COMPUTE_F32, -1)
    found = device.get(out, (n, ldc), np.float32 if type_c == F32 else np.uint16)
    found = found if type_c == F32 else (found.astype(np.uint32) << 16).view(np.float32)
    expected = 0.5 * (a @ b) + 2 * c
    np.testing.assert_allclose(found[:, :m].T, expected, rtol=0 if type_c == F32 else 2**-8)
    assert (found[:, m:] == 0).all()
    assert device.call("cublasGemmEx", *shape, out, type_c, ldc + 1, COMPUTE_F32, -1) == 7  # invalid: ends beyond C
    assert device.call("cublasGemmEx", *shape, out, type_c, ldc, 64, -1) == 15  # not supported: f16 sums
    device.ok("cublasDestroy_v2", handle)
