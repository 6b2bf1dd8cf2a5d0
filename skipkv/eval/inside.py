"""What runs inside of a sandbox, given to ``python -c`` as text: the standard library, and nothing of the package.

    evaluator ── JSON lines ── this process ── fork, once a test ── the program under test
                               check(candidate) ── calls, results ──┘

The program never shares a process with a verdict. It is forked before the text of a check comes in, it has neither end
of the channel to the evaluator, and this process cannot be traced: what the program may do is fail. What it returns is
unpickled as data only. Tests of stdin and stdout, and of values, are compared by the evaluator.
"""

import atexit
import collections
import contextlib
import copyreg
import ctypes
import json
import os
import pickle
import resource
import signal
import sys
import threading
import time
import types

NOTE = 300  # bytes of why a program failed
FILES = 64
PDEATHSIG, DUMPABLE = 1, 4  # of prctl
prctl = ctypes.CDLL(None).prctl


class TimeLimit(BaseException):
    pass


class Data(pickle.Unpickler):
    """Reads values, and calls nothing but types in C, which no pickle can change: so nothing compares as it likes."""

    TYPES = {"builtins": "bool complex dict float int iter list set str tuple"}
    TYPES |= {"collections": "OrderedDict defaultdict deque", "decimal": "Decimal"}

    def find_class(self, module, name):
        if name not in self.TYPES.get(module, "").split():
            raise TypeError(f"the result holds a {module}.{name}")
        return super().find_class(module, name)


def describe(error):
    return f"{type(error).__name__}: {error}".removesuffix(": ")[:NOTE]


def memory_file(data=b""):
    descriptor = os.memfd_create("")
    with open(descriptor, "wb", closefd=False) as file:
        file.write(data)
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor


class Program:
    """The program under test, in a process of its own; ``entry`` names the function that is called there."""

    def __init__(self, text, stdin, entry, seconds, alone):
        self.seconds, self.alone, self.ended = seconds, alone, False
        self.files = [memory_file(stdin.encode(errors="replace")), memory_file(), memory_file()]  # in, out, its error
        (calls, ours), (theirs, results) = os.pipe(), os.pipe()
        self.calls, self.results = open(ours, "wb"), open(theirs, "rb")
        self.pid = os.fork()
        if not self.pid:
            with contextlib.suppress(BaseException):
                self.begin(calls, results)
                self.run(text, entry, calls, results)
            os._exit(1)
        os.close(calls)
        os.close(results)

    def begin(self, calls, results):
        os.setpgid(0, 0)
        prctl(PDEATHSIG, signal.SIGKILL)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CPU, (self.seconds, self.seconds + 1))
        os.dup2(self.files[0], 0)
        os.dup2(self.files[1], 1)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        for other in set(range(3, FILES)) - {self.files[2], calls, results}:
            with contextlib.suppress(OSError):
                os.close(other)

    def run(self, text, entry, calls, results):
        """The program as ``__main__``, or as a module with a function; and what an interpreter does at its end."""
        name = "solution" if entry else "__main__"
        module = sys.modules[name] = types.ModuleType(name)
        stdout, status = sys.stdout, 0

        def program():
            exec(compile(text, "program.py", "exec"), vars(module))
            if entry:
                serve(vars(module), entry, open(calls, "rb"), open(results, "wb"))

        def flush():
            for stream in {sys.stdout, stdout}:
                if not stream.closed:
                    stream.flush()

        for step in program, threading._shutdown, atexit._run_exitfuncs, flush:
            try:
                step()
            except SystemExit:  # whatever its status: what was printed counts
                pass
            except BaseException as error:
                status = 1
                os.write(self.files[2], describe(error).encode(errors="replace"))
        os._exit(status)

    def call(self, *args, **kwargs):
        """The function's result there; EOFError or BrokenPipeError if it comes to none."""
        pickle.dump((args, kwargs), self.calls)
        self.calls.flush()
        return Data(self.results).load()

    def wait(self):
        """Why it failed, or ""; what it left behind is ended, and a failure."""
        _, status, usage = os.wait4(self.pid, 0)
        self.ended = True
        left = self.end_others()
        if usage.ru_utime + usage.ru_stime >= self.seconds or os.WTERMSIG(status) == signal.SIGXCPU:
            return "time limit"
        if os.WIFSIGNALED(status):
            return f"ended by signal {os.WTERMSIG(status)}"
        note = os.pread(self.files[2], NOTE, 0).decode(errors="replace")
        return (note or f"exit status {os.WEXITSTATUS(status)}") if status else "left a process behind" * left

    def end_others(self):
        """End what it left behind; whether there was anything that did not end by itself."""
        for attempt in range(1000):
            with contextlib.suppress(ChildProcessError):  # orphans come to process 1, which this may be
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass
            try:
                os.kill(-1 if self.alone else -self.pid, signal.SIGKILL if attempt >= 50 else 0)
            except ProcessLookupError:
                break
            time.sleep(0.001)
        return attempt > 50

    def output(self):
        with open(self.files[1], "rb", closefd=False) as file:
            file.seek(0)
            return file.read().decode(errors="replace")

    def close(self):
        if not self.ended:
            os.kill(self.pid, signal.SIGKILL)
            self.wait()
        for file in self.calls, self.results, *map(open, self.files):
            with contextlib.suppress(OSError):  # a call that never went out
                file.close()


def serve(space, entry, calls, results):
    """Call the function as often as is asked."""
    solution = space.get("Solution")
    function = getattr(solution(), entry) if hasattr(solution, entry) else space[entry]
    copyreg.pickle(collections.Counter, lambda counts: (dict, (dict(counts),)))
    while calls.peek(1):
        args, kwargs = pickle.load(calls)
        result = function(*args, **kwargs)
        if hasattr(result, "__next__"):
            result = iter(list(result))
        elif hasattr(result, "item"):  # a number of NumPy's
            result = result.item()
        pickle.dump(result, results)
        results.flush()


def result(program, request):
    """What the program printed or returned, or why it failed."""
    output = None
    try:
        if "args" in request:
            output = program.call(*request["args"])
        elif "check" in request:
            space = {}
            exec(request["problem"], space)  # the check may use its helpers
            space[request["entry"]] = program.call
            exec(request["check"], space)
            space["check"](program.call)
        program.calls.close()
    except (EOFError, BrokenPipeError):
        return {"why": program.wait() or "ended before it returned"}
    if why := program.wait():
        return {"why": why}
    return {"output": program.output() if "stdin" in request else output}


def confine(memory, processes, file):
    """Limits for this process and all that come of it. Where memory gets scarce, they are the first to be ended."""
    prctl(PDEATHSIG, signal.SIGKILL)
    with open("/proc/self/oom_score_adj", "w") as adjustment:
        adjustment.write("1000")
    prctl(DUMPABLE, 0)
    limits = {"AS": memory, "FSIZE": file, "NOFILE": FILES, "CORE": 0} | ({"NPROC": processes} if processes else {})
    for name, most in limits.items():
        which = getattr(resource, f"RLIMIT_{name}")  # infinity is -1 there
        most = min(most % 2**64, resource.getrlimit(which)[1] % 2**64)
        resource.setrlimit(which, (most, most))


def main():
    sys.path[:] = filter(None, sys.path)  # never a module that a program wrote
    requests, replies = open(os.dup(0)), open(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_RDWR), 0)
    os.dup2(0, 1)

    def ask(line="{}"):
        replies.write(line + "\n")
        replies.flush()
        return json.loads(requests.readline() or "null")

    def ring(*_):
        raise TimeLimit

    signal.signal(signal.SIGALRM, ring)
    settings = json.loads(requests.readline())
    seconds = settings.pop("seconds")
    alone = settings["processes"] > 0 and os.getpid() < 3  # whatever was called bubblewrap out there
    confine(**settings)
    request = ask()
    while request:
        program, reply = None, json.dumps({"why": "time limit"})
        try:
            program = Program(request["program"], request.get("stdin", ""), request.get("entry"), seconds, alone)
            if "stdin" not in request:
                request = ask()
            signal.setitimer(signal.ITIMER_REAL, 2 * seconds)
            reply = json.dumps(result(program, request))
            signal.setitimer(signal.ITIMER_REAL, 0)
        except TimeLimit:
            pass
        except Exception as error:
            reply = json.dumps({"why": describe(error)})
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        if program:
            program.close()
        request = ask(reply)


if __name__ == "__main__":
    main()
