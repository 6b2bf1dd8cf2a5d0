"""An evaluation over the workers of a Ray cluster. The driver is the only writer of its store.

runs × items → shards → workers, each with the model → lines, as they end → the store

Each worker is given all items and admits those of its shard: draws and reserves are those of one machine. A run's hash,
which a worker computes of its own files, stands in each line, so that what another checkpoint made is refused.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

from skipkv.errors import BackendError, CheckpointError, Error, warn
from skipkv.eval.records import Record
from skipkv.eval.runs import MethodRun
from skipkv.eval.store import Key
from skipkv.eval.work import Evaluation
from skipkv.model import load
from skipkv.run import Options

SHARDS = 4  # a worker at least, so that all end at about the same time

Shard = tuple[MethodRun, dict[Key, tuple[int, int]]]  # with the indices of items and samples


class Worker:
    """The model on one machine; an actor."""

    def __init__(self, source: tuple, task: str, items: list[Any], digest: str, options: dict[str, Any]) -> None:
        self.made = Evaluation(task, load(*source, progress=False), "full", items, **options)
        self.made.settings["data"] = digest  # of all items; these may be the first ones

    def texts(self, run: MethodRun, wanted: set[tuple[int, int]]) -> Iterator[Record]:
        self.made.name_run(run)
        yield from self.made.texts(run, lambda prompt, sample: (prompt, sample) in wanted)


class ClusterEvaluation(Evaluation):
    """As `Evaluation`, of which it takes the rest.

    Parameters
    ----------
    source : (source, device, dtype, threads)
        What each worker loads, as for `skipkv.load`; a path or hub id that all machines reach. A worker has one GPU, or
        as many processors as threads: all of the smallest machine by default.
    address : str or None
        As for ``ray.init``: a cluster's, or None for a running one or one on this machine. One that this process has
        been connected to before is taken as it is.

    Raises
    ------
    BackendError
        Ray is not there, or nothing that could work, or no worker is left.
    CheckpointError
        A worker's checkpoint, or its version of skipkv, is another.
    """

    def __init__(self, source: tuple, address: str | None, *args: Any, **options: Any) -> None:
        try:
            import ray
        except ImportError:
            raise BackendError("many machines take the package ray: pip install 'skipkv[scale]'") from None
        super().__init__(*args, **options)
        self.ray, self.source, self.address = ray, source, address
        left_out = ("data", "limit", "out", "command", "unsafe", "progress")
        # Workers run no programs: whether their machines have a sandbox is no matter.
        self.given = {k: v for k, v in options.items() if k not in left_out} | {"unsafe": True, "progress": False}
        self.workers: list[Any] = []

    def rows(self) -> Iterator[MethodRun]:
        ours = not self.ray.is_initialized()
        try:
            if ours:
                self._connect()
            self.workers = self._start()
            yield from super().rows()
        finally:
            for worker in self.workers:
                self.ray.kill(worker)
            if ours:
                self.ray.shutdown()

    def _connect(self) -> None:
        try:
            self.ray.init(self.address, log_to_driver=False, logging_level="warning")
        except Exception as error:  # of many types: no cluster there, no port free, its own processes too slow
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise BackendError(f"ray: {self.address or 'this machine'}: {reason}") from error

    def _start(self) -> list[Any]:
        source, device, dtype, threads = self.source
        kind = "CPU" if device == "cpu" else "GPU"
        nodes = [int(node["Resources"].get(kind, 0)) for node in self.ray.nodes() if node["Alive"]]
        each = 1 if kind == "GPU" else threads or min(filter(None, nodes), default=1)
        n = sum(found // each for found in nodes)
        if n == 0:
            raise BackendError(f"ray: expected a machine with {each} {kind}s, found {max(nodes, default=0)}")
        actor = self.ray.remote(**{f"num_{kind.lower()}s": each})(Worker)
        what = (source, device, dtype, threads if kind == "GPU" else each)
        given = what, self.name, self.ray.put(self.items), self.settings["data"], self.given
        return [actor.remote(*given) for _ in range(n)]

    def _shards(self, runs: Sequence[MethodRun]) -> Iterator[Shard]:
        n, is_free = self.samples, self.store.is_free
        free = {run: [(k, divmod(i, n)) for i, k in enumerate(self._keys(run)) if is_free(k)] for run in runs}
        total = sum(map(len, free.values()))
        size = max(self.options.get("rows", Options.rows), -(-total // (SHARDS * len(self.workers))))
        for run, of in free.items():
            if of:
                self._announce(run)
            yield from ((run, dict(of[first : first + size])) for first in range(0, len(of), size))

    def _make(self, runs: Sequence[MethodRun]) -> Iterator[None]:
        shards, idle, busy = deque(self._shards(runs)), list(self.workers), {}
        yield
        while shards or busy:
            while shards and idle:
                run, shard = shards.popleft()
                shard = {key: at for key, at in shard.items() if self.store.claim(key)}
                if shard:
                    texts = idle[-1].texts.options(num_returns="streaming")
                    busy[texts.remote(run, set(shard.values()))] = idle.pop(), (run, shard)
            if not busy:
                break
            for stream in self.ray.wait(list(busy), num_returns=1, timeout=1)[0]:
                if self._take(stream, *busy[stream]):
                    worker, (run, left) = busy.pop(stream)
                    if worker in self.workers:
                        idle.append(worker)
                    if left:
                        shards.append((run, left))
                    yield
            self._stop_if_asked()

    def _take(self, stream: Any, worker: Any, shard: Shard) -> bool:
        """The next line of a worker; whether there are no more."""
        run, left = shard
        try:
            record = self.ray.get(next(stream))
        except StopIteration:
            return True
        except (self.ray.exceptions.RayActorError, self.ray.exceptions.ObjectLostError) as error:
            self.workers.remove(worker)
            reason = str(error).strip().splitlines()[-1].strip()
            if not self.workers:
                raise BackendError(f"ray: no worker is left; the last one's end: {reason}") from None
            warn(f"a worker has died, {len(self.workers)} are left, which take over what it had: {reason}")
            return True
        except self.ray.exceptions.RayTaskError as error:
            raise (error.cause if isinstance(error.cause, Error) else error) from None
        if record.run != run.line["run"]:
            found = f"expected run {run.line['run']}, found {record.run}"
            raise CheckpointError(f"ray: a worker: {found}: its checkpoint, or its version of skipkv, is another")
        self._keep(record)
        left.pop(record.key, None)
        return False
