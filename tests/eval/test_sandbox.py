"""Programs that do harm: each ends as its own failure, within its limits, and nothing of it is left."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from skipkv.errors import BackendError
from skipkv.eval import sandbox as module
from skipkv.eval.sandbox import Limits, Sandbox

needs_bwrap = pytest.mark.skipif(not shutil.which("bwrap"), reason="bubblewrap is not there")
MARK = (8 << 20) + os.getpid()  # as a limit of file sizes it marks every process of these tests
LIMITS = Limits(seconds=1, file=MARK)


@pytest.fixture(scope="module")
def sandbox():
    return Sandbox(limits=LIMITS)


def running():
    found = []
    for limits in Path("/proc").glob("[0-9]*/limits"):
        try:
            if str(MARK) in limits.read_text():
                found.append(int(limits.parent.name))
        except OSError:
            pass
    return sorted(found)


def nothing_runs():
    until = time.monotonic() + 5
    while running() and time.monotonic() < until:
        time.sleep(0.02)
    return running() == []


HARM = {
    "fork bomb": ("import os\nwhile True:\n  try: os.fork()\n  except OSError: pass", "time limit"),
    "fork bomb that ends": ("import os\nwhile True:\n    os.fork()", "BlockingIOError"),
    "threads": ("import threading, time\nwhile True: threading.Thread(target=time.sleep, args=[9]).start()", "limit"),
    "10 GB": ("x = bytearray(10 << 30)", "MemoryError"),
    "endless": ("while True: pass", "time limit"),
    "endless in C": ("sum(iter(int, 1))", "time limit"),
    "sleeps": ("import time; time.sleep(99)", "time limit"),
    "kills all": ("import os; os.kill(-1, 9)", "ProcessLookupError|the sandbox"),
    "kills its parent": ("import os\nfor s in 9, 15, 19: os.kill(os.getppid(), s)\nraise KeyError", "Key|the sandbox"),
    "kills itself": ("import os; os.kill(os.getpid(), 11)", "ended by signal 11"),
    "stops itself": ("import os; os.kill(os.getpid(), 19)", "time limit"),
    "wakes its parent": ("import os, time; os.kill(os.getppid(), 14); time.sleep(9)", "time limit"),
    "interrupts its parent": ("import os, time; os.kill(os.getppid(), 2); time.sleep(9)", "the sandbox ended"),
    "100 MB": ("print('x' * (100 << 20))", "OSError"),
    "100 MB in pieces": ("while True: print('x' * 1000)", "OSError"),
    "a large file": ("open('/tmp/x', 'wb').write(bytes(100 << 20))", "OSError"),
    "many files": ("for i in range(99): open(f'/tmp/{i}', 'wb').write(bytes(8 << 20))", "OSError"),
    "closes stdout": ("import os, sys, time; sys.stdout.close(); os.closerange(0, 99); time.sleep(99)", "time limit"),
    "leaves a child": ("import os, time\nif not os.fork(): os.setsid(); time.sleep(99)\nprint(1)", "left a process"),
    "many that end": ("import os\nfor i in range(99):\n  if not os.fork(): os._exit(0)\n  os.wait()\n1/0", "Zero"),
    "ignores signals": (
        "import signal\nfor s in 15, 2, 24, 14: signal.signal(s, signal.SIG_IGN)\nwhile True: pass",
        "time limit",
    ),
    "another user": ("import os; os.setuid(0)", "PermissionError|OSError"),
    "mounts": ("import ctypes; assert not ctypes.CDLL(None).mount(b'x', b'/tmp', b'tmpfs', 0, None)", "AssertionError"),
    "raises limits": (
        "import resource; resource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
        "ValueError|PermissionError",
    ),
    "deep": ("x = '('; eval(x * 100000)", "Error"),
    "hostile error": ("class E(Exception):\n    def __str__(self): raise self\nraise E", "exit status 1"),
}


@needs_bwrap
@pytest.mark.parametrize("program, why", HARM.values(), ids=HARM)
def test_harm_is_a_failure_within_its_limits(sandbox, program, why):
    begin = time.monotonic()
    with sandbox.open() as session:
        found = session.run(program, "")
        assert found.output is None and any(part in found.why for part in why.split("|")), found
        if found.why != "the sandbox ended":
            assert session.run("print(input())", "next").output == "next\n"
    assert time.monotonic() - begin < 2 * LIMITS.seconds + 8
    assert nothing_runs()


@needs_bwrap
def test_what_a_sandbox_shows(sandbox, tmp_path):
    """Neither the home directory nor accounts nor the project; of the processes, its own; /tmp alone is for writing."""
    secret = Path.home() / f".skipkv-test-{os.getpid()}"
    secret.write_text("secret")
    try:
        private = [secret, "/etc/passwd", "/etc/shadow", "/etc/group", Path.home() / ".ssh", Path(__file__), tmp_path]
        program = f"""
import os
for path in {[str(path) for path in private]}:
    assert not os.path.exists(path), path
for folder in ["/", "/usr", "/etc", "/dev", "/dev/shm", "/proc", {sys.prefix!r}, {str(Path.home())!r}]:
    try:
        open(folder + "/written", "w")
    except OSError:
        continue
    raise AssertionError(folder)
open("/tmp/written", "w").write("x")
others = [name for name in os.listdir("/proc") if name.isdigit() and int(name) != os.getpid()]
assert len(others) < 3, others
for path in [f"/proc/{{other}}/{{name}}" for other in others for name in ("mem", "fd/1", "environ")]:
    try:
        open(path, "rb")
    except OSError:
        continue
    raise AssertionError(path)
print([name for name in os.listdir("/tmp") if name not in {Path(sys.prefix).parts}], sorted(os.environ))
"""
        with sandbox.open() as session:
            found = session.run(program, "")
    finally:
        secret.unlink()
    names = ["HOME", "LANG", "OPENBLAS_NUM_THREADS", "PATH", "PWD", "PYTHONHASHSEED", "TMPDIR"]
    assert found.output == f"['written'] {names}\n", found


@needs_bwrap
def test_no_network(sandbox):
    with socket.create_server(("127.0.0.1", 0)) as server, sandbox.open() as session:
        port = server.getsockname()[1]
        found = session.run(f"import socket; socket.create_connection(('127.0.0.1', {port}), 1)", "")
        assert "Error" in found.why
        server.settimeout(0)
        with pytest.raises(BlockingIOError):
            server.accept()


@needs_bwrap
def test_a_program_ends_as_one_does(sandbox):
    """Exit statuses, threads, handlers at the exit, buffered output."""
    ends = {
        "import sys; print(input()); sys.exit(3)": "in\n",
        "import threading, time\nthreading.Thread(target=lambda: (time.sleep(0.1), print('late'))).start()": "late\n",
        "import atexit, os; atexit.register(lambda: os.write(1, b'end'))": "end",
        "if __name__ == '__main__': print('é', end='')": "é",
        "import sys; sys.stdout.buffer.write(sys.stdin.buffer.read())": "in",
        "import os; os.write(1, b'\\xff'); os._exit(0)": "\ufffd",
        "import os, time\nif not os.fork(): time.sleep(0.01); os._exit(0)\nprint('parent')": "parent\n",
    }
    with sandbox.open() as session:
        assert {program: session.run(program, "in").output for program in ends} == ends
        orders = {session.run("print({'a', 'b', 'c', 'd', 'e'})", "").output for _ in range(4)}
    assert len(orders) == 1


@needs_bwrap
def test_the_outer_clock_ends_what_hangs_inside(sandbox, monkeypatch):
    monkeypatch.setattr(module, "GRACE", 0)
    with sandbox.open() as session:
        for process in running():
            os.kill(process, signal.SIGSTOP)
        assert session.run("print(1)", "").why == "the sandbox ended"
        assert session.run("print(1)", "").why == "the sandbox ended"
    assert nothing_runs()


@needs_bwrap
@pytest.mark.parametrize("unsafe", [False, True])
def test_all_ends_with_the_evaluator(unsafe):
    code = f"""
from skipkv.eval.sandbox import Limits, Sandbox
with Sandbox(unsafe={unsafe}, limits=Limits(seconds=60, file={MARK})).open() as session:
    print(flush=True)
    session.run("import time; time.sleep(99)", "")
"""
    env = dict(os.environ, PYTHONPATH=".")
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=env) as evaluator:
        evaluator.stdout.readline()
        until = time.monotonic() + 10
        while len(running()) < 2 and time.monotonic() < until:
            time.sleep(0.02)
        assert len(running()) >= 2
        evaluator.kill()
    assert nothing_runs()


def test_unsafe_programs_have_limits_and_a_group():
    with Sandbox(unsafe=True, limits=LIMITS).open() as session:
        assert session.run("print(input())", "in").output == "in\n"
        assert session.run("x = bytearray(10 << 30)", "").why == "MemoryError"
        assert session.run("while True: pass", "").why == "time limit"
        assert session.run("import os, time\nif not os.fork(): time.sleep(99)", "").why == "left a process behind"
    assert nothing_runs()


@pytest.mark.parametrize(
    "bwrap, why",
    [(None, "bwrap is not there; install bubblewrap"), ("echo No permissions >&2; exit 1", "No permissions")],
)
def test_where_it_cannot_isolate_it_refuses(tmp_path, monkeypatch, bwrap, why):
    if bwrap:
        (tmp_path / "bwrap").write_text(f"#!/bin/sh\n{bwrap}\n")
        (tmp_path / "bwrap").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BackendError, match=f"^programs cannot be isolated here: {why}; --unsafe"):
        Sandbox()


@needs_bwrap
def test_a_sandbox_that_does_not_limit_processes_is_refused(monkeypatch):
    """Root's processes are not counted, whatever the limit says."""
    monkeypatch.setattr(module, "BECOME_NOBODY", [])
    if os.geteuid() == 0:
        with pytest.raises(BackendError, match="their number of processes is not limited"):
            Sandbox(limits=LIMITS)
    assert nothing_runs()
