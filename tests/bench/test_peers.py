"""tests/bench/peers.py: its files of llama.cpp's format, its ratios, and what it says where no peer is installed."""

import os
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from skipkv import _skipkv
from skipkv.eval import speed
from tests.bench import peers
from tests.bench.gpu import ROOT
from tests.bench.shapes import SHAPES

QWEN = replace(SHAPES["tiny"], head_dim=16)  # as wide as llama.cpp expects
LLAMA = replace(QWEN, family="llama", qkv_bias=False, rope_theta=1e5)


# Both round activations to the same type; so does ours in q8.
@pytest.mark.parametrize("kind, tolerance", [("BF16", 0.02), ("Q8_0", 0.05)])
@pytest.mark.parametrize("config", [QWEN, LLAMA, replace(LLAMA, tied=True)], ids=["qwen2", "llama", "tied"])
def test_llama_cpp_says_the_same_with_the_same_weights(tmp_path, monkeypatch, config, kind, tolerance):
    pytest.importorskip("llama_cpp")
    rng, ids = np.random.default_rng(0), np.arange(3, 43)
    tensors = [(name, values + 0.1 * rng.standard_normal(values.shape, np.float32) * (values.ndim == 1))
               for name, values in speed.random_tensors(config)]  # fmt: skip
    peers.write_gguf(tmp_path / kind, config, tensors, kind)
    monkeypatch.setitem(peers.SHAPES, "tiny", config)
    llama = peers.LlamaCpp(SimpleNamespace(shape="tiny", files=tmp_path, threads=1), kind)
    context = llama.context(1, 64)
    llama.forward(context, ids[None], 0)
    ours = speed.model_of(config, tensors, {"BF16": "bf16", "Q8_0": "q8"}[kind], 1).logits(ids)[-1]
    assert np.abs(llama.logits(context) - ours).max() < tolerance * np.abs(ours).max()


@pytest.mark.oracle
@pytest.mark.parametrize("config", [QWEN, replace(LLAMA, tied=True)], ids=["qwen2", "llama"])
def test_transformers_says_the_same_with_the_same_weights(monkeypatch, config):
    torch = pytest.importorskip("torch")
    monkeypatch.setitem(peers.SHAPES, "tiny", config)
    args = SimpleNamespace(shape="tiny", threads=torch.get_num_threads(), steps=2, rounds=1)
    theirs = peers.Transformers(args, "bf16")
    ids = np.arange(3, 43)
    with torch.inference_mode():
        found = theirs.model(torch.from_numpy(ids[None])).logits[0].float().numpy()
    ours = speed.model_of(config, speed.random_tensors(config), "bf16", 1).logits(ids)
    assert np.abs(found - ours).max() < 0.05 * np.abs(ours).max()  # it rounds activations
    for name, what in peers.measurements(9).items():
        theirs.prepare(name, *what)
        assert len(theirs.turn(name, *what)) == (1 if what[0] == "prefill" else args.steps)


@pytest.mark.parametrize("config", [QWEN, LLAMA], ids=["qwen2", "llama"])
def test_every_tensor_has_a_name_there(config):
    names = [peers.gguf_name(name) for name, *_ in _skipkv.tensors(config.as_dict())]
    assert len({*names}) == len(names) and {"token_embd.weight", "blk.1.attn_q.weight", "output.weight"} < {*names}


def test_what_turns_together_lies_side_by_side():
    """Two heads of four: 0 turns with 2, 1 with 3."""
    assert peers.interleaved(np.arange(8.0), 2).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert peers.interleaved(np.arange(16.0).reshape(8, 2), 2)[1].tolist() == [4, 5]


def test_ratios_are_those_of_medians_and_of_rounds():
    seconds = {"ours bf16": [[0.1, 0.1, 0.9], [0.2, 0.2, 0.2]], "llama.cpp bf16": [[0.2, 0.2, 0.2], [0.2, 0.2, 0.2]],
               "ours q8": [[0.05] * 3] * 2}  # fmt: skip
    lines = peers.table({name: seconds for name in peers.measurements(64)}, 64)
    assert lines[7] == "| decode, 16 rows, context 64 | ours q8 | 50.0 | 320.0 | ours bf16 | 0.25 × (0.25–0.50) |"
    assert lines[6].endswith("| llama.cpp bf16 | 200.0 | 80.0 | ours bf16 | 1.00 × (1.00–2.00) |")
    assert lines[-2].startswith(f"| prefill of {peers.PROMPT} | llama.cpp bf16 | 200.0 | 2560.0 |")


def test_it_runs_with_what_is_there_and_names_what_is_not(tmp_path):
    """Modules of these names that cannot be imported stand before those that are installed, if any."""
    for name in ("llama_cpp", "torch", "transformers"):
        (tmp_path / f"{name}.py").write_text(f"raise ImportError('no {name}')\n")
    command = [sys.executable, "-m", "tests.bench.peers", "--shape", "tiny", "--rounds", "1", "--steps", "1",
               "--context", "9", "--out", str(tmp_path / "peers.md")]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "peers.md").read_text()
    assert done.stdout == text and "* transformers bf16: not measured: no t" in text
    assert text.lower().count("not measured: no ") == 3  # or there is no module gguf
    assert text.count("| ours bf16 |") == 9 and "| decode, 16 rows, context 9 | ours q8 |" in text
