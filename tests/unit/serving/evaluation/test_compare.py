"""Asking all arms (resumable, fair, failures counted) and the comparison that comes of it."""

import asyncio
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from graftwork.datasets.rows import DatasetRow
from graftwork.errors import ConfigError, DataError, RunError
from graftwork.prompts.render import Message
from graftwork.report.schema import CompareReport, Difference
from graftwork.serving.evaluation.answers import AnswerSet, CompareProgress, question
from graftwork.serving.evaluation.compare import arm_kind, compare
from graftwork.serving.evaluation.differences import Rules, ScoredArms, family
from graftwork.serving.evaluation.spec import CompareSpec
from graftwork.serving.evaluation.verdict import advise
from graftwork.serving.spec import ArmSpec
from tests.fake_arms import ARMS, SCHEMA, Script, airports, ask_all, spec

CONTRASTS = [
    {"a": "base-rag", "b": "finetuned", "metric": "facts"},
    {"a": "finetuned", "b": "base-rag", "metric": "form"},
    {"a": "raft-rag", "b": "naive-rag", "metric": "both"},
]


def ask(asked: CompareSpec, script: Any, rows: list[DatasetRow], path: Path, **options: Any) -> AnswerSet:
    return asyncio.run(ask_all(asked, rows, script, path, **options))


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> CompareReport:
    rows, path = airports(200), tmp_path_factory.mktemp("compare") / "answers.jsonl"
    asked = spec(contrasts=CONTRASTS)
    return compare(asked, rows, ask(asked, Script(rows), rows, path), SCHEMA, template_digest="9c21d0e4ff")


def difference(report: CompareReport, arm: str, metric: str) -> Difference:
    return next(d for d in report.differences if (d.a, d.metric) == (arm, metric))


# Asking.


def test_every_arm_is_asked_every_question_once(tmp_path: Path) -> None:
    rows = airports(10)
    script = Script(rows)
    answers = ask(spec(), script, rows, tmp_path / "answers.jsonl")
    assert len(answers) == len(set(script.asked)) == len(script.asked) == 50
    assert {arm for arm, _ in script.asked[:5]} == {arm["name"] for arm in ARMS}, "arms take turns within a question"
    firsts = {script.asked[5 * i][0] for i in range(5)}
    assert len(firsts) == 5, "each arm is first now and then"


def test_no_more_than_the_asked_concurrency_is_in_flight(tmp_path: Path) -> None:
    rows, flying, most = airports(20), 0, 0
    script = Script(rows)

    async def slow(arm: ArmSpec, messages: list[dict[str, str]], request_id: str) -> dict[str, Any]:
        nonlocal flying, most
        flying += 1
        most = max(most, flying)
        await asyncio.sleep(0)
        flying -= 1
        return await script(arm, messages, request_id)

    ask(spec(concurrency=7), slow, rows, tmp_path / "answers.jsonl")
    assert most == 7


def test_a_rerun_asks_only_what_is_missing(tmp_path: Path) -> None:
    rows, path = airports(8), tmp_path / "answers.jsonl"
    ask(spec(), Script(rows), rows, path)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:30]) + lines[30][:40])  # killed in the middle of the 31st line
    again = Script(rows)
    seen: list[CompareProgress] = []
    answers = ask(spec(), again, rows, path, on_progress=seen.append)
    assert (len(again.asked), len(answers)) == (10, 40)
    assert (seen[0].done, seen[0].reused, seen[-1].done, seen[-1].total) == (30, 30, 40, 40)
    assert sorted(path.read_text().splitlines()) == sorted(line.rstrip("\n") for line in lines)
    third = Script(rows)
    ask(spec(), third, rows, path)
    assert third.asked == []


def test_a_changed_arm_version_or_question_is_asked_anew(tmp_path: Path) -> None:
    rows, path = airports(4), tmp_path / "answers.jsonl"
    ask(spec(), Script(rows), rows, path, versions={"raft-rag": "aaaaaaaaaaaa"})
    other_version = Script(rows)
    answers = ask(spec(), other_version, rows, path, versions={"raft-rag": "bbbbbbbbbbbb"})
    assert {arm for arm, _ in other_version.asked} == {"raft-rag"}
    assert answers.stale == 4
    shorter = tuple({**arm, "max_new_tokens": 8} if arm["name"] == "base" else arm for arm in ARMS)
    other_arm = Script(rows)
    ask(spec(shorter), other_arm, rows, path, versions={"raft-rag": "bbbbbbbbbbbb"})
    assert {arm for arm, _ in other_arm.asked} == {"base"}
    reworded = [DatasetRow(rows[0].id, (Message("user", "And which is K000?"),), gold=rows[0].gold), *rows[1:]]
    other_question = Script(reworded)
    ask(spec(), other_question, reworded, path, versions={"raft-rag": "bbbbbbbbbbbb"})
    assert {row for _, row in other_question.asked} == {rows[0].id}


def test_the_gold_answer_is_not_sent() -> None:
    row = DatasetRow("r", (Message("user", "Which?"), Message("assistant", "KMIA")), gold={"icao": "KMIA"})
    assert question(row) == [{"role": "user", "content": "Which?"}]


def test_failures_are_recorded_counted_and_wrong(tmp_path: Path) -> None:
    rows, path = airports(40), tmp_path / "answers.jsonl"
    script = Script(rows)

    async def flaky(arm: ArmSpec, messages: list[dict[str, str]], request_id: str) -> dict[str, Any]:
        said = await script(arm, messages, request_id)
        if arm.name == "raft-rag" and len(script.asked) % 10 < 5:
            raise TimeoutError("no answer within 60 s")
        if arm.name == "finetuned":
            return {**said, "finish_reason": "error"}
        return said

    seen: list[CompareProgress] = []
    answers = ask(spec(), flaky, rows, path, on_progress=seen.append)
    found = compare(spec(), rows, answers, SCHEMA)
    arms = {arm.name: arm for arm in found.arms}
    assert (arms["finetuned"].errors, arms["finetuned"].scores["form"].value) == (40, 0)
    assert 0 < arms["raft-rag"].errors < 40
    assert seen[-1].failed == 40 + arms["raft-rag"].errors
    assert any("finetuned: 40 of 40 requests failed" in note for note in found.notes)
    assert {a.error for a in answers if a.arm == "raft-rag"} == {None, "TimeoutError: no answer within 60 s"}
    rerun = Script(rows)
    ask(spec(), rerun, rows, path)
    assert rerun.asked == [], "failures are not tried again"


def test_a_dead_endpoint_stops_the_run_and_keeps_what_was_answered(tmp_path: Path) -> None:
    rows, path = airports(100), tmp_path / "answers.jsonl"
    script = Script(rows)

    async def dies(arm: ArmSpec, messages: list[dict[str, str]], request_id: str) -> dict[str, Any]:
        if len(script.asked) >= 60:
            raise ConnectionError("connection refused")
        return await script(arm, messages, request_id)

    with pytest.raises(RunError, match="requests in a row failed: ConnectionError: connection refused"):
        ask(spec(concurrency=4), dies, rows, path)
    assert len(path.read_text().splitlines()) == 60
    after = Script(rows)
    assert len(ask(spec(), after, rows, path)) == 500
    assert len(after.asked) == 440


def test_when_nothing_at_all_is_answered_nothing_is_recorded(tmp_path: Path) -> None:
    async def never(arm: ArmSpec, messages: list[dict[str, str]], request_id: str) -> dict[str, Any]:
        raise ConnectionError("connection refused")

    with pytest.raises(RunError, match="connection refused"):
        ask(spec(), never, airports(2), tmp_path / "answers.jsonl")
    assert not (tmp_path / "answers.jsonl").exists()


def test_two_answers_to_one_question_are_refused(tmp_path: Path) -> None:
    rows, path = airports(3), tmp_path / "answers.jsonl"
    ask(spec(), Script(rows), rows, path)
    first = path.read_text().splitlines()[0]
    path.write_text(path.read_text() + first + "\n")
    with pytest.raises(DataError, match="answered twice"):
        ask(spec(), Script(rows), rows, path)


def test_a_broken_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    ask(spec(), Script(airports(2)), airports(2), path)
    path.write_text("{}\n" + path.read_text())
    with pytest.raises(DataError, match=r"answers\.jsonl: row 1"):
        ask(spec(), Script(airports(2)), airports(2), path)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "at least one question"),
        ([airports(1)[0]] * 2, "row 1 has the same"),
        ([DatasetRow("", (Message("user", "?"),))], "missing or empty"),
    ],
)
def test_rows_that_cannot_be_paired_are_refused(rows: list[DatasetRow], message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        ask(spec(), Script(rows), rows, tmp_path / "answers.jsonl")


# Comparing.


def test_the_script_is_found_again(report: CompareReport) -> None:
    arms = {arm.name: arm for arm in report.arms}
    assert {name: arm.kind for name, arm in arms.items()} == {
        "base": "prompt",
        "base-rag": "rag",
        "finetuned": "finetune",
        "naive-rag": "both",
        "raft-rag": "both",
    }
    for name, (form, knows) in (("base-rag", (0.02, 0.75)), ("raft-rag", (1.0, 0.9)), ("finetuned", (1.0, 0.1))):
        scores = arms[name].scores
        assert scores["form"].low - 0.01 <= form <= scores["form"].high + 0.01
        assert scores["facts"].low - 0.02 <= knows <= scores["facts"].high + 0.02
    assert arms["raft-rag"].scores["both"].method == "wilson"
    assert arms["raft-rag"].scores["facts"].method == "bca"
    assert arms["raft-rag"].adapter_version == "9f8e7d6c5b4a"
    assert {arm.latency_ms for arm in arms.values()} == {None}, "no scorer needs times, so that none were measured"


def test_verdicts_against_the_baseline(report: CompareReport) -> None:
    assert len(report.differences) == 4 * 4, "four arms on four metrics"
    assert difference(report, "finetuned", "form").verdict == "better"
    assert difference(report, "finetuned", "facts").verdict == "worse"
    assert difference(report, "raft-rag", "both").verdict == "better"
    undecided = difference(report, "base", "both")
    assert (undecided.wins + undecided.losses + undecided.ties, undecided.n) == (200, 200)
    for found in report.differences:
        assert found.low <= found.value <= found.high
        assert found.p_adjusted >= found.p_value
        assert (found.n_needed is not None) == (found.verdict == "undecided")
        assert found.n_needed is None or found.n_needed > 200


def test_declared_contrasts_hold(report: CompareReport) -> None:
    assert [(d.a, d.b, d.metric, d.verdict) for d in report.contrasts] == [
        ("base-rag", "finetuned", "facts", "better"),
        ("finetuned", "base-rag", "form", "better"),
        ("raft-rag", "naive-rag", "both", "better"),
    ]
    assert all(d.low > 0 and d.family == 3 for d in report.contrasts)


def test_signatures_say_what_is_needed(report: CompareReport) -> None:
    score = report.arms[-1].scores["both"].signature
    assert score.startswith("both|n:200|arm:raft-rag|base:1f0c9a2b|quant:nf4|tmpl:9c21d0e4|ci:wilson|seed:0|v:")
    assert "|vs:base-rag|" in difference(report, "raft-rag", "both").signature
    assert "|test:mcnemar-exact|holm:4|" in difference(report, "raft-rag", "both").signature


def test_the_advice_names_what_wins(report: CompareReport) -> None:
    both = next(found for found in report.advice.metrics if found.metric == "both")
    assert (both.best, both.winner, both.tied) == ("raft-rag", "finetuning with retrieval", ("raft-rag",))
    form = next(found for found in report.advice.metrics if found.metric == "form")
    assert form.winner == "finetuning"
    assert set(form.tied) == {"finetuned", "naive-rag", "raft-rag"}
    assert "finetuning on form" in report.advice.sentence
    assert "raft-rag answers" in report.advice.sentence


def test_prose_arms_are_noted_as_flattered(report: CompareReport) -> None:
    assert any(note.startswith("base, base-rag answer mostly in prose") for note in report.notes)


def test_samples_are_drawn_by_the_seed(report: CompareReport) -> None:
    assert len(report.samples) == 3
    assert all([answer.arm for answer in sample.answers] == [arm["name"] for arm in ARMS] for sample in report.samples)


def test_same_answers_and_seed_give_the_same_bytes(tmp_path: Path) -> None:
    rows, path = airports(30), tmp_path / "answers.jsonl"
    first = compare(spec(), rows, ask(spec(), Script(rows), rows, path), SCHEMA).model_dump_json()
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(reversed(lines)))  # the order in which answers came must not matter
    assert compare(spec(), rows, ask(spec(), Script(rows), rows, path), SCHEMA).model_dump_json() == first
    assert compare(spec(seed=1), rows, ask(spec(), Script(rows), rows, path), SCHEMA).model_dump_json() != first
    assert CompareReport.model_validate_json(first).model_dump_json() == first


def test_a_missing_answer_is_refused(tmp_path: Path) -> None:
    rows = airports(5)
    answers = ask(spec(), Script(rows), rows[:4], tmp_path / "answers.jsonl")
    with pytest.raises(DataError, match=r"arm 'base', row 'apt-4': no answer"):
        compare(spec(), rows, answers, SCHEMA)


def test_two_versions_in_one_arm_are_refused(tmp_path: Path) -> None:
    rows, path = airports(6), tmp_path / "answers.jsonl"
    ask(spec(), Script(rows), rows[:3], path)
    answers = ask(spec(), Script(rows, versions={"raft-rag": "bbbbbbbbbbbb"}), rows, path)
    with pytest.raises(DataError, match=r"arm 'raft-rag': adapter_version: found 9f8e7d6c5b4a, bbbbbbbbbbbb"):
        compare(spec(), rows, answers, SCHEMA)


def test_few_questions_leave_it_undecided_and_say_what_is_missing(tmp_path: Path) -> None:
    rows = airports(20)
    chances = {"base-rag": (0.5, 0.5), "finetuned": (0.65, 0.5)}
    asked = spec(tuple(arm for arm in ARMS if arm["name"] in chances))
    found = compare(asked, rows, ask(asked, Script(rows, chances), rows, tmp_path / "a.jsonl"), SCHEMA)
    assert {advice.winner for advice in found.advice.metrics} == {None}
    assert found.advice.sentence.startswith("On facts, undecided between")
    assert "minimum detectable effect" in found.advice.sentence
    assert "at n=20" in found.advice.sentence
    assert "questions would decide" in found.advice.sentence


def test_arms_shown_to_be_the_same_are_equivalent_and_the_cheaper_wins() -> None:
    same = np.array([1.0] * 480 + [0.0] * 120)
    scores = {"facts": same, "form": same, "both": same}
    scored = ScoredArms({"tuned": scores, "prompted": scores})
    assert family(scored, [("tuned", "prompted", "both")])[0].verdict == "equivalent"
    advice = advise(scored, {"tuned": "finetune", "prompted": "prompt"}, Rules())
    assert {found.winner for found in advice.metrics} == {"prompting"}


def test_no_arm_right_is_said() -> None:
    zero = np.zeros(50)
    scored = ScoredArms({name: {"facts": zero, "form": zero, "both": zero} for name in ("a", "b")})
    advice = advise(scored, {"a": "prompt", "b": "rag"}, Rules())
    assert advice.sentence == "On facts, no arm scores above 0 (n=50)."
    assert len(advice.caveats) == 2


def test_a_family_is_judged_together() -> None:
    """16 wins against 5: p = .027 alone, but not among three."""
    base = np.zeros(200)
    arm = base.copy()
    scores = {"both": arm}
    wins, losses = base.copy(), base.copy()
    wins[:16], losses[16:21] = 1, 1
    scored = ScoredArms({"a": {"both": wins}, "b": {"both": losses}, "c": scores, "d": scores})
    assert family(scored, [("a", "b", "both")], Rules(margin=0.001))[0].verdict == "better"
    three = family(scored, [("a", "b", "both"), ("c", "d", "both"), ("d", "c", "both")], Rules(margin=0.001))
    assert three[0].verdict == "undecided"
    assert three[0].p_adjusted == pytest.approx(3 * three[0].p_value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"baseline": "other"}, "none of the arms"),
        ({"contrasts": [{"a": "base", "b": "other", "metric": "both"}]}, "none of the arms"),
        ({"contrasts": [{"a": "base", "b": "base", "metric": "both"}]}, "compared with itself"),
        ({"contrasts": [{"a": "base", "b": "finetuned", "metric": "bleu"}]}, "no scorer measures 'bleu'"),
        ({"primary": "bleu"}, "no scorer measures 'bleu'"),
        ({"answer_schema": None}, "answer_schema is missing"),
    ],
)
def test_a_spec_that_makes_no_sense_is_refused(changes: dict[str, Any], message: str) -> None:
    from graftwork import config

    tree = {**json.loads(spec().model_dump_json()), **changes}
    with pytest.raises(ConfigError, match=message):
        config.validate(CompareSpec, tree, "compare.yaml")


def test_arm_kinds() -> None:
    assert [arm_kind(ArmSpec.model_validate(arm)) for arm in ARMS] == ["prompt", "rag", "finetune", "both", "both"]
