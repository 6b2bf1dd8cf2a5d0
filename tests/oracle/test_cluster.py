"""Evaluations over a Ray cluster: two workers of which one is killed, and what is refused."""

import os
import signal
from pathlib import Path

import pytest

from skipkv import BackendError, CheckpointError
from skipkv.eval import Store, evaluate
from skipkv.eval.cluster import ClusterEvaluation
from skipkv.eval.evaluate import finish

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.oracle
METHODS = "full:tau=0.8;rkv:budget=64,interval=16;random:budget=50%,interval=16"
SETTINGS = {"limit": 8, "samples": 2, "temperature": 0.7, "rows": 4, "seed": 5, "padding": "reserve", "grouping": True,
            "progress": False}  # fmt: skip
MARK = "SKIPKV_TEST_CLUSTER"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """Two places on this machine; the environment of the workers tells them from others' processes."""
    mark = str(tmp_path_factory.mktemp("cluster"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_agent_register_timeout_ms", "120000")
        patch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
        patch.setenv(MARK, mark)
        for last in (False, False, True):  # Ray waits 30 s for its own processes, however busy the machine is
            try:
                ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=1 << 27)
                break
            except Exception:
                if last:
                    raise
        yield mark
        ray.shutdown()


def spread(model, **options):
    return ClusterEvaluation(("tiny", "cpu", "auto", 1), None, "tiny", model, METHODS, **(SETTINGS | options))


def workers(mark):
    """Processes of this test's actors."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                names, values = (entry / "cmdline").read_bytes(), (entry / "environ").read_bytes()
            except OSError:
                continue
            if names.startswith(b"ray::Worker") and f"{MARK}={mark}".encode() in values.split(b"\0"):
                found.append(int(entry.name))
    return found


def facts(records):
    """What does not depend on the machine or on who made it."""
    timings = ("seconds", "pool_bytes", "pool_peak_bytes")
    kept = [{k: v for k, v in r.as_dict().items() if k not in ("seconds", "segment")} for r in records]
    return [r | {"stats": {k: v for k, v in r["stats"].items() if k not in timings}} for r in kept]


def test_a_killed_workers_texts_are_made_by_the_other(cluster, model, tmp_path, monkeypatch):
    undisturbed = evaluate("tiny", model, METHODS, **SETTINGS)
    add, killed = Store.add, []

    def kill_one(self, record):
        add(self, record)
        if not killed and len(found := workers(cluster)) == 2:  # the other may not have begun yet
            os.kill(found[0], signal.SIGKILL)
            killed.append(len(self.records()))

    monkeypatch.setattr(Store, "add", kill_one)
    with pytest.warns(UserWarning, match="a worker has died, 1 are left"):
        results = finish(spread(model, out=tmp_path / "store"))
    assert killed[0] < 48 and facts(results.records) == facts(undisturbed.records)
    lines = (tmp_path / "store" / "results.jsonl").read_bytes().splitlines()
    assert len(lines) == 48 and len({r.segment for r in results.records}) > 6  # more parts than runs: they were shared


def test_on_the_command_line(cluster, skip):
    argv = ["eval", "tiny", "--methods", METHODS, "--limit", "2", "--max-new-tokens", "80", "--threads", "1", "--quiet"]
    status, text, err = skip(*argv, "--ray")
    assert status == 0 and err == "" and text.splitlines()[0].startswith("method")
    pick = lambda text: [line.split()[:-1] for line in text.split("\n\n")[0].splitlines()]  # noqa: E731  all but its rate
    assert pick(text) == pick(skip(*argv)[1])


def test_what_another_checkpoint_made_is_refused(cluster, model, monkeypatch):
    monkeypatch.setitem(model.__dict__, "hashes", {"model.safetensors": "another"})
    with pytest.raises(CheckpointError, match="expected run .*, found .*: its checkpoint"):
        finish(spread(model, limit=2))


def test_without_a_machine_that_can_work(cluster, model):
    made = ClusterEvaluation(("tiny", "cpu", "auto", 3), None, "tiny", model, METHODS, **SETTINGS)
    with pytest.raises(BackendError, match="ray: expected a machine with 3 CPUs, found 2"):
        finish(made)
    made = ClusterEvaluation(("nowhere", "cpu", "auto", 1), None, "tiny", model, METHODS, **SETTINGS)
    with pytest.warns(UserWarning), pytest.raises(BackendError, match="no worker is left.*nowhere"):
        finish(made)
