"""§4, §7 by hand, of the specification and of the engine: sentences, repeats, steering strength."""

import math

import numpy as np
import pytest

import skipkv
import spec


@pytest.fixture(params=[spec, skipkv], ids=["spec", "engine"])
def who(request):
    """Both have `segment` and `flag_repeats`."""
    return request.param


def words(text):
    """Tokens of a made-up tokenizer: '|' separates them. Ids are their places."""
    texts = text.split("|")
    return list(range(len(texts))), texts


def test_delimiters_extend_and_colons_join(who):
    ids, texts = words("\n|\n|A| is:\n|b|.\n|\n\n|\n|Wa|it|,| c|\n|open")
    got = who.segment(ids, texts)
    np.testing.assert_array_equal(got.spans, [[0, 1], [2, 7], [8, 12]])
    np.testing.assert_array_equal(got.closed, [0, 5, 12])
    np.testing.assert_array_equal(got.labels, [0, 0, 1])
    official = who.segment(ids, texts, delimiters={0, 1, 5, 6, 7, 12}, markers={9, 2}, compat="official")
    np.testing.assert_array_equal(official.spans, [[0, 0], [1, 1], [2, 5], [6, 6], [7, 7], [8, 12]])
    np.testing.assert_array_equal(official.labels, [0, 0, 1, 0, 0, 1])


@pytest.mark.parametrize("text, label", [
    (" Wait|.\n", 1), ("wait|.\n", 1), ("WAIT|.\n", 0), ("Again|.\n", 0), (" again |.\n", 1),
    ("alt|ern|atively|.\n", 1), ("a|lt|ern|atively|.\n", 0), (" w|ait|.\n", 1),
    (" wait|ing|.\n", 1),  # a token that is the word counts whatever follows
])  # fmt: skip
def test_markers(who, text, label):
    assert who.segment(*words(text)).labels.tolist() == [label]


@pytest.mark.parametrize("text, delimiters, labels", [
    ("Alter|natively|.", [2], [1]),
    ("Alter|natively|.", [0, 2], [0, 0]),
    ("a|ga|in|.", [3], [1]),
    ("a|ga|in|.", [0, 3], [0, 0]),
    ("a|ga|in|.", [1, 3], [0, 0]),
    ("x|a|ga|in", [0, 3], [0, 1]),
])  # fmt: skip
def test_a_marker_does_not_span_sentences(who, text, delimiters, labels):
    assert who.segment(*words(text), delimiters=delimiters).labels.tolist() == labels


def test_official_prompt_counts_its_first_marker_only(who):
    ids, texts = words("a|Wait|.\n|Wait|.\n|Wait|.\n")
    labels = [
        who.segment(ids, texts, delimiters={2, 4, 6}, markers={1, 3, 5}, n_prompt=n, compat="official").labels
        for n in (0, 5, 7)
    ]
    np.testing.assert_array_equal(labels, [[1, 1, 1], [1, 0, 1], [1, 0, 0]])


def test_sentence_vector_includes_the_delimiter_that_closed_and_no_later_one():
    sentences = spec.segment(*words("a|b|.\n|\n|c|\n|open"))
    hidden = np.array([[1.0, 0], [0, 1], [2, 3], [100, 0], [-1, 0], [-1, 0], [7, 7]])
    np.testing.assert_allclose(spec.sentence_vectors(hidden, sentences), [[0.6, 0.8], [-1, 0]])


def test_flags_go_to_the_earlier_sentence(who):
    angle = np.radians([0, 60, 10, 15])
    vectors = np.column_stack([np.cos(angle), np.sin(angle)])
    cos = {a: math.cos(math.radians(a)) for a in (5, 10, 15)}
    np.testing.assert_allclose(who.flag_repeats(vectors, 0.95), [cos[10], 0, cos[5], 0], rtol=1e-6)
    np.testing.assert_allclose(who.flag_repeats(vectors, 0.95, compat="official"), [cos[15], 0, cos[5], 0], 1e-6)


STEER_TEXTS = {100: "<thi", 101: "nk>", 102: "</think>", 0: "x", 1: " Wait", 2: ".\n\n", 3: ":\n\n", 4: ".\n"}


def test_alpha_counts_the_sentence_that_this_token_closes():
    ids = [1, 2, 100, 101, 1, 0, 2, 0, 3, 1, 4, 0, 2, 102, 1, 2]
    texts = [STEER_TEXTS[i] for i in ids]
    steering = spec.Steering(np.ones(1), layer=0, alpha=1.0, gamma=0.5, alpha_max=1.9)

    def alphas(scope, n_prompt=0):
        s = spec.Steering(np.ones(1), 0, steering.alpha, steering.gamma, steering.alpha_max, scope)
        got = [spec.steering_alpha(s, ids[: t + 1], texts[: t + 1], n_prompt=n_prompt) for t in range(len(ids))]
        return {t: a for t, a in enumerate(got) if a is not None}

    # inside: 4 … 12. The delimiter at 6 closes the first thought, 10 the second (":\n\n" at 8 is no delimiter but has
    # a blank line); the marked sentences outside count nowhere
    assert alphas("think") == {6: 1.5, 8: 1.5, 12: 1.9}
    assert alphas("generation", n_prompt=8) == {8: 1.5, 12: 1.9, 15: 1.9}
    assert alphas("generation", n_prompt=9) == {12: 1.9, 15: 1.9}
    assert alphas("all") == {1: 1.0, 6: 1.5, 8: 1.5, 12: 1.9, 15: 1.9}
