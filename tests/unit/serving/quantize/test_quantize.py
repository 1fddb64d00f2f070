"""From measurements to a recommendation: the rule, the paired differences, the page, and specs that cannot be meant."""

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from graftwork import config, stats
from graftwork.datasets.rows import DatasetRow
from graftwork.errors import ConfigError
from graftwork.report import ReportInput, render_html
from graftwork.report.evaluation_schema import QuantizeReport
from graftwork.report.schema import Difference
from graftwork.serving.evaluation.differences import Rules, ScoredArms, family
from graftwork.serving.quantize.measure import AnswerText, MeasuredArm, PrecisionResult
from graftwork.serving.quantize.run import Candidate, Recommendation, Rule, judge, recommend
from graftwork.serving.quantize.spec import QuantizeSpec
from tests.fake_arms import SCHEMA, airports
from tests.unit.report.test_report import Page

ROOT = Path(__file__).parents[4]
RULE = Rule("fp32", "both", margin=0.05, min_speed=0.5, batch=32)
TREE: dict[str, Any] = {
    "kind": "quantize",
    "name": "q",
    "base": "b",
    "eval": "e.jsonl",
    "answer_schema": "s.json",
    "arms": [{"name": "base"}, {"name": "tuned", "adapter": "t@latest"}],
}


def difference(wins: int, losses: int, n: int = 200) -> Difference:
    """Of `both`: the first questions lost, the next won, the rest right on both sides."""
    reference = np.array([1.0] * losses + [0.0] * wins + [1.0] * (n - losses - wins))
    other = np.array([0.0] * losses + [1.0] * wins + [1.0] * (n - losses - wins))
    scored = ScoredArms({"other": {"both": other}, "reference": {"both": reference}})
    return family(scored, [("other", "reference", "both")], Rules())[0]


def candidate(name: str, size: int, speed: float, *changed: Difference) -> Candidate:
    return Candidate(
        name, size, {"base": speed, "tuned": 2 * speed}, dict(zip(("base", "tuned"), changed, strict=False))
    )


def found(*others: Candidate) -> Recommendation:
    return recommend([candidate("fp32", 400, 100.0), *others], RULE)


SAME, WORSE, FEW = difference(1, 1), difference(0, 30), difference(0, 0, n=20)


def test_the_smallest_that_keeps_score_and_speed_is_recommended() -> None:
    got = found(candidate("int8", 150, 60.0, SAME, SAME), candidate("nf4", 100, 120.0, SAME, SAME))
    assert got.precision == "nf4"
    assert [finding.good_enough for finding in got.findings] == [True] * 3
    assert "of 3 good enough" in got.sentence
    assert "0.25x fp32's" in got.sentence
    assert "1.20x its speed at batch 32" in got.sentence


def test_a_score_lost_on_one_arm_is_enough_to_be_out() -> None:
    got = found(candidate("int8", 150, 60.0, SAME, SAME), candidate("nf4", 100, 120.0, SAME, WORSE))
    assert got.precision == "int8"
    assert "tuned: both -0.150" in got.findings[2].why
    assert "does not rule out a loss of 0.05 (n=200" in got.findings[2].why


def test_too_slow_is_out_however_small() -> None:
    got = found(candidate("nf4", 100, 49.0, SAME, SAME))
    assert got.precision == "fp32"
    assert got.sentence == "Serve fp32. nf4: 0.49x the speed of fp32 at batch 32, 0.5x is needed."


def test_few_questions_rule_nothing_out_so_the_reference_stays() -> None:
    """20 questions without one difference: Newcombe's interval still reaches below -0.05."""
    assert FEW.value == 0
    assert FEW.low < -0.05
    got = found(candidate("nf4", 100, 120.0, FEW, FEW))
    assert got.precision == "fp32"
    assert "questions would decide" in got.findings[1].why


def test_of_two_with_the_same_bytes_the_reference_then_the_faster_wins() -> None:
    assert found(candidate("nf4", 400, 300.0, SAME, SAME)).precision == "fp32"
    two = (candidate("nf4", 100, 120.0, SAME, SAME), candidate("nf4-double", 100, 130.0, SAME, SAME))
    assert found(*two).precision == "nf4-double"


def test_the_lower_end_decides_as_one_side_of_tost() -> None:
    """Kept just where the interval that `stats` gives lies above the margin."""
    for losses in range(0, 12):
        changed = difference(0, losses)
        low = stats.newcombe_paired(200 - losses, 0, losses, 0).low
        assert (found(candidate("nf4", 1, 100.0, changed, changed)).precision == "nf4") == (low > -0.05)


# Judging measurements.

CHANCES = {"fp32": 0.9, "int8": 0.9, "nf4": 0.2}


def measured(spec: QuantizeSpec, precision: Any, rows: list[DatasetRow], size: int) -> PrecisionResult:
    """Every arm right on the same questions where the chances are equal; the base never."""
    arms = []
    for arm in spec.arms:
        dice = [random.Random(f"{arm.name} {row.id}").random() for row in rows]
        right = [arm.adapter is not None and roll < CHANCES[precision] for roll in dice]
        texts = [json.dumps(dict(row.gold or {})) if ok else "?" for row, ok in zip(rows, right, strict=True)]
        said = tuple(AnswerText(text=text, cut=text == "?") for text in texts)
        loss = 0.7 if precision == "nf4" and arm.adapter else None
        arms.append(
            MeasuredArm(
                arm=arm.name,
                adapter_version="v1" if arm.adapter else None,
                nats=1.5,
                tokens=99,
                answers=said,
                tokens_per_s={1: (10.0, 12.0), 32: (90.0, 100.0, 110.0)},
                merge_loss=loss,
            )
        )
    return PrecisionResult(
        precision=precision,
        base_digest="b" * 64,
        material="m",
        reason="dtype=float32",
        caveat="",
        load_s=1.0,
        stored_bytes=size,
        resident_bytes=size,
        predicted_bytes=size,
        peak_rss_bytes=2**30,
        machine="one CPU" if precision != "nf4" else "another CPU",
        arms=tuple(arms),
    )


@pytest.fixture(scope="module")
def report() -> QuantizeReport:
    spec = QuantizeSpec.model_validate({**TREE, "precisions": list(CHANCES), "margin": 0.05})
    rows = airports(200)
    sizes = {"fp32": 400, "int8": 150, "nf4": 100}
    seen = [measured(spec, precision, rows, sizes[precision]) for precision in CHANCES]
    return judge(spec, seen, rows, SCHEMA, text="a text", template_digest="c" * 64)


def test_differences_are_paired_with_the_reference_at_the_same_arm(report: QuantizeReport) -> None:
    both = {d.a: d for d in report.differences if d.metric == "both"}
    assert {name: d.b for name, d in both.items()} == {
        "int8/base": "fp32/base",
        "int8/tuned": "fp32/tuned",
        "nf4/base": "fp32/base",
        "nf4/tuned": "fp32/tuned",
    }
    assert (both["int8/tuned"].ties, both["int8/tuned"].value) == (200, 0.0)
    assert (both["nf4/tuned"].verdict, both["nf4/tuned"].wins) == ("worse", 0)
    assert {d.family for d in report.differences} == {4}
    lost = both["nf4/tuned"].losses
    kept = round(200 * report.precisions[0].arms[1].scores["both"].value) - lost
    expected = stats.newcombe_paired(kept, 0, lost, 200 - kept - lost)
    assert (both["nf4/tuned"].low, both["nf4/tuned"].high) == (expected.low, expected.high)


def test_the_recommendation_and_what_to_know_before_believing_it(report: QuantizeReport) -> None:
    assert report.recommended == "int8"
    assert [row.good_enough for row in report.precisions] == [True, True, False]
    notes = " ".join(report.notes)
    assert "base has both=0.00 at fp32: it has nothing to lose" in notes
    assert "the delta would be off by 70% of its norm" in notes
    assert "Measured on different machines, so that speeds do not compare: another CPU; one CPU." in notes
    tuned = report.precisions[0].arms[1]
    assert (tuned.tokens_per_s[32].p50, tuned.tokens_per_s[1].p50) == (100.0, 11.0)
    assert tuned.perplexity == pytest.approx(np.exp(1.5))
    assert report.precisions[0].arms[0].cut == 200


def test_the_page_shows_every_precision_and_the_reason(report: QuantizeReport) -> None:
    page = Page(render_html(ReportInput(title="Precisions", created_at="2026-01-02T03:04:05Z", quantize=report)))
    assert "precisions" in page.ids()
    for text in (report.sentence, "recommended", "int8/tuned", "100.0", report.notes[0]):
        assert text in page.text


# Specs.


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"precisions": ["fp32"]}, "at least two different ones"),
        ({"precisions": ["fp32", "nf4", "nf4"]}, "at least two different ones"),
        ({"reference": "bf16", "precisions": ["fp32", "nf4"]}, "none of the precisions"),
        ({"precisions": ["fp32", "fp8"]}, "precisions"),
        ({"arms": [{"name": "a"}, {"name": "a"}]}, "names must differ"),
        ({"arms": []}, "arms"),
        ({"text": {"window": 64, "stride": 65}}, "skips tokens"),
        ({"speed": {"batches": [1, 128]}}, "do not fit engine.max_batch=64"),
        ({"speed": {"prompt_tokens": 1000}}, "do not fit engine.max_seq_len"),
        ({"engine": {"kv_tokens": 2048}}, "do not fit engine.kv_tokens=2048"),
        ({"engine": {"prefill_tokens": 32}}, "speed.prompt_tokens=64"),
    ],
)
def test_a_spec_that_cannot_be_measured_is_refused(changed: Mapping[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        config.validate(QuantizeSpec, {**TREE, **changed}, "test")


def test_the_example_is_a_short_valid_spec_and_the_stage_is_known() -> None:
    path = ROOT / "examples/quantize.yaml"
    spec = config.load(path, expect="quantize")
    assert isinstance(spec, QuantizeSpec)
    assert set(spec.precisions) == {"fp32", "bf16", "int8", "nf4", "nf4-double"}
    assert len(path.read_text(encoding="utf-8").splitlines()) < 60
    assert config.schema("quantize")["properties"]["margin"]["description"].startswith("The loss of that score")
