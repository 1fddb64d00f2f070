"""Rows of an experiment's log: one `LogRow` for each assignment, answer, score that came later, and event.

Rows are only ever appended. An assignment is written when a request is sent to its arm, before there is an answer: the
order of these rows is the order in which units count (see `units`). An assignment or answer is known by (experiment,
request id, arm), of several choices the first is meant: a row that stands twice counts once. A later score is a row of
its own for each metric: it names the request id of its answer, with that answer's unit, arm, role and probability, and
the metric as `detail`.
"""

from typing import Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

Role = Literal["primary", "shadow", "override", "holdout"]


class LogRow(BaseModel):
    """One line of the log; what does not belong to its kind is null. Times in ms, instants in Unix seconds (UTC)."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    kind: Literal["assignment", "answer", "score", "event"]
    experiment: str
    """Name and digest of the experiment that the row belongs to."""
    at: float
    """When the row was written, by the clock of the ingress."""
    request_id: str = ""
    unit: str = ""
    """Keyed hash of the user, session or request: who it was is not in the log."""
    arm: str = ""
    role: Role = "primary"
    """primary: drawn, and seen by the caller; shadow: answered a copy; override and holdout: no part of the draw."""
    probability: float | None = Field(default=None, gt=0, le=1)
    """Chance that the unit had of this arm when it was assigned."""
    prompt_hash: str = ""
    base_digest: str | None = None
    adapter_version: str | None = None
    retrieved_ids: tuple[str, ...] = ()
    output: str | None = None
    error: str | None = None
    finish_reason: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    ttft_ms: float | None = None
    latency_ms: float | None = None
    cold: bool = False
    """The adapter had to be loaded first: its time says nothing of the arm."""
    scores: dict[str, float] = {}
    """By metric name. A failed answer has none: it counts as 0 on each."""
    event: str | None = None
    """start, resume, ramp, cut, kill, stop, stale. A `resume` with weights: the ingress was started again."""
    detail: str | None = None
    """Of an event its particulars as JSON; of a score the metric's name."""


class Assignment(NamedTuple):
    """The row of an assignment before it is a `LogRow`: made on the response path, where a draw takes 4 us in all."""

    experiment: str
    at: float
    request_id: str
    unit: str
    arm: str
    role: Role
    probability: float | None

    def row(self) -> LogRow:
        """Return it as a row."""
        return LogRow(kind="assignment", **self._asdict())
