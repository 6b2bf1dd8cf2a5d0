"""Fidelity to the full cache on recorded texts: the figures from the logits, what is counted, and the tables."""

import json

import numpy as np
import pytest
from checkpoints import LLAMA, write, write_tokenizer
from generations import PROBLEMS
from harness import refused

import skipkv
from skipkv import Steering, parse_method
from skipkv.eval import Table, bootstrap, compare
from skipkv.eval.fidelity import table
from skipkv.load.texts import json_lines
from skipkv.load.texts import read_texts as read

STEERING = Steering(np.full(256, 0.05), 1, scope="generation")


@pytest.fixture(scope="module")
def texts(model):
    """Recorded texts of 43 + 120, 54 + 60 and 43 + 90 tokens; the second is never compacted at a budget of 116."""
    outs = [model.generate(PROBLEMS[i], max_new_tokens=n, progress=False)[0] for i, n in ((0, 120), (9, 60), (3, 90))]
    return [out.prompt_tokens + out.tokens for out in outs], [len(out.prompt_tokens) for out in outs]


def log_softmax(logits):
    wide = logits.astype(np.float64)
    return wide - np.log(np.exp(wide - wide.max(1, keepdims=True)).sum(1, keepdims=True)) - wide.max(1, keepdims=True)


def expected(model, texts, prompts, method, steering=None, reference=None, **reference_cache):
    """(sums of nll, nll over full's, kl, same best token; positions) of each text; None where nothing was compacted."""
    found = []
    for i, (ids, n_prompt) in enumerate(zip(texts, prompts, strict=True)):
        full = (reference or model).replay(ids, n_prompt=n_prompt, logits=True, **reference_cache).logits
        run = model.replay(ids, method, steering, n_prompt=n_prompt, sequence=(i, 0), logits=True, trace=True)
        steps = run.trace.steps
        if method.compacts and (not steps or steps[0] >= len(ids) - 1):
            found.append(None)
            continue
        first = steps[0] if steps else 0
        p, q = log_softmax(full[first:-1]), log_softmax(run.logits[first:-1])
        at = np.arange(len(q)), ids[first + 1 :]
        same = (p.argmax(1) == q.argmax(1)).sum()
        found.append((-q[at].sum(), (p - q)[at].sum(), (np.exp(p) * (p - q)).sum(), same, len(p)))
    return found


RUNS = ["skipkv:budget=40,interval=32", "streaming:budget=116,interval=16", "random:budget=40"]


@pytest.mark.parametrize("text", RUNS)
@pytest.mark.parametrize("steering", [None, STEERING])
def test_figures_are_means_over_the_positions_behind_a_texts_first_compaction(model, texts, text, steering):
    method = parse_method(text)
    [found] = compare(model, texts[0], [(method, steering)], prompts=texts[1], progress=False)
    sums = [s for s in expected(model, *texts, method, steering) if s]
    nll, delta, kl, same, n = np.sum(sums, axis=0)
    assert (found.texts, found.positions) == (len(sums), n)
    assert found.texts == (2 if "116" in text else 3)
    # Logits and their logarithms are float32 in the run, float64 here.
    assert found.nll[0] == pytest.approx(nll / n, rel=1e-4)
    assert found.delta_nll[0] == pytest.approx(delta / n, abs=1e-6) and abs(found.delta_nll[0]) > 1e-5
    assert found.kl[0] == pytest.approx(kl / n, rel=1e-3, abs=1e-7) and found.kl[0] > 1e-4
    assert found.same[0] == pytest.approx(same / n)
    assert all(low <= mean <= high for mean, low, high in (found.nll, found.delta_nll, found.kl, found.same))
    peaks = [
        model.replay(ids, method, n_prompt=n_prompt, sequence=(i, 0)).stats.peak_bytes
        for i, (ids, n_prompt) in enumerate(zip(*texts, strict=True))
    ]
    assert found.peak_bytes == max(peaks)


def test_full_is_itself_and_counts_everything(model, texts):
    [found] = compare(model, texts[0], [(parse_method("full"), None)], prompts=texts[1], progress=False)
    assert found.delta_nll == found.kl == (0.0, 0.0, 0.0) and found.same == (1.0, 1.0, 1.0)
    positions = sum(len(t) - 1 for t in texts[0])
    assert (found.run, found.texts, found.positions) == ("full", 3, positions)
    nll = sum(s[0] for s in expected(model, *texts, parse_method("full")))
    assert found.nll[0] == pytest.approx(nll / positions, rel=1e-5)
    [steered] = compare(model, texts[0], [(parse_method("full"), STEERING)], prompts=texts[1], progress=False)
    assert steered.run == "full+steer:layer=1,alpha=1" and steered.kl[0] > 0 and steered.positions == positions


@pytest.mark.parametrize("dtype", ["q8", "bf16a16"])
@pytest.mark.parametrize("text", ["full", RUNS[0]])
def test_another_type_is_held_against_the_reference(texts, dtype, text):
    model, reference = (skipkv.load("tiny", dtype=name, progress=False) for name in (dtype, "f32"))
    method, options = parse_method(text), {"reference": reference, "reference_cache": "f32"}
    [found] = compare(model, texts[0], [(method, None)], prompts=texts[1], progress=False, **options)
    sums = np.array(expected(model, *texts, method, reference=reference, cache="f32"), float).sum(0)
    nll, delta, kl, same = sums[:4] / sums[4]
    assert (found.texts, found.positions) == (3, sums[4])
    assert found.nll[0] == pytest.approx(nll, rel=1e-4) and found.delta_nll[0] == pytest.approx(delta, abs=1e-6)
    assert found.kl[0] == pytest.approx(kl, rel=1e-3, abs=1e-7) and found.kl[0] > 1e-6
    assert found.same[0] == pytest.approx(same)
    options = {"cache": "q8", "reference": model, "reference_cache": "q8"}
    [itself] = compare(model, texts[0], [(parse_method("full"), None)], prompts=texts[1], progress=False, **options)
    assert itself.kl == (0.0, 0.0, 0.0)


def test_the_cost_of_a_cache_alone(model, texts):
    options = {"prompts": texts[1], "progress": False, "cache": "q8", "reference_cache": "bf16"}
    [found] = compare(model, texts[0], [(parse_method("full"), None)], **options)
    assert 0 < found.kl[0] < 0.1 and found.texts == 3


def test_a_reference_that_cannot_be_one_is_refused(model, texts, tmp_path):
    runs = [(parse_method("full"), None)]
    write(tmp_path)
    write_tokenizer(tmp_path, LLAMA["vocab_size"])
    other, n = skipkv.load(tmp_path, progress=False), model.config.vocab
    with refused(f"reference has {other.config.vocab} tokens in its vocabulary; the model has {n}"):
        compare(model, texts[0], runs, reference=other, progress=False)
    with refused("reference_cache is 'q4'; allowed: 'bf16', 'f32', 'q8'"):
        compare(model, texts[0], runs, reference_cache="q4", progress=False)


@pytest.mark.parametrize("name", ["skipkv", "h2o", "streaming"])
def test_a_budget_beyond_every_text_is_exact_and_reported_as_never_compacted(model, texts, name):
    runs = [(parse_method(f"{name}:budget={budget},interval=32"), None) for budget in (163, 50)]
    wide, narrow = compare(model, texts[0], runs, prompts=texts[1], progress=False)
    assert wide.kl == (0.0, 0.0, 0.0) and wide.same == (1.0, 1.0, 1.0)
    assert wide.texts == 0 and wide.positions == sum(len(t) - 1 for t in texts[0])
    assert narrow.texts == 3 and narrow.kl[0] > 0 and narrow.positions < wide.positions
    lines = str(table([wide, narrow])).splitlines()
    assert lines[1].startswith(f"{name}:budget=163,interval=32 (never compacted)  ") and "never" not in lines[2]


def test_virtual_sets_change_nothing(model, texts):
    [found] = compare(model, texts[0], [(parse_method("rkv:budget=40,evict=false"), None)], progress=False)
    assert found.kl[0] == 0.0 and found.same[0] == 1.0 and found.texts == 2  # 113 tokens have no point of the grid


def test_runs_keep_their_order_and_change_nothing_in_each_other(model, texts):
    runs = [(parse_method(t), None) for t in ("rkv:budget=40", "full", "snapkv:budget=40")]
    together = compare(model, texts[0], runs, prompts=texts[1], progress=False)
    assert [f.run for f in together] == ["rkv:budget=40", "full", "snapkv:budget=40"]
    for run, found in zip(runs, together, strict=True):
        assert compare(model, texts[0], [run], prompts=texts[1], progress=False) == [found]
    assert compare(model, texts[0], runs[:1], prompts=texts[1], seed=1, progress=False)[0].kl[0] == together[0].kl[0]


def test_random_scores_each_text_with_noise_of_its_own(model, texts):
    method = parse_method("random:budget=40,interval=32")
    ids, n_prompt = texts[0][0], texts[1][0]
    once, twice = ([ids] * n for n in (1, 2))
    [a] = compare(model, once, [(method, None)], prompts=[n_prompt], progress=False)
    [b] = compare(model, twice, [(method, None)], prompts=[n_prompt] * 2, progress=False)
    assert a.kl[0] != b.kl[0] and a.kl[1] == a.kl[2] and b.kl[1] < b.kl[2]


def test_flagged_is_a_share_of_the_sentences(model, texts):
    method = parse_method("skipkv:budget=40,tau=0.9")
    [found] = compare(model, texts[0], [(method, None)], prompts=texts[1], progress=False)
    stats = [model.replay(ids, method, n_prompt=n).stats for ids, n in zip(*texts, strict=True)]
    assert found.flagged == sum(s.flagged for s in stats) / sum(s.sentences for s in stats) > 0


def test_too_short_a_text_is_refused(model):
    with refused("text 1 has less than 2 tokens"):
        compare(model, [[5, 6], [5]], [(parse_method("full"), None)], progress=False)


def test_the_bootstrap_draws_texts_not_positions():
    rng = np.random.default_rng(0)
    sums = [(float(rng.normal(n * (i % 2), 1)), int(n)) for i, n in enumerate(rng.integers(50, 400, 40))]
    mean, low, high = bootstrap(sums, 4000, 1)
    totals = np.array(sums)
    assert mean == pytest.approx(totals[:, 0].sum() / totals[:, 1].sum())
    draws = np.random.default_rng(99).integers(0, 40, (20_000, 40))
    means = totals[draws, 0].sum(1) / totals[draws, 1].sum(1)
    # Half of the texts are 0, half are 1 a position: the interval is wide; 4000 draws place its ends within percents.
    assert np.allclose([low, high], np.percentile(means, [2.5, 97.5]), atol=0.02) and high - low > 0.2
    assert bootstrap(sums, 4000, 1) == (mean, low, high) != bootstrap(sums, 4000, 2)


def test_the_bootstrap_of_little():
    assert bootstrap([(3.0, 2)], 100, 0) == (1.5, 1.5, 1.5)
    assert bootstrap([(3.0, 2), (0.0, 0)], 100, 0) == (1.5, 1.5, 1.5)
    assert np.isnan(bootstrap([], 100, 0)).all()


def read_texts(model, path, tokens, limit):
    return read(path, model.tokenizer, model.config.context, tokens, limit)


def lines(tmp_path, *values):
    path = tmp_path / "texts.jsonl"
    path.write_text("\n".join(v if isinstance(v, str) else json.dumps(v, ensure_ascii=False) for v in values) + "\n")
    return str(path)


def test_texts_are_read(model, tmp_path):
    prompt, output = PROBLEMS[0], "First find Bea.\n\n"
    path = lines(tmp_path, json.dumps(output), {"text": output, "more": 1}, "", {"prompt": prompt, "output": output})
    texts, prompts = read_texts(model, path, None, None)
    ids, head = model.encode(output), model.encode(prompt)
    assert texts == [ids, ids, head + ids] and prompts == [1, 1, len(head)]
    assert read_texts(model, path, 20, 3) == ([ids, ids, (head + ids)[:20]], [1, 1, 20])
    assert read_texts(model, path, None, 1) == ([ids], [1])
    # What a generation prints as JSON can be compared at once.
    whole = lines(tmp_path, {"prompt": prompt, "output": output * 2000})
    assert len(read_texts(model, whole, None, None)[0][0]) == model.config.context


def test_a_line_break_inside_of_a_text_is_no_line(tmp_path):
    path = lines(tmp_path, {"text": "a\u2028b\x85c\x0bd"}, "[1, 2")
    assert list(json_lines(path)) == [(1, {"text": "a\u2028b\x85c\x0bd"}), (2, None)]


NO_TEXT = "line 1: expected a JSON text, an object with a text, or one with prompt and output"


@pytest.mark.parametrize("line, options, message", [
    *((line, {}, NO_TEXT) for line in ("{", "5", '{"prompt": "a"}', '{"text": ["a"]}', '{"prompt": 5, "output": "a"}')),
    ("", {}, "expected at least one text, found none"),
    ('"a"', {"tokens": 1}, "tokens is 1; allowed: integers from 2"),
    ('"a"', {"tokens": -5}, "tokens is -5; allowed: integers from 2"),
    ('"a"', {"limit": 0}, "limit is 0; allowed: integers from 1"),
])  # fmt: skip
def test_bad_files_of_texts_are_refused(model, tmp_path, line, options, message):
    path = lines(tmp_path, line)
    with refused(message if options else f"{path}: {message}"):
        read_texts(model, path, **({"tokens": None, "limit": None} | options))
    (tmp_path / "texts.jsonl").write_bytes(b'"\xff"\n')
    with pytest.raises(skipkv.ConfigError, match="expected UTF-8"):
        read_texts(model, path, None, None)


def test_the_table_has_a_row_a_run(model, texts):
    runs = [(parse_method(t), None) for t in ("full", "rkv:budget=40")]
    found = compare(model, texts[0], runs, prompts=texts[1], progress=False)
    head, full, rkv = str(table(found)).splitlines()
    columns = ["method", "nll", "Δnll", "KL(full‖method)", "same best token %", "peak cache MB", "texts", "positions",
               "flagged %"]  # fmt: skip
    starts = [head.index(name) for name in columns]
    for f, line in zip(found, (full, rkv), strict=True):
        cells = [line[a:b].strip() for a, b in zip(starts, [*starts[1:], None], strict=True)]
        assert cells[0] == f.run and cells[6:8] == [str(f.texts), str(f.positions)]
        assert cells[1] == f"{f.nll[0]:.3f} [{f.nll[1]:.3f}, {f.nll[2]:.3f}]"
        assert cells[2] == f"{f.delta_nll[0]:.4f} [{f.delta_nll[1]:.4f}, {f.delta_nll[2]:.4f}]"
        assert cells[3] == f"{f.kl[0]:.4f} [{f.kl[1]:.4f}, {f.kl[2]:.4f}]"
        assert cells[4].split()[0] == f"{100 * f.same[0]:.1f}" and cells[5] == f"{f.peak_bytes / 1e6:.2f}"
        assert cells[8] == f"{100 * f.flagged:.1f}"


def test_a_table_is_aligned_text_and_a_table_in_jupyter():
    shown = Table(("run", "n"), [("<full>", 3), ("rkv", 1000)], align="<>")
    assert str(shown) == repr(shown) == "run        n\n<full>     3\nrkv     1000"
    html = shown._repr_html_()
    assert "<th>run</th><th>n</th>" in html and "<td>&lt;full&gt;</td><td>3</td>" in html
    wide = Table(("run", "n"), widths=(5, 3))
    assert (wide.head, wide.line(("a", 1))) == ("run    n", "a      1")


def test_results_carry_the_method_itself(model, texts):
    run = parse_method("rkv:budget=40"), STEERING
    [found] = compare(model, texts[0][:1], [run], progress=False)
    assert (found.method, found.steering, found.run) == (*run, "rkv:budget=40+steer:layer=1,alpha=1")
    assert not found.as_dict().keys() & {"method", "steering"} and found.as_dict()["kl"] == found.kl
