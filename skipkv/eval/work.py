"""One call of `skipkv.eval.evaluate`: every item of a task under every method, kept in a store.

    items × runs × samples → admitted (claimed) → generated → graded → a line of the store

Every call of the engine gets all items in their places, as draws and reserves depend on these; what is there already,
or is being made by another process, is refused on the way. What others make is waited for at the end, and made here
where they died.
"""

from __future__ import annotations

import hashlib
import json
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, fields, replace
from os import PathLike
from typing import Any

from tqdm import tqdm

from skipkv import __version__
from skipkv.checks import flag, instance, integer, no_bar, one_of, path_of, text_of
from skipkv.errors import BackendError, ConfigError
from skipkv.eval import grading
from skipkv.eval.marking import mark, mark_all
from skipkv.eval.records import Record
from skipkv.eval.results import Outcome
from skipkv.eval.runs import FIRST_CAP, MethodRun, parameters, parse_methods, steering_text
from skipkv.eval.sandbox import Sandbox
from skipkv.eval.store import Key, Store
from skipkv.eval.summary import fragmentation as torn
from skipkv.eval.tasks import PROGRAM, find_task, load_items
from skipkv.methods import Full
from skipkv.model import Model
from skipkv.results import Generation
from skipkv.run import Interrupt, Options, Sampling, choose

OURS = ("n", "admit", "trace")  # options that are not the caller's here


class Evaluation:
    """Iterating over `rows` does the work; parameters are those of `evaluate`.

    Attributes
    ----------
    runs : list of MethodRun
        One for each method, the full cache first where others depend on its texts.
    """

    def __init__(
        self, task: str, model: Model, methods: Any, data: Any = None, prompt: str | None = None,
        out: str | PathLike[str] | None = None, samples: int = 1, limit: int | None = None, unsafe: bool = False,
        fragmentation: bool = False, progress: bool = True, command: str = "", **options: Any,
    ) -> None:  # fmt: skip
        self.name, self.task, self.model = task, find_task(task), instance("model", model, Model)
        for name, value in (("unsafe", unsafe), ("fragmentation", fragmentation), ("progress", progress)):
            flag(name, value)
        text_of("command", command)
        self.sandbox = Sandbox(unsafe) if self.task.grading == PROGRAM else None
        if self.sandbox is None:
            grading.grade(self.task.grading, "", "")  # what is not installed is missed now
        self.samples, self.progress, self.fragmentation = integer("samples", samples, 1), progress, fragmentation
        source = str(path_of("data", data)) if isinstance(data, (str, PathLike)) else None
        self.runs = parse_methods(methods)
        if limit is not None:
            integer("limit", limit, 1, None)
        for name in OURS:
            if name in options:
                raise ConfigError(f"option {name!r} is the evaluation's own; allowed: samples, and others of generate")
        prompt = one_of("prompt", next(iter(self.task.prompts)) if prompt is None else prompt, self.task.prompts, str)
        self.prompt = self.task.prompts[prompt]
        if self.prompt.stop:
            options.setdefault("stop", self.prompt.stop)
        if self.task.context and "max_new_tokens" not in options:
            options.setdefault("context", self.task.context)
        self.cap = options.pop("max_new_tokens", self.task.cap)  # None: known once the full cache has run
        self.template = options.pop("template", None)
        self.options = options
        chosen = choose(model, options | {"max_new_tokens": FIRST_CAP if self.cap is None else self.cap})
        self.items, digest = load_items(task, data, limit)
        self.prompts = [
            self.prompt.ids(model, item.problem, item.more.get("starter_code"), self.template) for item in self.items
        ]
        self.settings = self._describe(prompt, digest, chosen)
        # What no text depends on.
        self.about = {"source": source, "command": command, "checkpoint": model.name}
        self.about["items"] = {"n": len(self.items), "samples": self.samples}
        self._check(self.runs)
        self.store = Store(out, create=True)
        self.interrupt = Interrupt()

    def _describe(self, prompt: str, digest: str, o: Options) -> dict[str, Any]:
        """All that the texts of all runs depend on, but for their methods."""
        grouped = o.grouping or o.padding != "none"  # reserves depend on which prompts there are
        return {
            "task": self.name, "data": digest, "prompt": {"name": prompt} | asdict(self.prompt),
            "template": self.template, "model": {"config": self.model.config.as_dict(), "files": self.model.hashes},
            "dtype": self.model.dtype, "cache": o.cache,
            "sampling": {f.name: getattr(o, f.name) for f in fields(Sampling)},
            "max_new_tokens": self.cap or "twice the longest of full", "context": o.context, "stop": o.stop,
            "stop_ids": o.stop_ids, "brake": o.brake, "padding": o.padding, "grouping": o.grouping,
            "rows": o.rows if grouped else None, "items": len(self.items) if grouped else None, "version": __version__,
        }  # fmt: skip

    def _check(self, runs: Sequence[MethodRun]) -> None:
        """Refuse now what could not run after half of the table."""
        for run in runs:
            run.method.check_prompt(max(map(len, self.prompts)))
            self.model.check_steering(run.steering)

    # -- runs

    def rows(self) -> Iterator[MethodRun]:
        """Work; yields each run when all its texts are there."""
        bar = tqdm(unit="text", leave=False, disable=no_bar(self.progress), dynamic_ncols=True)
        with self.interrupt, closing(self.store), bar as self.bar:
            left = self.runs
            if self.cap is None or any(run.share is not None for run in self.runs):
                is_full = (run for run in self.runs if run.method.name == "full" and run.steering is None)
                full = next(is_full, None) or MethodRun(Full(), None)
                left = [run for run in self.runs if run is not full]
                self.runs = [full, *left]
                self._resolve([full])
                done = list(self._work([full]))
                self._measure(self.records(full), left)
                yield from done
            self._resolve(left)
            yield from self._work([run for run in self.runs if run in left])

    def _measure(self, full: Sequence[Record], runs: Sequence[MethodRun]) -> None:
        """Caps, and budgets that are shares, by the full cache's texts."""
        for run in runs:
            run.cap = 2 * max(len(r.tokens) for r in full)
            if run.share is not None:
                slots = round(run.share * sum(r.length for r in full) / len(full))
                run.method = run.method.with_(budget=max(1, slots))
        self._check(runs)

    def _resolve(self, runs: Sequence[MethodRun]) -> None:
        """Name runs of which budget and cap are known, and count what is there of them."""
        for run in runs:
            self.name_run(run)
        once = {run.line["run"] if run.line else run: run for run in reversed(self.runs)}
        self.runs = [run for run in self.runs if run in once.values()]
        self._count()

    def name_run(self, run: MethodRun) -> None:
        """Write down all that a run's texts depend on, and hash it."""
        run.cap = self.cap or run.cap
        own = {"parameters": parameters(run.method), "steering": steering_text(run.steering), "cap": run.cap}
        if not run.method.compacts:  # there is no budget to take padding off
            own |= {"padding": "none", "grouping": False, "rows": None, "items": None}
        text = json.dumps(self.settings | own, sort_keys=True, default=str)
        own |= {"method": str(run.method), "share": run.share} | self.about
        line = {"run": hashlib.sha256(text.encode()).hexdigest()[:16]} | self.settings | own
        run.line = json.loads(json.dumps(line, default=str))

    def _work(self, runs: Sequence[MethodRun]) -> Iterator[MethodRun]:
        """Make what nobody has made of the runs, then wait for what others are making."""
        left = list(runs)
        while left:
            for _ in self._make(list(left)):
                for run in [run for run in left if all(key in self.store for key in self._keys(run))]:
                    left.remove(run)
                    self._mark(run)
                    yield run
            if left:
                self._stop_if_asked()
                time.sleep(1)
                self.store.refresh()
                self._count()

    def _make(self, runs: Sequence[MethodRun]) -> Iterator[None]:
        """What is free of the runs; yields whenever some of them may have been completed."""
        for run in runs:
            keys = self._keys(run)
            if any(self.store.is_free(key) for key in keys):
                self._announce(run)
                for record in self.texts(run, lambda p, s, keys=keys: self.store.claim(keys[p * self.samples + s])):
                    self._keep(record)
                self._stop_if_asked()
            yield

    def _announce(self, run: MethodRun) -> None:
        known = self.store.runs().get(run.line["run"])
        if known is None or any(known["items"][name] < n for name, n in self.about["items"].items()):
            self.store.add_run(run.line)
        self.bar.set_description(run.name)

    def texts(self, run: MethodRun, admit: Callable[[int, int], bool]) -> Iterator[Record]:
        """Those that are admitted, by the indices of item and sample, as they end, with what can be graded at once."""
        segment, begin = uuid.uuid4().hex[:12], time.perf_counter()
        options = self.options | {"max_new_tokens": run.cap, "n": self.samples, "trace": self.fragmentation}
        for event in self.model.stream(self.prompts, run.method, run.steering, **options, admit=admit):
            if event.generation and event.generation.finish_reason == "interrupted":
                self.interrupt.seen = True
            elif event.generation:
                record = self._record(run, event.generation, segment, time.perf_counter() - begin)
                try:
                    grade = mark(self.task.grading, self.items[event.prompt], record)
                except BackendError:
                    yield record  # to be graded by the next call
                    raise
                yield replace(record, grade=grade, correct=grade and grade.correct)

    def _record(self, run: MethodRun, made: Generation, segment: str, seconds: float) -> Record:
        return Record(
            self.name, self.items[made.prompt].id, made.sample, run.name, run.line["run"], made.prompt_tokens,
            made.tokens, made.text, made.finish_reason,
            asdict(made.stats) | (torn(made.trace) if made.trace else {}), seconds, segment,
        )  # fmt: skip

    def _keep(self, record: Record) -> None:
        self.store.add(record)
        self.bar.update()

    def _mark(self, run: MethodRun) -> None:
        """Grade what could not be graded at once."""
        left = [record for record in self.records(run) if record.grade is None]
        items = {item.id: item for item in self.items}
        for record, grade in mark_all(self.task.grading, items, left, "default", self.sandbox, self.progress):
            self.store.add_grade(record.key, "default", grade)
            self._stop_if_asked()

    def _stop_if_asked(self) -> None:
        if self.interrupt.seen:
            raise KeyboardInterrupt

    def _count(self) -> None:
        """What others have made, now or before, is no sign of this process's rate."""
        self.bar.total = len(self.items) * self.samples * len(self.runs)
        there = sum(key in self.store for run in self.runs if run.line for key in self._keys(run))
        if not self.bar.disable:
            self.bar.initial += there - self.bar.n
            self.bar.n = there
            self.bar.refresh()

    def _keys(self, run: MethodRun) -> list[Key]:
        return [(self.name, item.id, s, run.line["run"]) for item in self.items for s in range(self.samples)]

    # -- results

    def records(self, run: MethodRun) -> list[Record]:
        """What is there of a run's items and samples, in their order."""
        if run.line is None:
            return []
        found = {record.key: record for record in self.store.records(run.line["run"])}
        return [found[key] for key in self._keys(run) if key in found]

    def outcome(self, run: MethodRun) -> Outcome:
        return Outcome.of(self.records(run), run.method, run.steering)
