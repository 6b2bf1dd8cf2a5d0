"""skipkv generate"""

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from skipkv.commands.options import METHOD_HELP, add_model, add_numbers, load_model, numbers
from skipkv.errors import ConfigError
from skipkv.load.texts import is_chat, read_prompts
from skipkv.results import Generation
from skipkv.run import Interrupt
from skipkv.steering import parse_run
from skipkv.tiny.problems import draw

HELP = "Continue prompts."
PROBLEMS = 1000  # held-out ones that can be named by number: a stream begins with its first
PYTHON = {"True": "true", "False": "false", "None": "null"}
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
NUMBERS = dict.fromkeys(("max_new_tokens", *SAMPLING), "") | {
    "rows": "sequences in flight at once", "brake": "step in after so many repeated sentences in a row",
}  # fmt: skip


def add(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument("--prompt", action="append", help="a text; may be given several times")
    parser.add_argument("--prompts", metavar="FILE", help="JSON lines: texts, or objects with a prompt or messages")
    parser.add_argument("--problem", type=int, metavar="N", help="one of the held-out problems of tiny")
    parser.add_argument("--chat", action="store_true", help="put each prompt through the checkpoint's chat template")
    parser.add_argument(
        "--template-var", action="append", default=[], metavar="NAME=JSON",
        help="a variable of the chat template, e.g. enable_thinking=false; may be given several times",
    )  # fmt: skip
    parser.add_argument("--method", default="full", help=METHOD_HELP)
    parser.add_argument("-n", type=int, default=1, help="samples of every prompt")
    parser.add_argument(
        "--stop", action="append", default=[], help="a text that ends the generation; may be given several times"
    )
    add_numbers(parser, **NUMBERS)
    parser.add_argument(
        "--sampling", choices=["checkpoint"], help="as the checkpoint recommends, in all that no option says"
    )
    parser.add_argument(
        "--memory-limit", type=int, metavar="BYTES", help="hard cap on the cache; on a GPU on all but the weights"
    )
    parser.add_argument("--trace", metavar="FILE.npz", help="record what was kept")
    parser.add_argument("--trace-scores", action="store_true", help="with every candidate's scores")


def run(args: argparse.Namespace) -> int:
    if args.trace_scores and not args.trace:
        raise ConfigError("--trace-scores needs --trace FILE.npz")
    method, steering = parse_run(args.method)
    prompts, template = _prompts(args), dict(map(_variable, args.template_var))
    model = load_model(args)
    options = numbers(args, (*NUMBERS, "n", "stop", "memory_limit", "cache", "sampling"))
    options["template"] = template
    options["trace"] = "scores" if args.trace_scores else args.trace is not None
    if len(prompts) == 1 and args.n == 1 and not args.json:
        outs = []
        with Interrupt():  # between two events, too, Ctrl-C ends the text and nothing more
            for event in model.stream(prompts, method, steering, **options):
                print(event.text, end="", flush=True)
                outs += [event.generation] if event.generation else []
        print()
    else:
        try:
            outs = model.generate(prompts, method, steering, progress=not args.quiet, **options)
        except BaseException as error:
            _print(getattr(error, "outputs", []), args.json)
            raise
        _print(outs, args.json)
    if args.trace:
        _save_traces(Path(args.trace), outs)
    if not args.json and not args.quiet:
        for out in outs:
            if out.stats:
                print(_summary(out), file=sys.stderr)
    return 130 if any(out.finish_reason == "interrupted" for out in outs) else 0


def _print(outs: Sequence[Generation], as_json: bool) -> None:
    for out in outs:
        print(json.dumps(out.as_dict()) if as_json else f"--- prompt {out.prompt}, sample {out.sample}\n{out.text}")


def _prompts(args: argparse.Namespace) -> list[Any]:
    texts: list[Any] = list(args.prompt or [])
    if args.prompts:
        texts += read_prompts(args.prompts)
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
    return [_chat(prompt) for prompt in texts] if args.chat else texts


def _chat(prompt: str | list) -> list:
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    if not is_chat(prompt):
        raise ConfigError(f"prompt is {prompt!r:.80}; allowed with --chat: a text or messages")
    return prompt


def _variable(text: str) -> tuple[str, Any]:
    """``name=value``; a value that is neither JSON nor what Python calls true, false or null is a text."""
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise ConfigError(f"template-var is {text!r:.80}; allowed: NAME=VALUE")
    with suppress(ValueError, RecursionError):
        return name, json.loads(PYTHON.get(value, value))
    return name, value


def _save_traces(path: Path, outs: Sequence[Generation]) -> None:
    for i, out in enumerate(outs):
        if out.trace is not None:
            target = path if len(outs) == 1 else path.with_stem(f"{path.stem}-{i}")
            out.trace.save(target)
            print(f"trace: {target}", file=sys.stderr)


def _summary(out: Generation) -> str:
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
