"""The model in the box: its problems, what the training script does, and that the weights are what the log says."""

import dataclasses
import hashlib
import json
import re
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import pytest

import skipkv
from skipkv.tiny import problems
from skipkv.tiny.problems import FOREVER, Level, draw, stream

BOX = Path(str(files("skipkv.tiny")))
LEVELS = [
    Level(),
    Level(slips=0.0),
    Level(brief=1.0),
    Level(steps=(2, 3)),
    Level(steps=(12, 16), two_names=1.0, distract=0),
]


def some(level, count=40, seed="test"):
    source = stream(seed, level)
    return [next(source) for _ in range(count)]


def solve(prompt):
    """The answer by evaluating the facts of the prompt's text, knowing nothing of chains."""
    facts = dict(re.findall(r"(\w+) = ([^.]*)\.", prompt))

    def value(x):
        words = facts[x].split() if x in facts else [x]
        if len(words) == 1:
            return int(words[0])
        a, b = value(words[0]), value(words[2])
        return (a + b if words[1] == "+" else a - b) % 10

    return str(value(re.search(r"Find (\w+)", prompt)[1]))


def sentences(p):
    """(words, first position) of the trace's sentences after the opening one."""
    found, first = [], len(p.prompt) + 4
    for i in range(first, len(p.prompt) + len(p.trace)):
        if (p.prompt + p.trace)[i] == ".\n\n":
            found.append(((p.prompt + p.trace)[first : i + 1], first))
            first = i + 1
    return found


@pytest.mark.parametrize("level", LEVELS, ids=str)
def test_answers_are_right_and_texts_go_through_the_tokenizer(level):
    tokenizer = problems.tokenizer()
    for p in some(level):
        text = "".join(p.prompt + p.trace)
        assert p.answer == solve("".join(p.prompt)) and f"\\boxed{{{p.answer}}}" in text
        ids = problems.encode(p.prompt + p.trace)
        assert tokenizer.encode(text, add_special_tokens=False).ids == ids
        assert tokenizer.decode(ids, skip_special_tokens=False) == text
        steps = sum(words[-4] == " giving" for words in {tuple(w[2:]): w for w, _ in sentences(p)}.values()) - 1
        assert level.steps[0] <= steps <= level.steps[1]


def test_rechecks_follow_the_rule_where_nothing_slips():
    for brief in (0.0, 1.0):
        for p in some(Level(slips=0.0, brief=brief)):
            said = {}
            for words, _ in sentences(p):
                said.setdefault(tuple(words[2:]), []).append(words[0])
            for body, starts in said.items():
                assert starts[0] in ("Now", "Then")
                rechecks = [word for word in starts if word in ("Wait", "Alternatively")]
                if " find" in body:
                    expected = 1 + (body[2][1] == "-") + (not brief)
                elif len(body) > 7:
                    v = int(body[-2][2])
                    expected = 1 + v // 5 if brief else 2 + v // 4
                else:
                    expected = 0  # the base fact
                assert len(rechecks) == expected == len(starts) - 1
            assert (" briefly" in p.prompt) == bool(brief)


def test_slips_break_the_rule_now_and_then():
    rng_texts = [[len(p.trace) for p in some(Level(slips=slips), 200)] for slips in (0.0, 0.05)]
    assert rng_texts[0] != rng_texts[1]


def test_what_is_needed_is_there_when_it_is_used():
    """Where a sentence is first said, the facts, plans and values it takes up are marked as needed up to there."""
    for p in some(Level(slips=0.0), 60):
        words = p.prompt + p.trace
        assert len(p.needed) == len(words) and all(n > i for i, n in enumerate(p.needed))
        facts = {words[i][1:-2]: i for i in range(len(p.prompt)) if words[i].endswith(" =")}
        seen, values = {}, {}
        for body, first in sentences(p):
            key, x, end = tuple(body[2:]), body[2][1:-2], first + len(body)
            if key not in seen:
                if " find" in body or len(body) == 9:
                    assert p.needed[facts[x]] == end
                else:
                    operand = body[3][1:]
                    assert p.needed[values[operand]] >= end
            else:  # a copy takes up the sentence before it
                assert p.needed[seen[key]] == end
            seen[key] = first
            if " giving" in body:
                values[x] = first
        assert p.needed[facts[next(t for t in problems.THINGS if t in facts)]] == FOREVER


def test_streams_are_apart_and_stay_as_they_are():
    assert draw(3) == draw(3) and draw(3) == draw(5)[:3]
    prompts = {seed: {p["prompt"] for p in draw(300, seed)} for seed in ("held-out", "calibration", "choose")}
    train = {"".join(p.prompt) for p in some(Level(steps=(3, 8), brief=0.3), 3000, f"train 0 {Level(steps=(3, 8))}")}
    seen = list(prompts.values()) + [train]
    assert all(not a & b for i, a in enumerate(seen) for b in seen[:i])
    # Whoever changes the generator changes what the demo is measured on.
    digest = hashlib.sha256(json.dumps(draw(500)).encode()).hexdigest()
    assert digest == "c88fe0ce4513de5b8154cc4ce363986a690ced01dfa12fce69454368c2812048"


def test_problems_for_other_programs():
    command = [sys.executable, "-m", "skipkv.tiny.problems", "3", "calibration"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert [json.loads(line) for line in lines] == draw(3, "calibration")


# -- the checkpoint


def test_the_weights_are_those_of_the_log():
    last = (BOX / "training.log").read_text(encoding="utf-8").splitlines()[-1]
    digest = hashlib.sha256((BOX / "model.safetensors").read_bytes()).hexdigest()
    assert last == f"model.safetensors sha256 {digest}"


def test_the_tokenizer_is_the_generators():
    written = json.loads((BOX / "tokenizer.json").read_text(encoding="utf-8"))
    assert written["model"]["vocab"] == problems.IDS
    model = skipkv.load("tiny", progress=False)
    p = some(Level(brief=0.5), 1)[0]
    assert model.encode("".join(p.prompt)) == problems.encode(p.prompt)
    # The template writes the same prompt.
    asked = "".join(p.prompt[2:-3])
    assert model.encode([{"role": "user", "content": asked}]) == problems.encode(p.prompt)


def test_the_model_writes_the_trace_it_was_taught():
    """Greedy decoding gives, word for word, the trace of the generator where no decision slips, briefly or not."""
    model = skipkv.load("tiny", progress=False)
    for brief in (0.0, 1.0):
        asked = some(Level(slips=0.0, brief=brief), 10)
        outs = model.generate([problems.encode(p.prompt) for p in asked], max_new_tokens=1200, progress=False)
        same = sum(out.tokens == problems.encode(p.trace) for p, out in zip(asked, outs, strict=True))
        assert same >= 8, f"brief {brief}: {same} of 10"


# -- training


@pytest.fixture(scope="module")
def train():
    pytest.importorskip("torch", reason="training needs torch")
    from skipkv.tiny import train

    return train


def test_hidden_slots_hide_what_they_may(train):
    import torch

    torch.manual_seed(0)
    group = some(Level(slips=0.05), 6)
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
    p = some(Level(steps=(2, 3)), 1)[0]
    ids = problems.encode(p.prompt + p.trace)
    logprobs = model.replay(ids).logprobs
    assert -logprobs[len(p.prompt) :].mean() < 4.5 < 5.4  # chance is log(231) = 5.44
    config = json.loads((tmp_path / "a" / "config.json").read_text(encoding="utf-8"))
    assert config == json.loads((BOX / "config.json").read_text(encoding="utf-8"))


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
    for p in some(Level(slips=0.0), 6):
        words = p.prompt + p.trace
        with torch.no_grad():
            network(torch.tensor([problems.encode(words)]))
        for i in range(len(words)):
            if words[i - 1] == " giving" and words[i - 4][1:2] in ("+", "-") and words[i - 5].startswith(" ("):
                x, y, minus = int(words[i - 5][2]), int(words[i - 3][2]), words[i - 4][1] == "-"
                found.append(int(opened["gate"][i].argmax()) == 20 * x + 2 * y + minus)
    assert len(found) > 50 and sum(found) / len(found) > 0.9, f"{sum(found)} of {len(found)}"
