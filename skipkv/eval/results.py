"""What an evaluation gives: accuracy over problems, fidelity over texts. Pictures are drawn from these."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from skipkv.eval.records import Record, time_of
from skipkv.eval.statistics import wilson
from skipkv.methods import Method
from skipkv.results import Result
from skipkv.steering import Steering, describe_run


@dataclass(frozen=True)
class _Named(Result):
    def __post_init__(self) -> None:
        if not self.run:
            object.__setattr__(self, "run", describe_run(self.method, self.steering))


@dataclass(frozen=True)
class Outcome(_Named):
    """One run over all problems.

    Attributes
    ----------
    method, steering
        That the problems ran under.
    right, n : int
    low, high : float
        95 % interval (Wilson) of the accuracy right / n.
    length : float
        Mean tokens, prompt included.
    truncated : int
        Texts that ran into the limit.
    peak_bytes : float
        Mean over problems of the most cache bytes.
    flagged : float
        Share of sentences that a later one repeats.
    steered : int
    tokens_per_second : float
    run : str
        Its name in tables and pictures; method and steering, unless given.
    """

    right: int
    n: int
    low: float
    high: float
    length: float
    truncated: int
    peak_bytes: float
    flagged: float
    steered: int
    tokens_per_second: float
    run: str = ""

    @property
    def accuracy(self) -> float:
        return self.right / self.n

    @classmethod
    def of(cls, records: Sequence[Record], method: Method, steering: Steering | None) -> Outcome:
        """From at least one text."""

        def total(name: str) -> int:
            return sum(r.stats[name] for r in records)

        n, right = len(records), sum(bool(r.correct) for r in records)
        return cls(
            method, steering, right, n, *wilson(right, n), length=sum(r.length for r in records) / n,
            truncated=sum(r.truncated for r in records), peak_bytes=total("peak_bytes") / n,
            flagged=total("flagged") / max(1, total("sentences")), steered=total("steered"),
            tokens_per_second=sum(len(r.tokens) for r in records) / time_of(records),
        )  # fmt: skip


@dataclass(frozen=True)
class Fidelity(_Named):
    """One method over all texts; each figure is (mean, low, high), a 95 % bootstrap interval over texts.

    Attributes
    ----------
    method, steering
        That the texts were replayed under.
    nll : negative log-likelihood a token, nats
    delta_nll : nll less that of the full cache at the same positions; comparable where ``positions`` differ
    kl : KL divergence of full from the method, nats a token
    same : share of positions with the same best token
    peak_bytes : int
        Most cache bytes of any text.
    texts, positions : int
        Texts that were compacted (all for ``full``; 0: the run never compacted) and positions counted: those after a
        text's first compaction.
    flagged : float
        Share of the finished sentences that a later one repeats.
    run : str
        Its name in tables and pictures; method and steering, unless given.
    """

    nll: tuple[float, float, float]
    delta_nll: tuple[float, float, float]
    kl: tuple[float, float, float]
    same: tuple[float, float, float]
    peak_bytes: int
    texts: int
    positions: int
    flagged: float
    run: str = ""


@dataclass(frozen=True)
class Run:
    """One row of the demo's table.

    Attributes
    ----------
    share : float or None
        The method's budget as a share of the full cache's mean length.
    outcome : Outcome
    texts : list of Record
        In the order of the problems.
    """

    share: float | None
    outcome: Outcome
    texts: list[Record]

    @property
    def method(self) -> Method:
        return self.outcome.method

    @property
    def steered(self) -> bool:
        return self.outcome.steering is not None

    @property
    def label(self) -> str:
        """Method, budget and steering, without what all runs share."""
        budget = f":budget={self.method.budget}" if self.share is not None else ""
        return self.method.name + budget + ("+steering" if self.steered else "")

    def as_dict(self) -> dict[str, Any]:
        budget = self.method.budget if self.share is not None else None
        row = {"method": self.method.name, "budget": budget, "share": self.share, "steering": self.steered}
        return row | self.outcome.as_dict() | {"accuracy": self.outcome.accuracy}
