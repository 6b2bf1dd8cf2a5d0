"""Ours beside llama.cpp and transformers on the CPU, with the same random weights, in one interleaved run.

    python -m tests.bench.peers [--shape qwen2.5-0.5b] [--context 1024] [--rounds 5] [--threads N] [--out FILE.md]

What is to be compared is installed into an environment of its own, beside what skipkv needs; what is not there is named
and left out:

    python -m venv peers && peers/bin/pip install numpy tokenizers jinja2 tqdm torch transformers gguf
    CMAKE_ARGS=-DLLAVA_BUILD=OFF peers/bin/pip install --no-binary llama-cpp-python llama-cpp-python

Prints, as Markdown, each engine's median time of a step of one row behind 128 tokens, of one of 16 rows behind
--context, and of a prompt of 512; and how many times as fast ours is in the same type: the ratio of the medians, and
the least and the largest ratio of a round.

What makes it fair:

* Each engine lives in a process of its own, with the same number of threads, and takes its turn in every round: one
  untimed step, then `--steps` timed ones (one untimed and one timed prompt); the order rotates from round to round. Who
  is not at work waits on a pipe. In one process that would not do: the threads of each OpenMP library spin for some
  milliseconds after their last loop, on the processors that the other one is just using. Between two turns there is a
  pause in which they go to sleep. The waiting policy is left as the environment has it (OMP_WAIT_POLICY).
* The weights are the same numbers, rounded to bfloat16, or to 8 bits by each engine's own rule. The others round what
  bf16 weights meet to bfloat16, too, as our bf16a16 does and our bf16 does not. Each engine has its own
  default cache: bf16 (ours, transformers), f16 (llama.cpp); rows are copies of one, and all caches grow alike.
* Tokens are made beforehand; only the forward is timed. Of a prompt only the last position's logits are computed, and
  none samples.
* transformers runs under inference_mode with sdpa and a DynamicCache; llama.cpp through `llama_decode`, a batch of one
  token for each sequence, with its default attention.

Speeds mean something on an otherwise idle machine only.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from skipkv.engine import cpu_count
from skipkv.eval import speed
from skipkv.load.config import ModelConfig
from skipkv.methods import Full
from tests.bench.shapes import SHAPES, transformers_config

PAUSE = 0.05  # seconds; far above the milliseconds for which an OpenMP thread spins by default
PROMPT = 512
# Whom each is held against: how many times as fast that one is.
ENGINES = {"ours q8": ["ours bf16"], "ours bf16": ["ours q8"], "ours bf16a16": ["ours bf16"],
           "llama.cpp Q8_0": ["ours q8"], "llama.cpp bf16": ["ours bf16", "ours bf16a16"],
           "transformers bf16": ["ours bf16", "ours bf16a16"]}  # fmt: skip
NAMES = {  # of llama.cpp's tensors
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
Measurement = tuple[str, int, int]  # kind, rows, tokens of context or prompt


def measurements(context: int) -> dict[str, Measurement]:
    return {"decode, 1 row, context 128": ("decode", 1, 128),
            f"decode, 16 rows, context {context}": ("decode", 16, context),
            f"prefill of {PROMPT}": ("prefill", 1, PROMPT)}  # fmt: skip


def gguf_name(name: str) -> str:
    """llama.cpp's name of a checkpoint's tensor."""
    stem, _, kind = name.rpartition(".")
    if not stem.startswith("model.layers."):
        return f"{NAMES[stem]}.{kind}"
    number, _, part = stem.removeprefix("model.layers.").partition(".")
    return f"blk.{number}.{NAMES[part]}.{kind}"


def interleaved(values: np.ndarray, n_heads: int) -> np.ndarray:
    """Outputs of a Llama's q or k in llama.cpp's order: the two that turn together lie side by side."""
    pairs = values.reshape(n_heads, 2, -1, *values.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(values.shape)


def write_gguf(path: Path, config: ModelConfig, tensors: Iterable[tuple[str, np.ndarray]], kind: str) -> None:
    """A file without a vocabulary's texts, whose matrices are of the kind "BF16" or "Q8_0"."""
    import gguf

    out = gguf.GGUFWriter(path, config.family)
    out.add_context_length(config.context)
    out.add_embedding_length(config.hidden)
    out.add_block_count(config.n_layers)
    out.add_feed_forward_length(config.ffn)
    out.add_head_count(config.n_heads)
    out.add_head_count_kv(config.n_kv_heads)
    out.add_key_length(config.head_dim)
    out.add_value_length(config.head_dim)
    out.add_rope_dimension_count(config.head_dim)
    out.add_rope_freq_base(config.rope_theta)
    out.add_layer_norm_rms_eps(config.norm_eps)
    out.add_vocab_size(config.vocab)
    out.add_tokenizer_model("no_vocab")
    for name, values in tensors:
        if config.family == "llama" and name.split(".")[-2] in ("q_proj", "k_proj"):
            values = interleaved(values, config.n_heads if "q_proj" in name else config.n_kv_heads)
        dtype = gguf.GGMLQuantizationType[kind if values.ndim == 2 else "F32"]
        out.add_tensor(gguf_name(name), gguf.quants.quantize(values, dtype), raw_dtype=dtype)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


class Ours:
    def __init__(self, args: argparse.Namespace, kind: str) -> None:
        config = SHAPES[args.shape]
        self.model = speed.model_of(config, speed.random_tensors(config), kind, args.threads)
        self.args = args
        self.open: dict[str, Any] = {}

    def about(self) -> str:
        return f"skipkv, {self.model._core.variant}"

    def prepare(self, name: str, kind: str, rows: int, n: int) -> None:
        if kind == "decode":
            bench = speed._Bench(self.model, Full(), "bf16", rows, n)
            self.open[name] = bench, bench.fill(n + (self.args.steps + 1) * self.args.rounds)

    def turn(self, name: str, kind: str, rows: int, n: int) -> list[float]:
        if kind == "prefill":
            return [speed.prefill(self.model, n, "bf16", 1)["seconds"]]
        bench, open_rows = self.open[name]
        return [bench.step(open_rows) for _ in range(self.args.steps + 1)][1:]


class LlamaCpp:
    def __init__(self, args: argparse.Namespace, kind: str) -> None:
        import llama_cpp

        self.lib, self.args, self.vocab = llama_cpp, args, SHAPES[args.shape].vocab
        self.said: list[str] = []
        self.log = llama_cpp.llama_log_callback(lambda level, text, _: self.said.append(text.decode()))  # kept: called
        llama_cpp.llama_log_set(self.log, None)
        llama_cpp.llama_backend_init()
        self.model = self.checked(llama_cpp.llama_model_load_from_file(
            str(Path(args.files, kind)).encode(), llama_cpp.llama_model_default_params()
        ))  # fmt: skip
        self.contexts: dict[str, Any] = {}
        self.rng = np.random.default_rng(1)

    def checked(self, made: Any) -> Any:
        if not made:
            raise RuntimeError(f"llama.cpp: {''.join(self.said[-4:])}")
        return made

    def about(self) -> str:
        features = re.findall(r"(\w+) = 1", self.lib.llama_print_system_info().decode())
        return f"llama-cpp-python {self.lib.__version__}, {' '.join(features)}"

    def context(self, rows: int, n: int) -> Any:
        """A context of rows with room for n tokens each."""
        params = self.lib.llama_context_default_params()
        params.n_ctx, params.n_seq_max = rows * -(-n // 256) * 256, rows
        params.n_batch = params.n_ubatch = PROMPT
        params.n_threads = params.n_threads_batch = self.args.threads
        return self.checked(self.lib.llama_init_from_model(self.model, params))

    def forward(self, context: Any, tokens: np.ndarray, first: int) -> float:
        """Seconds to feed tokens [rows, n], the first of them at that position, and to have each row's last logits."""
        rows, n = tokens.shape
        batch = self.lib.llama_batch_init(tokens.size, 0, 1)
        for i, token in enumerate(tokens.flat):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = int(token), first + i % n, 1
            batch.seq_id[i][0], batch.logits[i] = i // n, i % n == n - 1
        batch.n_tokens = tokens.size
        begin = time.perf_counter()
        status = self.lib.llama_decode(context, batch)
        self.lib.llama_synchronize(context)
        seconds = time.perf_counter() - begin
        self.lib.llama_batch_free(batch)
        self.checked(status == 0)
        return seconds

    def logits(self, context: Any) -> np.ndarray:
        """Of the last token that was fed."""
        return np.ctypeslib.as_array(self.lib.llama_get_logits_ith(context, -1), (self.vocab,)).copy()

    def tokens(self, *shape: int) -> np.ndarray:
        return self.rng.integers(0, self.vocab, shape)

    def prepare(self, name: str, kind: str, rows: int, n: int) -> None:
        context = self.context(rows, n + (self.args.steps + 1) * self.args.rounds)
        memory = self.lib.llama_get_memory(context)
        for first in range(0, n if kind == "decode" else 0, PROMPT):
            self.forward(context, self.tokens(1, min(PROMPT, n - first)), first)
        for row in range(1, rows):
            self.lib.llama_memory_seq_cp(memory, 0, row, -1, -1)
        self.contexts[name] = [context, n]

    def turn(self, name: str, kind: str, rows: int, n: int) -> list[float]:
        seconds = []
        context, at = self.contexts[name]
        for step in range(2 if kind == "prefill" else self.args.steps + 1):
            if kind == "prefill":
                self.lib.llama_memory_clear(self.lib.llama_get_memory(context), False)
                seconds.append(self.forward(context, self.tokens(1, n), 0))
            else:
                seconds.append(self.forward(context, self.tokens(rows, 1), at + step))
        self.contexts[name][1] += self.args.steps + 1
        return seconds[1:]


class Transformers:
    def __init__(self, args: argparse.Namespace, kind: str) -> None:
        import torch
        import transformers

        torch.set_num_threads(args.threads)
        self.torch, self.transformers, self.args = torch, transformers, args
        config = SHAPES[args.shape]
        shape = transformers_config(config)
        made = transformers.AutoModelForCausalLM.from_config(shape, attn_implementation="sdpa")
        self.model = made.to(torch.bfloat16).eval()
        with torch.no_grad():
            own = dict(self.model.named_parameters())
            for name, values in speed.random_tensors(config):
                own[name].copy_(torch.from_numpy(values))
        torch.manual_seed(0)
        known = inspect.signature(self.model.forward).parameters
        self.cache_name = "cache" if "cache" in known else "past_key_values"  # the latter is its older name
        self.caches: dict[str, Any] = {}

    def about(self) -> str:
        return f"transformers {self.transformers.__version__}, torch {self.torch.__version__}"

    def forward(self, rows: int, n: int, cache: Any) -> float:
        tokens = self.torch.randint(0, self.model.config.vocab_size, (rows, n))
        begin = time.perf_counter()
        with self.torch.inference_mode():
            self.model(input_ids=tokens, use_cache=True, logits_to_keep=1, **{self.cache_name: cache})
        return time.perf_counter() - begin

    def prepare(self, name: str, kind: str, rows: int, n: int) -> None:
        if kind == "decode":
            cache = self.caches[name] = self.transformers.DynamicCache()
            self.forward(1, n, cache)
            with self.torch.inference_mode():
                cache.batch_repeat_interleave(rows)

    def turn(self, name: str, kind: str, rows: int, n: int) -> list[float]:
        if kind == "prefill":
            return [self.forward(1, n, self.transformers.DynamicCache()) for _ in range(2)][1:]
        return [self.forward(rows, 1, self.caches[name]) for _ in range(self.args.steps + 1)][1:]


CLASSES: dict[str, type] = {"ours": Ours, "llama.cpp": LlamaCpp, "transformers": Transformers}


def work(args: argparse.Namespace) -> None:
    """A worker: one JSON call a line, [method, arguments …], one JSON result a line; the first says who it is."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints does not get among the answers
    name, kind = args.worker.split()
    try:
        worker = CLASSES[name](args, kind)
    except ImportError as error:
        print(json.dumps({"missing": str(error)}), file=answers)
        return
    print(json.dumps({"about": worker.about()}), file=answers, flush=True)
    for line in sys.stdin:
        method, *arguments = json.loads(line)
        print(json.dumps(getattr(worker, method)(*arguments)), file=answers, flush=True)


class Worker:
    def __init__(self, engine: str, args: argparse.Namespace) -> None:
        command = [sys.executable, "-m", "tests.bench.peers", "--worker", engine]
        for option in ("shape", "threads", "rounds", "steps", "files"):
            command += [f"--{option}", str(getattr(args, option))]
        self.engine = engine
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.about = self.answer()

    def answer(self) -> Any:
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"the worker {self.engine!r} ended with exit status {self.process.wait()}")
        return json.loads(line)

    def __call__(self, *call: Any) -> Any:
        time.sleep(PAUSE)
        print(json.dumps(call), file=self.process.stdin, flush=True)
        return self.answer()

    def end(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def measure(args: argparse.Namespace) -> tuple[dict[str, str], dict[str, dict[str, list[list[float]]]]]:
    """Who each engine is, or what it lacks; and seconds [round][step] of each engine in each measurement."""
    config, said, workers = SHAPES[args.shape], {}, []
    try:
        for kind in ("bf16", "Q8_0"):
            write_gguf(Path(args.files, kind), config, speed.random_tensors(config), kind.upper())
    except ImportError as error:
        said |= {engine: f"not measured: {error}" for engine in ENGINES if engine.startswith("llama.cpp")}
    try:
        for engine in ENGINES:  # one after the other: loading uses all threads, too
            if engine in said:
                continue
            worker = Worker(engine, args)
            if "missing" in worker.about:
                said[engine] = f"not measured: {worker.about['missing']}"
                worker.end()
            else:
                said[engine] = worker.about["about"]
                workers.append(worker)
        found = {}
        for name, what in measurements(args.context).items():
            for worker in workers:
                worker("prepare", name, *what)
            found[name] = seconds = {worker.engine: [] for worker in workers}
            for i in range(args.rounds):
                at = i % len(workers)
                for worker in workers[at:] + workers[:at]:
                    seconds[worker.engine].append(worker("turn", name, *what))
        return said, found
    finally:
        for worker in workers:
            worker.end()


def table(found: dict[str, dict[str, list[list[float]]]], context: int) -> list[str]:
    lines = ["| measurement | engine | ms | tokens/s | against | which is so many times as fast |",
             "|---|---|---:|---:|---|---|"]  # fmt: skip
    for name, (kind, rows, n) in measurements(context).items():
        pairs = [(engine, ours) for engine in found[name] for ours in ENGINES[engine] if ours in found[name]]
        for engine, ours in pairs:
            seconds = found[name][engine]
            mine, its = (statistics.median(sum(s, [])) for s in (found[name][ours], seconds))
            rounds = zip(found[name][ours], seconds, strict=True)
            ratios = [statistics.median(b) / statistics.median(a) for a, b in rounds]
            tokens = n if kind == "prefill" else rows
            lines.append(f"| {name} | {engine} | {1e3 * its:.1f} | {tokens / its:.1f} | {ours} "
                         f"| {its / mine:.2f} × ({min(ratios):.2f}–{max(ratios):.2f}) |")  # fmt: skip
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="qwen2.5-0.5b")
    parser.add_argument("--context", type=int, default=1024, help="of the 16 rows, in tokens")
    parser.add_argument("--threads", type=int, help="of each engine; all processors of this process by default")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=8, help="timed decode steps of a turn")
    parser.add_argument("--out", type=Path, metavar="FILE.md")
    parser.add_argument("--worker", choices=ENGINES, help=argparse.SUPPRESS)
    parser.add_argument("--files", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.threads = args.threads or cpu_count()
    if min(args.threads, args.rounds, args.steps, args.context) < 1:
        parser.error("threads, rounds, steps, context: allowed: integers from 1")
    if args.worker:
        work(args)
        return
    with tempfile.TemporaryDirectory() as args.files:
        said, found = measure(args)
    text = "\n".join([
        f"{args.shape}, {args.threads} threads each, OMP_WAIT_POLICY {os.environ.get('OMP_WAIT_POLICY', 'default')}; "
        f"medians of {args.rounds} rounds of {args.steps} steps", "",
        *(f"* {engine}: {who}" for engine, who in said.items()), "", *table(found, args.context),
    ])  # fmt: skip
    print(text)
    if args.out:
        args.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
