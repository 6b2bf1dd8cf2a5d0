"""What the training script of the model in the box does."""

import dataclasses
import hashlib
import json

import pytest
from harness import TINY

import skipkv
from skipkv.tiny import problems
from skipkv.tiny.problems import Level, stream

pytestmark = pytest.mark.oracle


def drawn(level, count):
    source = stream("test", level)
    return [next(source) for _ in range(count)]


@pytest.fixture(scope="module")
def train():
    pytest.importorskip("torch", reason="training needs torch")
    from skipkv.tiny import train

    return train


def test_hidden_slots_hide_what_they_may(train):
    import torch

    torch.manual_seed(0)
    group = drawn(Level(slips=0.05), 6)
    batch = train._batch(group)
    bias = train.hidden_slots(batch.needed, 4)
    B, T = batch.needed.shape
    assert bias.shape == (B, 4, T, T)
    seen = bias == 0
    assert bool(((bias == 0) | (bias == -torch.inf)).all())
    here = torch.arange(T)
    assert not bool((seen & (here[None, :] > here[:, None])).any())  # causal
    near = (here[:, None] - here[None, :] >= 0) & (here[:, None] - here[None, :] < 12)
    assert bool((seen | ~near).all())  # the last 12 always stay
    # Once gone, a slot stays gone; heads differ; and slots that are not needed any more go far more often.
    assert bool((seen.int().diff(dim=2).masked_fill(here[None, :] > here[:-1, None], 0) <= 0).all())
    assert not bool((seen[:, 0] == seen[:, 1]).all())
    last = seen[:, :, -1]
    spent = (batch.needed[:, None] + 64 < T).expand_as(last)
    asked = (batch.needed[:, None] >= problems.FOREVER).expand_as(last) & (here < T - 320)
    assert float(last[spent].float().mean()) < 0.6 < 0.8 < float(last[asked].float().mean())


def test_blind_hiding_takes_as_much_whatever_it_is(train):
    import torch

    torch.manual_seed(0)
    needed = next(train.batches(0, 6000, lambda: Level(steps=(6, 8)))).needed
    T = needed.shape[1]
    early = torch.arange(T) < T - 320
    spent, asked = early & (needed + 64 < T), early & (needed >= problems.FOREVER)
    means, gaps = [], []
    for blind in (False, True):
        seen = (train.hidden_slots(needed, 8, blind) == 0).float()
        assert not bool(seen.triu(1).any())
        means.append(2 * float(seen.mean()))
        last = seen[:, :, -1].mean(1)  # [B, T]: share of heads
        gaps.append(float(last[asked].mean() - last[spent].mean()))
    assert abs(means[0] - means[1]) < 0.25  # how much of a row goes is drawn anew
    assert gaps[0] > 0.4 > 0.1 > abs(gaps[1])


def test_batches_hold_the_problems_whole(train):
    batch = next(train.batches(3, 3000, lambda: Level(steps=(2, 4), brief=0.3)))
    assert (
        batch.ids.numel() <= 3000 and batch.ids.shape == batch.labels.shape == batch.kinds.shape == batch.needed.shape
    )
    for ids, labels in zip(batch.ids, batch.labels, strict=True):
        ids = ids[: int((ids != problems.IDS[problems.PAD]).sum())].tolist()
        text = [problems.WORDS[i] for i in ids]
        n_prompt = text.index("\n") + 1
        assert text[0] == problems.BOS and text[-1] == problems.EOS
        assert labels[n_prompt - 1 : len(ids) - 1].tolist() == ids[n_prompt:]
        assert set(labels[: n_prompt - 1].tolist()) | set(labels[len(ids) - 1 :].tolist()) == {-100}


def test_training_learns_and_can_be_repeated(train, tmp_path):
    """Two runs give the same bytes, another seed others; the loss falls; the engine loads what is saved."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    recipe = dataclasses.replace(train.Recipe(), million=0.03, tokens=1000, curriculum=((0.0, (2, 3)),), hide_from=0.5)
    logs = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        with open(tmp_path / f"{name}.log", "w", encoding="utf-8") as log:
            train.train(dataclasses.replace(recipe, seed=seed), tmp_path / name, log)
        logs.append((tmp_path / f"{name}.log").read_text(encoding="utf-8").splitlines())
    torch.set_num_threads(threads)
    assert logs[0][-1] == logs[1][-1] != logs[2][-1]
    assert logs[0][-1].split()[-1] == hashlib.sha256((tmp_path / "a" / "model.safetensors").read_bytes()).hexdigest()
    model = skipkv.load(str(tmp_path / "a"), progress=False)
    p = drawn(Level(steps=(2, 3)), 1)[0]
    ids = problems.encode(p.prompt + p.trace)
    logprobs = model.replay(ids).logprobs
    assert -logprobs[len(p.prompt) :].mean() < 4.5 < 5.4  # chance is log(231) = 5.44
    config = json.loads((tmp_path / "a" / "config.json").read_text(encoding="utf-8"))
    assert config == json.loads((TINY / "config.json").read_text(encoding="utf-8"))


def test_the_start_already_looks_things_up(train):
    """At the start the unit of a sum opens for its own triple and hardly ever another's: what the layout promises."""
    import torch

    from skipkv.tiny import start
    from skipkv.tiny.network import Network, Shape

    torch.manual_seed(5)
    network = Network(Shape())
    start.structure(network)
    opened = {}
    network.layers[1].mlp.gate_proj.register_forward_hook(
        lambda module, inputs, out: opened.update(gate=out[0, :, :200])
    )
    found = []
    for p in drawn(Level(slips=0.0), 6):
        words = p.prompt + p.trace
        with torch.no_grad():
            network(torch.tensor([problems.encode(words)]))
        for i in range(len(words)):
            if words[i - 1] == " giving" and words[i - 4][1:2] in ("+", "-") and words[i - 5].startswith(" ("):
                x, y, minus = int(words[i - 5][2]), int(words[i - 3][2]), words[i - 4][1] == "-"
                found.append(int(opened["gate"][i].argmax()) == 20 * x + 2 * y + minus)
    assert len(found) > 50 and sum(found) / len(found) > 0.9, f"{sum(found)} of {len(found)}"
