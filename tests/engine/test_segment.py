"""segment and flag_repeats on arrays against the reference, and the released code's deviations in them."""

import harness
import numpy as np
import pytest
import spec
from harness import TEXTS
from hypothesis import given, settings
from hypothesis import strategies as st

import skipkv

pytestmark = pytest.mark.sanitize

SETTINGS = settings(max_examples=300, deadline=None, print_blob=True)
IDS = st.lists(st.integers(0, len(TEXTS) - 1), max_size=60)
PIECES = ["alt", "ernat", "ively", "Alternat", " ", "  ", "Wai", "t", "aga", "in", "i", "n", "\n", ".\n\n", ":\n",
          ": \n", "x", "Wait", " Again", "again "]  # fmt: skip


def assert_same_sentences(got, want):
    assert got.spans.tolist() == want.spans.tolist()
    assert got.labels.tolist() == want.labels.tolist()
    assert got.closed.tolist() == want.closed.tolist()


@SETTINGS
@given(IDS)
def test_segment_equals_the_reference(ids):
    texts = [TEXTS[i] for i in ids]
    assert_same_sentences(skipkv.segment(ids, texts), spec.segment(ids, texts))


@SETTINGS
@given(st.lists(st.sampled_from(PIECES), max_size=40))
def test_markers_in_pieces_equal_the_reference(texts):
    ids = [PIECES.index(text) for text in texts]
    assert_same_sentences(skipkv.segment(ids, texts), spec.segment(ids, texts))


@settings(SETTINGS, max_examples=100)
@given(IDS, IDS.map(set), IDS.map(set), st.integers(0, 60))
def test_segment_by_ids_and_the_official_rules(ids, delimiters, markers, n_prompt):
    texts, chosen = [TEXTS[i] for i in ids], {"delimiters": delimiters, "markers": markers}
    for some in (chosen, {"delimiters": delimiters}, {"markers": markers}):
        assert_same_sentences(skipkv.segment(ids, texts, **some), spec.segment(ids, texts, **some))
    official = chosen | {"n_prompt": min(n_prompt, len(ids)), "compat": "official"}
    assert_same_sentences(skipkv.segment(ids, texts, **official), spec.segment(ids, texts, **official))


def test_compat_empty_sentences_and_prompt_marker_one_by_one():
    texts = ["a", " Wait", ".\n", "\n", " Wait", ".\n", "b", "\n"]
    chosen = {"delimiters": [2, 3, 5, 7], "markers": [1, 4], "n_prompt": 6}

    def found(compat):
        got = skipkv.segment(range(8), texts, compat=compat, **chosen)
        return got.spans.tolist(), got.labels.tolist()

    assert found(None) == ([[0, 3], [4, 5], [6, 7]], [1, 1, 0])
    assert found("empty-sentences") == ([[0, 2], [3, 3], [4, 5], [6, 7]], [1, 0, 1, 0])
    assert found("prompt-marker") == ([[0, 3], [4, 5], [6, 7]], [1, 0, 0])
    both = ([[0, 2], [3, 3], [4, 5], [6, 7]], [1, 0, 0, 0])
    assert found(["prompt-marker", "empty-sentences"]) == found("official") == both


@settings(SETTINGS, max_examples=100)
@given(st.integers(0, 2**32), st.integers(0, 30), st.sampled_from([1, 3, 32, 70]),
       st.sampled_from([0.95, 0.5, 0.0, -1.0, 1.01]))  # fmt: skip
def test_flags_equal_the_reference(seed, n, dim, tau):
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(n, dim))
    for j in range(1, n):
        if rng.random() < 0.5:
            vectors[j] = vectors[rng.integers(j)] + rng.choice([0, 0.1, 0.3]) * rng.normal(size=dim)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    vectors = vectors.astype(np.float32)
    pairs = (vectors.astype(np.float64) @ vectors.T.astype(np.float64))[np.triu_indices(n, 1)]
    if np.abs(pairs - tau).min(initial=1) < 1e-6:
        return  # §9: such a cosine may fall either way (dimension 1 at τ = ±1)
    for compat, official in ((None, None), ("latest-flag", "official"), ("official", "official")):
        got = skipkv.flag_repeats(vectors, tau, compat=compat)
        want = spec.flag_repeats(vectors, tau, compat=official)
        assert got.dtype == np.float32
        # λ to 1e-5 relative; a sum of up to 70 products near 0 has an absolute error instead
        assert harness.close(got, want, 1e-5, 1e-6) <= 1, compat
