"""Running experiment in the ingress: assigns arms, logs rows, takes feedback, cuts arms that break a guardrail."""

import asyncio
import hashlib
import json
import logging
import sys
import time
from collections import Counter, OrderedDict, deque
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field
from typing import Annotated, Any

import pyarrow.compute as pc
from pyarrow import RecordBatch
from pydantic import BaseModel, ConfigDict, Field

from graftwork.config import canonical_json
from graftwork.errors import StorageError
from graftwork.prompts.render import message_fields
from graftwork.serving.ab_test.assignment import ArmDraw, Assigner, key_of, reweigh, without
from graftwork.serving.ab_test.experiment_record import Cut, ExperimentRecord, Records
from graftwork.serving.ab_test.feedback import prompt_text
from graftwork.serving.ab_test.log import (
    Assignment,
    LogRow,
    Recorder,
    Role,
    Segments,
    rules_of,
    score_answer,
    scorers_of,
)
from graftwork.serving.ab_test.log_reader import ExperimentLog, columns_of_batch, columns_of_rows, row_of
from graftwork.serving.ab_test.monitor import Monitor, MonitorState
from graftwork.serving.ab_test.shadow import Copy, ShadowQueue
from graftwork.serving.ab_test.spec import weights_detail
from graftwork.serving.api.errors import ApiError
from graftwork.serving.api.openai_protocol import Json
from graftwork.serving.messages import ArmAnswer, ArmRequest, Question, StreamChunk
from graftwork.serving.router import EngineBackend
from graftwork.serving.spec import ArmSpec

# Feedback: POST /v1/feedback names the request id of an answer; each metric counts once.


REMEMBERED = 100_000
"""Answers that feedback can still come to, the latest of the endpoint."""
Metric = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_.-]{0,62}$")]


class FeedbackRequest(BaseModel):
    """Body of POST /v1/feedback."""

    model_config = ConfigDict(strict=True, extra="forbid")
    request_id: Annotated[str, Field(min_length=1, max_length=128)]
    """The answer's `id`."""
    scores: Annotated[dict[Metric, Annotated[float, Field(allow_inf_nan=False)]], Field(min_length=1, max_length=16)]
    """By metric, e.g. {"thumbs": 1}."""


@dataclass(slots=True)
class Answered:
    """An answer that may be scored later."""

    live: "LiveExperiment"
    row: LogRow
    scores: dict[str, float] = field(default_factory=dict)
    """Feedback on it."""

    def __post_init__(self) -> None:  # its text is in the log, not here
        self.row = self.row.model_copy(update={"prompt": None, "output": None, "retrieved_ids": (), "prompt_hash": ""})

    def score_row(self, metric: str, value: float, at: float) -> LogRow:
        """The row of one later score."""
        of = self.row
        return LogRow(
            kind="score",
            experiment=of.experiment,
            at=at,
            request_id=of.request_id,
            unit=of.unit,
            arm=of.arm,
            role=of.role,
            probability=of.probability,
            scores={metric: value},
            detail=metric,
        )


class RecentAnswers:
    """The latest answers of all experiments by request id."""

    def __init__(self, limit: int = REMEMBERED) -> None:
        self._limit, self._by_id = limit, OrderedDict[str, Answered]()

    def add(self, request_id: str, answered: Answered) -> None:
        """Remember one; the oldest is forgotten beyond the limit."""
        self._by_id.setdefault(request_id, answered)
        if len(self._by_id) > self._limit:
            self._by_id.popitem(last=False)

    def find(self, request_id: str) -> Answered | None:
        """None: unknown, or forgotten."""
        return self._by_id.get(request_id)

    def add_score(self, request_id: str, metric: str, value: float) -> None:
        """It has this score already."""
        if request_id in self._by_id:
            self._by_id[request_id].scores.setdefault(metric, value)


log = logging.getLogger("ray.serve")
TICK_S = 0.2


@dataclass(frozen=True, slots=True)
class ArmPlacement:
    """Route of one request. role None: the experiment takes no part, nothing is written down."""

    arm: ArmSpec
    unit: str
    role: Role | None
    probability: float | None


class LiveExperiment:
    """Built by `Experiments`; `run` is its task."""

    def __init__(
        self, record: ExperimentRecord, records: Records, backend: EngineBackend, recent: RecentAnswers
    ) -> None:
        self.record, self._records, self._backend, self._recent = record, records, backend, recent
        spec, (store, folder) = record.spec, record.log
        self._folder = store or records.store, folder
        self._assigner = self._new_assigner()
        self.recorder = Recorder(
            Segments(*self._folder), self._digest, buffer=spec.log_buffer, every_s=spec.log_every_s
        )
        self.shadow = ShadowQueue(self._answer_copy, limit=spec.shadow_queue, concurrency=spec.shadow_concurrency)
        self.counts: Counter[tuple[str, str, str]] = Counter()
        """Answers by arm, role and outcome (`ok`, or the error's code), since this process began."""
        self._scorers, self._monitor = scorers_of(spec), Monitor(rules_of(spec))
        self.judged = self._monitor.state()
        """Return the state after the rows so far."""
        self._replayed = False
        self._changing = asyncio.Lock()
        self.damaged: list[str] = []
        self._other_base: str | None = None

    @property
    def scored_here(self) -> frozenset[str]:
        """Metrics that each answer is scored by as it comes."""
        return frozenset(metric.name for metric in self._scorers.metrics)

    @property
    def log_uri(self) -> str:
        """Location of its rows."""
        store, folder = self._folder
        return store.path(*folder)

    def place(self, kind: str, name: str) -> ArmPlacement:
        """The arm of a unit: an override's, else the drawn one; the control's where the experiment does not run."""
        spec, whole = self.record.spec, f"{kind}:{name}"
        if self.record.status != "running":
            return ArmPlacement(self.record.arms[spec.control], "", None, None)
        unit = self._assigner.pseudonym(whole)
        if name in spec.overrides and kind != "request":
            return ArmPlacement(self.record.arms[spec.overrides[name]], unit, "override", None)
        drawn: ArmDraw = self._assigner.draw(whole)
        role: Role = "primary" if drawn.probability is not None else "holdout"
        return ArmPlacement(self.record.arms[drawn.arm], unit, role, drawn.probability)

    def assign(self, placed: ArmPlacement, request_id: str) -> bool:
        """Queue the row that says which arm the request is sent to, before there is an answer; see `Recorder.admit`."""
        arm, role = placed.arm.name, placed.role
        assert role is not None, "it takes no part"
        return self.recorder.admit(
            Assignment(self.record.id, time.time(), request_id, placed.unit, arm, role, placed.probability)
        )

    def write(self, placed: ArmPlacement, request_id: str, asked: Question, answer: ArmAnswer | ApiError | str) -> None:
        """Queue the row of an arm's answer, or of its failure, to a request that `assign` took."""
        row = answer_row(self.record.id, placed, request_id, asked, answer)
        if self.record.spec.log_prompts:
            row = row.model_copy(update={"prompt": prompt_text(asked)})
        self.counts[row.arm, row.role, row.error or "ok"] += 1
        self.recorder.add(row)
        if row.role != "shadow":
            self._recent.add(request_id, Answered(self, row))
        if row.base_digest is not None and row.base_digest != self.record.base_digest:
            self._other_base = row.base_digest

    def copy_to_others(self, placed: ArmPlacement, request: ArmRequest) -> None:
        """Queue the request for the other arms of a shadow."""
        for name, arm in self.record.arms.items():
            if name != placed.arm.name and name not in self.record.cut_arms and self.record.status == "running":
                self.shadow.offer(Copy(request.shadow_copy(arm), request.request_id, placed.unit))

    async def run(self) -> None:
        """Until cancelled: replay the log, then keep rows, weights and guardrails moving."""
        while True:
            await self.step()
            await asyncio.sleep(TICK_S)

    async def step(self, *, last: bool = False) -> None:
        """One turn of `run`; the last one publishes all."""
        if not self._replayed:
            self._replayed = True
            try:
                await asyncio.to_thread(self._replay)
            except StorageError as error:
                log.warning("experiment %s: its log can't be read again: %s", self.record.id, error)
        await self.recorder.step(last=last)
        await self._end_when_stale()
        await self._ramp_when_due()
        await self._cut_when_broken()

    async def close(self) -> None:
        """Drop the shadow's copies, publish what is waiting."""
        await self.shadow.close()
        await self.step(last=True)

    async def change(self, event: str, detail: Json, **changes: Any) -> None:
        """Write a change of the record, then let it take effect, then log it."""
        async with self._changing:
            new = self.record.changed(**changes)
            await asyncio.to_thread(self._records.save, new)
            self.record = new
            self._assigner = self._new_assigner()
            self.tell(event, detail)

    def tell(self, event: str, detail: Json) -> None:
        """An event's row."""
        text = json.dumps(detail, ensure_ascii=False)
        self.recorder.add(LogRow(kind="event", experiment=self.record.id, at=time.time(), event=event, detail=text))

    async def ramp(self, weights: dict[str, float], **changes: Any) -> None:
        """New weights; an arm that was cut stays at 0 and its share goes to the others in proportion."""
        for arm in sorted(self.record.cut_arms):
            weights = without(weights, arm, self.record.spec.control)
        ranges = reweigh(self.record.ranges, weights)
        await self.change("ramp", weights_detail(weights), weights=weights, ranges=ranges, **changes)

    async def cut(self, arm: str, why: Json) -> None:
        """Take an arm out."""
        record = self.record
        cuts = (*record.cuts, Cut(arm=arm, at=time.time(), why=json.dumps(why)))
        weights, ranges = record.weights, record.ranges
        if record.spec.mode == "split":
            weights = without(weights, arm, record.spec.control)
            ranges = reweigh(ranges, weights)
        log.warning("experiment %s: arm %s is cut: %s", record.id, arm, why)
        await self.change("cut", {"arm": arm, **why}, cuts=cuts, weights=weights, ranges=ranges)
        if weights != record.weights:
            self.tell("ramp", weights_detail(weights))

    async def _end_when_stale(self) -> None:
        if self._other_base is None or self.record.status != "running":
            return
        log.warning("experiment %s: the endpoint has another base now, it is stale", self.record.id)
        detail = {"base_digest": self._other_base, "started_with": self.record.base_digest}
        await self.change("stale", detail, status="stale")

    async def _ramp_when_due(self) -> None:
        record = self.record
        steps = record.spec.ramp[record.ramp_steps :]
        if record.status == "running" and steps and time.time() >= record.started_at + steps[0].after_s:
            await self.ramp(dict(steps[0].weights), ramp_steps=record.ramp_steps + 1)

    async def _cut_when_broken(self) -> None:
        for arm in self.judged.cut:
            if arm not in self.record.cut_arms and self.record.status == "running":
                await self.cut(arm, _cut_reason(self.judged, arm))

    def _digest(self, rows: Sequence[LogRow]) -> list[LogRow]:
        found = [score_answer(row, self._scorers) for row in rows]
        self._monitor.ingest(columns_of_rows(found, self._monitor.numbers))
        self.judged = self._monitor.state()
        kept = self.record.spec.log_outputs
        return found if kept else [row.model_copy(update={"output": None}) for row in found]

    def _replay(self) -> None:
        """Restore the state after a restart: the rows for the monitor, and the answers that may still get feedback."""
        found, latest = ExperimentLog(*self._folder), deque[RecordBatch]()
        for batch in found.batches():
            self._monitor.ingest(columns_of_batch(batch, self._monitor.numbers))
            latest.append(batch.filter(pc.not_equal(batch.column("kind"), "assignment")))
            while sum(map(len, latest)) - len(latest[0]) > REMEMBERED:
                latest.popleft()
        self.judged, self.damaged = self._monitor.state(), found.health.damaged
        for row in (row_of(tree) for batch in latest for tree in batch.to_pylist()):
            if row.kind == "answer" and row.role != "shadow":
                self._recent.add(row.request_id, Answered(self, row))
            elif row.kind == "score" and row.detail is not None:
                self._recent.add_score(row.request_id, row.detail, row.scores[row.detail])

    async def _answer_copy(self, copy: Copy) -> None:
        placed = ArmPlacement(copy.request.arm, copy.unit, "shadow", None)
        if not self.assign(placed, copy.request_id):
            return
        try:
            answers = await self._backend.choices(copy.request)
        except ApiError as error:
            self.write(placed, copy.request_id, copy.request.question, error)
        else:
            self.write(placed, copy.request_id, copy.request.question, answers[0])

    def _new_assigner(self) -> Assigner:
        record = self.record
        return Assigner(
            key_of(record.id, record.spec.salt), record.ranges, control=record.spec.control, holdout=record.spec.holdout
        )


def _cut_reason(judged: MonitorState, arm: str) -> Json:
    broken = [one for one in judged.guardrails if one.arm == arm and one.broken_at is not None]
    return {
        "guardrails": [
            {"kind": one.kind, "value": one.value, "limit": one.limit, "n": one.n, "e_value": finite(one.e_value)}
            for one in broken
        ]
    }


def finite(value: float) -> float:
    """JSON knows no infinity: the largest number stands for it."""
    return max(-sys.float_info.max, min(sys.float_info.max, value))


def answer_row(
    experiment: str, placed: ArmPlacement, request_id: str, asked: Question, answer: ArmAnswer | ApiError | str
) -> LogRow:
    """The row of one answer; an ApiError, or a text, is why there is none."""
    found: dict[str, Any] = {}
    if isinstance(answer, ArmAnswer):
        same = (
            "base_digest",
            "adapter_version",
            "finish_reason",
            "prompt_tokens",
            "completion_tokens",
            "ttft_ms",
            "latency_ms",
            "cold",
            "retrieved_ids",
        )
        found = {key: getattr(answer, key) for key in same} | {"output": answer.text}
    else:
        found["error"] = (answer.code or str(answer.status)) if isinstance(answer, ApiError) else answer
    assert placed.role is not None, "it takes no part"
    return LogRow(
        kind="answer",
        experiment=experiment,
        at=time.time(),
        request_id=request_id,
        unit=placed.unit,
        arm=placed.arm.name,
        role=placed.role,
        probability=placed.probability,
        prompt_hash=prompt_hash(asked),
        **found,
    )


def prompt_hash(asked: Question) -> str:
    """32 hex digits of the conversation."""
    whole = asked if isinstance(asked, str) else canonical_json([message_fields(turn) for turn in asked])
    return hashlib.blake2b(whole.encode(), digest_size=16).hexdigest()


# Requests to an experiment: answered as any other, and logged when they have ended.


DISCONNECTED = "disconnected"
"""The caller left before the end: the arm's failure, as far as is known."""


class LiveRequest:
    """`choices` and `stream` as a `EngineBackend` has them. One request each."""

    def __init__(self, live: LiveExperiment, placed: ArmPlacement, backend: EngineBackend) -> None:
        self.arm, self.experiment = placed.arm, live.record.id
        self._live, self._placed, self._backend = live, placed, backend

    async def choices(self, request: ArmRequest) -> list[ArmAnswer]:
        """See EngineBackend.choices."""
        with self._observe(request) as ended:
            answers = await self._backend.choices(request)
            ended.append(answers[0])
        return answers

    async def stream(self, request: ArmRequest) -> AsyncGenerator[StreamChunk]:
        """See EngineBackend.stream."""
        with self._observe(request) as ended:
            async with aclosing(self._backend.stream(request)) as chunks:
                async for chunk in chunks:
                    if isinstance(chunk, ArmAnswer) and chunk.index == 0:
                        ended.append(chunk)
                    yield chunk

    @contextmanager
    def _observe(self, request: ArmRequest) -> Iterator[list[ArmAnswer]]:
        answers: list[ArmAnswer] = []
        if self._placed.role is None or not self._live.assign(self._placed, request.request_id):
            yield answers
            return
        outcome: ArmAnswer | ApiError | None = None
        self._live.shadow.caller_came()
        try:
            yield answers
            outcome = answers[0]
        except ApiError as error:
            outcome = error
            raise
        except (asyncio.CancelledError, GeneratorExit):
            outcome = answers[0] if answers else None
            raise
        finally:
            ended = DISCONNECTED if outcome is None else outcome
            self._live.write(self._placed, request.request_id, request.question, ended)
            if self._live.record.spec.mode == "shadow" and outcome is not None:
                self._live.copy_to_others(self._placed, request)
            self._live.shadow.caller_left()
