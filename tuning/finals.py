"""The finals: once the search has no more, its best trials run again with other seeds, each with the same ones.

A seed decides the order of the rows and the adapter's first weights. Finalists that share it share that luck, so their
losses are compared seed by seed.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from graftwork.tuning.goals import pareto
from graftwork.tuning.records import TrialRecord
from graftwork.tuning.search import FixedPoints
from graftwork.tuning.search.protocol import Search, Suggestion, Wait, select_searched
from graftwork.tuning.space import Values, digest, rows_points
from graftwork.tuning.spec import TuneSpec


@dataclass(frozen=True)
class WithFinals:
    """A search, then the repeats of its finalists. They are not part of what the search sees."""

    search: Search
    spec: TuneSpec

    @property
    def name(self) -> str:
        """That of the search."""
        return self.search.name

    @property
    def total(self) -> int:
        """The search's trials and all repeats."""
        return self.search.total + most_repeats(self.spec)

    @property
    def reason(self) -> str:
        """That of the search."""
        return self.search.reason

    def suggest(self, trials: Sequence[TrialRecord]) -> Suggestion | Wait | None:
        """The search's next point; after the last one has ended, the next repeat."""
        searched = select_searched(trials)
        chosen = self.search.suggest(searched)
        if chosen is not None:
            return chosen
        if any(trial.state in ("pending", "running") for trial in searched):
            return Wait()
        known = {trial.trial_id for trial in trials}
        return next((one for one in _repeats(self.spec, searched) if digest(one.values) not in known), None)


def with_finals(spec: TuneSpec, search: Search) -> Search:
    """The search itself where the spec asks for no finals."""
    return WithFinals(search, spec) if spec.finals else search


def knows_all(search: Search) -> bool:
    """No point of the search depends on a result, so that it may be asked ahead."""
    return isinstance(search.search if isinstance(search, WithFinals) else search, FixedPoints)


def most_repeats(spec: TuneSpec) -> int:
    """Runs that the finals add, where enough trials run to their end."""
    return spec.finals.finalists * (spec.finals.repeats - 1) if spec.finals else 0


def seeds_of(spec: TuneSpec) -> tuple[int, ...]:
    """Of a finalist's runs; the first is that of the search."""
    repeats = spec.finals.repeats if spec.finals else 1
    return tuple(range(spec.train.seed, spec.train.seed + repeats))


def repeated(values: Values, seed: int) -> Values:
    """The same point with another seed."""
    return {**values, "seed": seed}


def repeated_rows(spec: TuneSpec) -> Iterator[Values]:
    """As `space.rows_points`, for the seeds that the finals add."""
    return (repeated(point, seed) for point in rows_points(spec) for seed in seeds_of(spec)[1:])


def ranked(spec: TuneSpec, trials: Sequence[TrialRecord]) -> list[TrialRecord]:
    """The search's trials that ran to their end, lowest loss first; with several objectives the Pareto front leads.

    A stopped trial is none of them: its last loss stands at an earlier step. Equal losses: the earlier trial.
    """
    finished = [trial for trial in trials if trial.state == "finished" and trial.repeat_of is None]
    front = {trial.trial_id for trial in pareto(trials, spec.objectives)} if len(spec.objectives) > 1 else set()
    return sorted(finished, key=lambda trial: (trial.trial_id not in front, trial.losses[-1][1]))


def finalists(spec: TuneSpec, trials: Sequence[TrialRecord]) -> list[TrialRecord]:
    """Those that take part: none where fewer than two trials ran to their end."""
    best = ranked(spec, trials)[: spec.finals.finalists] if spec.finals else []
    return best if len(best) > 1 else []


def _repeats(spec: TuneSpec, searched: Sequence[TrialRecord]) -> Iterator[Suggestion]:
    """Seed by seed, so that an interrupted sweep has whole pairs."""
    for seed in seeds_of(spec)[1:]:
        for finalist in finalists(spec, searched):
            yield Suggestion(repeated(finalist.values, seed), repeat_of=finalist.trial_id)
