"""Searches that learn from the trials: points at random first, then what a model of the loss holds for the best."""

import hashlib
import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass

from graftwork.errors import ConfigError
from graftwork.tuning.records import TrialRecord
from graftwork.tuning.search.drawn import fresh_points, most
from graftwork.tuning.search.outcomes import Outcome, as_forecast, as_reported, at_furthest_step
from graftwork.tuning.search.protocol import Suggestion, select_searched
from graftwork.tuning.search_spec import BohbSpec, GpSpec, TpeSpec
from graftwork.tuning.space import Values, contradiction, digest
from graftwork.tuning.spec import TuneSpec


@dataclass(frozen=True)
class OptunaSearch:
    """TPE, GP or BOHB. Optuna is imported when a point is first asked of its model."""

    spec: TuneSpec
    asked: TpeSpec | GpSpec | BohbSpec
    total: int

    @property
    def name(self) -> str:
        """Its kind."""
        return self.asked.kind

    @property
    def reason(self) -> str:
        """In words."""
        seed, objectives = self.spec.seed, len(self.spec.objectives)
        if isinstance(self.asked, BohbSpec):
            how = f"{self.asked.random_share:.0%} at random by seed {seed}, the others by TPE on all keys together, at "
            return f"bohb: {how}the furthest step that {min_reports(self.spec)} trials reported at; {self.total} in all"
        first = f"{min(self.asked.n_startup, self.total)} points at random by seed {seed}, then by a model of "
        model = "the losses" if objectives == 1 else f"{objectives} objectives"
        apart = ""
        if isinstance(self.asked, TpeSpec) and len(self.spec.space) > 1:
            apart = ", all keys together" if self.asked.multivariate else ", each key by itself"
        return f"{self.name}: {first}{model}{apart}; {self.total} in all"

    def suggest(self, trials: Sequence[TrialRecord]) -> Suggestion | None:
        """None after `total` trials, or when the space has no other point."""
        chosen = select_searched(trials)
        if len(chosen) >= self.total:
            return None
        known = {digest(trial.values) for trial in chosen}
        outcomes = self._outcomes(chosen)
        point = None if outcomes is None else self._by_model(outcomes, len(chosen), known)
        point = point or self._at_random(len(chosen), known)
        return Suggestion(point) if point is not None else None

    def _outcomes(self, chosen: Sequence[TrialRecord]) -> list[Outcome] | None:
        """What the model is to learn from; None: the next point is drawn at random."""
        objectives, number = self.spec.objectives, len(chosen)
        if isinstance(self.asked, BohbSpec):
            at_random = random.Random(_seed(self.spec, number, "share")).random() < self.asked.random_share
            return None if at_random else at_furthest_step(chosen, min_reports(self.spec))
        if number < self.asked.n_startup:
            return None
        if isinstance(self.asked, TpeSpec) and len(objectives) == 1:
            return as_reported(chosen)
        return as_forecast(chosen, objectives, self.spec.steps)

    def _by_model(self, outcomes: list[Outcome], number: int, known: set[str]) -> Values | None:
        """The model's first point that is new and can be run; None where it brings none within its tries."""
        from graftwork.tuning.search.optuna_models import points  # optuna: half a second

        for point in points(self.spec, self.asked, outcomes, _seed(self.spec, number, "model")):
            if digest(point) not in known and contradiction(self.spec, point) is None:
                return point
        return None

    def _at_random(self, number: int, known: set[str]) -> Values | None:
        """First the points of `kind: random` with the same seed, later one drawn for this trial."""
        if not isinstance(self.asked, BohbSpec) and number < self.asked.n_startup:
            first = fresh_points(self.spec, random.Random(self.spec.seed), ())
            return next(itertools.islice(first, number, None), None)
        return next(fresh_points(self.spec, random.Random(_seed(self.spec, number, "drawn")), known), None)


def optuna_search(spec: TuneSpec, asked: TpeSpec | GpSpec | BohbSpec) -> OptunaSearch:
    """Raises ConfigError when values contradict each other, or the kind can't seek several objectives."""
    if isinstance(asked, BohbSpec) and len(spec.objectives) > 1:
        raise ConfigError(
            f"search.kind=bohb with objectives={[goal.metric for goal in spec.objectives]}",
            "bohb learns from losses at early steps, where other objectives mean little",
            "bohb optimizes one objective, the held-out loss",
            "take search: {kind: tpe} or {kind: gp}, or leave the other objectives out",
        )
    search = OptunaSearch(spec, asked, most(spec))
    search._at_random(0, set())
    return search


def min_reports(spec: TuneSpec) -> int:
    """Reports at a step from which BOHB fits a model there: two more than keys and one (Falkner et al. 2018)."""
    return len(spec.space) + 3


def _seed(spec: TuneSpec, number: int, use: str) -> int:
    """One of its own for each trial: a search that goes on needs no state of a generator."""
    return int.from_bytes(hashlib.sha256(f"{spec.seed}/{number}/{use}".encode()).digest()[:4], "big")
