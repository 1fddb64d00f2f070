"""Why answers fail: the rule, the probes that feed it, the card that sums up, and failures with planted causes."""

import asyncio
import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from statsmodels.stats.proportion import proportion_confint

from benchmarks.advice import REMEDY, Told, run
from graftwork import config
from graftwork.cli.compare import show_card
from graftwork.datasets.rows import DatasetRow
from graftwork.errors import ConfigError
from graftwork.prompts.render import Message, Passage, PromptSpec
from graftwork.report import ReportInput, render_html, render_json
from graftwork.report.schema import CompareReport, DecisionCard, Lift, Share
from graftwork.serving.evaluation.answers import AnswerSet, EvalRequest, alone_jobs, ask_jobs
from graftwork.serving.evaluation.compare import compare, primary_metric
from graftwork.serving.evaluation.differences import ScoredArms
from graftwork.serving.evaluation.failures.card import (
    AdapterFacts,
    Findings,
    ask_for,
    make_card,
    measured,
    probed_corpus,
    reference_arm,
)
from graftwork.serving.evaluation.failures.classify import (
    Correctness,
    CorrectnessCheck,
    ProbeEvidence,
    classify,
    n_to_settle,
    repaired,
    share,
    state,
)
from graftwork.serving.evaluation.failures.probe import GoldPassages, Prober, distractors, right_answer, with_context
from graftwork.serving.evaluation.scorers.load import load_scorers
from graftwork.serving.evaluation.spec import CompareSpec, ProbeSpec
from graftwork.serving.spec import ArmSpec
from graftwork.stats import wilson
from tests.fake_arms import SCHEMA, Script, airports, ask_all, by_job, spec

# The rule.

WRONG = ProbeEvidence(form_right=True, value_right=False, retrieves=False)


@pytest.mark.parametrize(
    ("found", "causes"),
    [
        (replace(WRONG, value_right=True, form_right=False), ("form",)),
        (replace(WRONG, value_right=True), ("form",)),
        (replace(WRONG, oracle_right=True), ("information",)),
        (replace(WRONG, oracle_right=True, form_right=False), ("information", "form")),
        (replace(WRONG, oracle_right=True, closed_book=True), ("information",)),
        (replace(WRONG, oracle_right=False), ("use_of_context",)),
        (replace(WRONG, oracle_right=True, right_before=True), ("forgetting",)),
        (WRONG, ("unknown",)),
        (replace(WRONG, retrieves=True, gold_retrieved=False, oracle_right=True), ("retrieval",)),
        (replace(WRONG, retrieves=True, gold_retrieved=False, oracle_right=False, closed_book=True), ("distraction",)),
        (replace(WRONG, retrieves=True, gold_retrieved=False, oracle_right=False), ("use_of_context",)),
        (replace(WRONG, retrieves=True, gold_retrieved=True, oracle_right=True), ("distraction",)),
        (replace(WRONG, retrieves=True, gold_retrieved=True, oracle_right=False, closed_book=True), ("distraction",)),
        (replace(WRONG, retrieves=True, gold_retrieved=True, oracle_right=False), ("use_of_context",)),
        (replace(WRONG, retrieves=True, gold_retrieved=True, right_before=True), ("use_of_context",)),
        (replace(WRONG, retrieves=True, gold_retrieved=False, right_before=True), ("forgetting",)),
    ],
)
def test_the_rule(found: ProbeEvidence, causes: tuple[str, ...]) -> None:
    assert classify(found) == causes


def test_the_rule_has_an_answer_for_all_evidence() -> None:
    maybe = (None, False, True)
    for form, value, retrieves in itertools.product((False, True), repeat=3):
        for rest in itertools.product(maybe, repeat=5):
            causes = classify(ProbeEvidence(form, value, retrieves, *rest))
            assert 1 <= len(causes) == len(set(causes)) <= 2
            assert ("form" in causes) == (value or not form)
            assert value == (causes == ("form",))


# What the probes are made of.


def test_only_what_stands_around_an_object_is_repaired() -> None:
    assert repaired('```json\n{"a": [1, {"b": "}"}]}\n``` and {"c": 2}') == '{"a": [1, {"b": "}"}]}'
    assert repaired("{'a': 1}") is None
    assert repaired('{"a": 1') is None
    assert repaired("no") is None


def test_the_gold_passage_is_put_as_rendering_does() -> None:
    row = DatasetRow("r", (Message("system", "s"), Message("user", "Which?"), Message("assistant", "x")), doc_id="d")
    turns = with_context(row, Passage("d", "one\n two"), PromptSpec())
    assert turns == [{"role": "system", "content": "s"}, {"role": "user", "content": "Context:\n- one two\n\nWhich?"}]


def test_of_a_document_in_pieces_the_one_with_the_answer_is_taken() -> None:
    pieces = [Passage("guide.md#1", "Opens at nine"), Passage("guide.md#2", "It closes at 18:30"), Passage("b", "x")]
    gold = GoldPassages({piece.id: piece for piece in pieces}.get)
    row = DatasetRow("r", (Message("user", "?"),), doc_id="guide.md", gold={"closes": "18:30"})
    assert gold.find(row) == pieces[1]
    assert gold.find(replace(row, doc_id="guide.md#1")) == pieces[0]
    assert gold.find(replace(row, doc_id=None)) is None
    assert gold.find(replace(row, doc_id="c")) is None


def test_distractors_keep_what_the_question_gives_away() -> None:
    rows = airports(30)
    texts = distractors(rows[0], rows, 19, seed=0)
    assert len(texts) == len(set(texts)) == 19
    assert right_answer(rows[0]) not in texts
    assert {json.loads(text)["icao"] for text in texts} == {"K000"}
    assert texts == distractors(rows[0], rows, 19, seed=0)
    assert texts != distractors(rows[0], rows, 19, seed=1)


# Shares and advice.


def test_a_share_has_wilsons_interval_as_statsmodels_has_it() -> None:
    found = share("form", 7, 40, 0.05, {"arm": "base"})
    assert (found.low, found.high) == pytest.approx(proportion_confint(7, 40, method="wilson"))
    assert found.signature.startswith("form|n:40|arm:base|ci:wilson|alpha:0.05|v:")
    assert state(found, 0.05) == "matters"
    assert state(found, 0.1) == "open"
    assert state(found, 0.4) == "dismissed"


@pytest.mark.parametrize("value", [0.2, 0.13, 0.05, 0.0])
def test_the_failures_that_settle_it_are_the_fewest(value: float) -> None:
    n = n_to_settle(value, 0.1, 0.05)
    assert n is not None

    def settled(size: int) -> bool:
        found = wilson(round(value * size), size)
        return found.low >= 0.1 or found.high < 0.1

    assert settled(n)
    assert not settled(n // 2)
    assert n_to_settle(0.1, 0.1, 0.05) is None


FINDINGS = Findings(rare=False, causes=(), grammar="open", known="no", retrieves=False)


@pytest.mark.parametrize(
    ("changes", "remedy"),
    [
        ({"rare": True, "causes": ["form"]}, "neither"),
        ({}, "undecided"),
        ({"causes": ["form"], "grammar": "yes"}, "grammar"),
        ({"causes": ["form"]}, "finetune"),
        ({"causes": ["information"]}, "rag"),
        ({"causes": ["information"], "known": "yes"}, "prompt"),
        ({"causes": ["retrieval"], "retrieves": True}, "retriever"),
        ({"causes": ["information", "form"]}, "both"),
        ({"causes": ["information", "form"], "grammar": "yes"}, "rag with a grammar"),
        ({"causes": ["information", "use_of_context"]}, "both"),
        ({"causes": ["distraction"], "retrieves": True}, "both"),
        ({"causes": ["forgetting"]}, "retrain"),
    ],
)
def test_what_the_causes_ask_for(changes: dict[str, Any], remedy: str) -> None:
    assert ask_for(replace(FINDINGS, **changes)) == remedy


def lift(arm: str, remedy: Any, count: int, n: int = 50) -> Lift:
    found: Share = share("mended", count, n, 0.05, {})
    return Lift(arm=arm, kind="rag", remedy=remedy, cause="all", share=found)


def test_what_was_measured_has_the_last_word() -> None:
    lifts = [lift("rag", "rag", 2), lift("raft", "both", 40)]
    assert measured("rag", lifts)[0] == "both"
    assert measured("both", lifts)[0] == "both"
    assert measured("rag", [lift("rag", "rag", 30), lift("raft", "both", 40)])[0] == "rag", "not told apart"
    assert measured("retriever", lifts)[0] == "both"
    assert measured("finetune", lifts)[0] == "finetune", "no arm here shows what finetuning alone does"
    assert measured("neither", lifts)[0] == "neither"


# Planted causes, through the product's own scoring, probes and rule (600 of them: benchmarks/advice.py).


@pytest.fixture(scope="module")
def planted() -> list[Told]:
    return run(each=40, seed=0)


def test_planted_causes_are_named(planted: list[Told]) -> None:
    total = sum(len(one.causes) for one in planted)
    assert total == 240
    assert sum(one.named for one in planted) / total >= 0.9
    assert all(one.named / len(one.causes) >= 0.75 for one in planted)
    assert {one.cause: one.card.remedy for one in planted} == REMEDY


def test_cards_of_planted_causes_have_their_reasons(planted: list[Told]) -> None:
    form = next(one.card for one in planted if one.cause == "form")
    assert form.grammar_is_enough is not None
    assert form.grammar_is_enough.value > 0.9
    assert form.sentence.startswith(
        "Decode under a grammar: of 40 probed failures of base, wrong form in 100% [91, 100]"
    )
    for one in planted:
        assert sum(one.card.arms[0].causes.values()) == 40
        shown = {cause.cause for cause in one.card.causes if cause.state == "matters"}
        assert shown == {one.cause}


# The whole of a comparison with probes.

PROBED = {
    "probes": {"distractors": 3},
    "arms": [
        {"name": "base"},
        {"name": "base-rag", "retriever": {"corpus": "recipe://airport-card/corpus.jsonl"}},
        {"name": "finetuned", "adapter": "airport-card@closed"},
        {
            "name": "raft-rag",
            "adapter": "airport-card@raft",
            "retriever": {"corpus": "recipe://airport-card/corpus.jsonl"},
        },
    ],
}


class Probed(Script):
    """The scripted arms, asked by probes as well: with the gold passage they know four times in five."""

    async def probe(self, job: EvalRequest) -> dict[str, Any]:
        self.asked.append((job.label, job.row_id))
        if job.continuations:
            return {"logprobs": [(-1.0 - i, 1) for i in range(len(job.continuations))]}
        row = next(row for row in self.rows if row.id == job.row_id)
        shown = "about " in job.messages[-1]["content"]
        form, knows = self.chances[job.arm.name]
        chances = {job.label: (1.0 if job.arm.grammar else form, 0.8 if shown else knows)}
        return {"text": Script(self.rows, chances).text(job.label, row)}


def probed(folder: Path, n: int = 60, **changes: Any) -> tuple[CompareReport, Prober, Probed, AnswerSet]:
    rows = airports(n)
    asked = spec(**{**PROBED, **changes})
    assert asked.probes is not None
    script = Probed(rows)
    answers = asyncio.run(ask_all(asked, rows, script, folder / "answers.jsonl"))
    passages = GoldPassages({row.doc_id: Passage(row.doc_id or "", f"about {row.doc_id}") for row in rows}.get)
    prober = Prober(
        asked,
        asked.probes,
        rows,
        answers,
        CorrectnessCheck(asked, load_scorers(asked.scorers, SCHEMA), "both"),
        passages,
        prompts={arm.name: PromptSpec() for arm in asked.arms},
        versions={"finetuned": "v1", "raft-rag": "v2"},
        reference=asked.probes.reference or "base",
    )
    script.asked.clear()
    first = prober.first_requests()
    found = asyncio.run(ask_jobs(first, script.probe, folder / "probes.jsonl", 16))
    found = asyncio.run(ask_jobs(first + prober.followup_requests(found), script.probe, folder / "probes.jsonl", 16))
    report = compare(asked, rows, answers, SCHEMA, card=make_card(prober, found, {}))
    return report, prober, script, found


def test_a_card_says_why_and_what_to_do(tmp_path: Path) -> None:
    report, prober, script, found = probed(tmp_path)
    card = report.card
    assert card is not None
    assert (card.reference, card.n, card.failures, card.probed) == ("base", 60, 60, 60)
    by = {cause.cause: cause for cause in card.causes}
    assert by["information"].state == "matters"
    assert by["form"].share.count == 60
    assert (card.remedy, card.asked_for) == ("rag with a grammar", "rag with a grammar"), "no arm here shows it"
    assert "measured here, raft-rag fixes" in card.sentence
    assert sum(n for cause, n in card.arms[0].causes.items() if cause != "form") == 60 - sum(
        right.value for right in prober.rights["base"].values()
    )
    labels = {label for label, _ in script.asked}
    assert {"base~oracle", "base~grammar", "base~closed", "raft-rag~oracle"} <= labels
    assert not {"finetuned~before", "base~before"} & labels, "base is what finetuned was before"
    assert all(found.find(label, row) for label, row in script.asked)


def test_what_an_adapter_took_is_on_the_card(tmp_path: Path) -> None:
    _, prober, _, found = probed(tmp_path, n=12)
    card = make_card(prober, found, {"finetuned": AdapterFacts(2**29, 90.0), "raft-rag": AdapterFacts(2**20, None)})
    costs = {cost.arm: (cost.training_min, cost.adapter_gib) for cost in card.costs}
    assert costs == {
        "base": (None, None),
        "base-rag": (None, None),
        "finetuned": (1.5, 0.5),
        "raft-rag": (None, 2**-10),
    }
    assert {cost.latency_ms for cost in card.costs} == {None}, "answers of many requests in flight say no time"
    jobs = alone_jobs(prober.spec, prober.rows, {})
    alone = asyncio.run(ask_jobs(jobs, by_job(Probed(prober.rows)), tmp_path / "alone.jsonl", 1))
    timed_card = make_card(prober, found, {}, alone)
    assert all(cost.latency_ms and cost.latency_ms > 100 for cost in timed_card.costs)


def test_probes_are_asked_once(tmp_path: Path) -> None:
    first, _, _, _ = probed(tmp_path, n=20)
    again, _, script, _ = probed(tmp_path, n=20)
    assert script.asked == []
    assert again.model_dump_json() == first.model_dump_json()


def test_failures_beyond_the_most_are_drawn_by_the_seed(tmp_path: Path) -> None:
    report, prober, _, _ = probed(tmp_path, probes={"distractors": 3, "max_failures": 15, "arms": ["base"]})
    card = report.card
    assert card is not None
    assert (card.failures, card.probed, len(card.arms)) == (60, 15, 1)
    assert len({failure.row.id for failure in prober.failures}) == 15
    assert any("probe more than 15 of the 60 failures" in text for text in card.open)


def test_few_failures_leave_it_open_and_say_how_many_more(tmp_path: Path) -> None:
    report, _, _, _ = probed(tmp_path, n=8)
    assert report.card is not None
    open_causes = [cause for cause in report.card.causes if cause.state == "open"]
    assert open_causes
    for cause in open_causes:
        assert cause.more_questions is None or cause.more_questions > 0
    assert any("more questions would tell" in text for text in report.card.open)


def test_the_card_is_on_the_page_and_each_number_signed(tmp_path: Path) -> None:
    report, _, _, _ = probed(tmp_path, n=30)
    assert report.card is not None
    whole = ReportInput(title="t", created_at="now", compare=report)
    html = render_html(whole)
    assert len(html) < 1_000_000
    assert 'id="card"' in html
    for lift_found in report.card.lifts:
        assert lift_found.share.signature in html
    assert render_json(whole) == render_json(ReportInput.model_validate_json(render_json(whole)))


def test_the_reference_is_the_best_prompted_base() -> None:
    import numpy as np

    asked = spec(arms=[{"name": "base"}, {"name": "shots", "prompt": {"system": "s"}}, *PROBED["arms"][1:]])  # type: ignore[index]
    scores = {"base": 0.0, "shots": 0.1, "base-rag": 0.5, "finetuned": 0.2, "raft-rag": 0.9}
    scored = ScoredArms({name: {"both": np.full(10, value)} for name, value in scores.items()})
    assert reference_arm(asked, scored, "both") == "shots"
    no_prompt = spec(arms=PROBED["arms"][1:])  # type: ignore[index]
    assert reference_arm(no_prompt, scored, "both") == "base-rag"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"probes": {"arms": ["other"]}}, "none of the arms"),
        ({"probes": {"reference": "base", "arms": ["finetuned"]}}, "not among probes.arms"),
        ({"probes": {"corpora": "x"}}, "unknown key"),
        ({"probes": "yes please"}, "probes"),
    ],
)
def test_probes_that_make_no_sense_are_refused(changes: dict[str, Any], message: str) -> None:
    tree = {**json.loads(spec().model_dump_json()), **changes}
    with pytest.raises(ConfigError, match=message):
        config.validate(CompareSpec, tree, "compare.yaml")


def test_the_example_is_short_and_valid() -> None:
    path = Path(__file__).parents[5] / "examples/compare-probes.yaml"
    asked = config.load(path, expect="compare")
    assert isinstance(asked, CompareSpec)
    assert asked.probes == ProbeSpec()
    assert len(path.read_text().splitlines()) < 60


def test_gold_passages_need_a_corpus() -> None:
    asked = spec(arms=[{"name": "a"}, {"name": "b", "prompt": {"system": "s"}}], probes=True)
    assert asked.probes == ProbeSpec()
    assert spec(probes=False).probes is None
    with pytest.raises(ConfigError, match="name the corpus"):
        probed_corpus(asked, airports(2))
    assert probed_corpus(asked, [DatasetRow("r", (Message("user", "?"),))]) is None


# Answers that are texts: a right text among other words is a failure of form, and facts are what a probe looks for.


def inventors(n: int) -> list[DatasetRow]:
    return [
        DatasetRow(
            f"q{i}",
            (Message("user", f"Who invented engine {i}?"),),
            doc_id=f"d{i}",
            gold={"answers": [f"Thomas {i}x Newcomen", f"Newcomen {i}x"]},
        )
        for i in range(n)
    ]


async def says(job: EvalRequest) -> dict[str, Any]:
    """In turn: the right text; a sentence with it; wrong, but a sentence with it given the gold passage; wrong."""
    at = int(job.row_id[1:])
    if job.continuations:
        return {"logprobs": [(-9.0, 1), *[(-1.0, 1)] * (len(job.continuations) - 1)]}
    sentence = f"The inventor of it was Thomas {at}x Newcomen."
    shown = "about" in job.messages[-1]["content"]
    return {"text": [f"newcomen {at}x", sentence, sentence if shown else "James Watt", "James Watt"][at % 4]}


def text_card(folder: Path, *scorers: Any) -> tuple[DecisionCard, dict[str, set[str]]]:
    rows = inventors(40)
    asked = spec(
        arms=[{"name": "base"}, {"name": "other"}],
        baseline="base",
        scorers=list(scorers),
        answer_schema=None,
        probes={"arms": ["base"], "distractors": 3},
    )
    assert asked.probes is not None
    by_question = {row.messages[0].content: row.id for row in rows}

    async def answer(arm: ArmSpec, messages: Any, request_id: str) -> dict[str, Any]:
        return await says(EvalRequest("k", arm.name, by_question[messages[-1]["content"]], arm, messages))

    answers = asyncio.run(ask_all(asked, rows, answer, folder / "answers.jsonl"))
    passages = GoldPassages({row.doc_id: Passage(row.doc_id or "", f"about {row.id}") for row in rows}.get)
    loaded = load_scorers(asked.scorers)
    judge = CorrectnessCheck(asked, loaded, primary_metric(asked, loaded.tested))
    prober = Prober(
        asked,
        asked.probes,
        rows,
        answers,
        judge,
        passages,
        reference="base",
        versions={},
        prompts={arm.name: PromptSpec() for arm in asked.arms},
    )
    first = prober.first_requests()
    found = asyncio.run(ask_jobs(first, says, folder / "probes.jsonl", 8))
    second = prober.followup_requests(found)
    found = asyncio.run(ask_jobs(first + second, says, folder / "probes.jsonl", 8))
    return make_card(prober, found, {}), {job.row_id: set(job.continuations) for job in second}


@pytest.mark.parametrize("scorer", ["qa", {"kind": "qa", "field": "answers"}, {"kind": "exact", "ignore_case": True}])
def test_a_right_text_in_a_sentence_is_a_failure_of_form(tmp_path: Path, scorer: Any) -> None:
    card, asked = text_card(tmp_path, scorer)
    assert (card.failures, card.probed) == (30, 30)
    counts = {cause.cause: cause.share.count for cause in card.causes}
    assert counts == {
        "form": 10,
        "information": 10,
        "use_of_context": 10,
        "retrieval": 0,
        "distraction": 0,
        "forgetting": 0,
        "unknown": 0,
    }
    assert "does not tell a wrong form" not in " ".join(card.open)
    for row_id, texts in asked.items():
        own = {f"Thomas {row_id[1:]}x Newcomen", f"Newcomen {row_id[1:]}x"}
        assert len(texts & own) == 1, "one right text against those of other rows"
        assert all(text.endswith("Newcomen") for text in texts), "texts, and no JSON of gold"


def test_without_a_split_no_share_of_form_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    card, _ = text_card(tmp_path, "rouge")
    assert "form" not in {cause.cause for cause in card.causes}
    assert card.open[0].startswith("rouge_1 does not tell a wrong form from wrong facts")
    show_card(card)
    said = capsys.readouterr().out
    assert "wrong form from wrong facts" in said
    assert not [line for line in said.splitlines() if line.startswith("form")]


def test_containment_as_the_metric_asks_for_facts_alone(tmp_path: Path) -> None:
    asked = spec(scorers=["qa"], answer_schema=None, primary="contains")
    judge = CorrectnessCheck(asked, load_scorers(asked.scorers), "contains")
    row = inventors(1)[0]
    assert judge.check(row, "It was Newcomen 0x.") == Correctness(form=True, value=True, whole=True)
    assert judge.check(row, "It was Watt.") == Correctness(form=None, value=False, whole=False)
    assert not judge.splits


def test_a_pattern_is_part_of_a_texts_form(tmp_path: Path) -> None:
    short = {"kind": "regex", "name": "short", "pattern": r".{1,16}"}
    asked = spec(scorers=["qa", short], answer_schema=None)
    judge = CorrectnessCheck(asked, load_scorers(asked.scorers), "em")
    row = inventors(1)[0]
    assert judge.check(row, "Newcomen 0x") == Correctness(form=True, value=True, whole=True)
    assert judge.check(row, "It was Newcomen 0x") == Correctness(form=False, value=True, whole=False)
    assert judge.check(row, "James Watt") == Correctness(form=True, value=False, whole=False)
    assert judge.check(row, "Perhaps James Watt did") == Correctness(form=False, value=False, whole=False)
