"""R-KV's scores and selection: ours against the quadratic definition in torch, on the same keys, one thread each.

    python tests/bench/quadratic.py [MODEL_DIR] [--slots 1152] [--budget 1024] [--repeats 7]

The keys are those of a real text where a model is given (every layer and head of it, read out of its cache through a
custom score), else random ones around a shared direction for each head. Torch builds S [L, L] as METHOD.md §3 defines
it. The two take turns; the ratio of medians is printed, and whether they keep the same slots.
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np
import torch

import skipkv

TEXT = "The tortoise walks on, and the hare, who has seen it all before, sleeps. Then it wakes and runs. "


def real_heads(path: str, n_slots: int, window: int) -> tuple[np.ndarray, np.ndarray]:
    """keys [heads, L, d] and queries [heads, group, window, d] of a model that has read a text."""
    model = skipkv.load(path, progress=False)
    found: list[tuple[np.ndarray, np.ndarray]] = []

    def keep(c):
        found.append((c.keys, c.queries))
        return np.zeros(c.n_candidates, np.float32)

    ids = (model.encode(TEXT * (n_slots // 15 + 1)))[:n_slots]
    rng = np.random.default_rng(0)  # other words between the sentences, or every key would have a twin
    ids = [t if rng.random() < 0.5 else int(rng.integers(0, model.config.vocab)) for t in ids]
    model.replay(ids, skipkv.Custom(keep, ("queries",), budget=n_slots - 1, window=window), n_prompt=n_slots)
    return np.stack([k for k, _ in found]), np.stack([q for _, q in found])


def random_heads(
    n_slots: int, window: int, heads: int = 90, d: int = 64, group: int = 3
) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    keys = rng.standard_normal((heads, n_slots, d)) + 1.5 * rng.standard_normal((heads, 1, d))
    return keys.astype(np.float32), rng.standard_normal((heads, group, window, d)).astype(np.float32)


def quadratic(keys: torch.Tensor, queries: torch.Tensor, budget: int, window: int, mix: float = 0.1) -> torch.Tensor:
    """Kept slots [budget] of one head; keys [L, d], queries [group, window, d]."""
    n, d = keys.shape
    z = (queries @ keys[: n - window].T).amax(0) / d**0.5
    mean = torch.softmax(z, -1).mean(0)
    importance = torch.nn.functional.max_pool1d(mean[None], 7, 1, 3)[0]
    unit = keys / (keys.norm(dim=-1, keepdim=True) + 1e-8)
    s = unit @ unit.T
    s.fill_diagonal_(0)
    hit = (s > 0.5) * torch.arange(n)
    last = hit.amax(-1)
    s[torch.arange(n), last] = 0
    redundancy = torch.softmax(s.mean(0), -1)[: n - window]
    score = mix * importance - (1 - mix) * redundancy
    return torch.cat([score.topk(budget - window).indices.sort().values, torch.arange(n - window, n)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?")
    parser.add_argument("--slots", type=int, default=1152)
    parser.add_argument("--budget", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(1)
    window = 8
    keys, queries = real_heads(args.model, args.slots, window) if args.model else random_heads(args.slots, window)
    flat = queries.reshape(-1, *queries.shape[2:])
    torch_keys, torch_queries = torch.from_numpy(keys), torch.from_numpy(queries)
    ours, theirs = [], []
    for _ in range(args.repeats + 1):
        begin = time.perf_counter()
        mine = skipkv.select("rkv", keys, flat, budget=args.budget, window=window).kept
        ours.append(time.perf_counter() - begin)
        begin = time.perf_counter()
        with torch.inference_mode():
            other = [
                quadratic(k, q, args.budget, window).numpy() for k, q in zip(torch_keys, torch_queries, strict=True)
            ]
        theirs.append(time.perf_counter() - begin)
    a, b = statistics.median(ours[1:]), statistics.median(theirs[1:])
    same = np.mean([np.array_equal(x, y) for x, y in zip(mine, other, strict=True)])
    print(f"{len(keys)} heads, {args.slots} slots, budget {args.budget}")
    print(f"ours {1e3 * a:.1f} ms, torch {1e3 * b:.1f} ms, ratio {b / a:.1f}")
    print(f"same kept set in {100 * same:.0f} % of the heads")


if __name__ == "__main__":
    main()
