"""<think> and </think> in the text of the fed tokens, whatever their split, against a plain search in that text."""

from pathlib import Path

import harness
import numpy as np
import pytest
import spec
import tokenizers
from checkpoints import merging
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models

import skipkv
from skipkv import _skipkv, sentences
from skipkv.load.tokenizer import Tokenizer

pytestmark = pytest.mark.sanitize

SETTINGS = settings(max_examples=100, deadline=None, print_blob=True)
SMOLLM2 = Path.home() / ".cache" / "skipkv" / "models" / "SmolLM2-135M-Instruct"
NEIGHBOURS = ["", "\n", "\n\n", "é", "語", "🙂", "</", "think>", *map(chr, range(0x20, 0x7F))]
PARTS = ["<think>", "</think>", "<", "</", "<th", "think", ">", "k>", "<think", "/think>", *NEIGHBOURS]


def fallback():
    """As converted from sentencepiece: bytes for other characters, those of the markers' ends among them."""
    merges = [("t", "h"), ("i", "n"), ("in", "k"), ("th", "ink"), ("▁", "t")]
    tokens = [*(f"<0x{byte:02X}>" for byte in range(256)), *"▁think.", *("".join(pair) for pair in merges)]
    result = tokenizers.Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, merges, byte_fallback=True))
    result.normalizer = tokenizers.normalizers.Replace(" ", "▁")
    result.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return result


@pytest.fixture(scope="module", params=["smollm2", "merging", "fallback"])
def read(request, tmp_path_factory):
    """(tokenizer, the core's view of it)."""
    directory, vocab = SMOLLM2, 49152
    if request.param != "smollm2":
        raw = {"merging": merging, "fallback": fallback}[request.param]()
        directory, vocab = tmp_path_factory.mktemp("tokenizer"), raw.get_vocab_size()
        raw.save(str(directory / "tokenizer.json"))
    elif not SMOLLM2.exists():
        pytest.skip(f"needs a SmolLM2-135M-Instruct in {SMOLLM2}")
    tokenizer = Tokenizer(directory, vocab)
    return tokenizer, sentences.vocabulary(tokenizer)


def check(vocabulary, pieces, ids, n_prompt=1):
    """Where these tokens stand: in a session, fed one by one and in chunks, and on arrays. pieces: [vocab] bytes."""
    states = spec.think_states([pieces[i].decode("latin-1") for i in ids])
    assert sentences.thinking(ids, vocabulary).tolist() == (states == "inside").tolist()
    model, _ = harness.build(vocab=len(pieces), context=1 << 14)
    session = _skipkv.Session(model, method=harness.make("full").as_dict((2, 2)), vocabulary=vocabulary)
    for step in (1, 7):
        row, at = session.open(len(ids) + 1, n_prompt=n_prompt), 0
        while at < len(ids):
            part = np.array(ids[at : at + session.chunk(row, min(step, len(ids) - at))], np.int32)
            session.forward(np.array([[row, len(part)]], np.int32), part)
            at += len(part)
            for name, where in (("thinking_tokens", "inside"), ("answer_tokens", "after")):
                assert session.state(row)[name] == (states[:at] == where).sum()
        session.close(row)
    return states


def check_text(read, prompt, generated):
    """Of a prompt and what was generated behind it, each encoded on its own."""
    tokenizer, vocabulary = read
    parts = [tokenizer.encode(text, add_special_tokens=False) for text in (prompt, generated)]
    ids, pieces = sum(parts, []), tokenizer.token_bytes
    assert b"".join(pieces[i] for i in ids).decode() == prompt + generated
    states = check(vocabulary, pieces, ids, len(parts[0]))
    found = skipkv.segment(ids, [tokenizer.token_texts[i] for i in ids])
    assert found.inside.dtype == bool and found.inside.tolist() == (states == "inside").tolist()
    return states


@pytest.mark.parametrize("place", ["one text", "a prompt ends in a marker", "a generation begins with one"])
def test_markers_beside_every_neighbour(read, place):
    if place == "one text":
        pairs = [pair for c in NEIGHBOURS for pair in ((c, ""), ("", c), (c, c))]
        text = "".join(f"{before}<think>{after}x 1{before}</think>{after}y" for before, after in pairs)
        assert {*check_text(read, "x", text)} == {"", "inside", "after"}
        return
    for c in NEIGHBOURS[::3]:
        whole = f"a{c}<think>{c}b"
        for cut in range(whole.index("<think>"), len(whole)) if "prompt" in place else [1]:
            assert "after" in check_text(read, whole[:cut], f"{whole[cut:]}c{c}</think>{c}dd")


@SETTINGS
@given(parts=st.lists(st.sampled_from(PARTS), max_size=30), cut=st.integers(0, 200))
def test_texts_rich_in_markers_cut_into_prompt_and_generation(read, parts, cut):
    text = "".join(parts)
    check_text(read, text[:cut], text[cut:])


@SETTINGS
@given(st.lists(st.sampled_from([b"<", b"/", b"think", b">", b"<think>", b"</think>", b"t", b"\n", b"\0", b"\xc3",
                                 b"\xa9", b"\xff"]), max_size=40).map(b"".join),
       st.lists(st.integers(0, 200), max_size=62))  # fmt: skip
def test_bytes_cut_at_random_places(raw, cuts):
    """Tokens of any bytes: without a text, part of a character, one or several markers."""
    edges = [0, *sorted(min(cut, len(raw)) for cut in cuts), len(raw)]
    pieces = [raw[a:b] for a, b in zip(edges, edges[1:], strict=False)]
    ids = list(range(len(pieces)))
    pieces += [b""] * (64 - len(pieces))
    flags, runs = sentences.classify([""] * 64)
    check((flags, runs, *sentences.joined(pieces)), pieces, ids)


@pytest.mark.parametrize("starts", [
    [0, 3, 2, 6], [1, 2, 3, 6], [0, 2, 3, 7], [0, 2, 3, 5], [0, -1, 3, 6], [0, 9, 9, 6],
])  # fmt: skip
def test_starts_that_part_no_bytes_are_refused(starts):
    flags, runs = sentences.classify(["a", "b", "c"])
    words = (flags, runs, np.zeros(6, np.uint8), np.array(starts, np.int64))
    with harness.refused("tokens' starts: expected from 0 to 6, ascending; found others"):
        _skipkv.segment(np.zeros(1, np.int32), words, 3, 0, 0)
