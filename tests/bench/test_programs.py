"""The programs of this folder: every path of them, on tests/simt; the table of occupancy where nvcc is."""

import json
import subprocess
import sys
import time

import pytest

from tests.bench import gpu


@pytest.fixture
def stages(tmp_path, monkeypatch):
    """Runs gpu.py with other stages; (exit status, name and result of each)."""

    def run(*made, seconds=540):
        monkeypatch.setattr(gpu, "STAGES", [(stage.__name__, stage, most) for stage, most in made])
        monkeypatch.setattr(sys, "argv", ["gpu", "--out", str(tmp_path), "--seconds", str(seconds)])
        status = gpu.main()
        return status, {s["name"]: s["result"] for s in json.loads((tmp_path / "figures.json").read_text())["stages"]}

    return run


def good(args, seconds):
    return f"had {seconds:.0f} s"


def wrong(args, seconds):
    return gpu.run([sys.executable, "-c", "raise SystemExit('no such thing')"], seconds, args.out / "wrong.log")


def late(args, seconds):
    return gpu.run(["sh", "-c", "sleep 60 & sleep 60"], seconds, args.out / "late.log")


def absent(args, seconds):
    raise gpu.Skipped("no such tool")


def test_what_fails_or_is_late_does_not_stop_the_next(stages):
    begin = time.monotonic()
    status, found = stages((wrong, 60), (late, 1), (absent, 60), (good, 7))
    assert status == 1 and time.monotonic() - begin < 30
    assert found == {"wrong": "failed: exit status 1: no such thing", "late": "cut off after 1 s",
                     "absent": "skipped: no such tool", "good": "had 7 s"}  # fmt: skip


def test_the_total_time_is_kept_and_what_it_left_out_is_named(stages, capsys):
    status, found = stages((good, 600), seconds=60)
    assert status == 0 and found == {"good": "had 60 s"}
    status, found = stages((good, 600), seconds=5)
    assert status == 0 and found == {"good": "skipped: 5 s were left"}
    assert "skipped: 5 s were left" in capsys.readouterr().out


@pytest.mark.simt
def test_every_path_runs_and_every_figure_is_there(tmp_path):
    """What is measured at least: rates, decoding of three counts of rows, a prompt, compactions, largest batches."""
    command = [sys.executable, "-m", "tests.bench.gpu", "--quick", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=gpu.ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "figures.json").read_text())
    assert [s["name"] for s in found["stages"]] == [name for name, *_ in gpu.STAGES]
    missing = {f["name"]: f["failure"] for f in found["speeds"] if "failure" in f}
    allowed = "ModuleNotFoundError: No module named "
    assert all(name.startswith("transformers") and said.startswith(allowed) for name, said in missing.items()), missing
    measured = [f for f in found["speeds"] if "macs" in f]
    assert len(measured) == 15 and all(0 < f["macs_share"] and 0 < f["bytes_share"] for f in measured)
    full, evicting = (f for f in measured if f["name"].startswith("largest batch"))
    assert evicting["rows"] > full["rows"] and evicting["peak_bytes"] <= evicting["limit_bytes"]
    assert "times the batch" in done.stdout and done.stdout == (tmp_path / "report.md").read_text() + "\n"


@pytest.mark.simt
def test_no_kernel_spills():
    command = [sys.executable, "-m", "tests.bench.occupancy"]
    done = subprocess.run(command, cwd=gpu.ROOT, capture_output=True, text=True)
    if done.stdout.startswith("skipped: "):
        pytest.skip(done.stdout)
    assert "| `attend_kernel<__nv_bfloat16, 2, 4>` | 128 bf16 | 128 |" in done.stdout, done.stderr
    assert "spills" not in done.stderr
