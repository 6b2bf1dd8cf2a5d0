"""One line of a store of results, and what a grader found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Grade:
    """What a grader found in a text.

    Attributes
    ----------
    correct : bool
    found : str or None
        The answer as it stands in the text; None where there is none, and for programs.
    note : str
        Why it is wrong, where that is more than another answer: no answer, a test that failed, a limit.
    unsafe : bool
        A program that ran without a sandbox.
    """

    correct: bool
    found: str | None = None
    note: str = ""
    unsafe: bool = False


@dataclass(frozen=True)
class Record:
    """One generation of a task, as it stands in the store.

    Attributes
    ----------
    task, item : str
    sample : int
    method : str
        The run's name in tables, steering included.
    run : str
        Hash of all that its text depends on; ``runs.jsonl`` has it in full.
    prompt_tokens, tokens : list of int
        Ids of the prompt and of what was written.
    text : str
    finish_reason : str
        As of `Generation`.
    stats : dict
        As of `Stats`, and what was measured beside it.
    seconds : float
        From the begin of this process's part of the run to this text's end.
    segment : str
        Names that part.
    correct : bool or None
        None until it is graded.
    grade : Grade or None
    """

    task: str
    item: str
    sample: int
    method: str
    run: str
    prompt_tokens: list[int]
    tokens: list[int]
    text: str
    finish_reason: str
    stats: dict[str, Any]
    seconds: float
    segment: str
    correct: bool | None = None
    grade: Grade | None = None

    @property
    def key(self) -> tuple[str, str, int, str]:
        return self.task, self.item, self.sample, self.run

    @property
    def length(self) -> int:
        """Tokens, prompt included."""
        return len(self.prompt_tokens) + len(self.tokens)

    @property
    def truncated(self) -> bool:
        return self.finish_reason in ("length", "context")

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def time_of(texts: Sequence[Record]) -> float:
    """Seconds that a run's texts took: each process's part lasted until its last one ended."""
    last: dict[str, float] = {}
    for r in texts:
        last[r.segment] = max(r.seconds, last.get(r.segment, 0.0))
    return sum(last.values())
