"""A comparison beyond the fields of a card: other scorers, a primary metric, slices, clusters, tied sets."""

import asyncio
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from statsmodels.stats.multitest import multipletests

from graftwork.data import read_fields
from graftwork.errors import ConfigError, DataError
from graftwork.metrics import LATENCY_MS, Metric
from graftwork.report import ReportInput, render_html
from graftwork.report.records import CompareReport
from graftwork.serving.experiment.answers import Answers
from graftwork.serving.experiment.compare import compare, primary_metric
from graftwork.serving.experiment.offline import run_offline
from graftwork.serving.experiment.verdict import Rules, ScoredArms, family
from graftwork.serving.spec import ArmSpec
from tests.scripted_arms import ARMS, SCHEMA, Script, airports, spec

SCORERS = ["fields", "field_f1", {"kind": "regex", "name": "braces", "pattern": r"\{.*\}"}, "latency", "tokens",
           {"kind": "cost", "per_1k_prompt_tokens": 0.1, "per_1k_completion_tokens": 0.4}]  # fmt: skip


def answers(asked: Any, script: Any, rows: Any, folder: Path) -> Answers:
    return asyncio.run(run_offline(asked, rows, script, folder / "answers.jsonl"))


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> CompareReport:
    rows = airports(120)
    asked = spec(scorers=SCORERS, slices=["country"], cluster="pair", primary="both")
    said = answers(asked, Script(rows), rows, tmp_path_factory.mktemp("compare"))
    fields = {"country": tuple((row.gold or {})["country"] for row in rows),
              "pair": tuple(str(i // 2) for i in range(120))}  # fmt: skip
    return compare(asked, rows, said, SCHEMA, fields=fields)


def test_every_scorer_has_its_column_and_its_tests(report: CompareReport) -> None:
    names = ["facts", "form", "both", "field_accuracy", "field_f1", "braces", "latency_ms", "ttft_ms", "prompt_tokens",
             "completion_tokens", "cost"]  # fmt: skip
    assert [metric.name for metric in report.metrics] == names
    assert all(list(arm.scores) == names for arm in report.arms)
    assert len(report.differences) == 4 * len(names)
    by = {(d.a, d.metric): d for d in report.differences}
    assert by["raft-rag", "braces"].verdict == "better"
    assert by["raft-rag", "field_f1"].verdict == "better"
    assert by["raft-rag", "ttft_ms"].verdict == "equivalent", "the script takes as long for all"
    assert by["raft-rag", "latency_ms"].value == pytest.approx(
        report.arms[4].scores["latency_ms"].value - report.arms[1].scores["latency_ms"].value
    )


def test_clusters_are_drawn_whole(report: CompareReport) -> None:
    assert (report.cluster, report.clusters) == ("pair", 60)
    assert {d.interval for d in report.differences} == {"cluster-bca"}
    assert {score.method for arm in report.arms for score in arm.scores.values()} == {"cluster-bca"}
    assert "|cluster:pair|" in report.arms[0].scores["both"].signature


def test_copies_of_a_question_say_nothing_new() -> None:
    rng = np.random.default_rng(0)
    base = rng.integers(0, 2, 40).astype(float)
    arm = np.where(rng.random(40) < 0.25, 1.0, base)
    once = ScoredArms({"a": {"both": arm}, "b": {"both": base}}, clusters=[str(i) for i in range(40)])
    copies = [str(i // 5) for i in range(200)]
    five = ScoredArms({"a": {"both": arm.repeat(5)}, "b": {"both": base.repeat(5)}}, clusters=copies)
    alone, copied = (family(scored, [("a", "b", "both")])[0] for scored in (once, five))
    assert (alone.value, alone.p_value) == (copied.value, copied.p_value)
    assert (alone.low, alone.high) == pytest.approx((copied.low, copied.high))
    assert copied.mde == pytest.approx(alone.mde, rel=0.05)
    naive = family(ScoredArms(dict(five.values)), [("a", "b", "both")])[0]
    assert naive.p_value < copied.p_value
    assert naive.high - naive.low < copied.high - copied.low


def test_slices_are_adjusted_over_all_of_them_as_statsmodels_does(report: CompareReport) -> None:
    assert [(part.field, part.value) for part in report.slices] == [("country", v) for v in ("BR", "GL", "US")]
    assert sum(part.n for part in report.slices) == report.n
    tests = [d for part in report.slices for d in part.differences]
    assert {(d.family, d.adjust, d.metric) for d in tests} == {(12, "bh", "both")}
    adjusted = multipletests([d.p_value for d in tests], method="fdr_bh")[1]
    assert [d.p_adjusted for d in tests] == pytest.approx(list(adjusted))
    assert "|bh:12|" in tests[0].signature


def test_small_slices_are_taken_together(tmp_path: Path) -> None:
    rows = airports(40)
    asked = spec(slices=["place"], slice_min=10)
    fields = {"place": tuple("big" if i < 25 else f"small{i}" for i in range(40))}
    said = answers(asked, Script(rows), rows, tmp_path)
    assert [(s.value, s.n) for s in compare(asked, rows, said, SCHEMA, fields=fields).slices] == [
        ("big", 25), ("(other)", 15)]  # fmt: skip


def test_tied_sets_stand_in_place_of_a_ranking(report: CompareReport) -> None:
    both = next(found for found in report.advice.metrics if found.metric == "both")
    assert sorted(arm for group in both.groups for arm in group)[0] == "base"
    assert {arm for group in both.groups for arm in group} == {arm["name"] for arm in ARMS}
    assert all(len(group) > 1 for group in both.groups if "base" in group), "base and base-rag are both at 0"


def test_the_page_shows_it_all(report: CompareReport) -> None:
    html = render_html(ReportInput(title="t", created_at="now", compare=report))
    assert len(html) < 1_000_000
    for text in ("Where it differs", "country = GL", "Not told apart", "cost", "bootstrap over 60 clusters"):
        assert text in html


def test_another_task_without_fields_or_schema(tmp_path: Path) -> None:
    rows = airports(60)
    asked = spec(answer_schema=None, scorers=[{"kind": "exact", "field": "city"}, "latency"])

    async def city(arm: ArmSpec, messages: list[dict[str, str]], request_id: str) -> dict[str, Any]:
        said = await Script(rows)(arm, messages, request_id)
        gold = next(row.gold for row in rows if row.messages[0].content == messages[-1]["content"])
        return {**said, "text": gold["city"] if gold and arm.name == "raft-rag" else "Nowhere"}

    found = compare(asked, rows, answers(asked, city, rows, tmp_path), None)
    assert (found.primary, found.advice.metrics[-1].winner) == ("exact", "finetuning with retrieval")
    assert found.advice.sentence.startswith("Finetuning with retrieval wins on exact: raft-rag 1.00, +1.00 [")
    assert found.arms[0].not_json is None
    assert "not JSON" not in render_html(ReportInput(title="t", created_at="now", compare=found))


def test_a_time_that_was_never_taken_is_left_out(tmp_path: Path) -> None:
    rows = airports(30)
    asked = spec(scorers=["fields", "latency"])

    async def fails(arm: ArmSpec, messages: list[dict[str, str]], request_id: str) -> dict[str, Any]:
        if arm.name == "base":
            raise TimeoutError("no answer")
        return await Script(rows)(arm, messages, request_id)

    found = compare(asked, rows, answers(asked, fails, rows, tmp_path), SCHEMA)
    assert "latency_ms" not in found.arms[0].scores
    assert not [d for d in found.differences if (d.a, d.metric) == ("base", "latency_ms")]
    assert not any(math.isnan(d.value) for d in found.differences)
    assert "–" in render_html(ReportInput(title="t", created_at="now", compare=found))


def test_the_margin_of_a_measure_is_a_share_of_it() -> None:
    b = np.linspace(100, 200, 400)
    scored = ScoredArms({"a": {"latency_ms": b + 1}, "b": {"latency_ms": b}}, metrics=(LATENCY_MS,))
    assert family(scored, [("a", "b", "latency_ms")], Rules(margin=0.03))[0].verdict == "equivalent"
    assert family(scored, [("a", "b", "latency_ms")], Rules(margin=0.001))[0].verdict == "worse"


def test_fields_are_read_from_rows_and_their_gold(tmp_path: Path) -> None:
    path = tmp_path / "eval.jsonl"
    lines = [{"prompt": "?", "completion": "!", "gold": {"country": "US"}, "asked": ["country", "a"], "level": 3}] * 3
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    names = ["country", "asked", "level"]
    assert read_fields(str(path), names, limit=2) == {"country": ("US",) * 2, "asked": ("country+a",) * 2,
                                                      "level": ("3",) * 2}  # fmt: skip
    with pytest.raises(DataError, match=r"row 1: contry: the field is missing"):
        read_fields(str(path), ["contry"])


def test_a_verdict_needs_a_score() -> None:
    lower = Metric("errors", "share", "lower", "binary", "")
    with pytest.raises(ConfigError, match="of which more is better"):
        primary_metric(spec(scorers=["latency"], answer_schema=None), [LATENCY_MS, lower])
