"""Programs that may hang or take all memory: each in a process of its own, with limits, that any thread may ask.

    arguments → Process.ask → a running `skipkv.load.serve` → the program's ``answer``
"""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from contextlib import ExitStack, suppress

from skipkv.errors import BackendError
from skipkv.load import serve

# The process sees the modules that are seen here, whatever brought them; its own start looks at no environment.
START = "import sys, json, runpy; sys.path[:] = json.loads(sys.argv[4]); runpy.run_path(sys.argv[1], None, '__main__')"
START_SECONDS = 60
ENVIRONMENT = ("TZ", "LD_LIBRARY_PATH")  # no secrets, and no sanitizer, which takes more address space than any limit
ENDS = {serve.NO_MEMORY: "needs more memory", -signal.SIGALRM: "needs more time"}  # by exit status


class Process:
    """A program's process, started with the first request; threads take turns, the child of a fork starts another.

    Parameters
    ----------
    need : str
        Who needs it, for the error where it cannot be started: "chat templates need".
    program : str
        Path of a file with ``answer``, which takes JSON values and gives a list of them.
    size : int
        Bytes of address space that it may take.

    Attributes
    ----------
    took : float
        Seconds that the last answer took, the process's start aside.
    """

    def __init__(self, need: str, program: str, size: int) -> None:
        self._start = need, program, size
        self._lock, self._owner = threading.Lock(), os.getpid()
        self._worker: _Worker | None = None
        self.took = 0.0

    def ask(self, arguments: list, seconds: float) -> list | str:
        """What the program answers, or how it ended instead: "needs more time".

        Raises
        ------
        BackendError
            No process can be started.
        """
        if self._owner != os.getpid():  # the process is the parent's, and a thread that is not here may hold the lock
            Process.__init__(self, *self._start)
        request = json.dumps([seconds, arguments]).encode() + b"\n"
        with self._lock:
            again = self._worker is not None and self._worker.end.alive
            answer = self._ask(request, seconds)
            if again and isinstance(answer, int) and answer not in ENDS:
                answer = self._ask(request, seconds)  # it may have been killed from outside meanwhile
        return ENDS.get(answer, f"ends its process with status {answer}") if isinstance(answer, int) else answer

    def _ask(self, request: bytes, seconds: float) -> list | int:
        if self._worker is None or not self._worker.end.alive:
            self._worker = _Worker(*self._start)
            ended = self._worker.ask(b"", START_SECONDS)
            if ended is not None:
                return ended
        begun = time.monotonic()
        answer = self._worker.ask(request, seconds)
        self.took = time.monotonic() - begun
        return answer


class _Worker:
    """A running process; ``end`` ends it, at the latest with this object or with Python."""

    def __init__(self, need: str, program: str, size: int) -> None:
        path = json.dumps([*map(str, sys.path)])
        command = [sys.executable, "-IS", "-c", START, serve.__file__, program, str(size), path]
        environ = {key: os.environ[key] for key in ENVIRONMENT if key in os.environ}
        try:
            self._channel, theirs = socket.socketpair()
            with theirs, ExitStack() as failing:
                failing.enter_context(self._channel)
                self._process = subprocess.Popen(
                    command, stdin=theirs, stdout=theirs, stderr=subprocess.DEVNULL, env=environ,
                    start_new_session=True,  # a terminal's Ctrl-C is for this process alone
                )  # fmt: skip
                failing.pop_all()
        except OSError as error:
            raise BackendError(f"{need} a process of {sys.executable!r}: {error.strerror}") from None
        self.end = weakref.finalize(self, _end, self._process, self._channel, os.getpid())

    def ask(self, request: bytes, seconds: float) -> list | int | None:
        """The value of the next line, or the status of the process if it ended instead."""
        deadline, reply = time.monotonic() + seconds, bytearray()
        try:
            self._channel.settimeout(seconds)
            self._channel.sendall(request)
            while not reply.endswith(b"\n"):
                self._channel.settimeout(max(deadline - time.monotonic(), 1e-3))
                part = self._channel.recv(1 << 16)
                if not part:
                    raise ConnectionError
                reply += part
            return json.loads(reply)
        except TimeoutError:
            self.end()
            return -signal.SIGALRM
        except ConnectionError:
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(1)
            self.end()
            return self._process.returncode
        except BaseException:  # Ctrl-C
            self.end()
            raise


def _end(process: subprocess.Popen, channel: socket.socket, owner: int) -> None:
    channel.close()
    if owner == os.getpid():
        process.kill()
        process.wait()
