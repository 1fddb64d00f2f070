"""A comparison beyond the fields of a card: other scorers, a primary metric, slices, clusters, tied sets."""

import asyncio
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from statsmodels.stats.multitest import multipletests

from graftwork.cli.compare import show_comparison
from graftwork.datasets.rows import DatasetRow, read_fields
from graftwork.errors import ConfigError, DataError
from graftwork.metrics import LATENCY_MS, Metric
from graftwork.prompts.render import Message
from graftwork.report import ReportInput, render_html
from graftwork.report.schema import CompareReport
from graftwork.report.views import headline
from graftwork.serving.evaluation.answers import AnswerSet, alone_jobs, ask_jobs
from graftwork.serving.evaluation.compare import compare, primary_metric
from graftwork.serving.evaluation.differences import Rules, ScoredArms, family
from graftwork.serving.evaluation.verdict import advise
from graftwork.serving.spec import ArmSpec
from tests.fake_arms import ARMS, SCHEMA, Script, airports, ask_all, by_job, spec

SCORERS = [
    "fields",
    "field_f1",
    {"kind": "regex", "name": "braces", "pattern": r"\{.*\}"},
    "latency",
    "tokens",
    {"kind": "cost", "per_1k_prompt_tokens": 0.1, "per_1k_completion_tokens": 0.4},
]


def answers(asked: Any, script: Any, rows: Any, folder: Path) -> AnswerSet:
    return asyncio.run(ask_all(asked, rows, script, folder / "answers.jsonl"))


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> CompareReport:
    rows = airports(120)
    asked = spec(scorers=SCORERS, slices=["country"], cluster="pair", primary="both")
    folder = tmp_path_factory.mktemp("compare")
    said = answers(asked, Script(rows), rows, folder)
    alone = asyncio.run(ask_jobs(alone_jobs(asked, rows, {}), by_job(Script(rows)), folder / "alone.jsonl", 1))
    fields = {
        "country": tuple((row.gold or {})["country"] for row in rows),
        "pair": tuple(str(i // 2) for i in range(120)),
    }
    return compare(asked, rows, said, SCHEMA, fields=fields, alone=alone)


def test_every_scorer_has_its_column_and_its_tests(report: CompareReport) -> None:
    names = [
        "facts",
        "form",
        "both",
        "field_accuracy",
        "field_f1",
        "braces",
        "prompt_tokens",
        "completion_tokens",
        "cost",
    ]
    assert [metric.name for metric in report.metrics] == names
    assert all(list(arm.scores) == names for arm in report.arms)
    assert len(report.differences) == 4 * len(names)
    by = {(d.a, d.metric): d for d in report.differences}
    assert by["raft-rag", "braces"].verdict == "better"
    assert by["raft-rag", "field_f1"].verdict == "better"
    assert by["raft-rag", "prompt_tokens"].verdict == "equivalent", "the script has as many for all"
    assert by["raft-rag", "completion_tokens"].value == pytest.approx(
        report.arms[4].scores["completion_tokens"].value - report.arms[1].scores["completion_tokens"].value
    )


def test_a_time_is_of_each_arm_alone_and_no_verdict(report: CompareReport) -> None:
    assert not {"latency_ms", "ttft_ms"} & {d.metric for d in report.differences}
    for arm in report.arms:
        assert arm.latency_ms is not None
        assert arm.ttft_ms is not None
        assert (arm.latency_ms.n, arm.ttft_ms.p50) == (10, 10.0)
    html = render_html(ReportInput(title="t", created_at="now", compare=report))
    assert "measured with one request in flight" in html
    assert "Latencies are under" not in html


@pytest.mark.parametrize("name", ["latency_ms", "ttft_ms"])
def test_a_claim_about_a_time_is_refused(name: str) -> None:
    claim = {"a": "base", "b": "base-rag", "metric": name}
    with pytest.raises(ValueError, match=f"contrasts: {name} is measured with each arm alone and not tested"):
        spec(scorers=["fields", "latency"], contrasts=[claim])


def test_an_hours_price_counts_the_time_alone_and_not_the_queue(tmp_path: Path) -> None:
    """A replica at 3.6 USD an hour costs a thousandth of a USD a second: 0.1 s are 0.1 USD per 1,000 answers."""
    rows = airports(40)
    asked = spec(scorers=["fields", {"kind": "cost", "per_replica_hour": 3.6}])

    def took(ms: float) -> Script:
        class Slow(Script):
            async def __call__(self, arm: ArmSpec, messages: Any, request_id: str) -> dict[str, Any]:
                return {**await super().__call__(arm, messages, request_id), "latency_ms": ms}

        return Slow(rows)

    queued = answers(asked, took(35_000.0), rows, tmp_path)
    alone = asyncio.run(ask_jobs(alone_jobs(asked, rows, {}), by_job(took(100.0)), tmp_path / "alone.jsonl", 1))
    cost = compare(asked, rows, queued, SCHEMA, alone=alone).arms[0].scores["cost"]
    assert cost.value == pytest.approx(0.1)
    assert cost.n == 10
    assert "cost" not in compare(asked, rows, queued, SCHEMA).arms[0].scores


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
        ("big", 25),
        ("(other)", 15),
    ]


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


def test_a_measure_that_was_never_taken_is_left_out(tmp_path: Path) -> None:
    rows = airports(30)
    asked = spec(scorers=["fields", "tokens"])

    async def fails(arm: ArmSpec, messages: list[dict[str, str]], request_id: str) -> dict[str, Any]:
        if arm.name == "base":
            raise TimeoutError("no answer")
        return await Script(rows)(arm, messages, request_id)

    found = compare(asked, rows, answers(asked, fails, rows, tmp_path), SCHEMA)
    assert "prompt_tokens" not in found.arms[0].scores
    assert not [d for d in found.differences if (d.a, d.metric) == ("base", "prompt_tokens")]
    assert not any(math.isnan(d.value) for d in found.differences)
    assert "–" in render_html(ReportInput(title="t", created_at="now", compare=found))


def test_the_margin_of_a_measure_is_a_share_of_it() -> None:
    b = np.linspace(100, 200, 400)
    scored = ScoredArms({"a": {"latency_ms": b + 1}, "b": {"latency_ms": b}}, metrics=(LATENCY_MS,))
    assert family(scored, [("a", "b", "latency_ms")], Rules(margin=0.03))[0].verdict == "equivalent"
    assert family(scored, [("a", "b", "latency_ms")], Rules(margin=0.001))[0].verdict == "worse"


def test_fields_are_read_from_rows_and_their_gold(tmp_path: Path) -> None:
    path = tmp_path / "eval.jsonl"
    lines = [
        {"prompt": "?", "completion": "!", "gold": {"country": "US"}, "given_fields": ["country", "a"], "level": 3}
    ] * 3
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    names = ["country", "given_fields", "level"]
    assert read_fields(str(path), names, limit=2) == {
        "country": ("US",) * 2,
        "given_fields": ("country+a",) * 2,
        "level": ("3",) * 2,
    }
    with pytest.raises(DataError, match=r"row 1: contry: the field is missing"):
        read_fields(str(path), ["contry"])


def test_a_verdict_needs_a_score() -> None:
    lower = Metric("errors", "share", "lower", "binary", "")
    with pytest.raises(ConfigError, match="of which more is better"):
        primary_metric(spec(scorers=["latency"], answer_schema=None), [LATENCY_MS, lower])


# Texts: exact match alone rewards brevity, containment alone length.

PLACES = [
    DatasetRow(
        f"q{i}", (Message("user", f"Where is {i}?"),), doc_id=f"d{i}", gold={"answers": [f"Town {i}x", f"T{i}x"]}
    )
    for i in range(50)
]
TEXT_ARMS = (
    {"name": "base-rag", "retriever": {"corpus": "c.jsonl"}, "max_new_tokens": 24},
    {"name": "raft-rag", "adapter": "a@b", "retriever": {"corpus": "c.jsonl"}},
    {"name": "base"},
)


class Texts:
    """base-rag writes sentences, 11 of 50 with the right text in them, and 37 are cut; raft-rag 13 right texts, and 3
    sentences that contain one; base nothing of it."""

    async def __call__(self, arm: ArmSpec, messages: list[dict[str, str]], request_id: str) -> dict[str, Any]:
        at = next(i for i, row in enumerate(PLACES) if row.messages[0].content == messages[-1]["content"])
        wordy = f"As far as I can tell from this, the place in question is Town {at}x"
        said = {
            "base-rag": wordy if at < 11 else "As far as I can tell from this, nothing",
            "raft-rag": f"T{at}x" if 5 <= at < 18 else wordy if 18 <= at < 21 else "Nowhere",
            "base": "No idea",
        }[arm.name]
        cut = arm.name == "base-rag" and at >= 13
        return {
            "request_id": request_id,
            "arm": arm.name,
            "text": said,
            "base_digest": "1f0c9a2b77aa",
            "adapter_version": "9f8e7d6c5b4a" if arm.adapter else None,
            "finish_reason": "length" if cut else "stop",
        }


def places(folder: Path, scorer: str, arms: int = 2) -> CompareReport:
    asked = spec(TEXT_ARMS[:arms], scorers=[scorer], answer_schema=None)
    return compare(asked, PLACES, answers(asked, Texts(), PLACES, folder), None)


def test_a_verdict_on_texts_tells_exact_match_from_containment(tmp_path: Path) -> None:
    found = places(tmp_path, "qa")
    assert found.primary == "em"
    scores = {arm.name: {name: score.value for name, score in arm.scores.items()} for arm in found.arms}
    assert (scores["raft-rag"]["em"], scores["raft-rag"]["contains"]) == (0.26, 0.32)
    assert (scores["base-rag"]["em"], scores["base-rag"]["contains"]) == (0.0, 0.22)
    sentence = found.advice.sentence
    assert sentence.startswith("Finetuning with retrieval wins by F1 and by exact match, undecided by containment: ")
    assert "raft-rag 0.26, +0.26 [+0.14, +0.40] over base-rag, the baseline, n=50" in sentence
    assert "(exact match / F1 / containment: raft-rag 0.26 / 0.28 / 0.32, base-rag 0.00 / 0.06 / 0.22)" in sentence
    assert sentence.endswith(" Answers cut at max_new_tokens: base-rag 74%.")
    assert any(
        text.startswith("By containment, undecided between raft-rag and base-rag") for text in found.advice.caveats
    )
    html = render_html(ReportInput(title="t", created_at="now", compare=found))
    assert "base-rag: 37 of 50 answers (74%) were cut at max_new_tokens." in html


def test_arms_with_something_in_common_win_by_it_only_over_arms_without_it(tmp_path: Path) -> None:
    contains = [found for found in places(tmp_path, "qa").advice.metrics if found.metric == "contains"]
    assert (contains[0].winner, contains[0].tied) == (None, ("raft-rag", "base-rag"))
    three = places(tmp_path / "three", "qa", arms=3).advice
    assert three.sentence.startswith("Retrieval wins by containment and finetuning with retrieval by F1 and by exact ")
    assert "over base-rag, the baseline (level with 1 more arm), n=50" in three.sentence


def test_exact_alone_is_said_to_reward_brevity(tmp_path: Path) -> None:
    [note] = [note for note in places(tmp_path, "exact").notes if note.startswith("exact counts")]
    assert "contain the right text and more: base-rag 11, raft-rag 3 of 50" in note
    assert "the scorer qa reports" in note
    assert not [note for note in places(tmp_path, "qa").notes if note.startswith("exact counts")]


def test_the_terminal_says_what_was_cut_and_what_is_open(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    show_comparison(places(tmp_path, "qa"), 0)
    said = " ".join(capsys.readouterr().out.split())
    assert "cut" in said
    assert "Answers cut at max_new_tokens: base-rag 74%." in said
    assert "By containment, undecided between raft-rag and base-rag" in said


# What the verdict compares with, and how it is rounded.


def test_the_headline_compares_with_the_baseline_of_arms_that_score_the_same(tmp_path: Path) -> None:
    """139 of 200 against five arms at 0: 70 points more than the declared baseline, and so it says."""
    right, rows = np.zeros(200), np.zeros(200)
    right[:139] = 1
    values = {name: rows for name in ("base", "shots", "rag", "tuned", "naive")} | {"raft": right}
    kinds: dict[str, Any] = {
        "base": "prompt",
        "shots": "prompt",
        "rag": "rag",
        "tuned": "finetune",
        "naive": "both",
        "raft": "both",
    }
    scored = ScoredArms({name: {"facts": some, "form": some, "both": some} for name, some in values.items()})
    sentence = advise(scored, kinds, Rules(), baseline="rag").sentence
    assert "raft answers 70% of 200 questions wholly right, 70 points more than rag, the baseline" in sentence
    assert "(level with 4 more arms) (95% interval 63 to 75)" in sentence
    values["naive"] = right * (np.arange(200) < 10)
    scored = ScoredArms({name: {"facts": some, "form": some, "both": some} for name, some in values.items()})
    assert "points more than naive, the best other arm (95%" in advise(scored, kinds, Rules(), baseline="rag").sentence


def test_the_tile_names_the_arm_of_the_verdict(report: CompareReport) -> None:
    best, tied = headline(report)
    both = next(found for found in report.advice.metrics if found.metric == "both")
    assert (best.name, tied) == (both.best, both.tied[1:])


# What facts leaves out.


def test_empty_gold_is_counted_and_so_are_values_invented_there(tmp_path: Path) -> None:
    rows = [replace(row, gold={**(row.gold or {}), "iata": ""}) for row in airports(30)]
    asked = spec(scorers=["fields"])

    async def says(arm: ArmSpec, messages: list[dict[str, str]], request_id: str) -> dict[str, Any]:
        gold = next(dict(row.gold or {}) for row in rows if row.messages[0].content == messages[-1]["content"])
        if arm.name == "finetuned":
            gold["iata"] = "ABC"
        return {**await Script(airports(30))(arm, messages, request_id), "text": json.dumps(gold)}

    found = compare(asked, rows, answers(asked, says, rows, tmp_path), SCHEMA)
    by = {arm.name: arm.scores for arm in found.arms}
    assert (by["finetuned"]["facts"].value, by["finetuned"]["both"].value, by["base"]["both"].value) == (1, 0, 1)
    [note] = [note for note in found.notes if note.startswith("facts leaves out")]
    assert "30 empty gold values (iata 30)" in note
    assert "Invented: base 0, base-rag 0, finetuned 30, naive-rag 0, raft-rag 0." in note
