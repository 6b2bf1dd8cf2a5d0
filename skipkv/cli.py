"""The command line: skipkv demo | generate | eval | bench | compare | view | steer | methods | devices."""

import argparse
import os
import signal
import sys
import threading
import warnings
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from skipkv.commands import bench, compare, demo, devices, eval, generate, methods, steer, view
from skipkv.errors import ConfigError, Error

COMMANDS = {"demo": demo, "generate": generate, "eval": eval, "bench": bench, "compare": compare, "view": view,
            "steer": steer, "methods": methods, "devices": devices}  # fmt: skip


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    top = argparse.ArgumentParser(prog="skipkv", description="Compressed KV caches for reasoning models.")
    commands = top.add_subparsers(dest="command", required=True)
    for name, command in COMMANDS.items():
        command.add(commands.add_parser(name, help=command.HELP, description=command.HELP))
    return top


def _check_outputs(args: argparse.Namespace) -> None:
    """Refuse before the work what could not be written after it."""
    if sys.stdout is None:
        raise ConfigError("standard output is closed; allowed: a terminal, a file, a pipe")
    for name in ("out", "trace", "plot"):
        path = getattr(args, name, None)
        if path is None:
            continue
        folder = Path(os.path.realpath(path) if os.path.islink(path) else path).parent  # where it is written first
        if not folder.is_dir():
            raise ConfigError(f"{name} is {path!r}; there is no directory {str(folder)!r}")
        if Path(path).is_dir():
            raise ConfigError(f"{name} is {path!r}, a directory; allowed: a file")
        there = Path(path).exists()
        places = [path] * there + [folder] * (not there or Path(path).is_file())
        if not all(os.access(place, os.W_OK) for place in places):
            raise ConfigError(f"{name} is {path!r}, which may not be written")


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status: 0 done, 2 refused, 130 interrupted."""
    hook, timers = sys.unraisablehook, []

    def drop(dropped: Any) -> None:  # a Ctrl-C within a destructor would be told with a traceback, and the work go on
        if issubclass(dropped.exc_type, KeyboardInterrupt):
            timers.append(threading.Timer(0.01, signal.raise_signal, [signal.SIGINT]))
            timers[-1].start()
        else:
            hook(dropped)

    sys.unraisablehook = drop
    try:
        return _main(argv)
    except KeyboardInterrupt:
        return 130
    finally:
        sys.unraisablehook = hook
        for timer in timers:
            timer.cancel()


def _main(argv: list[str] | None) -> int:
    args = parser().parse_args(argv)
    args.argv = sys.argv[1:] if argv is None else argv
    quiet = getattr(args, "quiet", False)
    sys.stderr = _Messages(sys.stderr or open(os.devnull, "w"))  # without one, print would take standard output instead
    if hasattr(sys.stdout, "reconfigure"):  # what it cannot encode is escaped rather than lost
        sys.stdout.reconfigure(errors="backslashreplace")
    status, failed = 2, None
    try:
        _check_outputs(args)
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_: None if quiet else tqdm.write(f"skipkv: {message}", sys.stderr)
            status = COMMANDS[args.command].run(args)
    except (Error, OSError, MemoryError) as error:
        failed = error
    except KeyboardInterrupt:
        status = 130
    lost = _flush()
    if isinstance(failed, OSError) and failed.filename is None:  # files are named
        lost = failed
    if isinstance(lost, BrokenPipeError):  # the reader has seen what it wanted
        return 0
    if lost and not isinstance(failed, Error):
        status, failed = 2, f"standard output: {lost.strerror}"
    if failed:
        print(f"skipkv: {str(failed) or 'out of memory'}", file=sys.stderr)
    return status


def _flush() -> OSError | None:
    """Write what is still to be printed, here rather than at the interpreter's exit, or say why it is lost."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError as error:
        _discard(sys.stdout)
        return error
    return None


def _discard(file: TextIO) -> None:
    """From now on nobody reads what is written to it."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), file.fileno())


class _Messages:
    """Standard error; where it is full or its terminal has gone, only what it is told is lost and not the work."""

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def write(self, text: str) -> None:
        try:
            self._file.write(text)
            self._file.flush()
        except OSError:
            _discard(self._file)
