"""What several commands take."""

import argparse
from collections.abc import Iterable
from dataclasses import fields
from typing import Any

from skipkv.checks import CONSTANTS
from skipkv.errors import ConfigError
from skipkv.model import Model, load
from skipkv.run import Options

METHOD_HELP = (
    'what the cache keeps, e.g. "rkv:budget=1024,mix=0.07" or "skipkv:budget=512+steer:vector.safetensors,alpha=1"; '
    "skipkv methods lists them"
)


def add_common(parser: argparse.ArgumentParser, *, json: bool = True) -> None:
    """Threads and how to report."""
    parser.add_argument("--threads", type=int)
    if json:
        parser.add_argument("--json", action="store_true", help="for machines")
    parser.add_argument("--quiet", action="store_true", help="no progress, no summary")


def add_device(parser: argparse.ArgumentParser) -> None:
    """Where it computes."""
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N; skipkv devices lists them")


def add_types(parser: argparse.ArgumentParser, dtypes: list[str], dtype: str) -> None:
    """Types of weights and cache."""
    parser.add_argument("--dtype", default=dtype, choices=dtypes, help="of the weights")
    parser.add_argument("--cache", default="bf16", choices=CONSTANTS["cache_dtypes"], help="type of keys and values")


def add_model(parser: argparse.ArgumentParser) -> None:
    """The model, where it computes and in what types."""
    parser.add_argument("model", help="a directory, a hub id, or tiny")
    add_device(parser)
    add_types(parser, ["auto", *CONSTANTS["weight_dtypes"]], "auto")
    add_common(parser)


def add_numbers(parser: argparse.ArgumentParser, **helps: str) -> None:
    """Fields of `Options` that are numbers, under their names; helps may be empty. See `numbers`."""
    for field in fields(Options):
        if field.name in helps:
            option = "--" + field.name.replace("_", "-")
            kind, text = type(field.default), helps[field.name] or None
            parser.add_argument(option, type=kind, default=argparse.SUPPRESS, help=text)


def numbers(args: argparse.Namespace, names: Iterable[str]) -> dict[str, Any]:
    """Those of the options that were given: what a checkpoint recommends yields to them alone."""
    return {name: getattr(args, name) for name in names if name in args}


def load_model(args: argparse.Namespace, dtype: str | None = None) -> Model:
    """In the type that was asked for, or in this one."""
    return load(args.model, args.device, dtype or args.dtype, args.threads, progress=not args.quiet)


def integers(name: str, text: str, more: str = "") -> list[int]:
    """``"1,2"`` → [1, 2]."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"{name} is {text!r}; allowed: integers separated by commas{more}") from None
