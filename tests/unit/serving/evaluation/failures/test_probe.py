"""Probes of failed answers: gold passages, distractors, and answers that are texts."""

import asyncio
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from graftwork.cli.compare import show_card
from graftwork.datasets.rows import DatasetRow
from graftwork.prompts.render import Message, Passage, PromptSpec
from graftwork.report.schema import DecisionCard
from graftwork.serving.evaluation.answers import EvalRequest, ask_jobs
from graftwork.serving.evaluation.compare import primary_metric
from graftwork.serving.evaluation.failures.card import (
    make_card,
)
from graftwork.serving.evaluation.failures.classify import (
    Correctness,
    CorrectnessCheck,
)
from graftwork.serving.evaluation.failures.probe import GoldPassages, Prober, distractors, right_answer, with_context
from graftwork.serving.evaluation.scorers.load import load_scorers
from graftwork.serving.spec import ArmSpec
from tests.fake_arms import airports, ask_all, spec


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
