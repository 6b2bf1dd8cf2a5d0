"""Hand-made records, and a store of them in memory."""

from dataclasses import replace

from skipkv.eval.records import Grade, Record

STATS = {"flagged": 2, "thoughts": 1, "compression": 0.5, "peak_bytes": 2_000_000}


def record(run, item, sample, correct, prompt=10, new=90, reason="stop", seconds=1.0, segment="a", **stats):
    grade = None if correct is None else Grade(correct, "7" if correct else "8")
    tokens = [1] * prompt, [2] * new
    return Record("sums", item, sample, NAMES[run], run, *tokens, "text", reason, STATS | stats, seconds, segment,
                  correct, grade)  # fmt: skip


NAMES = {"f": "full", "r": "rkv:budget=50", "s": "skipkv:budget=50+steer:layer=3,alpha=1"}
SETTINGS = {"task": "sums", "data": "d", "sampling": {"temperature": 0.6}}
RUNS = {
    "f": {**SETTINGS, "run": "f", "method": "full", "steering": None, "cap": 500, "checkpoint": "M",
          "command": "again f"},
    "r": {**SETTINGS, "run": "r", "method": "rkv:budget=50", "steering": None, "share": 0.5, "command": "again r"},
    "s": {**SETTINGS, "run": "s", "method": "skipkv:budget=50", "steering": "layer=3,alpha=1", "command": "again s"},
}
# Right (1), wrong (0) or cut off (-1) samples of each item, and their numbers of new tokens.
SOLVED = {
    "f": {"a": [(1, 90), (1, 110)], "b": [(1, 70), (0, 130)], "c": [(0, 190), (0, 210)]},
    "r": {"a": [(1, 80), (0, 140)], "b": [(0, 150), (0, 170)], "c": [(-1, 290), (1, 60)]},
    "s": {"a": [(1, 50), (1, 50)], "b": [(1, 60), (1, 60)], "d": [(0, 90), (1, 70)]},
}
RECORDS = [
    record(run, item, sample, right == 1, new=new, reason="length" if right < 0 else "stop", seconds=1.0 + sample,
           segment=f"{run}{item}", flagged=4 - right, thoughts=None if run == "s" else 3)
    for run, items in SOLVED.items() for item, of in items.items() for sample, (right, new) in enumerate(of)
]  # fmt: skip


class Memory:
    """What a report asks of a store."""

    def __init__(self, records=RECORDS, runs=RUNS, official=None):
        self._records, self._runs, self._official = records, runs, official or {}

    def records(self, run=None, rule="default"):
        if rule == "default":
            return list(self._records)
        return [replace(r, correct=self._official.get(r.key), grade=None) for r in self._records]

    def runs(self):
        return dict(self._runs)
