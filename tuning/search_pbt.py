"""Population based training (Jaderberg et al. 2017, arXiv 1711.09846) of learning-rate schedules.

A trial is one segment of a member: `every` steps that begin from its parent's checkpoint. Between two generations the
worst members take over weights and values of the best (exploit) and multiply the learning rate (explore). Ray's own
keeps that in the driver's memory; here it follows from the seed and the trials, so that a killed sweep goes on alike.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import Field, JsonValue, model_validator

from graftwork.config import Spec
from graftwork.errors import ConfigError
from graftwork.training.strategies import ZERO
from graftwork.tuning.search import Suggestion, Values, Wait, select_searched
from graftwork.tuning.search_grid_random import RandomSpec

if TYPE_CHECKING:
    from graftwork.tuning.spec import TuneSpec
    from graftwork.tuning.trials import TrialRecord

FACTORS = "optim.factors"
"""The key of the training spec that a segment's values hold its schedule in: that of its whole line, from step 0."""


class PbtSpec(Spec):
    """Population based training of the learning rate's schedule (Jaderberg et al. 2017, arXiv 1711.09846)."""

    kind: Literal["pbt"] = "pbt"
    population: int = Field(default=4, ge=2)
    """Members, each at its own point of the space; `num_trials` is not read."""
    every: int = Field(ge=1)
    """Optimizer steps of a segment, after which the worst members go on from the best."""
    quantile: float = Field(default=0.25, gt=0, le=0.5)
    """Share of the members that is replaced, at least one."""
    factors: Annotated[tuple[Annotated[float, Field(gt=0)], ...], Field(min_length=1)] = (0.8, 1.25)
    """A replaced member's learning rate is multiplied by one of these."""

    @model_validator(mode="after")
    def _factors_change(self) -> Self:
        if 1.0 in self.factors or len(set(self.factors)) < len(self.factors):
            raise ValueError(f"factors must differ, from 1 too, found {list(self.factors)}")
        return self

    def check(self, spec: "TuneSpec") -> None:
        """Raise ValueError where the sweep's other keys can't go with it."""
        if self.every >= spec.steps or spec.steps % self.every:
            raise ValueError(f"search.every={self.every} must divide steps={spec.steps} into at least two segments")
        if self.every % spec.report_every:
            raise ValueError(
                f"search.every={self.every} must be a multiple of report_every={spec.report_every}, so that members "
                "compare"
            )
        if spec.scheduler is not None:
            raise ValueError(
                f"scheduler.kind={spec.scheduler.kind} can't go with search.kind=pbt, which ends no member"
            )
        if spec.share_base > 1:
            raise ValueError(f"share_base={spec.share_base} can't go with search.kind=pbt, whose members change places")
        if spec.train.optim.factors or "optim.factors" in spec.space:
            raise ValueError("optim.factors can't go with search.kind=pbt, which finds them: take them out")
        if spec.train.strategy.kind in ZERO:
            raise ValueError(
                f"train.strategy.kind={spec.train.strategy.kind} can't go with search.kind=pbt: DeepSpeed's optimizer "
                "keeps the rate to itself. Set train.strategy.kind=ddp or fsdp2"
            )

    def start(self, spec: "TuneSpec") -> "PbtSearch":
        """Return the search. Raises ConfigError when the space has fewer points than the population members."""
        points = RandomSpec().start(spec.model_copy(update={"num_trials": self.population})).points
        if len(points) < self.population:
            raise ConfigError(
                f"search.population={self.population}",
                f"the space has {len(points)} points",
                "members begin at different points",
                f"set it to {len(points)} or less, or widen the space",
            )
        return PbtSearch(self, points, spec.steps, spec.seed)


@dataclass(frozen=True)
class PbtSearch:
    """A search in generations."""

    asked: PbtSpec
    points: tuple[Values, ...]
    """Values that the members begin with."""
    steps: int
    seed: int

    @property
    def generations(self) -> int:
        """Segments of a member."""
        return self.steps // self.asked.every

    @property
    def total(self) -> int:
        """Segments of all members."""
        return self.asked.population * self.generations

    @property
    def reason(self) -> str:
        """In words."""
        asked = self.asked
        return (
            f"pbt: {asked.population} members in {self.generations} segments of {asked.every} steps by seed "
            f"{self.seed}; after each the worst {_count(asked)} go on from the best {_count(asked)}"
        )

    def suggest(self, trials: "Sequence[TrialRecord]") -> Suggestion | Wait | None:
        """The next segment; none of a generation before all of the one before have ended."""
        segments = select_searched(trials)
        generation, member = divmod(len(segments), self.asked.population)
        if generation == self.generations:
            return None
        until = (generation + 1) * self.asked.every
        if generation == 0:
            return Suggestion(self.points[member], until=until)
        before = segments[(generation - 1) * self.asked.population :][: self.asked.population]
        if any(trial.state in ("pending", "running") for trial in before):
            return Wait()
        if all(trial.state == "failed" for trial in before):
            return None
        parent, factor = self._lines(before, generation)[member]
        values = dict(parent.values)
        if factor != 1.0:
            values[FACTORS] = _extend_range(values.get(FACTORS), generation * self.asked.every / self.steps, factor)
        return Suggestion(values, parent=parent.trial_id, until=until)

    def _lines(self, before: "Sequence[TrialRecord]", generation: int) -> "list[tuple[TrialRecord, float]]":
        """For each member the segment that it goes on from, and what its learning rate is multiplied by."""
        ranked = sorted(range(len(before)), key=lambda member: (_loss(before[member]), member))
        alive = [member for member in ranked if before[member].state != "failed"]
        best = alive[: _count(self.asked)]
        survivors = self.asked.population - _count(self.asked)
        worst = [member for member in ranked if member not in alive or ranked.index(member) >= survivors]
        rng, factors = random.Random(f"{self.seed} generation {generation}"), self.asked.factors
        rng.shuffle(best)
        lines = [(trial, 1.0) for trial in before]
        for place, member in enumerate(one for one in worst if one not in best):
            copies, one = divmod(place, len(best))
            power, other = divmod(copies, len(factors))  # a further copy gets another factor, then a power of it
            factor = factors[(int(rng.random() * len(factors)) + other) % len(factors)] ** (power + 1)
            lines[member] = (before[best[one]], float(factor))
        return lines


def finished_trials(trials: "Sequence[TrialRecord]") -> set[str]:
    """Return the trials whose checkpoints are not needed: they ended, and so did all that could begin from them."""
    segments = [trial for trial in trials if trial.until is not None and trial.repeat_of is None]
    size = sum(trial.until == segments[0].until for trial in segments) if segments else 1
    open_from = next(
        (place for place, trial in enumerate(segments) if trial.state in ("pending", "running")), len(segments)
    )
    first_needed = (open_from // size - 1) * size  # the generation before the first that is still at work
    needed = {trial.trial_id for trial in segments[max(0, first_needed) :]}
    return {trial.trial_id for trial in trials if trial.state not in ("pending", "running")} - needed


def _count(asked: PbtSpec) -> int:
    """Members that are replaced at a barrier."""
    return max(1, int(asked.population * asked.quantile))


def _loss(trial: "TrialRecord") -> float:
    return trial.losses[-1][1] if trial.state != "failed" and trial.losses else math.inf


def _extend_range(known: JsonValue, share: float, factor: float) -> JsonValue:
    """Return the schedule with one more factor, multiplied by the last."""
    pieces: list[JsonValue] = [*known] if isinstance(known, list | tuple) else []
    last = pieces[-1] if pieces else None
    reached = float(str(last[1])) if isinstance(last, list | tuple) else 1.0
    return [*pieces, [round(share, 9), float(f"{reached * factor:.6g}")]]
