"""§4, §7 of the specification by hand: sentences, repeats, steering strength."""

import math

import numpy as np
import pytest

import spec


def words(text):
    """Tokens of a made-up tokenizer: '|' separates them. Ids are their places."""
    texts = text.split("|")
    return list(range(len(texts))), texts


def test_delimiters_extend_and_colons_join():
    ids, texts = words("\n|\n|A| is:\n|b|.\n|\n\n|\n|Wa|it|,| c|\n|open")
    got = spec.segment(ids, texts)
    np.testing.assert_array_equal(got.spans, [[0, 1], [2, 7], [8, 12]])
    np.testing.assert_array_equal(got.closed, [0, 5, 12])
    np.testing.assert_array_equal(got.labels, [0, 0, 1])
    official = spec.segment(ids, texts, delimiters={0, 1, 5, 6, 7, 12}, markers={9, 2}, compat="official")
    np.testing.assert_array_equal(official.spans, [[0, 0], [1, 1], [2, 5], [6, 6], [7, 7], [8, 12]])
    np.testing.assert_array_equal(official.labels, [0, 0, 1, 0, 0, 1])


@pytest.mark.parametrize(
    "text, label",
    [
        (" Wait|.\n", 1),
        ("wait|.\n", 1),
        ("WAIT|.\n", 0),
        ("Again|.\n", 0),
        (" again |.\n", 1),
        ("alt|ern|atively|.\n", 1),
        ("a|lt|ern|atively|.\n", 0),
        (" wait|ing|.\n", 1),  # a token that is the word counts whatever follows
        (" w|ait|.\n", 1),
    ],
)
def test_markers(text, label):
    assert spec.segment(*words(text)).labels.tolist() == [label]


def test_official_prompt_counts_its_first_marker_only():
    ids, texts = words("a|Wait|.\n|Wait|.\n|Wait|.\n")
    labels = [
        spec.segment(ids, texts, delimiters={2, 4, 6}, markers={1, 3, 5}, n_prompt=n, compat="official").labels
        for n in (0, 5, 7)
    ]
    np.testing.assert_array_equal(labels, [[1, 1, 1], [1, 0, 1], [1, 0, 0]])


def test_sentence_vector_includes_the_delimiter_that_closed_and_no_later_one():
    sentences = spec.segment(*words("a|b|.\n|\n|c|\n|open"))
    hidden = np.array([[1.0, 0], [0, 1], [2, 3], [100, 0], [-1, 0], [-1, 0], [7, 7]])
    np.testing.assert_allclose(spec.sentence_vectors(hidden, sentences), [[0.6, 0.8], [-1, 0]])


def test_flags_go_to_the_earlier_sentence():
    angle = np.radians([0, 60, 10, 15])
    vectors = np.column_stack([np.cos(angle), np.sin(angle)])
    cos = {a: math.cos(math.radians(a)) for a in (5, 10, 15)}
    np.testing.assert_allclose(spec.flag_repeats(vectors, 0.95), [cos[10], 0, cos[5], 0])
    np.testing.assert_allclose(spec.flag_repeats(vectors, 0.95, compat="official"), [cos[15], 0, cos[5], 0])


THINK = ([[100, 101]], [[102]])  # <think> is two tokens, </think> one
STEER_TEXTS = {100: "<thi", 101: "nk>", 102: "</think>", 0: "x", 1: " Wait", 2: ".\n\n", 3: ":\n\n", 4: ".\n"}


def test_alpha_counts_the_sentence_that_this_token_closes():
    ids = [1, 2, 100, 101, 1, 0, 2, 0, 3, 1, 4, 0, 2, 102, 1, 2]
    texts = [STEER_TEXTS[i] for i in ids]
    steering = spec.Steering(np.ones(1), layer=0, alpha=1.0, gamma=0.5, alpha_max=1.9)

    def alphas(scope, n_prompt=0):
        s = spec.Steering(np.ones(1), 0, steering.alpha, steering.gamma, steering.alpha_max, scope)
        got = [
            spec.steering_alpha(s, ids[: t + 1], texts[: t + 1], THINK, n_prompt=n_prompt) for t in range(len(ids))
        ]
        return {t: a for t, a in enumerate(got) if a is not None}

    # inside: 4 … 12. The delimiter at 6 closes the first thought, 10 the second (":\n\n" at 8 is no delimiter but has
    # a blank line); the marked sentences outside count nowhere
    assert alphas("think") == {6: 1.5, 8: 1.5, 12: 1.9}
    assert alphas("generation", n_prompt=8) == {8: 1.5, 12: 1.9, 15: 1.9}
    assert alphas("generation", n_prompt=9) == {12: 1.9, 15: 1.9}
    assert alphas("all") == {1: 1.0, 6: 1.5, 8: 1.5, 12: 1.9, 15: 1.9}
