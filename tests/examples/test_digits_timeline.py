"""Spans of made-up workers: how much of the transfers was hidden, and the picture of it."""

from __future__ import annotations

import re

import pytest

from examples.disaggregated_diffusion.timeline import Span, draw, overlap
from hwcore.errors import ArgumentTypeError, ArgumentValueError


def span(kind, start, end, worker="a", role="denoiser", request="one"):
    return Span(request, role, kind, start, end, worker)


def test_a_transfer_beside_a_computation_counts_as_long_as_both_run():
    found = overlap([span("push", 1.0, 4.0), span("compute", 3.0, 9.0)])
    assert (found.transfer_s, found.compute_s, found.overlap_s) == (3.0, 6.0, 1.0)
    found = overlap([span("push", 3.0, 9.0), span("compute", 1.0, 4.0)])
    assert (found.transfer_s, found.compute_s, found.overlap_s) == (6.0, 3.0, 1.0)


def test_transfers_that_run_together_count_once():
    spans = [span("stage", 0.0, 2.0), span("push", 1.0, 3.0), span("load", 1.5, 1.75)]
    found = overlap([*spans, span("compute", 0.0, 10.0), span("compute", 2.0, 12.0, "b")])
    assert (found.transfer_s, found.compute_s, found.overlap_s) == (3.0, 12.0, 3.0)


def test_one_after_the_other_is_no_overlap():
    found = overlap([span("push", 0.0, 1.0), span("compute", 1.0, 2.0), span("load", 2.0, 3.0)])
    assert (found.transfer_s, found.overlap_s, found.same_worker_s) == (2.0, 0.0, 0.0)


def test_what_another_worker_computes_is_told_apart_from_what_the_same_one_does():
    spans = [span("push", 0.0, 4.0, "a"), span("compute", 0.0, 4.0, "b")]
    assert overlap(spans).overlap_s == 4.0
    assert overlap(spans).same_worker_s == 0.0
    found = overlap([*spans, span("compute", 1.0, 2.0, "a"), span("load", 3.0, 5.0, "b")])
    assert found.same_worker_s == 1.0 + 1.0


def test_several_stretches_are_summed_in_any_order():
    spans = [span("compute", start, start + 2.0) for start in (8.0, 0.0, 4.0)]
    spans += [span("load", start, start + 2.0) for start in (5.0, 1.0, 20.0)]
    assert overlap(spans).overlap_s == 2.0
    assert overlap(reversed(spans)) == overlap(spans)


def test_nothing_is_no_time():
    assert overlap([]).transfer_s == overlap([]).overlap_s == 0.0


@pytest.mark.parametrize(
    ("kind", "start", "end", "error"),
    [
        ("wait", 0.0, 1.0, ArgumentValueError),
        ("push", 2.0, 1.0, ArgumentValueError),
        ("push", 0.0, float("nan"), ArgumentValueError),
        ("push", 0.0, float("inf"), ArgumentValueError),
        ("push", "0", 1.0, ArgumentTypeError),
    ],
)
def test_a_span_that_cannot_be_is_refused(kind, start, end, error):
    with pytest.raises(error, match="Span"):
        span(kind, start, end)


@pytest.fixture(name="drawn")
def _drawn(monkeypatch):
    """What is drawn: bars by their colour's kind, row labels, and the lines."""
    axes_class = pytest.importorskip("matplotlib.axes").Axes
    calls = {"bars": [], "labels": [], "lines": [], "title": ""}
    names = ("broken_barh", "axvline", "set_yticks", "set_title")
    real = {name: getattr(axes_class, name) for name in names}

    def bars(axes, spans, row, **style):
        calls["bars"].append((list(spans), row[0], style["facecolor"]))
        return real["broken_barh"](axes, spans, row, **style)

    def line(axes, x, **style):
        calls["lines"].append(x)
        return real["axvline"](axes, x, **style)

    def ticks(axes, places, labels):
        calls["labels"] = list(labels)
        return real["set_yticks"](axes, places, labels)

    def title(axes, text):
        calls["title"] = text
        return real["set_title"](axes, text)

    for name, call in zip(names, (bars, line, ticks, title), strict=True):
        monkeypatch.setattr(axes_class, name, call)
    return calls


def test_the_picture_has_a_row_for_each_worker_roles_in_the_order_of_their_work(drawn, tmp_path):
    spans = [
        span("compute", 105.0, 107.0, "den-1", "denoiser"),
        span("compute", 100.0, 102.0, "enc-0", "encoder"),
        span("compute", 103.0, 104.0, "den-0", "denoiser"),
        span("load", 109.0, 110.0, "dec-0", "decoder"),
    ]
    draw(tmp_path / "timeline.png", spans, {"killed": 106.0})
    assert drawn["labels"] == [
        "encoder\nenc-0",
        "denoiser\nden-0",
        "denoiser\nden-1",
        "decoder\ndec-0",
    ]
    assert drawn["lines"] == [6.0]
    assert (tmp_path / "timeline.png").read_bytes().startswith(b"\x89PNG")


def test_each_span_is_a_bar_of_its_kind_in_its_workers_row(drawn, tmp_path):
    spans = [span("stage", 1.0, 2.0), span("load", 1.5, 4.0), span("push", 0.0, 3.0, "b")]
    draw(tmp_path / "timeline.png", spans)
    filled = [(bars, round(row)) for bars, row, _ in drawn["bars"] if bars]
    assert sorted(filled) == [([(0.0, 3.0)], 1), ([(1.0, 1.0)], 0), ([(1.5, 2.5)], 0)]
    assert len({color for bars, _, color in drawn["bars"] if bars}) == 3


def test_the_title_says_how_much_was_hidden(drawn, tmp_path):
    computed = [span("compute", 1.0, 2.0, "b"), span("compute", 0.0, 0.25)]
    draw(tmp_path / "timeline.png", [span("push", 0.0, 3.0), *computed])
    assert re.findall(r"([\d.]+) s", drawn["title"]) == ["3.00", "1.25", "0.25"]


def test_no_spans_are_no_picture(tmp_path):
    with pytest.raises(ArgumentValueError, match="spans"):
        draw(tmp_path / "timeline.png", [])
    assert not any(tmp_path.iterdir())
