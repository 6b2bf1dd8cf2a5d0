"""What runs say of a text's thinking, steer in it and end it where the tokenizer merges the markers with neighbours."""

import json
from dataclasses import asdict

import numpy as np
import pytest
import spec
from checkpoints import LLAMA, merging, write
from generations import PROBLEMS, like, run

import skipkv
from skipkv import Steering, vectors
from skipkv.load.tokenizer import Tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:.*never compacted", "ignore:.*steered no token")

# The model in the box under other texts: both ends of either marker stand in tokens with other text, <think> in two.
# Three digits' ids write </think> where the brake asks for it.
MERGED = {"<|assistant|>": "<|assistant|>.<th", "<think>": "ink>So", "</think>": "4.</think>So",
          "7": "</", "8": "think", "9": ">"}  # fmt: skip


@pytest.fixture(scope="module")
def merged(model, tmp_path_factory):
    directory = tmp_path_factory.mktemp("merged")
    whole = json.loads(model.tokenizer._tokenizer.to_str())
    whole["added_tokens"] = [token for token in whole["added_tokens"] if token["content"] not in MERGED]
    whole["model"]["vocab"] = {MERGED.get(word, word): i for word, i in whole["model"]["vocab"].items()}
    (directory / "tokenizer.json").write_text(json.dumps(whole))
    return like(model, Tokenizer(directory, model.config.vocab))


@pytest.fixture(scope="module")
def random(tmp_path_factory):
    """Random weights beside a byte-level BPE whose merges straddle the markers' ends."""
    directory, tokenizer = tmp_path_factory.mktemp("random"), merging()
    write(directory, LLAMA, vocab_size=tokenizer.get_vocab_size(), max_position_embeddings=1024)
    tokenizer.save(str(directory / "tokenizer.json"))
    return skipkv.load(directory, threads=1, progress=False)


def expected(model, ids):
    """Of fed tokens: (thinking, answer, positions that scope="think" steers)."""
    texts = [model.tokenizer.token_texts[i] for i in ids]
    states = spec.think_states(texts)
    steered = [t for t in range(len(ids)) if states[t] == "inside" and texts[t - 1 : t + 1] == ["\n", "\n"]]
    return (states == "inside").sum(), (states == "after").sum(), steered


@pytest.mark.parametrize("text", [
    "<think>\n4.</think>\nb", "<think>\na)</think>\n\nb", "<think>\n\n\"</think>\nb", "<think>\na\n</think>So b",
    "<think>\na\n</think><answer>4", "x.<think>\na\n\nb", "é<think>語</think>🙂\n\n",
    "a</think>b<think></think><think>c\n\nd", ".<think>\n\na\n\nb4.</think>So\n\nc<think>(d\n\n)</think>",
])  # fmt: skip
def test_replay_counts_and_steers_by_the_text(random, text):
    ids = random.encode(text)
    out = random.replay(ids, steering=Steering(np.ones(16), 1, gamma=0.0), trace=True)
    thinking, answer, steered = expected(random, ids)
    assert (out.stats.thinking_tokens, out.stats.answer_tokens) == (thinking, answer)
    assert sorted(out.trace.alphas) == steered and thinking > 0


def test_generation_counts_from_the_prompts_marker_on(random):
    for prompt, counts in (("x.<think>", (19, 0)), ("x.<think>4.</think>So", (4, 20))):  # >4 .< / th ink >S o
        [out] = run(random, [prompt], max_new_tokens=20, stop_ids=())
        assert (out.stats.thinking_tokens, out.stats.answer_tokens) == counts
        assert expected(random, out.prompt_tokens + out.tokens[:-1])[:2] == counts


@pytest.mark.parametrize("method", ["full", "skipkv:budget=136,interval=32,tau=0.8"])
def test_merged_markers_say_what_markers_of_their_own_say(model, merged, method):
    """The same ids, so the same tokens; steering by N_o inside of thinking, and every count."""
    ids = model.encode(PROBLEMS[0])
    steering = Steering.load("tiny", alpha=0.75, gamma=0.01)
    one, other = (run(m, [ids], method, steering, max_new_tokens=900, trace=True)[0] for m in (model, merged))
    assert other.tokens == one.tokens and other.trace.alphas == one.trace.alphas
    stats = [asdict(out.stats) | {"seconds": 0} for out in (one, other)]
    assert stats[0] == stats[1]
    assert min(other.stats.thinking_tokens, other.stats.answer_tokens, other.stats.thoughts, other.stats.steered) > 3


def test_the_brake_ends_a_thinking_that_a_merged_marker_began(merged, model):
    method = skipkv.SkipKV(2000, tau=-1.0, interval=16)  # every sentence but the first repeats one
    out = run(merged, [model.encode(PROBLEMS[0])], method, brake=2, trace=True, max_new_tokens=250)[0]
    forced = merged.encode("</think>")
    at = next(t for t in range(len(out.tokens)) if out.tokens[t : t + 3] == forced)
    assert len(forced) == 3 and out.stats.braked > 0
    thinking, answer, _ = expected(merged, out.prompt_tokens + out.tokens[:-1])
    assert (out.stats.thinking_tokens, out.stats.answer_tokens) == (thinking, answer)
    assert thinking == 1 + at + 2  # the prompt's line break, what was generated, two of the three tokens


@pytest.mark.parametrize("text, steps", [
    ("x.<think>a\n\nb1\n\nWait, c.</think>So\n\nd", ["b1\n\n", "Wait, c."]),
    ("a\n\nb1\n\nWait, c.</think>So\n\nd\n\n<", ["b1\n\n", "Wait, c."]),  # as if it began to think
    ("x<think>a\n\nb.<think>c\n\nd1\n\n</think>", ["b.", "d1\n\n"]),
    ("x<think>a\n\nb</thi", ["b</thi"]),
])  # fmt: skip
def test_a_step_ends_where_a_marker_begins(random, text, steps):
    ids = random.encode(text)
    found = vectors.steps(random, ids)
    assert [step.text for step in found] == steps
    texts = [random.tokenizer.token_texts[i] for i in ids]
    for step in found:
        assert texts[step.before] == "\n" and "".join(texts[step.before + 1 :]).startswith(step.text)
