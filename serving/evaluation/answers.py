"""Answers of all arms to all questions, collected through the serving handle and stored in `answers.jsonl`."""

import asyncio
import hashlib
import os
import random
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pydantic
from pydantic import BaseModel, ConfigDict

from graftwork.config import canonical_json
from graftwork.datasets.rows import DatasetRow
from graftwork.errors import DataError, GraftworkError, RunError, StorageError
from graftwork.prompts.render import message_fields
from graftwork.serving.arms import arm_of_row
from graftwork.serving.evaluation.scorers.choice import ChoiceScorer
from graftwork.serving.evaluation.spec import CompareSpec
from graftwork.serving.spec import ArmSpec

# Answers on disk: one JSON line each in `answers.jsonl`.
#
# A line is found again by its key: a digest of everything that decides the answer (arm, pinned adapter version, base,
# quantisation, limits, question). A changed arm or question has another key, so nothing stale is ever counted.


class EvalAnswer(BaseModel):
    """Answer of one arm to one question, or its error. Times in ms."""

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
            raise DataError(
                f"arm {answer.arm!r}, row {answer.row_id!r}",
                "answered twice",
                "one answer an arm and row",
                "remove one of the two lines from answers.jsonl",
            )
        self._by_pair[pair] = answer

    def get(self, arm: str, row_id: str) -> EvalAnswer:
        """Raises DataError when there is none."""
        if (arm, row_id) not in self._by_pair:
            raise DataError(
                f"arm {arm!r}, row {row_id!r}",
                "no answer",
                "every arm answers every row",
                "run the comparison again: it continues where it stopped",
            )
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
    messages: Sequence[Mapping[str, Any]] | None = None,
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


def question(row: DatasetRow) -> list[dict[str, Any]]:
    """The turns that are sent: all but a final answer, which would give the gold away."""
    return [message_fields(turn) for turn in row.question]


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


# Append-only JSON lines: a line that a crash cut is removed, and its question is asked again.


def read_whole_lines(path: Path) -> list[bytes]:
    """The lines that were written whole; a torn last one is cut off the file."""
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        os.truncate(path, whole)
    return content[:whole].splitlines()


def append_line(path: Path, record: BaseModel) -> None:
    """One line, written by one call, so that a reader and a second writer see it whole. Raises StorageError."""
    line = record.model_dump_json().encode() + b"\n"
    try:
        with path.open("ab", buffering=0) as file:
            file.write(line)
    except OSError as error:
        raise StorageError(
            f"answers {path}",
            f"cannot be written ({error.strerror})",
            "",
            "free space or choose another root; the rerun continues",
        ) from error


Messages = list[dict[str, Any]]

_MIN_OUTAGE = 32
ALONE_QUESTIONS = 10
"""Questions an arm is timed on."""
ALONE = "~alone"


@dataclass(frozen=True)
class CompareProgress:
    """Progress of the answers. `failed` counts failures of this run."""

    done: int
    total: int
    failed: int
    reused: int
    """Answers found on disk."""


@dataclass(frozen=True)
class EvalRequest:
    """One request: an answer to be generated, or (`continuations`) likelihoods of given ones."""

    key: str
    label: str
    """Key of its answer: the name of the arm or of the probe."""
    row_id: str
    arm: ArmSpec
    messages: Messages
    continuations: tuple[str, ...] = ()

    @property
    def request_id(self) -> str:
        return f"cmp-{self.key}"


Send = Callable[[EvalRequest], Awaitable[Mapping[str, Any]]]
"""A job -> the fields of an `EvalAnswer`. Any exception is a failed answer."""


def question_jobs(spec: CompareSpec, rows: Sequence[DatasetRow], versions: Mapping[str, str]) -> list[EvalRequest]:
    """Every question to every arm. versions: adapter version by arm name, as resolved now, so that an answer of an
    older version is not taken for one of the new.

    Arms take turns within each question, the first arm changing from question to question, so that they share the
    load evenly. Raises DataError: row ids missing or twice.
    """
    check_ids(rows)
    jobs = []
    for index, row in enumerate(rows):
        first = index % len(spec.arms)
        for arm in (arm_of_row(arm, row) for arm in spec.arms[first:] + spec.arms[:first]):
            key = answer_key(spec, arm.name, arm, row, versions.get(arm.name))
            jobs.append(EvalRequest(key, arm.name, row.id, arm, question(row)))
    return jobs


async def ask_jobs(
    jobs: Sequence[EvalRequest],
    send: Send,
    path: Path,
    concurrency: int,
    on_progress: Callable[[CompareProgress], None] | None = None,
) -> AnswerSet:
    """Send the jobs, `concurrency` at once, and append each answer to `path` as it comes.

    A rerun continues from `path`; nothing is asked twice, failures included. Runs in the driver. Raises RunError when
    the endpoint is gone: so many failures in a row that no request in flight had an answer. Those last failures are not
    recorded.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    answers = read_answers(path, _wanted_keys(jobs))
    left = [job for job in jobs if (job.label, job.row_id) not in answers]
    run = _OfflineRun(answers, path, len(jobs), max(_MIN_OUTAGE, concurrency), on_progress)
    await run.ask_all(left, send, concurrency)
    return answers


def count_missing(jobs: Sequence[EvalRequest], path: Path) -> int:
    """Jobs that `ask_jobs` would still send."""
    return len(jobs) - len(read_answers(path, _wanted_keys(jobs)))


def option_jobs(
    spec: CompareSpec, rows: Sequence[DatasetRow], choices: Sequence[ChoiceScorer], versions: Mapping[str, str]
) -> list[EvalRequest]:
    """Likelihoods of every row's options in every arm, filed under `ARM~SCORER`."""
    jobs = []
    for row in rows:
        for arm in (arm_of_row(arm, row) for arm in spec.arms):
            for choice in choices:
                label, options = f"{arm.name}~{choice.name}", choice.options(row)
                key = answer_key(spec, label, arm, row, versions.get(arm.name), continuations=options)
                jobs.append(EvalRequest(key, label, row.id, arm, question(row), options))
    return jobs


def alone_jobs(spec: CompareSpec, rows: Sequence[DatasetRow], versions: Mapping[str, str]) -> list[EvalRequest]:
    """A few questions to every arm, to be asked with one request in flight: what an answer takes without a queue.

    They are asked before all others, so that no prompt is in the prefix cache. The first of each arm may load its
    adapter, and is not timed. Filed under `ARM~alone`.
    """
    drawn = random.Random(spec.seed).sample(list(rows), min(ALONE_QUESTIONS + 1, len(rows)))
    jobs = []
    for row in drawn:
        for arm in (arm_of_row(arm, row) for arm in spec.arms):
            label = f"{arm.name}{ALONE}"
            key = answer_key(spec, label, arm, row, versions.get(arm.name))
            jobs.append(EvalRequest(key, label, row.id, arm, question(row)))
    return jobs


def timed(alone: AnswerSet, arm: str) -> list[EvalAnswer]:
    """An arm's answers to `alone_jobs`, without failures and without the first, which may have loaded the adapter."""
    found = [answer for answer in alone if answer.arm == f"{arm}{ALONE}"]
    return [answer for answer in found[1:] if answer.error is None]


def check_ids(rows: Sequence[DatasetRow]) -> None:
    """Raises DataError: no rows, a row without id, an id twice."""
    if not rows:
        raise DataError("evaluation rows", "none", "a comparison needs at least one question")
    seen: dict[str, int] = {}
    for number, row in enumerate(rows, start=1):
        if not row.id:
            raise DataError(f"evaluation row {number}: id", "missing or empty", "answers are paired by row id")
        if row.id in seen:
            raise DataError(f"evaluation row {number}: id={row.id!r}", f"row {seen[row.id]} has the same", "ids differ")
        seen[row.id] = number


def _wanted_keys(jobs: Sequence[EvalRequest]) -> dict[str, tuple[str, str]]:
    return {job.key: (job.label, job.row_id) for job in jobs}


class _OfflineRun:
    """State of one run: what is recorded, and the failures that no later answer has yet shown to be the arm's own."""

    def __init__(
        self,
        answers: AnswerSet,
        path: Path,
        total: int,
        outage: int,
        on_progress: Callable[[CompareProgress], None] | None,
    ) -> None:
        self.answers, self.path, self.total, self.outage = answers, path, total, outage
        self.on_progress = on_progress
        self.reused, self.failed = len(answers), 0
        self.pending: list[EvalAnswer] = []

    async def ask_all(self, jobs: Sequence[EvalRequest], send: Send, concurrency: int) -> None:
        queue = iter(jobs)
        self._report_progress()
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(concurrency, len(jobs))):
                    group.create_task(self._worker(queue, send))
        except ExceptionGroup as group_error:
            raise group_error.exceptions[0] from None
        if self.pending and all(answer.error is not None for answer in self.answers):
            raise self._outage()
        self._record_pending()

    async def _worker(self, queue: Iterator[EvalRequest], send: Send) -> None:
        for job in queue:
            self._take(await _ask(job, send))

    def _take(self, answer: EvalAnswer) -> None:
        self.failed += answer.error is not None
        self.pending.append(answer)
        if answer.error is None:
            self._record_pending()
        elif len(self.pending) >= self.outage:
            raise self._outage()
        self._report_progress()

    def _outage(self) -> RunError:
        kept = f"{len(self.answers)} of {self.total} answers are kept in {self.path}"
        return RunError(
            f"comparison: {len(self.pending)} requests in a row failed",
            str(self.pending[-1].error),
            "an arm may fail, the endpoint may not",
            f"fix it and run again: {kept}",
        )

    def _record_pending(self) -> None:
        for answer in self.pending:
            append_line(self.path, answer)
            self.answers.add(answer)
        self.pending.clear()

    def _report_progress(self) -> None:
        if self.on_progress is not None:
            done = len(self.answers) + len(self.pending)
            self.on_progress(CompareProgress(done, self.total, self.failed, self.reused))


async def _ask(job: EvalRequest, send: Send) -> EvalAnswer:
    """The answer, or the failure as an answer. `gather` is what turns an exception of any kind into a value."""
    said = {"key": job.key, "arm": job.label, "row_id": job.row_id, "request_id": job.request_id}
    [result] = await asyncio.gather(send(job), return_exceptions=True)
    if isinstance(result, BaseException):
        return EvalAnswer.model_validate({**said, "error": _failure(result)})
    return EvalAnswer.model_validate({**result, **said, "error": _engine_error(result)})


def _failure(error: BaseException) -> str:
    """One text a failure. Raises what ends a process; an answer that was cancelled is one failure, not the end."""
    if isinstance(error, GraftworkError):
        return error.text()
    if isinstance(error, Exception | asyncio.CancelledError):
        return f"{type(error).__name__}: {error}"[:2000]
    raise error


def _engine_error(result: Mapping[str, Any]) -> str | None:
    """An engine that fails or drops a request ends it with a reason instead of an exception."""
    reason = result.get("finish_reason")
    return f"finish_reason={reason}" if reason in ("error", "cancelled") else None
