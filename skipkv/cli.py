"""The command line: skipkv demo | generate | bench | compare | view | steer | methods."""

import argparse
import os
import sys
import warnings
from pathlib import Path

from tqdm import tqdm

from skipkv.commands import bench, compare, demo, generate, methods, steer, view
from skipkv.errors import ConfigError, Error

COMMANDS = {"demo": demo, "generate": generate, "bench": bench, "compare": compare, "view": view, "steer": steer,
            "methods": methods}  # fmt: skip


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    top = argparse.ArgumentParser(prog="skipkv", description="Compressed KV caches for reasoning models.")
    commands = top.add_subparsers(dest="command", required=True)
    for name, command in COMMANDS.items():
        command.add(commands.add_parser(name, help=command.HELP, description=command.HELP))
    return top


def _check_outputs(args: argparse.Namespace) -> None:
    """Refuse before the work what could not be written after it."""
    for name in ("out", "trace", "plot"):
        path = getattr(args, name, None)
        if path is None:
            continue
        folder = Path(path).parent
        if not folder.is_dir():
            raise ConfigError(f"{name} is {path!r}; there is no directory {str(folder)!r}")
        if Path(path).is_dir():
            raise ConfigError(f"{name} is {path!r}, a directory; allowed: a file")
        if not os.access(path if Path(path).exists() else folder, os.W_OK):
            raise ConfigError(f"{name} is {path!r}, which may not be written")


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status: 0 done, 2 refused, 130 interrupted."""
    args = parser().parse_args(argv)
    quiet = getattr(args, "quiet", False)
    try:
        _check_outputs(args)
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_: None if quiet else tqdm.write(f"skipkv: {message}", sys.stderr)
            status = COMMANDS[args.command].run(args)
        sys.stdout.flush()  # a pipe that broke is told here, not at exit
        return status
    except BrokenPipeError:
        # The reader has gone; what Python would still flush has no one to go to.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (Error, OSError) as error:
        print(f"skipkv: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
