"""`reasoning.plot`: what is in the pictures, and the interval, against other ways of getting it."""

import dataclasses
import math
import sys

import pytest
from reasoning.synthetic import edit_manifest, make_pool, pool_of, record_pool, run_live
from tiny_cli import run

from falcon_h1r.commands.policy import MARGIN
from falcon_h1r.reasoning import (
    DeepConf,
    Offline,
    find_records,
    group_confidences,
    read_record,
    replay,
    wilson_interval,
)
from falcon_h1r.reasoning.plot import (
    OTHER,
    RIGHT,
    WRONG,
    Point,
    check_picture,
    plot_accuracy,
    plot_confidence,
)

pytest.importorskip("matplotlib")


@pytest.fixture
def figure(monkeypatch):
    """The last figure that was saved."""
    from matplotlib.figure import Figure

    kept, save = [], Figure.savefig

    def keep(self, *arguments, **options):
        kept.append(self)
        return save(self, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", keep)
    return lambda: kept[-1]


@pytest.mark.parametrize(("right", "asked"), [(0, 5), (3, 10), (150, 200), (7, 7), (1, 1)])
def test_wilson_is_where_the_normal_test_turns(right, asked):
    z = 1.959963984540054
    low, high = wilson_interval(right, asked)
    share = right / asked
    assert 0 <= low <= share <= high <= 1
    for bound in (low, high):
        if 0 < bound < 1:
            # The score test of this bound is exactly at its limit.
            error = math.sqrt(bound * (1 - bound) / asked)
            assert abs(share - bound) / error == pytest.approx(z, rel=1e-9)
    assert (low == 0) == (right == 0) and (high == 1) == (right == asked)
    for wrong in ((-1, 5), (6, 5), (0, 0)):
        with pytest.raises(ValueError, match="is no share"):
            wilson_interval(*wrong)


def test_wilson_published():
    # 15 of 148, in Newcombe (1998), Statistics in Medicine 17, table I: 0.0624 to 0.1605; and 81 of
    # 263: 0.2553 to 0.3662.
    for counts, interval in (((15, 148), (0.0624, 0.1605)), ((81, 263), (0.2553, 0.3662))):
        assert [round(bound, 4) for bound in wilson_interval(*counts)] == list(interval)


CONFIDENCES = [[3.0, 4.0, 5.0], [5.0] * 4, [9.0, 9.0, 2.0, 1.0, 8.0], [8.0], [7.0, 7.0, 7.0]]
ANSWERS = ["5", "6", "5", "5", None]


def drawn(axes):
    """(x, y, colour, line style, marker) of everything with points."""
    return [
        (
            *([float(v) for v in values] for values in line.get_data()),
            line.get_color(),
            line.get_linestyle(),
            line.get_marker(),
        )
        for line in axes.get_lines()
        if len(line.get_xdata()) and line.get_label().startswith("_")
    ]


def test_confidences_along_traces(tmp_path, figure):
    params = DeepConf(k=1, window=2, warmup=2, budget=5, eta=50.0, tau=None)
    policy = run_live(pool_of(CONFIDENCES, ANSWERS), params, tmp_path / "r", reference="5.0")
    record, result = read_record(tmp_path / "r"), policy.result()
    assert result.threshold == 4.25 and result.traces[2].tokens == 4
    plot_confidence(record, tmp_path / "x.png", window=2, result=result)
    (axes,) = figure().axes
    lines = drawn(axes)
    curves, ends = lines[0::2], lines[1::2]
    assert [end[4] for end in ends].count("x") == 1
    expected = {
        0: (range(2, 4), RIGHT, ":"),
        1: (range(2, 5), WRONG, ":"),
        2: (range(2, 5), OTHER, "-"),
        3: (range(1, 2), RIGHT, "-"),
        4: (range(2, 4), OTHER, "-"),
    }
    found = {}
    for curve, end in zip(curves, ends):
        for number, trace in enumerate(record.traces):
            groups = group_confidences(trace.confidence, 2).tolist()
            if curve[1] == groups:
                found[number] = (curve[0], curve[2], curve[3])
                assert end[:3] == ([curve[0][-1]], [curve[1][-1]], curve[2])
                assert end[4] == ("x" if number == 2 else "o")
    assert found == {n: (list(map(float, x)), *rest) for n, (x, *rest) in expected.items()}
    # What is drawn later lies on top: the right ones last.
    assert [curve[2] for curve in curves] == [OTHER, OTHER, WRONG, RIGHT, RIGHT]
    labels = [text.get_text() for text in figure().legends[0].get_texts()]
    assert labels == [
        *("right: 2", "wrong: 1", "no answer: 2"),
        *("warm-up, not stopped: 2", "stopped: 1", "threshold: 4.250"),
    ]
    (line,) = [line for line in axes.get_lines() if line.get_label().startswith("threshold")]
    assert set(line.get_ydata()) == {4.25}
    assert "last 2 tokens" in axes.get_ylabel() and "(answer: 5.0)" in axes.get_title()


def test_without_a_reference_the_answer_is_what_counts(tmp_path, figure):
    record_pool(pool_of(CONFIDENCES, ANSWERS), tmp_path / "r", k=1)
    record = read_record(tmp_path / "r")
    plot_confidence(record, tmp_path / "x.svg", window=2, answer="6")
    labels = [text.get_text() for text in figure().legends[0].get_texts()]
    assert labels == ["the answer: 1", "another answer: 3", "no answer: 1"]
    assert (tmp_path / "x.svg").read_text().lstrip().startswith("<?xml")
    # A policy that cuts what was recorded whole.
    params = DeepConf(k=1, window=2, warmup=2, budget=5, eta=50.0, tau=None)
    online = replay(record, params).online
    plot_confidence(record, tmp_path / "y.png", window=2, result=online)
    curves = drawn(figure().axes[0])
    assert sorted(max(x) for x, *_ in curves[::2]) == [1, 3, 3, 4, 4]
    labels = [text.get_text() for text in figure().legends[0].get_texts()]
    assert online.answer == "5" and labels[:2] == ["the answer: 2", "another answer: 1"]
    # Traces that the policy did not start are left out.
    short = dataclasses.replace(params, budget=3)
    plot_confidence(record, tmp_path / "y.png", window=2, result=replay(record, short).online)
    assert len(drawn(figure().axes[0])) == 2 * 3


def test_long_traces_keep_their_ends(tmp_path, figure):
    record_pool(pool_of([[float(i % 7) for i in range(4001)]], ["5"]), tmp_path / "r", k=1)
    record = read_record(tmp_path / "r")
    plot_confidence(record, tmp_path / "x.png", window=3)
    (x, y, *_), _ = drawn(figure().axes[0])
    groups = group_confidences(record.traces[0].confidence, 3)
    assert len(x) <= 2002 and (x[0], x[-1]) == (3, 4001)
    assert y == [float(groups[int(place) - 3]) for place in x]


def test_a_record_without_tokens(tmp_path):
    run_live(make_pool(1, 20), DeepConf(k=4), tmp_path / "r", interrupt_at=0)
    with pytest.raises(ValueError, match="holds no tokens to draw"):
        plot_confidence(read_record(tmp_path / "r"), tmp_path / "x.png", window=2)
    assert not (tmp_path / "x.png").exists()


def test_titles_are_text(tmp_path, figure):
    record_pool(make_pool(1, 2), tmp_path / "r", reference="$5$")
    edit_manifest(tmp_path / "r", question="a $x_1^$ \n" + "b" * 200)
    plot_confidence(read_record(tmp_path / "r"), tmp_path / "x.png", window=2)
    title = figure().axes[0].get_title()
    assert title.startswith(r"a \$x_1^\$ bbb") and len(title) < 130
    assert title.endswith(r"...  (answer: \$5\$)")


def test_accuracy_against_tokens(tmp_path, figure):
    points = [Point("majority", 6, 8, 800), Point("mean", 4, 8, 800), Point("deepconf", 8, 8, 200)]
    plot_accuracy(points, tmp_path / "x.png", "eight")
    (axes,) = figure().axes
    assert axes.get_title() == "eight"
    places = []
    for container, point in zip(axes.containers, points, strict=True):
        line, _, (bars,) = container.lines
        (x,), (y,) = line.get_data()
        places.append(x)
        assert y == 100 * point.right / 8
        (low, high) = bars.get_segments()[0][:, 1]
        assert (low / 100, high / 100) == pytest.approx(wilson_interval(point.right, 8))
        assert container.get_label() == f"{point.name}: {y:.1f} %, {point.tokens / 8:,.0f}"
    assert places[2] == 25 and places[0] < 100 < places[1] and places[1] - places[0] < 2
    with pytest.raises(ValueError, match="no policy could be judged"):
        plot_accuracy([], tmp_path / "x.png")


def test_where_no_picture_can_be(tmp_path, monkeypatch):
    check_picture(tmp_path / "x.PDF")
    for path, message in (("x", "must end with"), (tmp_path / "no" / "x.png", "is no folder")):
        with pytest.raises(ValueError, match=message):
            check_picture(path)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ValueError, match=r"pip install 'falcon-h1r\[reasoning\]'"):
        check_picture(tmp_path / "x.png")


def test_replay_plots_a_record(capsys, tmp_path, figure):
    record_pool(make_pool(8, 20), tmp_path / "r", reference="5")
    argv = ["replay", tmp_path / "r", "--plot", tmp_path / "x.png", "--window", 5]
    status, _, err = run(capsys, *argv)
    assert (status, err) == (0, "") and len(drawn(figure().axes[0])) == 40
    assert "last 5 tokens" in figure().axes[0].get_ylabel()
    labels = [text.get_text() for text in figure().legends[0].get_texts()]
    record = read_record(tmp_path / "r")
    right = sum(trace.answer == "5" for trace in record.traces)
    assert labels[0] == f"right: {right}"
    argv += ["--policy", "deepconf-low", "--warmup", 4, "--min-voters", 21]
    assert run(capsys, *argv)[0] == 0
    labels = [text.get_text() for text in figure().legends[0].get_texts()]
    params = DeepConf(k=4, window=5, warmup=4, budget=20, min_voters=21)
    result = replay(record, params).online
    assert f"threshold: {result.threshold:.3f}" in labels and "warm-up, not stopped: 4" in labels
    assert f"stopped: {result.count('low_confidence')}" in labels
    # Answers read anew: nobody says 9.
    argv = ["replay", tmp_path / "r", "--plot", tmp_path / "x.png", "--extractor", "re:9"]
    assert run(capsys, *argv)[0] == 0
    assert [text.get_text() for text in figure().legends[0].get_texts()] == ["no answer: 20"]


def test_replay_plots_a_comparison(capsys, tmp_path, figure):
    for i in range(6):
        record_pool(make_pool(i, 8), tmp_path / "all" / f"q{i}", reference="5")
    argv = [
        "replay",
        tmp_path / "all",
        "--compare",
        "--window",
        5,
        "--warmup",
        3,
        "--min-voters",
        2,
    ]
    status, out, _ = run(capsys, *argv, "--plot", tmp_path / "x.png")
    labels = [container.get_label() for container in figure().axes[0].containers]
    names = [line.split("  ")[0] for line in out.splitlines()[1:]]
    assert status == 0 and [label.split(":")[0] for label in labels] == [
        "first trace alone",
        *names,
    ]
    records = [read_record(path) for path in find_records(tmp_path / "all")]
    for label, policy in zip(labels, (Offline(budget=1), Offline())):
        results = [replay(record, policy) for record in records]
        share = 100 * sum(result.right for result in results) / 6
        tokens = sum(result.tokens for result in results) / 6
        assert label.split(": ")[1] == f"{share:.1f} %, {tokens:,.0f}"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--plot", "x.gif"], "must end with one of"),
        (["--plot", "OUT"], "of one record and one policy, or with --compare"),
        (["--plot", "OUT", "--policy", "mean", "--policy", "tail"], "of one record and one policy"),
        (["--plot", "OUT", "--compare", "--window", 5], "needs a reference in every record"),
    ],
)
def test_replay_refuses(capsys, tmp_path, argv, message):
    for i in range(2):
        record_pool(make_pool(i, 8), tmp_path / "all" / f"q{i}", reference="5" if i else None)
    out = tmp_path / "x.png"
    argv = [out if argument == "OUT" else argument for argument in argv]
    place = tmp_path / "all" / ("q1" if "--policy" in argv else "")
    status, printed, err = run(capsys, "replay", place, *argv)
    assert (status, printed) == (2, "") and message in err and err.count("\n") == 1
    assert not out.exists()


def test_half_a_picture_is_not_left(capsys, tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    def full_disk(self, path, **options):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", full_disk)
    record_pool(make_pool(1, 8), tmp_path / "r")
    picture = tmp_path / "x.png"
    picture.write_bytes(b"old")
    argv = ["replay", tmp_path / "r", "--policy", "majority", "--plot", picture]
    status, _, err = run(capsys, *argv)
    assert status == 2 and "No space left" in err
    assert picture.read_bytes() == b"old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["r", "x.png"]


def test_min_voters_reach_the_policies(capsys, tmp_path):
    import json

    record_pool(make_pool(8, 20), tmp_path / "r", reference="5")
    argv = ["replay", tmp_path / "r", "--window", 5, "--warmup", 4, "--json", "--min-voters", 9]
    _, out, _ = run(capsys, *argv, "--policy", "deepconf-low")
    (result,) = json.loads(out)["policies"][0]["results"]
    params = DeepConf(k=4, window=5, warmup=4, budget=20, min_voters=9, margin=MARGIN)
    assert result["online"]["params"] == params.to_dict()
    few = replay(read_record(tmp_path / "r"), dataclasses.replace(params, min_voters=1))
    assert few.tokens < result["tokens"]
    argv = ["replay", tmp_path / "r", "--min-voters", 9]
    status, _, err = run(capsys, *argv, "--policy", "majority")
    assert status == 2 and "min_voters: the policy majority has none" in err
