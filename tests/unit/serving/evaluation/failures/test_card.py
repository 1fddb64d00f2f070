"""The decision card of a comparison with probes: remedy, reasons, costs, and its place on the page."""

import asyncio
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from graftwork import config
from graftwork.datasets.rows import DatasetRow
from graftwork.errors import ConfigError
from graftwork.prompts.render import Message, Passage, PromptSpec
from graftwork.report import ReportInput, render_html, render_json
from graftwork.report.schema import CompareReport, Lift, Share
from graftwork.serving.evaluation.answers import AnswerSet, EvalRequest, alone_jobs, ask_jobs
from graftwork.serving.evaluation.compare import compare
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
    CorrectnessCheck,
    share,
)
from graftwork.serving.evaluation.failures.probe import GoldPassages, Prober
from graftwork.serving.evaluation.scorers.load import load_scorers
from graftwork.serving.evaluation.spec import CompareSpec, ProbeSpec
from tests.fake_arms import SCHEMA, Script, airports, ask_all, by_job, spec

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
