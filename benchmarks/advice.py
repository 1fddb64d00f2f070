"""Do the probes name the cause of a failure? 600 failures are planted, 100 a cause, and classified as `compare` does.

    python -m benchmarks.advice

Rows and passages are those of the airport-card recipe. A simulated model answers, told for each question what it
knows, whether it reads a passage, whether others mislead it, whether the retriever finds the gold one and how it
writes; it is told no cause. One probe in twenty comes out the other way, likelihoods have noise. Scoring, probes,
classification and advice are the product's own code. A cause counts as named when it is the only one given.
"""

import argparse
import asyncio
import json
import random
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.record import Clock, figure, write
from graftwork.datasets.rows import DatasetRow, read_rows
from graftwork.prompts.render import PromptSpec
from graftwork.report.schema import DecisionCard
from graftwork.retrieval import LexicalSpec
from graftwork.scoring import AnswerSchema
from graftwork.serving.evaluation.answers import EvalRequest, ask_jobs, question_jobs
from graftwork.serving.evaluation.failures.card import make_card
from graftwork.serving.evaluation.failures.classify import Cause, CorrectnessCheck, classify
from graftwork.serving.evaluation.failures.probe import GoldPassages, Prober, right_answer
from graftwork.serving.evaluation.scorers.load import load_scorers
from graftwork.serving.evaluation.spec import CompareSpec

RECIPE = "recipe://airport-card"
EACH, NOISE, SPREAD, LIFT = 100, 0.05, 0.15, 0.5
REMEDY = {
    "information": "rag",
    "retrieval": "retriever",
    "form": "grammar",
    "use_of_context": "both",
    "distraction": "both",
    "forgetting": "retrain",
}
"""What the card is to advise where all failures have one cause."""
ARM = {
    "information": "base",
    "retrieval": "rag",
    "form": "base",
    "use_of_context": "rag",
    "distraction": "rag",
    "forgetting": "finetuned",
}
"""The arm that fails."""


@dataclass(frozen=True)
class Mind:
    """What the simulated model is like on one question."""

    knows: bool = False
    """Answers without any context, and finds the right answer the likeliest."""
    reads: bool = True
    """Finds the answer in a passage that stands alone."""
    misled: bool = False
    """Other passages beside the gold one lead it astray."""
    found: bool = True
    """The retriever finds the gold passage."""
    writes: str = "card"
    """card, or a form that breaks the schema: fence, prose, cut."""
    knew: bool = False
    """The base without the adapter answers."""


def mind(cause: Cause, rng: random.Random) -> Mind:
    """One of the ways to fail by this cause."""
    ways: dict[str, Sequence[Mind]] = {
        "information": (Mind(),),
        "retrieval": (Mind(found=False),),
        "form": tuple(Mind(knows=True, writes=form) for form in ("fence", "prose", "cut")),
        "use_of_context": (Mind(reads=False), Mind(reads=False, found=False)),
        "distraction": (Mind(misled=True), Mind(misled=True, knows=True, reads=False)),
        "forgetting": (Mind(knew=True), Mind(knew=True, reads=False)),
    }
    return rng.choice(ways[cause])


class Simulated:
    """Answers as an endpoint would, the same for the same job."""

    def __init__(
        self, rows: Sequence[DatasetRow], minds: Mapping[str, Mind], passages: GoldPassages, seed: int
    ) -> None:
        self.rows, self.minds, self.passages, self.seed = {row.id: row for row in rows}, minds, passages, seed
        self.order = [row.id for row in rows]

    async def answer(self, job: EvalRequest) -> Mapping[str, Any]:
        """To the comparison itself: no noise, the failure is planted."""
        row, arm = self.rows[job.row_id], job.arm
        own, gold = self.minds[row.id], self.passages.find(row)
        assert gold is not None, "every airport has its passage"
        others = [passage.id for other in self.order[:2] if (passage := self.passages.find(self.rows[other]))]
        retrieved = ([gold.id, *others] if own.found else others) if arm.retriever else []
        if arm.retriever:
            right = own.found and own.reads and not own.misled
        else:
            right = own.knows or (arm.adapter is None and own.knew)
        text = self._text(row, right, own.writes)
        return {
            "text": text,
            "retrieved_ids": retrieved,
            "finish_reason": "stop",
            "base_digest": "1f0c9a2b77aa",
            "latency_ms": 100.0,
            "prompt_tokens": 50,
            "completion_tokens": 40,
        }

    async def probe(self, job: EvalRequest) -> Mapping[str, Any]:
        """To a probe: now and then the other way round."""
        row, rng = self.rows[job.row_id], random.Random(f"{self.seed} {job.label} {job.row_id}")
        own, gold = self.minds[row.id], self.passages.find(row)
        if job.continuations:
            return {"logprobs": [self._likelihood(text, row, own, rng) for text in job.continuations]}
        shown = gold is not None and " ".join(gold.text.split()) in job.messages[-1]["content"]
        right = (own.reads and shown) or own.knows or (job.arm.adapter is None and own.knew)
        if rng.random() < NOISE:
            right = not right
        return {"text": self._text(row, right, "card" if job.arm.grammar else own.writes), "finish_reason": "stop"}

    def _likelihood(self, text: str, row: DatasetRow, own: Mind, rng: random.Random) -> tuple[float, int]:
        tokens = max(1, len(text) // 3)
        known = own.knows and text == right_answer(row)
        return tokens * (-1.5 + rng.gauss(0, SPREAD) + (LIFT if known else 0)), tokens

    def _text(self, row: DatasetRow, right: bool, form: str) -> str:
        gold = dict(row.gold or {})
        if not right:
            place = self.order.index(row.id)
            other = dict(self.rows[self.order[(place + 1) % len(self.order)]].gold or {})
            gold = {name: gold[name] if name in row.given_fields else value for name, value in other.items()}
        text = json.dumps(gold, ensure_ascii=False)
        if form == "fence":
            return f"```json\n{text}\n```"
        if form == "prose":
            return ", ".join(str(value) for value in gold.values())
        return text + " and so on" if form == "cut" else text


def spec() -> CompareSpec:
    """Three arms; where nothing is planted they are right."""
    corpus = f"{RECIPE}/corpus.jsonl"
    return CompareSpec.model_validate(
        {
            "name": "planted",
            "base": {"uri": "tiny"},
            "eval": f"{RECIPE}/eval.jsonl",
            "baseline": "base",
            "answer_schema": f"{RECIPE}/schema.json",
            "probes": {"max_failures": EACH},
            "arms": [
                {"name": "base"},
                {"name": "rag", "retriever": LexicalSpec(corpus=corpus).model_dump(exclude_unset=True)},
                {"name": "finetuned", "adapter": "airport-card@latest"},
            ],
        }
    )


@dataclass(frozen=True)
class Told:
    """What the product said of the failures that were planted with one cause."""

    cause: Cause
    causes: tuple[tuple[Cause, ...], ...]
    card: DecisionCard

    @property
    def named(self) -> int:
        return sum(given == (self.cause,) for given in self.causes)


def told(cause: Cause, rows: Sequence[DatasetRow], schema: AnswerSchema, passages: GoldPassages, seed: int = 0) -> Told:
    """Plant one cause in all rows of one arm, and ask the product."""
    asked, rng = spec(), random.Random(f"{seed} {cause}")
    assert asked.probes is not None
    model = Simulated(rows, {row.id: mind(cause, rng) for row in rows}, passages, seed)
    probes = asked.probes.model_copy(update={"arms": (ARM[cause],), "reference": ARM[cause]})
    scorers = load_scorers(asked.scorers, schema)
    with tempfile.TemporaryDirectory() as folder:
        answers = asyncio.run(
            ask_jobs(question_jobs(asked, rows, {}), model.answer, Path(folder) / "answers.jsonl", asked.concurrency)
        )
        prompts = {arm.name: PromptSpec() for arm in asked.arms}
        prober = Prober(
            asked,
            probes,
            rows,
            answers,
            CorrectnessCheck(asked, scorers, "both"),
            passages,
            prompts=prompts,
            versions={},
            reference=ARM[cause],
        )
        path, first = Path(folder) / "probes.jsonl", prober.first_requests()
        found = asyncio.run(ask_jobs(first, model.probe, path, 64))
        found = asyncio.run(ask_jobs(first + prober.followup_requests(found), model.probe, path, 64))
    causes = tuple(classify(prober.evidence(failure, found)) for failure in prober.failures)
    assert len(causes) == len(rows), f"{len(causes)} of {len(rows)} planted failures failed"
    return Told(cause, causes, make_card(prober, found, {}))


def shared_rows(each: int) -> list[list[DatasetRow]]:
    """Rows of the recipe in six parts, none in two, each with an id of its own."""
    rows = [row for file in ("eval", "train") for row in read_rows(f"{RECIPE}/{file}.jsonl", need="eval")]
    rows = [replace(row, id=f"{row.id}-{number}") for number, row in enumerate(rows)]
    assert len(rows) >= each * len(REMEDY), f"the recipe has {len(rows)} rows"
    return [rows[part * each : (part + 1) * each] for part in range(len(REMEDY))]


def run(each: int, seed: int) -> list[Told]:
    """All causes."""
    schema = AnswerSchema.load(f"{RECIPE}/schema.json")
    passages = GoldPassages.read(f"{RECIPE}/corpus.jsonl")
    causes: list[Cause] = ["information", "retrieval", "form", "use_of_context", "distraction", "forgetting"]
    return [told(cause, rows, schema, passages, seed) for cause, rows in zip(causes, shared_rows(each), strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seeds", type=int, default=5, help="repetitions with other noise")
    args = parser.parse_args()
    clock, runs = Clock(), [run(EACH, seed) for seed in range(args.seeds)]
    total = EACH * len(REMEDY)
    figures = {
        "named": figure([sum(one.named for one in found) / total for found in runs], f"share of {total} failures"),
        "advised": figure([sum(one.card.remedy == REMEDY[one.cause] for one in found) for found in runs], "of 6 cards"),
    }
    detail = [
        {
            "planted": one.cause,
            "named": one.named / len(one.causes),
            "remedy": one.card.remedy,
            "given": {"+".join(given): count for given, count in Counter(one.causes).most_common()},
        }
        for one in runs[0]
    ]
    meta = {"each": EACH, "noise": NOISE, "likelihood_spread": SPREAD, "likelihood_lift": LIFT, "seeds": args.seeds}
    write("advice", args.out, figures, detail, meta, clock)


if __name__ == "__main__":
    main()
