"""A comparison with a known outcome: airport-like questions, and arms whose answers are scripted by chances."""

import json
import random
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from graftwork.datasets.rows import DatasetRow
from graftwork.prompts.render import Message
from graftwork.scoring import AnswerSchema
from graftwork.serving.evaluation.answers import (
    AnswerSet,
    CompareProgress,
    EvalRequest,
    Send,
    ask_jobs,
    question_jobs,
)
from graftwork.serving.evaluation.spec import CompareSpec
from graftwork.serving.spec import ArmSpec

Ask = Callable[[ArmSpec, list[dict[str, str]], str], Awaitable[Mapping[str, Any]]]
"""(arm, messages, request id) -> the fields of an `EvalAnswer`."""
FIELDS = ("icao", "iata", "name", "city", "country", "elevation_ft")
SCHEMA = AnswerSchema(
    {
        "type": "object",
        "additionalProperties": False,
        "required": list(FIELDS),
        "properties": {name: {"type": "integer" if name == "elevation_ft" else "string"} for name in FIELDS},
    }
)
CORPUS = "recipe://airport-card/corpus.jsonl"
ARMS: tuple[dict[str, Any], ...] = (
    {"name": "base"},
    {"name": "base-rag", "retriever": {"corpus": CORPUS}},
    {"name": "finetuned", "adapter": "airport-card@closed"},
    {"name": "naive-rag", "adapter": "airport-card@closed", "retriever": {"corpus": CORPUS}},
    {"name": "raft-rag", "adapter": "airport-card@raft", "retriever": {"corpus": CORPUS}},
)
CHANCES = {
    "base": (0.0, 0.05),
    "base-rag": (0.02, 0.75),
    "finetuned": (1.0, 0.1),
    "naive-rag": (1.0, 0.4),
    "raft-rag": (1.0, 0.9),
}
"""Arm -> (chance of form, chance of knowing the airport)."""


def airports(n: int, seed: int = 0) -> list[DatasetRow]:
    """Evaluation rows with gold, each asked by its ICAO code."""
    rng = random.Random(seed)
    return [_airport(i, rng) for i in range(n)]


def _airport(i: int, rng: random.Random) -> DatasetRow:
    icao = f"K{i:03d}"
    gold = {
        "icao": icao,
        "iata": f"{i:03d}",
        "name": f"Field {i * 7} Airport",
        "city": f"Town{rng.randrange(10**6)}",
        "country": rng.choice(["US", "BR", "GL"]),
        "elevation_ft": 5000 + rng.randrange(10**4),
    }
    return DatasetRow(
        f"apt-{i}", (Message("user", f"Which airport is {icao}?"),), doc_id=icao, gold=gold, given_fields=("icao",)
    )


def spec(arms: Sequence[Mapping[str, Any]] = ARMS, **changes: Any) -> CompareSpec:
    """A comparison of the arms against `base-rag` (or the first)."""
    names = [arm["name"] for arm in arms]
    tree = {
        "name": "airports",
        "base": {"uri": "tiny"},
        "eval": "eval.jsonl",
        "answer_schema": "schema.json",
        "arms": [dict(arm) for arm in arms],
        "baseline": "base-rag" if "base-rag" in names else names[0],
    }
    return CompareSpec.model_validate({**tree, **changes})


@dataclass
class Script:
    """Answers as an endpoint would: deterministic per arm and question. `asked` keeps the order of requests."""

    rows: Sequence[DatasetRow]
    chances: Mapping[str, tuple[float, float]] = field(default_factory=lambda: CHANCES)
    versions: Mapping[str, str] = field(default_factory=dict)
    asked: list[tuple[str, str]] = field(default_factory=list)

    async def __call__(self, arm: ArmSpec, messages: list[dict[str, str]], request_id: str) -> dict[str, Any]:
        row = next(row for row in self.rows if row.messages[0].content == messages[-1]["content"])
        self.asked.append((arm.name, row.id))
        text = self.text(arm.name, row)
        return {
            "request_id": request_id,
            "arm": arm.name,
            "text": text,
            "base_digest": "1f0c9a2b77aa",
            "prompt_tokens": 50,
            "adapter_version": self.versions.get(arm.name, "9f8e7d6c5b4a") if arm.adapter else None,
            "retrieved_ids": ["K000"] if arm.retriever else [],
            "completion_tokens": len(text) // 4,
            "ttft_ms": 10.0,
            "latency_ms": 100.0 + len(text),
            "finish_reason": "stop",
        }

    def text(self, arm: str, row: DatasetRow) -> str:
        """What the arm says to the question."""
        rng, gold = random.Random(f"{arm} {row.id}"), dict(row.gold or {})
        form, knows = self.chances[arm]
        if rng.random() >= knows:
            gold |= {"iata": "ZZZ", "name": "Nowhere", "city": "Nowhere", "country": "XX", "elevation_ft": 1}
        if rng.random() < form:
            return json.dumps(gold)
        return (
            f"{gold['icao']} is {gold['name']} ({gold['iata']}) in {gold['city']}, {gold['country']}, "
            f"{gold['elevation_ft']} ft."
        )


def by_job(script: Ask) -> Send:
    """The script as what answers jobs."""

    async def send(job: EvalRequest) -> Mapping[str, Any]:
        return await script(job.arm, job.messages, job.request_id)

    return send


async def ask_all(
    asked: CompareSpec,
    rows: Sequence[DatasetRow],
    script: Ask,
    path: Path,
    versions: Mapping[str, str] | None = None,
    on_progress: Callable[[CompareProgress], None] | None = None,
) -> AnswerSet:
    """Answers of all arms to all questions by the script."""
    jobs = question_jobs(asked, rows, versions or {})
    return await ask_jobs(jobs, by_job(script), path, asked.concurrency, on_progress)
