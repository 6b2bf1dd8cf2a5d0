"""Train the tiny reasoner: ``python -m skipkv.tiny.train --out DIR`` (the extra ``[train]``).

problems, never repeated → batches of rows of about equal length → network, in some batches with hidden slots → loss
on the trace

Hidden slots teach the model to live with an evicting cache. For the shipped weights mostly needless copies are hidden;
the controls are ``--hide 0``, nothing, and ``--blind``, as much whatever it is.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch
import torch.nn.functional as F
from torch import Tensor

from skipkv.tiny import problems, start
from skipkv.tiny.network import Network, Shape

POOL = 192  # problems that are sorted by length together
WARMUP = 50  # steps
REPORT = 50  # steps


class Muon(torch.optim.Optimizer):
    """Momentum, then the nearest orthogonal matrix (five Newton-Schulz steps).

    In float32 and batched by shape: torch.optim.Muon works in bfloat16, which costs more than the whole backward pass
    on a CPU without bfloat16 arithmetic.
    """

    def __init__(self, params: Any, lr: float, momentum: float = 0.95, weight_decay: float = 0.01):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            shapes: dict[torch.Size, list[Tensor]] = {}
            for p in group["params"]:
                shapes.setdefault(p.shape, []).append(p)
            for shape, params in shapes.items():
                updates = []
                for p in params:
                    average = self.state[p].setdefault("momentum", torch.zeros_like(p))
                    average.lerp_(p.grad, 1 - group["momentum"])
                    updates.append(p.grad.lerp(average, group["momentum"]))
                x = torch.stack(updates)
                x = x.mT if shape[0] > shape[1] else x
                x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
                for _ in range(5):
                    g = x @ x.mT
                    x = 3.4445 * x + (-4.7750 * g + 2.0315 * g @ g) @ x
                x = x.mT if shape[0] > shape[1] else x
                for p, update in zip(params, x, strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(update, alpha=-group["lr"] * 0.2 * max(shape) ** 0.5)


@dataclass(frozen=True)
class Batch:
    """Rows padded to one length.

    Attributes
    ----------
    ids : int64 [B, T]
    labels : int64 [B, T]
        The next token; -100 in the prompt and the padding.
    kinds : int64 [B, T]
        What the label asks of the model, an index into `KINDS`.
    needed : int64 [B, T]
        As `problems.Problem.needed`.
    """

    ids: Tensor
    labels: Tensor
    kinds: Tensor
    needed: Tensor


# What a token asks of the model, for the log.
KINDS = ["local", "start", "again", "first", "operand", "value", "sum", "end"]


def kinds(words: list[str]) -> list[int]:
    """What each token asks: to decide what comes, to look up an operand or a value, to add, or only to look around."""
    found = []
    for i, word in enumerate(words):
        _, forms = problems.parts(word)
        before, second = words[i - 1] if i else "", words[i - 2] if i > 1 else ""
        kind = "local"
        if word in problems.STARTS:
            kind = "start"
        elif word == "</think>":
            kind = "end"
        elif before in problems.STARTS:
            kind = "again"
        elif "op" in forms:
            kind = "operand"
        elif "(" in forms:
            kind = "sum" if second == " giving" else "value"
        elif "bare" in forms and before.endswith("="):
            kind = "first"
        found.append(KINDS.index(kind))
    return found


def batches(seed: int, tokens: int, level: Callable[[], problems.Level]) -> Iterator[Batch]:
    """Endless batches of at most `tokens` tokens, padding counted."""
    drawn: dict[problems.Level, Iterator[problems.Problem]] = {}
    shuffle = torch.Generator().manual_seed(seed)
    while True:
        now = level()
        source = drawn.setdefault(now, problems.stream(f"train {seed} {now}", now))
        pool = sorted((next(source) for _ in range(POOL)), key=lambda p: len(p.needed))
        groups = []
        while pool:
            n = max(1, tokens // len(pool[-1].needed))
            groups.append(pool[-n:])
            pool = pool[:-n]
        for i in torch.randperm(len(groups), generator=shuffle):
            yield _batch(groups[i])


def _batch(group: list[problems.Problem]) -> Batch:
    B, T = len(group), max(len(p.needed) for p in group)
    batch = Batch(
        torch.full((B, T), problems.IDS[problems.PAD]),
        torch.full((B, T), -100),
        torch.zeros(B, T, dtype=torch.long),
        torch.full((B, T), problems.FOREVER),
    )
    for i, p in enumerate(group):
        words, n = p.prompt + p.trace, len(p.prompt)
        ids = torch.tensor(problems.encode(words))
        batch.ids[i, : len(ids)] = ids
        batch.needed[i, : len(ids)] = torch.tensor(p.needed)
        batch.labels[i, n - 1 : len(ids) - 1] = ids[n:]
        batch.kinds[i, n - 1 : len(ids) - 1] = torch.tensor(kinds(words)[n:])
    return batch


def hidden_slots(needed: Tensor, heads: int, blind: bool = False) -> Tensor:
    """Attention bias [B, G, T, T] in which slots disappear as an eviction takes them, for each head its own.

    A token that is no longer needed goes within 64 tokens, with a probability of the row between 0.3 and 1; any
    other, from 12 tokens on, at a random time with one between 0 and 0.15. Blind, each head first shuffles for how
    long the tokens of a row are needed: about as many slots disappear, whatever is in them.
    """
    B, T = needed.shape
    here = torch.arange(T)
    needed = needed[:, None].expand(B, heads, T)
    if blind:
        needed = here + (needed - here).gather(2, torch.rand(B, heads, T).argsort(2))

    def happens(low: float, high: float) -> Tensor:
        return torch.rand(B, heads, T) < low + (high - low) * torch.rand(B, 1, 1)

    done = torch.where(happens(0.3, 1), needed + 64 * torch.rand(B, heads, T), T)
    lost = torch.where(happens(0, 0.15), here + 12 + 300 * torch.rand(B, heads, T), T)
    seen = (here[:, None] >= here) & (here[:, None] < torch.minimum(done, lost)[:, :, None])
    return torch.zeros(seen.shape).masked_fill_(~seen, -torch.inf)


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the weights.

    Attributes
    ----------
    million : float
        Tokens to train on, padding counted.
    tokens : int
        Of a batch.
    curriculum : tuple of (float, (int, int))
        From which share of the training on problems have how many steps.
    brief : float
        Share of problems that ask for few re-checks.
    hide, hide_from : float
        Share of the batches with hidden slots, and from which share of the training on.
    blind : bool
        Hide them whether they are needed or not.
    rate, muon : float
        Learning rates of AdamW (embedding, head, norms) and Muon (matrices).
    seed : int
    """

    million: float = 5.0
    tokens: int = 5000
    curriculum: tuple[tuple[float, tuple[int, int]], ...] = ((0.0, (2, 4)), (0.1, (2, 8)), (0.3, (3, 8)))
    brief: float = 0.3
    hide: float = 0.6
    hide_from: float = 0.4
    blind: bool = False
    rate: float = 3e-3
    muon: float = 0.01
    seed: int = 0


def train(recipe: Recipe, out: Path, log: TextIO) -> None:
    """Train from the start and save to a directory.

    Parameters
    ----------
    recipe : Recipe
    out : Path
        Receives an ordinary Hugging Face directory.
    log : text file
    """
    torch.manual_seed(recipe.seed)
    network = Network(Shape())
    start.structure(network)
    matrices, others = [], []
    for name, p in network.named_parameters():
        (matrices if p.dim() == 2 and "embed" not in name and "head" not in name else others).append(p)
    optimizers = [
        torch.optim.AdamW(others, lr=recipe.rate, betas=(0.9, 0.95), weight_decay=0.0),
        Muon(matrices, lr=recipe.muon),
    ]
    rates = [recipe.rate, recipe.muon]
    seen = step = 0

    def share() -> float:
        return seen / (1e6 * recipe.million)

    def level() -> problems.Level:
        steps = [steps for begin, steps in recipe.curriculum if share() >= begin][-1]
        return problems.Level(steps=steps, brief=recipe.brief)

    def note(text: str) -> None:
        print(text, file=log, flush=True)

    note(f"{recipe}")
    cpu = torch.backends.cpu.get_cpu_capability()
    note(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {cpu}")
    note(f"{sum(p.numel() for p in network.parameters())} parameters; wrong tokens of the trace, in percent, by kind")
    begun = time.monotonic()
    data = batches(recipe.seed, recipe.tokens, level)
    tally = torch.zeros(3, len(KINDS))  # loss, right, count
    while share() < 1:
        batch = next(data)
        hide = share() >= recipe.hide_from and float(torch.rand(())) < recipe.hide
        bias = hidden_slots(batch.needed, network.shape.num_key_value_heads, recipe.blind) if hide else None
        asked = batch.labels >= 0
        logits, want = network.lm_head(network(batch.ids, bias)[asked]), batch.labels[asked]
        loss = F.cross_entropy(logits, want, reduction="none")
        network.zero_grad()
        loss.mean().backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        # Falls early: the circuits are there after 100 steps, from then on precision counts.
        scale = min(1, (step + 1) / WARMUP) * max(0.01, (1 - share()) ** 2)
        for optimizer, rate in zip(optimizers, rates, strict=True):
            optimizer.param_groups[0]["lr"] = rate * scale
            optimizer.step()
        step += 1
        seen += batch.ids.numel()
        with torch.no_grad():
            right = (logits.argmax(-1) == want).float()
            tally.index_add_(1, batch.kinds[asked], torch.stack([loss, right, torch.ones_like(loss)]))
        if step % REPORT == 0 or share() >= 1:
            seconds = time.monotonic() - begun
            loss_sum, n_right, n = tally.sum(1).tolist()
            wrong = 100 * (1 - tally[1] / tally[2])
            by_kind = ", ".join(f"{kind} {wrong[i]:.1f}" for i, kind in enumerate(KINDS) if tally[2, i])
            note(
                f"step {step}: {seen / 1e6:.2f} M tokens, {seconds:.0f} s, loss {loss_sum / n:.4f}, "
                f"wrong {100 * (1 - n_right / n):.2f} ({by_kind})"
            )
            tally.zero_()
            network.save(out)
    note(f"model.safetensors sha256 {hashlib.sha256((out / 'model.safetensors').read_bytes()).hexdigest()}")


class _Tee:
    """The log file and the terminal."""

    def __init__(self, *files: TextIO):
        self.files = files

    def write(self, text: str) -> None:
        for file in self.files:
            file.write(text)

    def flush(self) -> None:
        for file in self.files:
            file.flush()


def main(argv: list[str] | None = None) -> None:
    ap = argparse.ArgumentParser(prog="python -m skipkv.tiny.train", description=__doc__.splitlines()[0])
    ap.add_argument("--out", type=Path, required=True, metavar="DIR")
    ap.add_argument("--threads", type=int, default=2)
    for name in ("million", "hide", "seed"):
        default = getattr(Recipe, name)
        ap.add_argument(f"--{name}", type=type(default), default=default)
    ap.add_argument("--blind", action="store_true", help="hide slots whether they are needed or not")
    args = ap.parse_args(argv)
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    with open(args.out / "training.log", "w", encoding="utf-8") as file:
        recipe = Recipe(million=args.million, hide=args.hide, blind=args.blind, seed=args.seed)
        train(recipe, args.out, _Tee(sys.stdout, file))


if __name__ == "__main__":
    main()
