"""The vocabulary that sentences are read with, of real tokenizers and of one like Qwen's; sentences of real traces."""

import json
from pathlib import Path

import numpy as np
import pytest
import spec
from checkpoints import byte_level

import skipkv
from skipkv import Steering, sentences
from skipkv.load.tokenizer import Tokenizer

SHARED = Path(__file__).parents[3] / "shared" / "data"
SMOLLM2 = Path.home() / ".cache" / "skipkv" / "models" / "SmolLM2-135M-Instruct"


def test_a_blank_line_of_two_tokens_is_steered_at_the_second():
    if not SMOLLM2.exists():
        pytest.skip(f"needs a SmolLM2-135M-Instruct in {SMOLLM2}")
    model = skipkv.load(SMOLLM2, progress=False)
    ids = model.encode("<think>\na.\n\nb\nc\n\n\nd")
    texts = [model.tokenizer.token_texts[i] for i in ids]
    pairs = [t for t in range(2, len(ids)) if texts[t - 1 : t + 1] == ["\n", "\n"] and texts[t - 2] != "\n"]
    assert len(pairs) == 1  # this tokenizer has a token for two newlines only where a third one follows
    expected = sorted(pairs + [t for t, text in enumerate(texts) if "\n\n" in text])
    assert np.flatnonzero(sentences.blank_lines(ids, model.vocabulary)).tolist() == expected and len(expected) == 2
    steering = Steering(np.ones(model.config.hidden), 3, scope="all", gamma=0.0)
    run = model.replay(ids, steering=steering, trace=True, logits=True)
    assert sorted(run.trace.alphas) == expected
    assert not np.array_equal(run.logits, model.replay(ids, logits=True).logits)


@pytest.fixture(scope="module")
def qwen_like(tmp_path_factory):
    """A byte-level BPE that merges newlines with what is before them, as Qwen's does."""
    lines = ["<think>\nSo x = 3.\n\nWait, (x)\n again?\n\n</think>\n\n",
             "Alternative nativ ely Alternatively wait: \n"] * 10  # fmt: skip
    raw = byte_level(r" ?[^\s\w]+\n*|\s*\n+|\s+(?!\S)| ?\w+|\s+", corpus=lines)
    directory = tmp_path_factory.mktemp("qwen")
    raw.save(str(directory / "tokenizer.json"))
    return Tokenizer(directory, 420)


@pytest.fixture(scope="module")
def smollm2():
    if not SMOLLM2.exists():
        pytest.skip(f"needs a SmolLM2-135M-Instruct in {SMOLLM2}")
    return Tokenizer(SMOLLM2, 49152)


@pytest.fixture(params=["qwen_like", "smollm2"])
def tokenizer(request):
    return request.getfixturevalue(request.param)


def test_delimiters_and_markers_of_a_vocabulary(tokenizer):
    flags, runs, _, _ = sentences.vocabulary(tokenizer)
    texts = tokenizer.token_texts
    delimiters = [texts[i] for i in np.flatnonzero(flags & sentences.DELIMITER)]
    assert delimiters and all(text.endswith("\n") and not text.rstrip().endswith(":") for text in delimiters)
    for i in np.flatnonzero(flags & sentences.MARKER):
        assert texts[i].strip(" ").lower() in ("wait", "alternatively", "again")
    for run in runs[:: max(1, len(runs) // 200)]:
        assert "".join(texts[i] for i in run if i >= 0).strip(" ").lower() in ("wait", "alternatively", "again")
    assert all("\n\n" in texts[i] for i in np.flatnonzero(flags & sentences.PARAGRAPH))


def test_official_sets_are_the_last_ids(tokenizer):
    delimiters, markers = sentences.official_ids(tokenizer)
    assert delimiters == {tokenizer.encode(s, add_special_tokens=False)[-1] for s in sentences.OFFICIAL_DELIMITERS}
    flags, runs, _, _ = sentences.vocabulary(tokenizer, "official", "official")
    assert set(np.flatnonzero(flags & sentences.DELIMITER)) == delimiters and len(runs) == 0
    assert set(np.flatnonzero(flags & sentences.MARKER)) == markers


@pytest.mark.skipif(not SHARED.exists(), reason="needs the recorded traces beside the repository")
def test_spans_and_labels_of_real_traces(tokenizer):
    vocabulary = sentences.vocabulary(tokenizer)
    n_sentences = n_labelled = 0
    for file in sorted(SHARED.glob("traces_*.jsonl")):
        for line in file.read_text(encoding="utf-8").splitlines()[:4]:
            ids = tokenizer.encode(json.loads(line)["output"][:6000], add_special_tokens=False)
            texts = [tokenizer.token_texts[i] for i in ids]
            expected = spec.segment(ids, texts)
            from_core = skipkv._skipkv.segment(np.array(ids, np.int32), vocabulary, tokenizer.vocab, 0, 0)
            on_arrays = skipkv.segment(ids, texts)
            for spans, labels, closed in (from_core[:3], (on_arrays.spans, on_arrays.labels, on_arrays.closed)):
                assert np.array_equal(spans, expected.spans)
                assert np.array_equal(labels, expected.labels)
                assert np.array_equal(closed, expected.closed)
            # Every token up to the last delimiter lies in exactly one span.
            covered = [t for first, last in expected.spans for t in range(first, last + 1)]
            assert covered == list(range(len(covered)))
            assert not any(sentences.is_delimiter(text) for text in texts[len(covered) :])
            n_sentences += len(labels)
            n_labelled += int(labels.sum())
    assert n_sentences > 100 and 0 < n_labelled < n_sentences
