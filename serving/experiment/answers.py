"""The answers of a comparison, on disk as they come: one JSON line each in `answers.jsonl`.

A line is found again by its key: a digest of everything that decides the answer (arm, pinned adapter version, base,
quantisation, limits, question). A changed arm or question has another key, so nothing stale is ever counted.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pydantic
from pydantic import BaseModel, ConfigDict

from graftwork.config import canonical_json
from graftwork.data import DatasetRow
from graftwork.errors import DataError
from graftwork.serving.experiment.lines import read_whole_lines
from graftwork.serving.experiment.spec import CompareSpec
from graftwork.serving.spec import ArmSpec


class EvalAnswer(BaseModel):
    """What one arm said to one question, or why it failed. Times in ms."""

    model_config = ConfigDict(frozen=True, extra="ignore", protected_namespaces=())

    key: str
    arm: str
    row_id: str
    request_id: str
    text: str = ""
    error: str | None = None
    """The request failed; it counts as a wrong answer."""
    adapter_version: str | None = None
    base_digest: str | None = None
    retrieved_ids: tuple[str, ...] = ()
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    ttft_ms: float | None = None
    latency_ms: float | None = None
    finish_reason: str | None = None
    logprobs: tuple[tuple[float, int], ...] | None = None
    """Of a question for likelihoods: (sum in nats, tokens) of each continuation."""


class AnswerSet:
    """Answers by (arm, row id). `stale` counts lines on disk that belong to another arm record or question."""

    def __init__(self, answers: Sequence[EvalAnswer] = (), stale: int = 0) -> None:
        """Raises DataError when an arm answered a question twice."""
        self.stale = stale
        self._by_pair: dict[tuple[str, str], EvalAnswer] = {}
        for answer in answers:
            self.add(answer)

    def add(self, answer: EvalAnswer) -> None:
        """Raises DataError when the arm has answered this question."""
        pair = (answer.arm, answer.row_id)
        if pair in self._by_pair:
            raise DataError(f"arm {answer.arm!r}, row {answer.row_id!r}", "answered twice", "one answer an arm and row",
                            "remove one of the two lines from answers.jsonl")  # fmt: skip
        self._by_pair[pair] = answer

    def get(self, arm: str, row_id: str) -> EvalAnswer:
        """Raises DataError when there is none."""
        if (arm, row_id) not in self._by_pair:
            raise DataError(f"arm {arm!r}, row {row_id!r}", "no answer", "every arm answers every row",
                            "run the comparison again: it continues where it stopped")  # fmt: skip
        return self._by_pair[arm, row_id]

    def find(self, arm: str, row_id: str) -> EvalAnswer | None:
        """The answer, where there is one that did not fail."""
        found = self._by_pair.get((arm, row_id))
        return found if found is not None and found.error is None else None

    def __contains__(self, pair: tuple[str, str]) -> bool:
        return pair in self._by_pair

    def __len__(self) -> int:
        return len(self._by_pair)

    def __iter__(self) -> Iterator[EvalAnswer]:
        return iter(self._by_pair.values())


def answer_key(
    spec: CompareSpec,
    label: str,
    arm: ArmSpec,
    row: DatasetRow,
    version: str | None,
    *,
    messages: Sequence[Mapping[str, str]] | None = None,
    continuations: Sequence[str] = (),
) -> str:
    """32 hex digits over everything that decides the answer. `version` is what the arm's adapter resolves to now.

    label: what the answer is filed under (the arm's name, or a probe's). messages: what is sent, else the row's.
    """
    decides = {
        "arm": arm.model_dump(mode="json", exclude={"name"}),
        "version": version,
        "base": spec.base.model_dump(mode="json"),
        "quant": spec.quant.model_dump(mode="json"),
        "max_seq_len": spec.engine.max_seq_len,
        "row": row.id,
        "messages": messages if messages is not None else question(row),
        **({"continuations": list(continuations)} if continuations else {}),
    }
    return hashlib.sha256(canonical_json([label, decides]).encode()).hexdigest()[:32]


def question(row: DatasetRow) -> list[dict[str, str]]:
    """The turns that are sent: all but a final answer, which would give the gold away."""
    return [{"role": turn.role, "content": turn.content} for turn in row.question]


def read_answers(path: Path, wanted: Mapping[str, tuple[str, str]]) -> AnswerSet:
    """Recorded answers whose key is wanted (key -> arm name, row id). A line torn by a crash is cut off.

    Raises DataError: a line that is no answer (its number named), or two answers to one question.
    """
    if not path.exists():
        return AnswerSet()
    found, stale = [], 0
    for number, line in enumerate(read_whole_lines(path), start=1):
        try:
            answer = EvalAnswer.model_validate_json(line)
        except pydantic.ValidationError as error:
            found_here, hint = error.errors()[0]["msg"], "remove the line; its question is asked again"
            raise DataError(f"{path}: row {number}", found_here, "a line is one answer as JSON", hint) from None
        if wanted.get(answer.key) == (answer.arm, answer.row_id):
            found.append(answer)
        else:
            stale += 1
    return AnswerSet(found, stale)
