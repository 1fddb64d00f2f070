"""A log on disk -> verdict, page and JSON: the same bytes however it is cut, and what is wrong with it is said."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
from typer.testing import CliRunner

from graftwork.cli import app
from graftwork.report import ReportInput, render_html
from graftwork.report.evaluation_schema import ExperimentReport
from graftwork.serving.ab_test.log import LogRow, LogSegment, Segments, encode
from graftwork.serving.ab_test.log_reader import read_log
from graftwork.serving.ab_test.report import analyse, analyse_log
from graftwork.serving.ab_test.spec import GuardrailSpec, OnlineRules, weights_detail
from graftwork.storage.store import Store

RULES = OnlineRules(
    arms=("base", "rag"),
    control="base",
    metric="right",
    weights={"base": 0.5, "rag": 0.5},
    guardrails=(GuardrailSpec(kind="errors", limit=0.05), GuardrailSpec(kind="latency", limit=0.05, bound_ms=2000.0)),
)
SPEC = """kind: experiment
name: cards
control: base
arms: [{name: base, weight: 0.5}, {name: rag, weight: 0.5}]
primary: right
guardrails: [{kind: errors, limit: 0.05}]
"""


def rows(n: int, gain: float = 0.15, failing: float = 0.01) -> list[LogRow]:
    """A start, and units with an answer each."""
    rng = np.random.default_rng(0)
    found = [
        LogRow(kind="event", experiment="e", at=0.0, event="start", detail=json.dumps(weights_detail(RULES.weights)))
    ]
    for k in range(n):
        arm = "rag" if rng.random() < 0.5 else "base"
        failed = arm == "rag" and rng.random() < failing
        scores = {} if failed else {"right": float(rng.random() < (0.5 + gain if arm == "rag" else 0.5))}
        drawn = LogRow(
            kind="assignment", experiment="e", at=k / 10, request_id=f"r{k}", unit=f"{k:032x}", arm=arm, probability=0.5
        )
        answered = {"kind": "answer", "latency_ms": float(rng.lognormal(5, 1)), "scores": scores}
        found += [drawn, drawn.model_copy(update={**answered, "error": "timeout" if failed else None})]
    return found


def written(folder: Path, told: Sequence[LogRow], size: int) -> Path:
    segments = Segments(Store(str(folder)), ())
    for number, start in enumerate(range(0, len(told), size), 1):
        part = told[start : start + size]
        assert segments.create(LogSegment(1, number, number, len(part), "jsonl"), encode(part))
    return folder


def read(folder: Path) -> ExperimentReport:
    return analyse_log("cards", read_log(Store(str(folder)), ()), RULES)


def page_of(report: ExperimentReport) -> str:
    return render_html(ReportInput(title="Experiment cards", created_at="2026-01-01T00:00:00+00:00", experiment=report))


def test_the_same_rows_give_the_same_bytes_however_they_are_cut(tmp_path: Path) -> None:
    told = rows(1500)
    few, many = read(written(tmp_path / "few", told, 800)), read(written(tmp_path / "many", told, 7))
    assert few.model_dump_json() == many.model_dump_json()
    assert few.contrasts[0].verdict == "better"
    assert few.contrasts[0].n == 1500
    assert few.sentence.startswith("rag is better than base: +0.1")
    assert "n=1,500 units" in few.sentence
    assert len(few.contrasts[0].path) > 50


def test_duplicates_and_damage_are_said_and_change_nothing(tmp_path: Path) -> None:
    told = rows(600)
    folder = written(tmp_path, [*told, *told[100:200]], 100)
    (folder / "000001-00000099-50.jsonl").write_bytes(encode(told[:50])[:-40])
    report = read(folder)
    assert report.contrasts == read(written(tmp_path / "clean", told, 100)).contrasts
    assert report.notes[0].startswith("100 rows stood in the log twice")
    assert "000001-00000099-50.jsonl" in report.notes[1]


def test_the_page_shows_its_numbers_and_needs_nothing(tmp_path: Path) -> None:
    report = read(written(tmp_path, rows(1500), 500))
    page = page_of(report)
    assert len(page.encode()) < 200_000
    assert "http" not in page.replace("http://www.w3.org", "").replace("http-equiv", "")
    for piece in (report.sentence, "right|n:1500|arm:rag|vs:base|score:aipw|cs:betting", "answers slower than 2000 ms"):
        assert piece in page
    assert page.count("<polygon") == 1


def test_an_arm_that_broke_a_guardrail_and_a_blocked_verdict_lead_the_page(tmp_path: Path) -> None:
    failing = read(written(tmp_path / "a", rows(600, failing=0.3), 500))
    assert failing.cut == ("rag",)
    assert failing.sentence.startswith("rag broke a guardrail and is to be cut.")
    lost = [row for row in rows(4000) if row.arm != "rag" or int(row.request_id[1:]) % 4]
    blocked = read(written(tmp_path / "b", lost, 2000))
    assert blocked.contrasts[0].verdict == "undecided"
    assert "No conclusion: units do not fall to the arms as planned" in page_of(blocked)


def test_a_log_without_answers_yet_makes_a_page(tmp_path: Path) -> None:
    report = read(written(tmp_path, rows(0), 10))
    assert report.sentence == "Nothing is known of rag against base on right yet."
    assert "Nothing is known" in page_of(report)
    assert analyse("cards", [], RULES).rows == 0


def test_batches_that_hold_other_metrics_or_none_are_read_alike() -> None:
    """Scores are a struct of what a segment has; here one batch has ours beside another, one has none."""
    told = rows(3)[1:]
    base = {name: [getattr(row, name) for row in told] for name in ("kind", "role", "arm", "unit", "request_id", "at")}
    shared = {
        **base,
        "probability": [0.5] * 6,
        "error": pa.nulls(6, pa.string()),
        "cold": [False] * 6,
        "retrieved_ids": pa.nulls(6, pa.list_(pa.string())),
        "event": pa.nulls(6, pa.string()),
        "detail": pa.nulls(6, pa.string()),
        "latency_ms": [5.0] * 6,
    }
    right = pa.array([None, 1.0, None, 0.0, None, None], pa.float64())  # an assignment, its answer, and so on
    scores = pa.StructArray.from_arrays([right, pa.array([0.5] * 6)], ["right", "form"])
    some = analyse("cards", [pa.record_batch({**shared, "scores": scores})], RULES)
    none = analyse("cards", [pa.record_batch(shared)], RULES)
    assert (some.contrasts[0].n, none.contrasts[0].n) == (2, 0)
    assert [arm.units for arm in some.arms] == [arm.units for arm in none.arms]


def test_the_command_prints_the_verdict_and_writes_the_page(tmp_path: Path) -> None:
    written(tmp_path / "log", rows(1500), 500)
    (tmp_path / "spec.yaml").write_text(SPEC, encoding="utf-8")
    asked = [
        "experiment",
        "report",
        str(tmp_path / "spec.yaml"),
        "--log",
        str(tmp_path / "log"),
        "--out",
        str(tmp_path),
    ]
    said = CliRunner().invoke(app, asked)
    assert said.exit_code == 0, said.output
    printed = " ".join(said.output.split())
    assert "rag is better than base" in printed
    assert "arm units plain mean answers failed" in printed
    assert "arm weighted difference units e-value" in printed
    assert (tmp_path / "report.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    assert '"verdict":"better"' in (tmp_path / "report.json").read_text(encoding="utf-8").replace(": ", ":")
