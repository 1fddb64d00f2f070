"""What the log of an experiment says so far: one `MonitorState`, frozen, equal for equal logs."""

from dataclasses import dataclass

from graftwork.stats import Verdict


@dataclass(frozen=True)
class ArmState:
    """One arm. A unit is of the arm of its first assignment."""

    arm: str
    units: int
    """Units assigned to it."""
    counted: int
    """Units whose outcome is fixed, and that of all units assigned before them."""
    scored: int
    """Counted units with a score of their own (a failed answer has the worst); the others count with the middle."""
    mean: float | None
    """Plain mean of the primary metric over counted units."""
    answers: int
    errors: int
    """Failed answers; each counts with the lowest score."""


@dataclass(frozen=True)
class ContrastState:
    """An arm minus the control on the primary metric. All of it holds at every look, however often one looks."""

    arm: str
    control: str
    n: int
    """Units (or pairs, in a shadow) that tell about it."""
    estimate: float | None
    low: float
    high: float
    """Confidence sequence at level 1 - alpha."""
    level: float
    e_value: float
    """Largest evidence so far against no difference; 1 / alpha decides."""
    verdict: Verdict
    """On the arm against the control. `undecided` while anything blocks conclusions."""
    n_needed: int | None
    """Units that would decide, when undecided."""


@dataclass(frozen=True)
class GuardrailState:
    """One guardrail of one arm."""

    arm: str
    kind: str
    n: int
    value: float | None
    """Share of answers beyond it, or gap between the groups."""
    limit: float
    e_value: float
    """Largest evidence so far that the limit is broken; 1 / alpha cuts the arm."""
    broken_at: int | None
    """Observations of this guardrail when it broke."""


@dataclass(frozen=True)
class MonitorState:
    """Everything that may be said at this point of the log."""

    arms: tuple[ArmState, ...]
    contrasts: tuple[ContrastState, ...]
    guardrails: tuple[GuardrailState, ...]
    srm_e_value: float
    """Evidence that units, or those of them that got a score, do not fall to arms as planned; 1 / srm_alpha blocks."""
    blocked: str | None
    """Why no conclusion may be drawn; None when one may."""
    cut: tuple[str, ...]
    """Arms to be taken out: a guardrail of theirs broke."""
    waiting: int
    """Units (pairs, in a shadow) that are assigned and not counted yet: an outcome is open."""
    left_out: dict[str, int]
    """Rows that count for nothing, by reason."""
