"""All arms answer all questions, through the same handle that serves them live."""

import asyncio
import random
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graftwork.data import DatasetRow
from graftwork.errors import DataError, GraftworkError, RunError
from graftwork.serving.experiment.answers import AnswerSet, EvalAnswer, answer_key, question, read_answers
from graftwork.serving.experiment.lines import append_line
from graftwork.serving.experiment.scorers.choice import ChoiceScorer
from graftwork.serving.experiment.spec import CompareSpec
from graftwork.serving.spec import ArmSpec

Ask = Callable[[ArmSpec, list[dict[str, str]], str], Awaitable[Mapping[str, Any]]]
"""(arm, messages, request id) -> the fields of an `ArmAnswer`. Any exception is a failed answer."""
Messages = list[dict[str, str]]

_MIN_OUTAGE = 32
ALONE_QUESTIONS = 10
"""Questions an arm is timed on."""
ALONE = "~alone"


@dataclass(frozen=True)
class CompareProgress:
    """How far the answers are. `failed` counts failures of this run."""

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
    """What its answer is filed under: the arm's name, or a probe's."""
    row_id: str
    arm: ArmSpec
    messages: Messages
    continuations: tuple[str, ...] = ()

    @property
    def request_id(self) -> str:
        return f"cmp-{self.key}"


Send = Callable[[EvalRequest], Awaitable[Mapping[str, Any]]]
"""A job -> the fields of an `EvalAnswer`. Any exception is a failed answer."""


async def run_offline(
    spec: CompareSpec,
    rows: Sequence[DatasetRow],
    answer: Ask,
    path: Path,
    *,
    versions: Mapping[str, str] | None = None,
    on_progress: Callable[[CompareProgress], None] | None = None,
) -> AnswerSet:
    """Ask every arm every question, `spec.concurrency` at once, and append each answer to `path` as it comes.

    Arms take turns within each question, the first arm changing from question to question, so that they share the
    load evenly. A rerun continues from `path`; nothing is asked twice, failures included. versions: adapter version by
    arm name, as resolved now, so that an answer of an older version is not taken for one of the new.

    Runs in the driver. Raises DataError (row ids missing or twice), RunError when the endpoint is gone: so many
    failures in a row that no request in flight had an answer. Those last failures are not recorded.
    """
    check_ids(rows)
    jobs = list(_interleaved(spec, rows, versions or {}))

    async def send(job: EvalRequest) -> Mapping[str, Any]:
        return await answer(job.arm, job.messages, job.request_id)

    return await ask_jobs(jobs, send, path, spec.concurrency, on_progress)


async def ask_jobs(
    jobs: Sequence[EvalRequest],
    send: Send,
    path: Path,
    concurrency: int,
    on_progress: Callable[[CompareProgress], None] | None = None,
) -> AnswerSet:
    """Answers to all jobs, those on disk reused; each is appended to `path` as it comes. Raises as `run_offline`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    answers = read_answers(path, _wanted(jobs))
    left = [job for job in jobs if (job.label, job.row_id) not in answers]
    run = _OfflineRun(answers, path, len(jobs), max(_MIN_OUTAGE, concurrency), on_progress)
    await run.ask_all(left, send, concurrency)
    return answers


def count_unanswered(spec: CompareSpec, rows: Sequence[DatasetRow], path: Path, versions: Mapping[str, str]) -> int:
    """Questions times arms that `run_offline` would still ask."""
    return count_missing(list(_interleaved(spec, rows, versions)), path)


def count_missing(jobs: Sequence[EvalRequest], path: Path) -> int:
    """Jobs that `ask_jobs` would still send."""
    return len(jobs) - len(read_answers(path, _wanted(jobs)))


def option_jobs(
    spec: CompareSpec, rows: Sequence[DatasetRow], choices: Sequence[ChoiceScorer], versions: Mapping[str, str]
) -> list[EvalRequest]:
    """Likelihoods of every row's options in every arm, filed under `ARM~SCORER`."""
    jobs = []
    for row in rows:
        for arm in spec.arms:
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
        for arm in spec.arms:
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


def _wanted(jobs: Sequence[EvalRequest]) -> dict[str, tuple[str, str]]:
    return {job.key: (job.label, job.row_id) for job in jobs}


def _interleaved(spec: CompareSpec, rows: Sequence[DatasetRow], versions: Mapping[str, str]) -> Iterator[EvalRequest]:
    for index, row in enumerate(rows):
        first = index % len(spec.arms)
        for arm in spec.arms[first:] + spec.arms[:first]:
            key = answer_key(spec, arm.name, arm, row, versions.get(arm.name))
            yield EvalRequest(key, arm.name, row.id, arm, question(row))


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
        self.held: list[EvalAnswer] = []

    async def ask_all(self, jobs: Sequence[EvalRequest], send: Send, concurrency: int) -> None:
        queue = iter(jobs)
        self._say()
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(concurrency, len(jobs))):
                    group.create_task(self._worker(queue, send))
        except ExceptionGroup as group_error:
            raise group_error.exceptions[0] from None
        if self.held and all(answer.error is not None for answer in self.answers):
            raise self._outage()
        self._record_held()

    async def _worker(self, queue: Iterator[EvalRequest], send: Send) -> None:
        for job in queue:
            self._take(await _ask(job, send))

    def _take(self, answer: EvalAnswer) -> None:
        self.failed += answer.error is not None
        self.held.append(answer)
        if answer.error is None:
            self._record_held()
        elif len(self.held) >= self.outage:
            raise self._outage()
        self._say()

    def _outage(self) -> RunError:
        kept = f"{len(self.answers)} of {self.total} answers are kept in {self.path}"
        return RunError(f"comparison: {len(self.held)} requests in a row failed", str(self.held[-1].error),
                        "an arm may fail, the endpoint may not", f"mend it and run again: {kept}")  # fmt: skip

    def _record_held(self) -> None:
        for answer in self.held:
            append_line(self.path, answer)
            self.answers.add(answer)
        self.held.clear()

    def _say(self) -> None:
        if self.on_progress is not None:
            done = len(self.answers) + len(self.held)
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
