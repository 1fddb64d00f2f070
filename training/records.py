"""What a training run tells: progress while it goes on, the report when it is done."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Progress:
    """Where a run is. Called back in the driver, at most a few times a second."""

    step: int
    total_steps: int
    loss: float
    tokens_per_s: float
    """Over the last steps, all workers together, padding left out."""
    eta_s: float
    """Seconds to the last step at that pace."""
    eval_loss: float | None = None
    """The last one measured."""


@dataclass(frozen=True)
class TrainReport:
    """A finished run, measured."""

    run_id: str
    adapter: str | None
    """`task@version`, as published; None where all weights were trained."""
    version: str
    """Of the adapter, or of the base."""
    reused: bool
    """The run had finished before; nothing was trained now."""
    steps: int
    rows: int
    """Training rows, after dropping."""
    dropped_rows: int
    """Training rows longer than `max_length`."""
    tokens: int
    """Tokens processed, padding left out."""
    wall_s: float
    """Seconds since the first step, evaluations and checkpoints and resumed parts included, loading left out."""
    tokens_per_s: float
    """Tokens over the seconds in training steps alone, all workers together."""
    train_loss: tuple[tuple[int, float], ...]
    """(step, mean loss in nats over the step's trained tokens)."""
    eval_loss: tuple[tuple[int, float], ...]
    peak_rss_bytes_per_worker: tuple[int, ...]
    peak_cuda_bytes_per_worker: tuple[int, ...]
    notes: tuple[str, ...] = ()
    """What was resolved or left out, with the reason."""
    base: str | None = None
    """Where the new base lies, as `base:` takes it, where all weights were trained."""
    outcomes: Mapping[str, Any] | None = None
    """The OutcomesReport, JSON-ready, where the spec asks for one."""
    page: str = ""
    """Where report.html is."""

    @property
    def published(self) -> str:
        """In words."""
        return self.adapter or f"base {self.base}"

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)

    @classmethod
    def from_dict(cls, record: Mapping[str, Any], *, reused: bool) -> "TrainReport":
        """From what `as_dict` gave, through JSON."""
        pairs = {key: tuple((int(s), float(v)) for s, v in record[key]) for key in ("train_loss", "eval_loss")}
        lists = {key: tuple(value) for key, value in record.items() if isinstance(value, list)}
        return cls(**{**record, **lists, **pairs, "reused": reused})
