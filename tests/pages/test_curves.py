"""Curves: what is drawn is what the results say; read off matplotlib's own objects."""

import signal
import subprocess
import sys
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.colors import to_hex
from traces import RUNS, fidelity, outcome

import skipkv
from skipkv import ConfigError, viz
from skipkv.eval import Run
from skipkv.run import Interrupt

SVG = "{http://www.w3.org/2000/svg}"


def lines_of(picture):
    """Name of each series → its line, a level one or one through points."""
    return {line.get_label(): line for line in picture.figure.axes[0].lines if line.get_label()[0] != "_"}


def drawn(picture):
    """Name of each series with budgets → its points [n, 2], and the ends of its intervals [n, 2] or None."""
    bars = {c.get_label()[1:]: c.lines[2][0].get_segments() for c in picture.figure.axes[0].containers}
    ends = {name: np.array(segments)[:, :, 1] for name, segments in bars.items()}
    points = {name: line.get_xydata() for name, line in lines_of(picture).items() if [*line.get_xdata()] != [0, 1]}
    return {name: (of, ends.get(name)) for name, of in points.items()}


def texts(picture):
    return [text.text for text in ElementTree.fromstring(picture._repr_svg_()).iter(f"{SVG}text")]


def test_a_curve_of_outcomes():
    runs = [*RUNS[:1], *RUNS[3:0:-1], outcome("skipkv:interval=32,budget=64", 4)]
    picture = viz.curve(runs)
    points, ends = drawn(picture)["rkv"]
    np.testing.assert_allclose(points, [[64, 20], [128, 50], [256, 80]])
    np.testing.assert_allclose(ends, [[15, 24], [45, 54], [75, 84]])
    assert lines_of(picture)["full"].get_ydata() == pytest.approx([90, 90])
    band = picture.figure.axes[0].patches[0].get_window_extent()
    line = picture.figure.axes[0].transData.transform([(64, 85), (64, 94)])[:, 1]
    np.testing.assert_allclose([band.y0, band.y1], line)
    x = [picture.figure.axes[0].transData.transform((budget, 0))[0] for budget in (64, 128, 256)]
    assert x[1] - x[0] == pytest.approx(x[2] - x[1])  # doubled budgets are as far apart
    shown = texts(picture)
    assert {"accuracy, %", "budget, slots a head (logarithmic)", "64", "128", "256", "80"} <= set(shown)
    assert {"full", "rkv", "skipkv", "Accuracy against budget", "bars and bands: 95 % intervals"} <= set(shown)


def test_runs_of_the_demo_are_drawn_as_their_outcomes():
    methods = [skipkv.Full(), skipkv.RKV(64, interval=32), skipkv.RKV(128, interval=32)]
    outcomes = [outcome(method, 3) for method in methods]
    runs = [Run(0.5, of, []) for of in outcomes]
    assert viz.curve(runs)._repr_svg_() == viz.curve(outcomes)._repr_svg_()
    assert list(drawn(viz.curve([runs[1], outcomes[2]]))) == ["rkv"]


def test_names_say_what_differs():
    """One method with and without steering has one colour and marker, and another dash."""
    runs = [outcome("rkv:budget=64", 3), outcome("rkv:budget=64,mix=0.07", 3), outcome("rkv:budget=64", 3, 2)]
    picture = viz.curve([*runs, outcome("snapkv:budget=64", 3), outcome(skipkv.Custom(len, budget=64), 3)])
    names = ["rkv (mix=0.1)", "rkv (mix=0.07)", "rkv (mix=0.1) + steering", "snapkv", "custom (score=len)"]
    assert list(drawn(picture)) == names
    plain, steered = (lines_of(picture)[name] for name in ("rkv (mix=0.1)", "rkv (mix=0.1) + steering"))
    assert plain.get_color() == steered.get_color() and plain.get_marker() == steered.get_marker()
    assert plain.get_linestyle() != steered.get_linestyle()
    two = [RUNS[-1], outcome("rkv:budget=64", 3, 3, 2.0)]
    assert list(drawn(viz.curve(two))) == ["skipkv + steering (layer=2,alpha=1.25)", "rkv + steering (layer=3,alpha=2)"]


def test_curves_tell_series_apart_without_colour():
    picture = viz.curve([outcome(f"rkv:budget=64,interval={i}", 5) for i in range(16, 40)])
    lines = lines_of(picture).values()
    assert len({(line.get_linestyle(), line.get_marker()) for line in lines}) == len(lines) == 24
    assert len({to_hex(line.get_color()) for line in lines}) == 10


def test_a_curve_of_fidelities_and_other_axes():
    runs = [
        fidelity("full", (0.0, 0.0, 0.0)), fidelity("rkv:budget=64", (0.4, 0.1, 0.3)),  # the mean may be outside
        fidelity("rkv:budget=32", (float("nan"),) * 3),
    ]  # fmt: skip
    picture = viz.curve(runs)
    points, ends = drawn(picture)["rkv"]
    assert points.tolist() == [[64, 0.4]]
    np.testing.assert_allclose(ends, [[0.1, 0.3]])
    assert "KL divergence from the full cache, nats a token" in texts(picture)
    assert len(drawn(viz.curve(runs, "same", x="peak_bytes"))["rkv"][0]) == 2
    assert "no intervals recorded" in texts(viz.curve([outcome("rkv:budget=64", 1)], "length"))


@pytest.mark.parametrize("budget", [64, [64, 32], [[64, 32], [16, 12]]])
def test_budgets_are_means_over_layers_and_heads(budget):
    for method in (skipkv.RKV(budget, mix=0.07), skipkv.Custom(len, budget=budget)):
        [(points, _)] = drawn(viz.curve([outcome(method, 3)])).values()
        assert points.tolist() == [[np.mean(budget), 30]]


def test_curves_where_all_values_are_the_most_or_none_is_finite():
    full = [outcome(run, 10) for run in ("full", "rkv:budget=64", "rkv:budget=32")]
    ticks = viz.curve(full, "flagged").figure.axes[0].get_yticks()
    assert max(ticks) <= 100
    ticks = viz.curve(full).figure.axes[0].get_yticks()
    assert max(ticks) == 100 and len(ticks) > 1  # although intervals go beyond
    half = fidelity("rkv:budget=64", (1.0, float("nan"), 2.0))
    picture = viz.curve([half, fidelity("rkv:budget=32", (1.0, 0.5, 2.0))])
    assert drawn(picture)["rkv"][0].tolist() == [[32, 1]]


def named(name):
    """A custom method whose score has this name."""

    def score(c):
        return c.importance

    score.__name__ = name
    return outcome(skipkv.Custom(score, budget=16), 3)


def test_long_and_hostile_names():
    long = "x" * 200
    [name] = lines_of(viz.curve([named(long)]))
    assert name == f"custom (score={long}"[:89] + "…" and name in texts(viz.curve([named(long)]))
    hostile = "</svg><script>&\"'$\\frac$\ud800\0\n"
    picture = viz.curve([named(hostile)], title=f"<b>{hostile}")
    clean = hostile[:-3] + "\ufffd" * 3
    assert {f"custom (score={clean})", f"<b>{clean}"} <= set(texts(picture))
    assert "<script" not in picture.inline() and repr(picture.title) in repr(picture)


@pytest.mark.parametrize("results, options, message", [
    ([], {}, "results hold none; allowed: at least one Outcome, or at least one Fidelity"),
    ([RUNS[0], fidelity("full", (0, 0, 0))], {},
     "results hold Outcome, Fidelity; allowed: at least one Outcome, or at least one Fidelity"),
    ([5], {}, "results hold int; allowed: at least one Outcome, or at least one Fidelity"),
    (RUNS, {"y": "kl"}, "y is 'kl'; allowed: accuracy, length, peak_bytes, flagged"),
    (RUNS, {"x": "tokens"}, "x is 'tokens'; allowed: budget, peak_bytes"),
    ([fidelity("full", (0, float("nan"), 0))], {}, "results have no finite kl; allowed: at least one"),
])  # fmt: skip
def test_errors_of_curves(results, options, message):
    with pytest.raises(ConfigError) as caught:
        viz.curve(results, **options)
    assert str(caught.value) == message


def test_files_are_what_their_names_say_and_always_the_same(tmp_path):
    picture, again = viz.curve(RUNS), viz.curve(RUNS)
    for name, start in (("a.svg", b"<?xml"), ("a.png", b"\x89PNG"), ("a.PDF", b"%PDF")):
        picture.save(tmp_path / name), again.save(tmp_path / f"again-{name}")
        assert (tmp_path / name).read_bytes().startswith(start)
        assert (tmp_path / name).read_bytes() == (tmp_path / f"again-{name}").read_bytes()
    assert (tmp_path / "a.svg").read_text(encoding="utf-8") == picture._repr_svg_()
    with pytest.raises(ConfigError) as caught:
        picture.save("a.html")
    assert str(caught.value) == "path is 'a.html'; allowed: names that end in .png, .pdf, .svg"
    assert not (tmp_path / "a.html").exists()


def test_ctrl_c_waits_until_a_drawing_is_done(monkeypatch):
    """In the midst of it, matplotlib's C code makes a ValueError of it now and then."""
    done = []

    def draw(figure, file, **_):
        signal.raise_signal(signal.SIGINT)
        done.append(figure)

    picture, handler = viz.curve(RUNS), signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(type(picture.figure), "savefig", draw)
    with pytest.raises(KeyboardInterrupt):
        picture._repr_svg_()
    assert done == [picture.figure] and signal.getsignal(signal.SIGINT) is handler
    with Interrupt() as outer:
        picture._repr_svg_()
    assert outer.seen and len(done) == 2


def test_matplotlib_is_loaded_where_something_is_drawn():
    code = "import sys, skipkv, skipkv.viz.report; assert 'matplotlib' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
