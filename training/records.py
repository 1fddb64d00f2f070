"""What a training run tells: progress while it goes on, the report when it is done."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from graftwork import stats
from graftwork.report import words

_HEADLINES = ("accuracy", "reward", "exact_match")
"""What is looked for in held-out rows, of pairs, of sampled answers, of generated ones; else their loss."""


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
    eval_rows: int = 0
    """Held-out rows, after dropping."""
    dropped_eval_rows: int = 0
    """Held-out rows longer than `max_length`."""
    eval_metrics: Mapping[str, float] = field(default_factory=dict)
    """The kind's own figures of the held-out rows, when they were last evaluated (accuracy, reward, ...)."""
    outcomes: Mapping[str, Any] | None = None
    """The OutcomesReport, JSON-ready, where the spec asks for one."""
    page: str = ""
    """Where report.html is."""

    @property
    def published_name(self) -> str:
        """Name and version of the published adapter or base, as text."""
        return self.adapter or f"base {self.base}"

    @property
    def rows_text(self) -> str:
        """`48 rows (0 dropped), 18 held-out rows (6 dropped)`."""
        held_out = f", {self.eval_rows} held-out rows ({self.dropped_eval_rows} dropped)" if self.eval_rows else ""
        return f"{self.rows} rows ({self.dropped_rows} dropped){held_out}"

    @property
    def held_out(self) -> str:
        """The figure of the held-out rows that says most of this kind of run, and their loss; empty without such rows.

        `held-out accuracy 0.44 [0.25, 0.66] of 18 pairs, where chance is 0.50; held-out loss 0.690 (0.693 at step 4)`
        """
        parts = [_headline(name, self.eval_metrics[name], self.eval_rows) for name in _HEADLINES
                 if name in self.eval_metrics][:1]  # fmt: skip
        if self.eval_loss and "reward" not in self.eval_metrics:  # of sampled answers the loss is minus the reward
            (step, first), (_, last) = self.eval_loss[0], self.eval_loss[-1]
            parts.append(f"held-out loss {last:.3f}" + (f" ({first:.3f} at step {step})" if self.eval_loss[1:] else ""))
        return "; ".join(parts)

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)

    @classmethod
    def from_dict(cls, record: Mapping[str, Any], *, reused: bool) -> "TrainReport":
        """From what `as_dict` gave, through JSON."""
        pairs = {key: tuple((int(s), float(v)) for s, v in record[key]) for key in ("train_loss", "eval_loss")}
        lists = {key: tuple(value) for key, value in record.items() if isinstance(value, list)}
        return cls(**{**record, **lists, **pairs, "reused": reused})


def _headline(name: str, value: float, rows: int) -> str:
    if name != "accuracy" or not rows:
        return f"held-out {name.replace('_', ' ')} {words.number(value)}"
    found = stats.wilson(round(value * rows), rows)
    return (f"held-out accuracy {words.score(value)} {words.interval(found.low, found.high)} of {rows} pairs, where "
            "chance is 0.50")  # fmt: skip
