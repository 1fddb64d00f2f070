"""Scores that come later: POST /v1/feedback names the request id of an answer, each metric counts once."""

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated

from pydantic import BaseModel, ConfigDict, Field

from graftwork.serving.experiment.online.log_row import LogRow

if TYPE_CHECKING:
    from graftwork.serving.experiment.online.live import LiveExperiment

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
    """What was said of it later."""

    def __post_init__(self) -> None:  # its text is in the log, not here
        self.row = self.row.model_copy(update={"output": None, "retrieved_ids": (), "prompt_hash": ""})

    def score_row(self, metric: str, value: float, at: float) -> LogRow:
        """The row of one later score."""
        of = self.row
        return LogRow(
            kind="score", experiment=of.experiment, at=at, request_id=of.request_id, unit=of.unit, arm=of.arm,
            role=of.role, probability=of.probability, scores={metric: value}, detail=metric,
        )  # fmt: skip


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
