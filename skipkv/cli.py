"""The command line: skipkv demo | generate | bench | compare | view | steer | methods."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

from tqdm import tqdm

from skipkv.errors import ConfigError, Error
from skipkv.tiny.problems import draw

PROBLEMS = 100_000  # held-out ones that can be named by number


def parse_run(text: str) -> tuple[Any, Any]:
    """``"skipkv:budget=1024+steer:file.safetensors,alpha=1"`` → (Method, Steering or None)."""
    from skipkv.methods import parse_method
    from skipkv.steering import parse_steering

    method, plus, steering = text.partition("+steer:")
    return parse_method(method), parse_steering(steering) if plus else None


def _prompts(args: argparse.Namespace) -> list[Any]:
    texts: list[Any] = list(args.prompt or [])
    if args.prompts:
        from skipkv.compare import json_lines

        for number, value in json_lines(args.prompts):
            text = value.get("prompt") if isinstance(value, dict) else value if isinstance(value, str) else None
            if not isinstance(text, (str, list)):
                where = f"{args.prompts}: line {number}"
                raise ConfigError(f"{where}: expected a JSON text or an object with a prompt")
            texts.append(text)
    if args.problem is not None:
        if args.model != "tiny":
            raise ConfigError(f"problem is {args.problem}; allowed with the model tiny only, found {args.model!r}")
        if not 0 <= args.problem < PROBLEMS:
            raise ConfigError(f"problem is {args.problem}; allowed: 0 to {PROBLEMS - 1}")
        if args.chat:
            raise ConfigError(f"problem {args.problem} is in the chat template already; --chat is for other prompts")
        texts.append(draw(args.problem + 1)[-1]["prompt"])
    if not texts:
        more = ", --problem N" if args.model == "tiny" else ""
        raise ConfigError(f"no prompt; allowed: --prompt TEXT, --prompts FILE{more}")
    return [[{"role": "user", "content": text}] for text in texts] if args.chat else texts


def _generate(args: argparse.Namespace) -> int:
    from skipkv.model import load

    if args.trace_scores and not args.trace:
        raise ConfigError("--trace-scores needs --trace FILE.npz")
    method, steering = parse_run(args.method)
    prompts = _prompts(args)
    model = load(args.model, device=args.device, dtype=args.dtype, threads=args.threads, progress=not args.quiet)
    options = dict(
        max_new_tokens=args.max_new_tokens, temperature=args.temperature, top_k=args.top_k, top_p=args.top_p,
        min_p=args.min_p, n=args.n, seed=args.seed, stop=args.stop or (), rows=args.rows,
        memory_limit=args.memory_limit, cache=args.cache,
        trace=("scores" if args.trace_scores else True) if args.trace else False, brake=args.brake,
    )  # fmt: skip
    single = len(prompts) == 1 and args.n == 1
    if single and not args.json:
        done = None
        for event in model.stream(prompts, method, steering, **options):
            print(event.text, end="", flush=True)
            done = event.generation or done
        outs = [done] if done else []
        print()
    else:
        outs = model.generate(prompts, method, steering, progress=not args.quiet, **options)
        for out in outs:
            if args.json:
                shown = dataclasses.asdict(dataclasses.replace(out, trace=None))
                del shown["trace"]
                print(json.dumps(shown, ensure_ascii=False))
            else:
                print(f"--- prompt {out.prompt}, sample {out.sample}\n{out.text}")
    if args.trace and outs:
        _save_traces(args.trace, outs)
    if not args.json and not args.quiet:
        for out in outs:
            if out.stats:
                print(_summary(out), file=sys.stderr)
    return 130 if any(out.finish_reason == "interrupted" for out in outs) else 0


def _save_traces(path: str, outs: list[Any]) -> None:
    for i, out in enumerate(outs):
        if out.trace is not None:
            target = Path(path) if len(outs) == 1 else Path(path).with_stem(f"{Path(path).stem}-{i}")
            out.trace.save(target)
            print(f"trace: {target}", file=sys.stderr)


def _summary(out: Any) -> str:
    s = out.stats
    parts = [
        f"{s.prompt_tokens} + {s.new_tokens} tokens ({out.finish_reason}) in {s.seconds:.1f} s",
        f"cache {s.peak_bytes / 1e6:.2f} MB at most, full {s.full_bytes / 1e6:.2f} MB",
    ]
    if s.compactions:
        parts.append(f"{s.compactions} compactions, {s.evicted} slots dropped")
    if s.sentences:
        parts.append(f"{s.sentences} sentences, {s.flagged} repeated, {s.thoughts} re-checks")
    if s.steered:
        parts.append(f"{s.steered} tokens steered")
    return "; ".join(parts)


def _bench(args: argparse.Namespace) -> int:
    from skipkv import bench

    return bench.main(args)


def _compare(args: argparse.Namespace) -> int:
    from skipkv import compare

    return compare.main(args)


def _view(args: argparse.Namespace) -> int:
    from skipkv import viz
    from skipkv.trace import Trace

    traces = [Trace.load(path) for path in args.trace]
    if len(traces) > 2:
        raise ConfigError(f"view: {len(traces)} traces; allowed: one, or two of the same text to compare")
    chosen = {"step": args.step, "layers": _numbers("layers", args.layers), "heads": _numbers("heads", args.heads)}
    page = viz.compare(*traces, **chosen) if len(traces) == 2 else viz.kept(traces[0], **chosen)
    page.save(args.out)
    print(args.out)
    return 0


def _numbers(name: str, text: str | None) -> list[int] | None:
    try:
        return [int(part) for part in text.split(",")] if text is not None else None
    except ValueError:
        raise ConfigError(f"{name} is {text!r}; allowed: integers separated by commas") from None


def _methods(args: argparse.Namespace) -> int:
    from skipkv.methods import CLASSES, PARAMETERS, TABLE

    if args.json:
        print(json.dumps({"methods": TABLE, "parameters": PARAMETERS}))
        return 0
    for name in CLASSES:
        print(f"{name:10s} {TABLE[name]['summary']}\n{'':10s} {TABLE[name]['parameters'].replace(' ', ', ')}")
    print("\nparameters")
    for name, p in PARAMETERS.items():
        default = "required" if p["default"] is None else f"default {p['default']}"
        print(f"{name:10s} {p['summary']} ({p['low']:g} to {p['high']:g}; {default})")
    print(f"{'protect':10s} slots kept besides: none, prompt, sinks:N")
    print(f"{'evict':10s} False: score and trace, drop nothing")
    print(f"{'compat':10s} official, or single deviations of the released code")
    return 0


METHOD_HELP = (
    'what the cache keeps, e.g. "rkv:budget=1024,mix=0.07" or "skipkv:budget=512+steer:vector.safetensors,alpha=1"; '
    "skipkv methods lists them"
)


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    from skipkv import demo, workshop

    top = argparse.ArgumentParser(prog="skipkv", description="Compressed KV caches for reasoning models.")
    commands = top.add_subparsers(dest="command", required=True)

    def command(name: str, function: Any, help: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help, description=help)
        sub.set_defaults(function=function)
        return sub

    def model_options(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("model", help="a directory, a hub id, or tiny")
        sub.add_argument("--device", default="cpu")
        sub.add_argument("--dtype", default="auto", choices=["auto", "f32", "bf16"], help="of the weights")
        sub.add_argument("--cache", default="bf16", choices=["bf16", "f32"], help="type of keys and values")
        sub.add_argument("--threads", type=int)
        sub.add_argument("--json", action="store_true", help="for machines")
        sub.add_argument("--quiet", action="store_true", help="no progress, no summary")

    demo.add_command(command)

    g = command("generate", _generate, "Continue prompts.")
    model_options(g)
    g.add_argument("--prompt", action="append", help="a text; may be given several times")
    g.add_argument("--prompts", metavar="FILE", help="JSON lines: texts, or objects with a prompt")
    g.add_argument("--problem", type=int, metavar="N", help="one of the held-out problems of tiny")
    g.add_argument("--chat", action="store_true", help="put each prompt through the checkpoint's chat template")
    g.add_argument("--method", default="full", help=METHOD_HELP)
    g.add_argument("--max-new-tokens", type=int, default=4096)
    g.add_argument("--temperature", type=float, default=0.0)
    g.add_argument("--top-k", type=int, default=0)
    g.add_argument("--top-p", type=float, default=1.0)
    g.add_argument("--min-p", type=float, default=0.0)
    g.add_argument("-n", type=int, default=1, help="samples of every prompt")
    g.add_argument("--seed", type=int, default=0)
    g.add_argument("--stop", action="append", help="a text that ends the generation; may be given several times")
    g.add_argument("--rows", type=int, default=16, help="sequences in flight at once")
    g.add_argument("--memory-limit", type=int, metavar="BYTES", help="hard cap on the cache")
    g.add_argument("--brake", type=int, default=0, metavar="K", help="step in after K repeated sentences in a row")
    g.add_argument("--trace", metavar="FILE.npz", help="record what was kept")
    g.add_argument("--trace-scores", action="store_true", help="with every candidate's scores")

    b = command("bench", _bench, "Measure this machine's limits and the engine against them.")
    b.add_argument("model", nargs="?", help="a directory, a hub id, or tiny")
    shapes = "qwen2.5-0.5b, r1-distill-qwen-1.5b or smollm2-135m"
    b.add_argument("--random-weights", metavar="SHAPE", help=f"no file: {shapes}")
    b.add_argument("--dtype", default="bf16", choices=["f32", "bf16"])
    b.add_argument("--cache", default="bf16", choices=["bf16", "f32"])
    b.add_argument("--threads", type=int)
    b.add_argument("--rows", default="1,8", help="rows that decode together, comma-separated")
    b.add_argument("--contexts", default="128,1024", help="tokens already in the cache")
    b.add_argument("--prefill", type=int, default=512, help="tokens")
    b.add_argument("--steps", type=int, default=16, help="decode steps a measurement")
    b.add_argument("--repeats", type=int, default=3)
    b.add_argument("--method", default="full", help=METHOD_HELP)
    b.add_argument("--json", action="store_true")
    b.add_argument("--quiet", action="store_true")

    c = command("compare", _compare, "Replay recorded texts under several methods against the full cache; no sampling.")
    model_options(c)
    c.add_argument("texts", help="JSON lines: texts, or objects with a text, or with prompt and output")
    c.add_argument("--methods", required=True, help='separated by ";", e.g. "full;rkv:budget=256"')
    c.add_argument("--tokens", type=int, help="only the first tokens of each text")
    c.add_argument("--limit", type=int, help="only the first texts")
    c.add_argument("--bootstrap", type=int, default=2000, help="resamples for the intervals")
    c.add_argument("--seed", type=int, default=0)
    c.add_argument("--plot", metavar="FILE.png", help="needs matplotlib")

    v = command("view", _view, "Draw what a recorded run kept, as one page that works offline.")
    v.add_argument("trace", nargs="+", help="a .npz of generate --trace; two of the same text are compared")
    v.add_argument("--step", type=int, metavar="N", help="where the slider starts: after so many tokens")
    v.add_argument("--layers", help="comma-separated; all by default")
    v.add_argument("--heads", help="KV heads, comma-separated; all by default")
    v.add_argument("-o", "--out", required=True, metavar="FILE.html")

    steering = commands.add_parser("steer", help="Make, show and import steering vectors.")
    steer = steering.add_subparsers(dest="what", required=True)

    def steer_command(name: str, function: Any, help: str) -> argparse.ArgumentParser:
        sub = steer.add_parser(name, help=help, description=help)
        sub.set_defaults(function=function)
        return sub

    def steered_model(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("model", help="a directory, a hub id, or tiny")
        sub.add_argument("--threads", type=int)
        sub.add_argument("--quiet", action="store_true")

    workshop.add_commands(steer_command, steered_model)

    m = command("methods", _methods, "List the eviction methods and their parameters.")
    m.add_argument("--json", action="store_true")
    return top


def _check_outputs(args: argparse.Namespace) -> None:
    """Refuse before the work what could not be written after it."""
    for name in ("out", "trace", "plot"):
        path = getattr(args, name, None)
        if not isinstance(path, str):  # view reads its traces
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
            status = args.function(args)
        sys.stdout.flush()  # a pipe that broke is told here, not at exit
        return status
    except Error as error:
        print(f"skipkv: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if isinstance(error, BrokenPipeError):
            # The reader has gone; what Python would still flush has no one to go to.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        print(f"skipkv: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
