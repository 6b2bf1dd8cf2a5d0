"""Runs in a process of its own: the ``answer`` of a program's file, for one request after another.

    seconds, [argument, …] → answer(argument, …)     a line of JSON each, on standard input and output

Imports nothing of skipkv. A first line says that the program is loaded; what takes too long or too much memory ends it.
"""

import json
import os
import resource
import runpy
import signal
import sys
from contextlib import suppress

NO_MEMORY = 3  # exit status


def main(program: str, size: int) -> None:
    """Answer requests until there are no more; size: bytes of address space."""
    most = resource.getrlimit(resource.RLIMIT_AS)[1]
    limit = size if most == resource.RLIM_INFINITY else min(size, most)
    with suppress(ValueError):  # macOS has no such limit
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    replies = sys.stdout.buffer
    try:
        answer = runpy.run_path(program)["answer"]
        replies.write(b"null\n")
        replies.flush()
        for line in sys.stdin.buffer:
            seconds, arguments = json.loads(line)
            signal.alarm(int(seconds) + 1)  # where nobody is left who waits for the answer
            replies.write(json.dumps(answer(*arguments)).encode() + b"\n")
            replies.flush()
            signal.alarm(0)
    except MemoryError:
        os._exit(NO_MEMORY)


if __name__ == "__main__":
    main(sys.argv[2], int(sys.argv[3]))
