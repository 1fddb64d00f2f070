"""Studies: the spec, the sweep over a key, the likelihoods' scores, and what is said of each claim."""

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats

from examples.studies.claims import judge, outcome_of, welch
from examples.studies.cli import show_study
from examples.studies.for_each import expand
from examples.studies.likelihood import Weighed, read_weighed, scores_of, weigh_all
from examples.studies.measure import Measured, check_measure
from examples.studies.pages import page_of
from examples.studies.report import StudyPage, section
from examples.studies.results import measure_record, sentence
from examples.studies.schema import StudyReport
from examples.studies.scores import Scores
from examples.studies.spec import ClaimSpec, StudySpec
from graftwork import config, stats
from graftwork.datasets.rows import DatasetRow
from graftwork.errors import ConfigError, DataError, RunError, UserError
from graftwork.prompts.render import Message
from graftwork.report import render_html, render_json
from graftwork.scoring import Choices
from graftwork.serving.messages import Likelihood
from graftwork.serving.spec import ArmSpec
from graftwork.stats import Interval

STUDIES = Path(__file__).parents[3] / "examples" / "studies"
FILES = sorted(STUDIES.glob("*.yaml"))
RESULTS = sorted((STUDIES / "results").glob("*.json"))


MAIN = {
    "name": "main",
    "eval": "eval.jsonl",
    "answer_schema": "schema.json",
    "metrics": ["facts"],
    "arms": [{"name": "left"}, {"name": "right"}],
}


def study(claims: Sequence[dict[str, Any]], **changes: Any) -> StudySpec:
    """Two arms and their claims on answers of a file that is not read."""
    claim = {"statement": "left is better", "a": "left", "b": "right", "metric": "facts", "expect": "higher"}
    tree = {
        "name": "small",
        "title": "A study",
        "paper": "A paper",
        "base": "tiny",
        "measures": [{**MAIN, "by": "size"}],
        "claims": [{**claim, **one} for one in claims],
    }
    return StudySpec.model_validate({**tree, **changes})


def scores(left: Sequence[float], right: Sequence[float], *, units: int = 0, groups: Sequence[str] = ()) -> Scores:
    """Scores on facts; `units` questions in turn belong to one unit, or each to its own."""
    n = len(left)
    names = [str(i % units) if units else str(i) for i in range(n)]
    values = {arm: {"facts": np.array(found, dtype=float)} for arm, found in (("left", left), ("right", right))}
    return Scores(values, names, list(groups) or [""] * n)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_each_study_of_the_examples_is_short_and_valid(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 60
    spec = config.load_as(StudySpec, path)
    assert spec.name == path.stem
    for adapter in spec.adapters:
        assert (path.parent / adapter.file).is_file()


def test_an_entry_stands_once_for_every_value() -> None:
    tree = {"arms": [{"name": "k-{k}", "retriever": {"k": "{k}"}}, {"name": "base"}], "title": "kept {k}"}
    assert expand(tree, {"k": [1, 3]}) == {
        "arms": [{"name": "k-1", "retriever": {"k": 1}}, {"name": "k-3", "retriever": {"k": 3}}, {"name": "base"}],
        "title": "kept {k}",
    }
    assert expand(["{a}{b}"], {"a": [1, 2], "b": ["x", "y"]}) == ["1x", "1y", "2x", "2y"]
    assert expand([{"inner": ["{a}"]}], {"a": [1, 2]}) == [{"inner": [1, 2]}], "the innermost list is repeated"
    assert expand(['{"json": 1}'], {"a": [1]}) == ['{"json": 1}']


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"claims": [{"b": "nobody"}]}, "'nobody' is none of the arms"),
        ({"claims": [{"b": "left"}]}, "compared with itself"),
        ({"claims": [{"metric": "nats"}]}, "metric='nats' is none of facts, form, both"),
        ({"claims": [{"measure": "other"}]}, "measure='other' is none of"),
        ({"claims": [{"than_of": "5"}]}, "than_of needs of"),
    ],
)
def test_a_claim_that_cannot_be_judged_is_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        study(**change)


def test_a_wrong_key_of_a_study_is_named(tmp_path: Path) -> None:
    file = tmp_path / "study.yaml"
    file.write_text((STUDIES / "raft-trap.yaml").read_text(encoding="utf-8").replace("limit:", "limits:"))
    with pytest.raises(ConfigError, match="did you mean 'limit'"):
        config.load_as(StudySpec, file)


@pytest.mark.parametrize(
    ("measure", "claim", "said"),
    [
        ({"by": "colour"}, {}, "row 1: colour: the field is missing"),
        ({"by": "size"}, {"of": "huge"}, "of='huge': no question of this group\\n.*into large, small"),
        ({"unit": "doc_id"}, {}, "row q1: it has no doc_id"),
        ({"kind": "likelihood", "answer_schema": None, "metrics": ["nats"]}, {"metric": "nats"}, r"gold\.choices"),
    ],
)
def test_rows_that_cannot_be_measured_are_refused_before_anything_runs(
    tmp_path: Path, measure: dict[str, Any], claim: dict[str, Any], said: str
) -> None:
    file = tmp_path / "eval.jsonl"
    asked = {"prompt": "Who?", "completion": "I", "gold": {"x": 1}}
    file.write_text(
        "".join(
            json.dumps({"id": f"q{n}", "size": size, **asked}) + "\n"
            for n, size in enumerate(("small", "large"), start=1)
        )
    )
    whole = {**MAIN, "eval": str(file), **measure}
    spec = study([claim], measures=[whole])
    with pytest.raises(UserError, match=said):
        check_measure(spec, spec.measures[0])


@pytest.mark.parametrize(
    ("expect", "value", "p", "inside", "outcome"),
    [
        ("higher", 0.3, 0.001, Interval(0.1, 0.5), "reproduced"),
        ("higher", -0.3, 0.001, Interval(-0.5, -0.1), "not reproduced"),
        ("lower", -0.3, 0.001, Interval(-0.5, -0.1), "reproduced"),
        ("higher", 0.3, 0.06, Interval(-0.05, 0.6), "undecided"),
        ("higher", 0.01, 0.001, Interval(0.005, 0.02), "not reproduced"),  # shown to be within the margin of 0.03
        ("not lower", 0.0, 1.0, Interval(-0.01, 0.01), "reproduced"),
        ("not lower", -0.1, 0.001, Interval(-0.2, -0.05), "not reproduced"),
        ("not lower", 0.0, 1.0, Interval(-0.1, 0.1), "undecided"),
    ],
)
def test_what_is_said_of_a_claim(expect: str, value: float, p: float, inside: Interval, outcome: str) -> None:
    claim = ClaimSpec.model_validate({"statement": "it", "a": "x", "b": "y", "metric": "facts", "expect": expect})
    assert outcome_of(claim, value, p, inside, alpha=0.05, margin=0.03) == outcome


def test_claims_are_tested_together_and_pinned_to_the_tests_they_name() -> None:
    left, right = [1.0] * 60 + [0.0] * 40, [1.0] * 20 + [0.0] * 60 + [1.0] * 20
    found = judge(study([{}, {"expect": "lower", "statement": "the other way"}]), {"main": scores(left, right)})
    assert [claim.outcome for claim in found] == ["reproduced", "not reproduced"]
    first = found[0]
    assert (first.n, first.test, first.family) == (100, "mcnemar-exact", 2)
    assert first.p_value == pytest.approx(scipy.stats.binomtest(20, 60).pvalue)
    assert first.p_adjusted == pytest.approx(2 * first.p_value)
    assert Interval(first.low, first.high) == stats.newcombe_paired(20, 40, 20, 20)


def test_a_unit_of_many_questions_counts_once() -> None:
    """Twenty questions about each of five facts, one fact decides all: no test may be sure of it."""
    left = [float(i % 5 == 0) for i in range(100)]
    [claim] = judge(study([{}]), {"main": scores(left, [0.0] * 100, units=5)})
    assert (claim.n, claim.value, claim.outcome) == (5, 0.2, "undecided")
    [alone] = judge(study([{}]), {"main": scores(left, [0.0] * 100)})
    assert (alone.n, alone.outcome) == (100, "reproduced")


def test_a_gain_in_one_group_is_compared_with_that_in_another() -> None:
    rng = np.random.default_rng(0)
    groups = ["1"] * 80 + ["5"] * 80
    left = (rng.random(160) < 0.9).astype(float)
    right = (rng.random(160) < np.where(np.array(groups) == "1", 0.1, 0.7)).astype(float)
    [claim] = judge(study([{"of": 1, "than_of": 5}]), {"main": scores(left.tolist(), right.tolist(), groups=groups)})
    gains = left - right
    expected = scipy.stats.ttest_ind(gains[:80], gains[80:], equal_var=False)
    assert (claim.test, claim.n, claim.n_than_of) == ("welch", 80, 80)
    assert claim.p_value == pytest.approx(expected.pvalue)
    assert (claim.low, claim.high) == pytest.approx(expected.confidence_interval(0.95))
    assert claim.outcome == "reproduced"


def test_two_constant_groups_differ_for_sure_or_not_at_all() -> None:
    same, more = np.zeros(5), np.ones(5)
    assert welch(same, same, 0.05) == (Interval(0.0, 0.0), 1.0)
    assert welch(more, same, 0.05) == (Interval(1.0, 1.0), 0.0)


def row(name: str, choices: list[str], right: int, signs: list[int] | None = None) -> DatasetRow:
    gold = {"choices": choices, "right": right} | ({"signs": signs} if signs else {})
    return DatasetRow(name, (Message("user", f"Who is {name}?"),), gold=gold)


def test_a_choice_is_as_probable_as_its_mean_token() -> None:
    rows = [row("x", ["she", "he", "not known"], 2, [1, -1, 0]), row("y", ["he", "she", "unknown"], 2, [-1, 1, 0])]
    weighed = [
        Weighed(key="x", logprobs=(-2.0, -3.0, -3.6), tokens=(1, 1, 2)),
        Weighed(key="y", logprobs=(-2.0, -1.0, -4.0), tokens=(1, 1, 1)),
    ]
    found = scores_of(weighed, [Choices.from_row(one) for one in rows])
    assert {name: list(values) for name, values in found.items()} == {
        "nats": [1.8, 4.0],
        "choice": [1.0, 0.0],
        "bias": [0.0, 1.0],
    }


@pytest.mark.parametrize(
    ("gold", "said"),
    [
        ({}, "choices"),
        ({"choices": ["a"], "right": 1}, "right"),
        ({"choices": ["a"], "right": 0, "signs": [1, 2]}, "signs"),
    ],
)
def test_a_row_that_cannot_be_weighed_is_refused(gold: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError, match=f"row r: gold.{said}"):
        Choices.from_row(DatasetRow("r", (Message("user", "Who?"),), gold=gold))


def test_likelihoods_are_kept_as_they_come_and_a_torn_line_is_weighed_again(tmp_path: Path) -> None:
    path, one = tmp_path / "likelihoods.jsonl", row("x", ["a", "b"], 0)
    jobs = {
        "k1": (ArmSpec(name="base"), one, Choices.from_row(one)),
        "k2": (ArmSpec(name="base"), one, Choices.from_row(one)),
    }
    asked: list[str] = []

    async def weigh(arm: ArmSpec, messages: Any, choices: Sequence[str], request_id: str) -> list[Likelihood]:
        asked.append(request_id)
        return [Likelihood(-float(len(asked)), 1) for _ in choices]

    asyncio.run(weigh_all(jobs, weigh, path, lambda done: None))
    assert set(read_weighed(path)) == {"k1", "k2"}
    path.write_bytes(path.read_bytes()[:-9])
    assert set(read_weighed(path)) == {"k1"}
    asyncio.run(weigh_all({"k2": jobs["k2"]}, weigh, path, lambda done: None))
    assert read_weighed(path)["k2"].logprobs == (-3.0, -3.0)

    async def short(arm: ArmSpec, messages: Any, choices: Sequence[str], request_id: str) -> list[Likelihood]:
        return [Likelihood(-1.0, 1)]

    with pytest.raises(RunError, match="one for each of 2 choices"):
        asyncio.run(weigh_all({"k3": jobs["k1"]}, short, path, lambda done: None))


def report_of(groups: Sequence[str] = ()) -> StudyReport:
    """A study's record from scores, with no model behind it."""
    spec = study([{}, {"statement": "<b>lower</b>", "expect": "lower"}])
    found = scores([1.0] * 60 + [0.0] * 40, [1.0] * 20 + [0.0] * 80, groups=groups)
    claims = judge(spec, {"main": found})
    measured = Measured(spec.measures[0], found, 0, False, "f" * 64)
    return StudyReport(
        name="small",
        title="A study",
        paper="A paper",
        deviations=("Smaller.",),
        base="tiny",
        base_digest="b" * 64,
        alpha=0.05,
        equivalence_margin=0.03,
        seed=0,
        adapters=(),
        claims=claims,
        sentence=sentence(claims),
        measures=(measure_record(spec, measured, "b" * 64),),
    )


def test_the_page_shows_each_arm_and_each_claim_escaped() -> None:
    found = report_of(["1"] * 50 + ["5"] * 50)
    page = StudyPage(title="A study", created_at="now", verdict=found.sentence, study=found)
    html = render_html(page, section(found))
    assert json.loads(render_json(page))["study"] == json.loads(found.model_dump_json())
    for anchor in ("patterns", "measure-main"):
        assert f'href="#{anchor}"' in html
        assert f'id="{anchor}"' in html
    assert html.count('data-metric="facts"') == 3, "all questions, and the two groups"
    assert "Of 2 published patterns: 1 reproduced, 1 not reproduced." in html
    assert "&lt;b&gt;lower&lt;/b&gt;" in html
    assert "size 5" in html


def test_the_terminal_shows_the_same_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    show_study(report_of(["1"] * 50 + ["5"] * 50))
    said = capsys.readouterr().out
    assert "main: 100 questions" in said
    assert "main, size 5 (n=50)" in said
    assert "0.60 [0.50, 0.69]" in said, "Wilson's interval of 60 in 100"
    assert "+0.40 [+0.30, +0.49]" in said


def test_equal_scores_give_equal_bytes() -> None:
    assert report_of().model_dump_json() == report_of().model_dump_json()


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_a_recorded_result_is_of_the_study_as_it_stands(path: Path) -> None:
    """Arms, claims and predictions in the file are those that the spec declares now."""
    result = StudyReport.model_validate_json(path.read_text(encoding="utf-8"))
    spec = config.load_as(StudySpec, STUDIES / f"{path.stem}.yaml")
    assert [(c.statement, c.a, c.b, c.metric, c.expect) for c in result.claims] == [
        (c.statement, c.a, c.b, c.metric, c.expect) for c in spec.claims
    ]
    assert (result.title, result.paper, result.deviations) == (spec.title, spec.paper, spec.deviations)
    for measure, found in zip(spec.measures, result.measures, strict=True):
        assert [arm.name for arm in measure.arms] == list(dict.fromkeys(score.arm for score in found.scores))
        assert found.questions >= 100
        assert found.failed == 0


def test_the_documents_page_is_made_of_the_results() -> None:
    page = STUDIES.parents[1] / "docs" / "studies.md"
    assert page.read_text(encoding="utf-8") == page_of(STUDIES), "run `python -m examples.studies.pages`"
