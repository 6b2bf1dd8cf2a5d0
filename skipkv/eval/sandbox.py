"""Programs that nobody has read, run where they can harm nothing: under bubblewrap, or not at all.

A sandbox has namespaces of its own (network, processes, ipc, user, host name, cgroup), a file system that is read-only
and holds the system's libraries and this interpreter, a small /tmp in memory, and limits of CPU time, memory,
processes, files and wall clock. All in it ends with it. `inside.py` runs the programs there, and says how.

Limits hold for each process, but for ``processes`` and the wall clock. Where a program wants more memory than the
machine has, spread over its processes, the kernel ends those first.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from skipkv.errors import BackendError

INSIDE = Path(__file__).with_name("inside.py")
START = 60  # seconds until it has to be there
GRACE = 10  # seconds that a busy machine may add to a test's
NOBODY = "65534"
# The kernel does not count root's processes. Bubblewrap's own stays root's: only so may it end this one when it ends.
BECOME_NOBODY = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "unshare", "--user"]
PROBE = """
import os, signal
children = []
try:
    for _ in range({}):
        children.append(os.fork())
        if not children[-1]:
            signal.pause()
except OSError:
    print(input())
for child in children:
    os.kill(child, signal.SIGKILL)
    os.wait()
"""


@dataclass(frozen=True)
class Limits:
    """What each test of a program may use.

    Attributes
    ----------
    seconds : int
        Of CPU time, as other programs run beside it; twice as many of wall clock.
    memory : int
        Bytes of address space.
    processes : int
        Threads count.
    file : int
        Bytes of each file, and of the output.
    """

    seconds: int = 6
    memory: int = 4 << 30
    processes: int = 32
    file: int = 32 << 20


@dataclass(frozen=True)
class Result:
    """What a program printed or returned, or why it failed."""

    output: Any = None
    why: str = ""


class Sandbox:
    """Where programs run.

    Parameters
    ----------
    unsafe : bool
        Without isolation: limits alone, and a process group of its own.
    limits : Limits

    Raises
    ------
    BackendError
        Programs cannot be isolated here.
    """

    def __init__(self, unsafe: bool = False, limits: Limits = Limits()) -> None:  # noqa: B008
        self.unsafe, self.limits = unsafe, limits
        self._running: set[subprocess.Popen[bytes]] = set()
        if unsafe:
            return
        with self.open() as session:
            found = session.run(PROBE.format(limits.processes + 1), "isolated")
        if found.output != "isolated\n":
            raise self._refused(found.why or "their number of processes is not limited")

    @contextmanager
    def open(self) -> Iterator[Session]:
        """A sandbox of its own for the tests of one program."""
        folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True) if self.unsafe else nullcontext("/tmp")
        with folder as home:
            env = {"PATH": "/usr/bin:/bin", "HOME": home, "TMPDIR": home, "LANG": "C.UTF-8"}
            env |= {"PYTHONHASHSEED": "0", "OPENBLAS_NUM_THREADS": "1"}  # grades are repeatable; few processes
            command = [] if self.unsafe else self._isolated()
            command += [sys.executable, "-s", "-c", INSIDE.read_text("utf-8")]
            pipes = {name: subprocess.PIPE for name in ("stdin", "stdout", "stderr")}
            try:
                process = subprocess.Popen(command, cwd=home, env=env, start_new_session=True, **pipes)
            except OSError as error:
                raise self._refused(str(error)) from None
            session = Session(process, self.limits)
            self._running.add(process)
            try:
                settings = asdict(self.limits) | ({"processes": 0} if self.unsafe else {})
                if session.ask(settings, START).why:
                    process.kill()
                    raise self._refused(process.communicate()[1].decode(errors="replace").strip()[-300:])
                yield session
            finally:
                self._running.discard(process)
                process.kill()
                with suppress(OSError, ValueError):  # what never went in
                    process.communicate()

    def kill(self) -> None:
        """End every program that runs now; its test fails."""
        for process in list(self._running):
            process.kill()

    def _refused(self, why: str) -> BackendError:
        if self.unsafe:
            return BackendError(f"programs cannot be run here: {why}")
        return BackendError(f"programs cannot be isolated here: {why}; --unsafe (unsafe=True) runs them without")

    def _isolated(self) -> list[str]:
        bwrap = shutil.which("bwrap")
        if not bwrap:
            raise self._refused("bwrap is not there; install bubblewrap")
        binds = ["/usr", "/lib", "/lib32", "/lib64", "/bin", "/etc/ld.so.cache", sys.base_prefix, sys.prefix]
        command = [bwrap, "--die-with-parent", "--new-session", "--cap-drop", "ALL"]
        command += [f"--unshare-{name}" for name in ("ipc", "pid", "net", "uts", "cgroup-try")]
        if os.geteuid():
            command += ["--as-pid-1", "--unshare-user", "--uid", NOBODY, "--gid", NOBODY]  # no process to talk for us
        else:
            command += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
        command += ["--size", str(4 * self.limits.file), "--perms", "1777", "--tmpfs", "/tmp"]
        for path in binds:  # a folder on the way to it is as private as it is out here, if it is not made before
            command += ["--perms", "0755", "--dir", str(Path(path).parent), "--ro-bind-try", path, path]
        command += ["--proc", "/proc", "--dev", "/dev", "--remount-ro", "/dev", "--remount-ro", "/", "--chdir", "/tmp"]
        return command if os.geteuid() else command + BECOME_NOBODY


class Session:
    """An open sandbox; a test that fails leaves it usable, or every later one fails."""

    def __init__(self, process: subprocess.Popen[bytes], limits: Limits) -> None:
        self._process, self._limits = process, limits

    def run(self, program: str, stdin: str) -> Result:
        """What the program prints."""
        return self.ask({"program": program, "stdin": stdin})

    def call(self, program: str, entry: str, args: list[Any]) -> Result:
        """What its function (or its class Solution's) returns, as JSON has it."""
        return self._ask_twice(program, {"entry": entry, "args": args})

    def check(self, program: str, entry: str, problem: str, check: str) -> Result:
        """Whether ``check(function)`` returns. The program is there, and cannot see it, before the check's text is."""
        return self._ask_twice(program, {"entry": entry, "problem": problem, "check": check})

    def _ask_twice(self, program: str, test: dict[str, Any]) -> Result:
        started = self.ask({"program": program, "entry": test["entry"]})
        return started if started.why else self.ask(test)

    def ask(self, request: dict[str, Any], seconds: float | None = None) -> Result:
        """One line there, one line back."""
        pipes = self._process.stdin, self._process.stdout
        assert pipes[0] and pipes[1]
        watch = threading.Timer(seconds or 2 * self._limits.seconds + GRACE, self._process.kill)
        watch.start()
        try:
            pipes[0].write(json.dumps(request).encode() + b"\n")
            pipes[0].flush()
            return Result(**json.loads(pipes[1].readline(8 * self._limits.file)))
        except (OSError, ValueError, RecursionError, MemoryError):
            return Result(why="the sandbox ended")
        finally:
            watch.cancel()
