"""skipkv steer extract | show | import"""

import argparse
import json
import sys
from collections.abc import Callable
from itertools import islice
from typing import Any

import numpy as np

from skipkv.checks import integer
from skipkv.commands.options import add_common, add_numbers, integers, numbers
from skipkv.errors import CheckpointError, ConfigError
from skipkv.load.files import is_int, parse_object, show
from skipkv.load.texts import json_lines, prompt_of, read_texts
from skipkv.model import Model, load
from skipkv.steering import load_vectors
from skipkv.vectors import extract, import_released

HELP = "Make, show and import steering vectors."
NUMBERS = ("max_new_tokens", "temperature", "seed", "rows")
KNOWN: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "counts": ("an integer", is_int),
    "norms": ("three numbers", lambda v: isinstance(v, list) and [type(x) for x in v] == [float] * 3),
    "examples": ("a list of texts", lambda v: isinstance(v, list) and all(isinstance(x, str) for x in v)),
}
TEMPLATE = "{}\nPlease reason step by step, and put your final answer within \\boxed{{}}."


def add(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(dest="what", required=True)

    def command(name: str, action: Any, help: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help, description=help)
        sub.set_defaults(action=action)
        return sub

    e = command(
        "extract", _extract, "Make steering vectors from problems (which are run) or recorded traces (which are read)."
    )
    e.add_argument("model", help="a directory, a hub id, or tiny")
    add_common(e, json=False)
    source = e.add_mutually_exclusive_group(required=True)
    source.add_argument("--problems", metavar="FILE",
                        help="JSON lines with a prompt or messages, or a problem for the chat template")  # fmt: skip
    source.add_argument("--traces", metavar="FILE",
                        help="JSON lines: texts, or objects with a text, or with prompt and output")  # fmt: skip
    e.add_argument("--layers", default="all", help="comma-separated; all by default")
    e.add_argument("-o", "--out", required=True, metavar="FILE.safetensors")
    e.add_argument("--limit", type=int, help="only the first problems or traces")
    e.add_argument("--tokens", type=int, help="only the first tokens of each trace")
    e.add_argument("--template", default=TEMPLATE, help="{} is the problem")
    add_numbers(e, **dict.fromkeys(NUMBERS, ""))
    s = command("show", _show, "Print counts, norms, cosines and examples of a file of vectors.")
    s.add_argument("file", help="of steer extract or steer import; or tiny, the vector in the box")
    s.add_argument("--json", action="store_true")
    i = command("import", _import, "Convert a released .pt vector, without running code of it; its sign is turned.")
    i.add_argument("file")
    i.add_argument("--layer", type=int, required=True)
    i.add_argument("--keep-sign", action="store_true", help="it is execution − re-checking already")
    i.add_argument("-o", "--out", required=True, metavar="FILE.safetensors")


def run(args: argparse.Namespace) -> int:
    return args.action(args)


def _extract(args: argparse.Namespace) -> int:
    try:
        args.template.format("")
    except (ValueError, LookupError, AttributeError) as error:
        found = f"--template is {args.template!r}"
        raise ConfigError(f"{found}; allowed: text with {{}} for the problem ({error})") from None
    model = load(args.model, threads=args.threads, progress=not args.quiet)
    n = model.config.n_layers
    layers = range(n) if args.layers == "all" else integers("layers", args.layers, ", or all")
    for layer in layers:
        integer("layer", layer, 0, n - 1)
    found = extract(model, _calibration(model, args), layers, progress=not args.quiet)
    found.save(args.out, model.name)
    if not args.quiet:
        print(f"{args.out}: " + ", ".join(f"{n} {name}" for name, n in found.counts.items()), file=sys.stderr)
    return 0


def _calibration(model: Model, args: argparse.Namespace) -> list[tuple[list[int], int]]:
    if args.traces:
        found = read_texts(args.traces, model.tokenizer, model.config.context, args.tokens, args.limit)
        return list(zip(*found, strict=True))
    prompts: list[Any] = []
    if args.limit is not None:
        integer("limit", args.limit, 1, None)
    for number, value in islice(json_lines(args.problems), args.limit):
        try:
            given = prompt_of(value)
            prompts.append(given if given else [{"role": "user", "content": args.template.format(value["problem"])}])
        except (KeyError, TypeError, AttributeError):
            expected = "an object with a prompt, messages or a problem"
            raise ConfigError(f"{args.problems}: line {number}: expected {expected}") from None
    outs = model.generate(prompts, progress=not args.quiet, **numbers(args, NUMBERS))
    return [(out.prompt_tokens + out.tokens, len(out.prompt_tokens)) for out in outs]


def _show(args: argparse.Namespace) -> int:
    vectors, metadata = load_vectors(args.file)
    layers = sorted(vectors)
    norms = {layer: float(np.linalg.norm(vectors[layer])) for layer in layers}
    unit = {layer: vectors[layer] / max(norms[layer], 1e-30) for layer in layers}
    cosines = [[float(unit[a] @ unit[b]) for b in layers] for a in layers]
    known = _known(args.file, metadata)
    if args.json:
        found = {"layers": layers, "hidden": len(vectors[layers[0]]), "vector_norms": norms, "cosines": cosines}
        print(json.dumps(found | metadata | known))
        return 0
    origin = metadata.get("model", metadata.get("source", "of unknown origin"))
    print(f"{args.file}: {origin}, hidden {len(vectors[layers[0]])}")
    if "counts" in known:
        print("steps: " + ", ".join(f"{n} {name}" for name, n in known["counts"].items()))
    for layer in layers:
        means = known.get("norms", {}).get(str(layer))
        more = f", mean states {means[1]:.3g} (execution) and {means[2]:.3g} (re-checking)" if means else ""
        print(f"layer {layer}: norm {norms[layer]:.4g}{more}")
    if len(layers) > 1:
        print("cosine between layers\n" + " " * 6 + "".join(f"{layer:7d}" for layer in layers))
        for layer, row in zip(layers, cosines, strict=True):
            print(f"{layer:6d}" + "".join(f"{c:7.2f}" for c in row))
    for name, texts in known.get("examples", {}).items():
        for text in texts:
            print(f"{name}: {' '.join(text.split())}")
    return 0


def _known(path: str, metadata: dict[str, str]) -> dict[str, dict[str, Any]]:
    """What `Extraction.save` tells of vectors."""
    known = {key: parse_object(metadata[key], f"{path}: {key}") for key in KNOWN if key in metadata}
    for key, values in known.items():
        expected, fits = KNOWN[key]
        for name, value in values.items():
            if not fits(value):
                raise CheckpointError(f"{path}: {key}: {show(name)}: expected {expected}, found {show(value)}")
    return known


def _import(args: argparse.Namespace) -> int:
    vector = import_released(args.file, args.layer, args.out, negate=not args.keep_sign)
    print(f"{args.out}: layer {args.layer}, hidden {len(vector)}, norm {np.linalg.norm(vector):.4g}", file=sys.stderr)
    return 0
