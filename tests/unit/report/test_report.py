"""The page: opens alone, escapes what it is given, shows the numbers of its input."""

import asyncio
import json
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pytest

from graftwork.metrics import distribution
from graftwork.report import ReportInput, build, render_html, render_json
from graftwork.report import format as words
from graftwork.report.charts import Line, Mark, Scale, interval_track, line_chart, ticks
from graftwork.report.schema import (
    AdapterLatency,
    CompareReport,
    PlanRow,
    ServingRecord,
    StageTime,
    SwapRecord,
    TrainRun,
)
from graftwork.report.sweep_schema import SweepRecord, SweepTrial
from graftwork.serving.evaluation.compare import compare
from graftwork.storage.store import Store
from tests.fake_arms import SCHEMA, Script, airports, ask_all, spec

EVIL = "<script>alert('x')</script><img src=http://evil.example/x onerror=alert(1)>\"'&"
VOID = {"meta", "link", "br", "img", "hr", "input"}
SECTIONS = (
    "arms",
    "claims",
    "pairs",
    "samples",
    "tune",
    "train",
    "plan",
    "time",
    "serving",
    "swap",
    "glossary",
    "provenance",
)


class Page(HTMLParser):
    """Elements, attributes and text of a page; refuses what is not closed in order."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.stack: list[str] = []
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str, str]] = []
        self.pieces: list[str] = []
        self.feed(html)
        self.close()
        assert self.stack == [], f"left open: {self.stack}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data: str) -> None:
        self.pieces.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.pieces))

    def ids(self) -> list[str]:
        return [value for _, name, value in self.attributes if name == "id"]


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> CompareReport:
    rows, path = airports(120), tmp_path_factory.mktemp("report") / "answers.jsonl"
    asked = spec(contrasts=[{"a": "raft-rag", "b": "naive-rag", "metric": "both"}])
    script = Script(rows)
    script.text = lambda arm, row, said=script.text: EVIL if arm == "base" else said(arm, row)  # type: ignore[method-assign, misc]
    return compare(asked, rows, asyncio.run(ask_all(asked, rows, script, path)), SCHEMA)


@pytest.fixture(scope="module")
def whole(comparison: CompareReport) -> ReportInput:
    milliseconds = distribution([120.0, 140.0, 180.0], "ms")
    trials = (
        SweepTrial(
            id="a", values={"adapter.rank": 4, "optim.lr": 5e-4}, losses=((4, 1.9), (8, 1.2345)), state="stopped"
        ),
        SweepTrial(
            id="b", values={"adapter.rank": 16, "optim.lr": 2e-3}, losses=((4, 1.1), (12, 0.4321)), state="finished"
        ),
        SweepTrial(id="c", values={"adapter.rank": 16, "optim.lr": 5e-3}, losses=(), state="failed"),
    )
    loss = ((1, 2.5), (2, 1.5), (3, float("nan")))
    run = TrainRun(
        name="airport-card",
        adapter="airport-card@9f8e7d6c5b4a",
        loss=loss,
        eval_loss=((2, 1.6),),
        rows=641,
        dropped_rows=3,
        tokens=81234,
        tokens_per_s=412.0,
        wall_s=96.4,
        peak_memory_bytes=(1_288_490_189,),
        method=f"LoRA r16 {EVIL}",
        workers=2,
    )
    swap = SwapRecord(
        alias="airport-card@latest",
        old_version="aaaaaaaaaaaa",
        new_version="bbbbbbbbbbbb",
        requests=121,
        failed=0,
        answers_by_version={"aaaaaaaaaaaa": 70, "bbbbbbbbbbbb": 51},
        swap_ms=38.4,
    )
    return ReportInput(
        title=f"Airports {EVIL}",
        created_at="2026-01-02T03:04:05Z",
        compare=comparison,
        tune=SweepRecord(name="airport-card", trials=trials, best_id="b", rows=16),
        train=(run,),
        plan=(
            PlanRow(stage="train", predicted_bytes=2**30, actual_bytes=int(1.1 * 2**30), predicted_s=90, actual_s=96),
            PlanRow(stage="serve", actual_s=41),
        ),
        serving=ServingRecord(
            latency=(
                AdapterLatency(name="base", n=3, ttft_ms=milliseconds, latency_ms=milliseconds),
                AdapterLatency(name="quiet", n=0, ttft_ms=None, latency_ms=None),
            ),
            swap=swap,
            max_adapters_in_batch=4,
        ),
        stages=(
            StageTime(stage="train", wall_s=96.4, found="1 adapter"),
            StageTime(stage="tune", wall_s=3, reused=True),
        ),
        provenance={"git": "4e5834b", "versions": {"torch": "2.13.0"}, "argv": ["graftwork", EVIL]},
    )


@pytest.fixture(scope="module")
def page(whole: ReportInput) -> Page:
    return Page(render_html(whole))


def test_every_section_is_there_and_every_link_lands(page: Page) -> None:
    assert set(SECTIONS) <= set(page.ids())
    assert len(page.ids()) == len(set(page.ids()))
    links = [value for tag, name, value in page.attributes if tag == "a" and name == "href"]
    assert links
    assert {link.removeprefix("#") for link in links} <= set(page.ids())


def test_the_page_fetches_nothing(whole: ReportInput, page: Page) -> None:
    assert not {"script", "img", "link", "iframe", "object", "embed", "base", "form"} & set(page.tags)
    loading = {"src", "href", "xlink:href", "action", "srcset", "data", "poster", "background"}
    assert all(value.startswith("#") for _, name, value in page.attributes if name in loading)
    assert not any(name.startswith("on") for _, name, _ in page.attributes)
    style = render_html(whole).partition("<style>")[2].partition("</style>")[0]
    assert not re.search(r"url\(|@import|https?:", style)
    policy = next(value for tag, name, value in page.attributes if name == "content" and "default-src" in value)
    assert policy.startswith("default-src 'none'")


def test_whatever_comes_from_outside_is_escaped(whole: ReportInput, page: Page) -> None:
    html = render_html(whole)
    assert "<script" not in html
    assert "<img" not in html
    assert page.text.count(re.sub(r"\s+", " ", EVIL)) >= 3 + len(whole.compare.samples if whole.compare else ())


def test_the_numbers_are_those_of_the_input(whole: ReportInput, page: Page) -> None:
    assert whole.compare is not None
    for arm in whole.compare.arms:
        for score in arm.scores.values():
            assert words.score(score.value) in page.text
            assert words.interval(score.low, score.high) in page.text
            assert score.signature in page.text
    for found in whole.compare.differences + whole.compare.contrasts:
        assert f"{words.signed(found.value)} {words.signed_interval(found.low, found.high)}" in page.text
        assert found.signature in page.text
    assert whole.compare.advice.sentence in page.text
    for number in (
        "1.234",
        "0.432",
        "641",
        "81,234",
        "1.20 GiB",
        "1 min 36 s",
        "+10%",
        "140 ms",
        "121",
        "38 ms",
        "51",
    ):
        assert number in page.text, number


def test_the_baseline_and_n_are_marked(page: Page) -> None:
    assert "base-rag baseline" in page.text
    assert "n=120" in page.text


def test_a_report_of_nothing_but_a_verdict_opens() -> None:
    page = Page(render_html(ReportInput(title="Empty", created_at="now", verdict="Nothing was measured.")))
    assert "Nothing was measured." in page.text
    assert set(page.ids()) == {"glossary"}


@pytest.mark.parametrize("part", ["compare", "tune", "train", "plan", "serving", "stages", "provenance"])
def test_every_part_may_be_missing(whole: ReportInput, part: str) -> None:
    default = ReportInput.model_fields[part].get_default(call_default_factory=True)
    Page(render_html(whole.model_copy(update={part: default})))


def test_a_verdict_of_ones_own_replaces_the_advice(whole: ReportInput) -> None:
    page = Page(render_html(whole.model_copy(update={"verdict": "Take the third."})))
    assert "Take the third." in page.text


def test_both_files_are_written(whole: ReportInput, tmp_path: Path) -> None:
    built = build(whole, Store(str(tmp_path)), "runs", "demo-12345678")
    html, records = Path(built.html_uri).read_text(), json.loads(Path(built.json_uri).read_text())
    assert len(html.encode()) < 1_000_000
    assert html == render_html(whole)
    assert records["compare"]["n"] == 120
    assert Path(built.json_uri).parent == tmp_path / "runs" / "demo-12345678"


def test_json_holds_the_whole_input(whole: ReportInput) -> None:
    """Read back and written again it is the same, a diverged loss (NaN) included."""
    assert render_json(ReportInput.model_validate_json(render_json(whole))) == render_json(whole)


def test_same_input_same_bytes(whole: ReportInput) -> None:
    assert render_html(whole) == render_html(whole)
    assert render_json(whole) == render_json(whole)


# Plots.


def test_a_mark_stands_where_its_value_is() -> None:
    svg = str(interval_track(Mark(0.25, 0.1, 0.4, "rag", "r: 0.25"), Scale(0, 1), reference=0.5))
    assert 'x1="10.00%" x2="40.00%"' in svg
    assert 'x="25.00%"' in svg
    assert 'x1="50.00%" x2="50.00%"' in svg
    assert "<title>r: 0.25</title>" in svg


def test_a_curve_goes_through_its_points() -> None:
    svg = str(line_chart([Line([(0, 2.0), (10, 1.0)], "train", EVIL)], Scale(0, 10), Scale(0, 2), "loss"))
    assert 'points="0.00,0.00 100.00,50.00"' in svg
    assert "<script" not in svg


def test_a_log_scale_spreads_powers_evenly() -> None:
    scale = Scale(1e-4, 1e-2, log=True)
    assert [scale(1e-4), scale(1e-3), scale(1e-2)] == pytest.approx([0, 50, 100])


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 1, [0, 0.25, 0.5, 0.75, 1]), (0, 80, [0, 20, 40, 60, 80]), (0.41, 2.1, [0.5, 1, 1.5, 2]), (3, 3, [3])],
)
def test_ticks_are_round(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high) == pytest.approx(expected)


# Words.


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (words.seconds(0.42), "0.4 s"),
        (words.seconds(59.4), "59 s"),
        (words.seconds(59.7), "1 min 00 s"),
        (words.seconds(3723), "1 h 02 min"),
        (words.seconds(None), "–"),
        (words.milliseconds(1204.4), "1,204 ms"),
        (words.size(512), "512 B"),
        (words.size(1.5 * 2**30), "1.50 GiB"),
        (words.size(37 * 2**30), "37 GiB"),
        (words.signed(-0.125), "−0.12"),
        (words.p_value(0.0004), "< 0.001"),
        (words.ratio(110, 100), "+10%"),
        (words.format_setting(2e-3), "0.002"),
        (words.format_setting(True), "true"),
    ],
)
def test_numbers_in_words(said: str, expected: str) -> None:
    assert said == expected


def test_settings_are_flattened() -> None:
    assert words.flat({"a": {"b": 1, "c": {}}, "d": [1, "x"]}) == [("a.b", "1"), ("a.c", "{}"), ("d", "1, x")]
