"""Choice of a sweep's best trial and its confidence: by the finals where there are any, else by one run per point.

The unit is a seed: the question is which configuration to train, and another training has another seed. Held-out losses
of single rows would give a narrower interval, for another question: which of two trained adapters is better.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import fmean

import numpy as np

from graftwork import stats
from graftwork.errors import RunError
from graftwork.tuning.search import FixedPoints, Search, Suggestion, Values, Wait, digest, rows_points, select_searched
from graftwork.tuning.search_space import Goal
from graftwork.tuning.spec import TuneSpec
from graftwork.tuning.trials import FinalistComparison, SearchDecision, TrialRecord, label_points, pareto, value_of

COSTS = (Goal(metric="trained_parameters"), Goal(metric="step_s"))
"""What counts after the sweep's own objectives."""
MEASURED = ("step_s", "wall_s", "peak_rss_bytes")
SAME = 0.05
"""Measured costs that are no further apart than this share count as equal: seconds vary with the machine's load."""


@dataclass(frozen=True)
class Cheapest:
    """The cheapest of tied trials, and the metric that decided."""

    trial_id: str
    by: str | None
    """The metric; None where nothing tells them apart."""
    figures: str = ""
    """Its cost against the least of the others, e.g. `0.9 M against 3.7 M trained parameters`."""


def cheapest(objectives: Sequence[Goal], tied: Mapping[str, Sequence[TrialRecord]]) -> Cheapest:
    """Compare by the `objectives`, then trained parameters, then seconds a step; else return the first of `tied`.

    `tied`: the runs of each trial by its id; the mean over them counts.
    """
    found = Cheapest(next(iter(tied)), None)
    pool = list(tied)
    for goal in (*objectives, *COSTS):
        costs = {one: value for one in pool if (value := _mean(tied[one], goal)) is not None}
        if len(costs) < len(pool):
            continue
        best = min if goal.direction == "min" else max
        least = best(costs.values())
        noise = SAME if goal.metric in MEASURED else 0.0
        pool = [one for one, cost in costs.items() if abs(cost - least) <= noise * max(cost, least)]
        if len(pool) < len(costs):
            others = best(cost for one, cost in costs.items() if one not in pool)
            found = Cheapest(pool[0], goal.metric, _value_text(goal.metric, least, others))
    return found


def _mean(runs: Sequence[TrialRecord], goal: Goal) -> float | None:
    values = [value_of(run, goal) for run in runs]
    known = [value for value in values if value is not None]
    return fmean(known) if len(known) == len(values) else None


def _value_text(metric: str, a: float, b: float) -> str:
    if metric == "trained_parameters":
        counts = [f"{value / 1e6:.2f} M" if value >= 1e5 else f"{value:.0f}" for value in (a, b)]
        return f"{' against '.join(counts)} trained parameters"
    if metric in ("adapter_bytes", "peak_rss_bytes"):
        return f"{a / 2**20:.1f} against {b / 2**20:.1f} MiB of {metric.removesuffix('_bytes')}"
    unit = {"step_s": " s a step", "wall_s": " s", "tokens": " tokens"}[metric]
    return f"{a:.3g} against {b:.3g}{unit}"


@dataclass(frozen=True)
class Finalist:
    """A trial of the search with its repeats."""

    trial: TrialRecord
    name: str
    runs: tuple[TrialRecord, ...]
    """Its own first, in the order of the seeds; fewer than seeds where one did not reach its end."""

    @property
    def losses(self) -> tuple[float, ...]:
        """At the last step, by seed."""
        return tuple(run.losses[-1][1] for run in self.runs)

    @property
    def loss(self) -> float:
        """Mean over the seeds."""
        return fmean(self.losses)


def choose(spec: TuneSpec, trials: Sequence[TrialRecord]) -> SearchDecision:
    """The trial to take, of those of the search that ran to their end. Raises RunError when none did."""
    best = ranked(spec, trials)
    if not best:
        raise _none_finished(spec, trials)
    front = tuple(trial.trial_id for trial in pareto(trials, spec.objectives)) if len(spec.objectives) > 1 else ()
    taking_part = finalists(spec, trials)
    if not taking_part:
        return _decide_by_one_run(spec, best, front)
    notes, whole = [], []
    if spec.finals and len(taking_part) < spec.finals.finalists:
        notes.append(f"finals.finalists={spec.finals.finalists}, but {len(taking_part)} trials ran to their end")
    for one in gathered(spec, taking_part, trials):
        if len(one.runs) == len(seeds_of(spec)):
            whole.append(one)
        else:
            notes.append(f"{one.name} is out: of its {len(seeds_of(spec))} runs {len(one.runs)} reached their end")
    if not whole:
        return _decide_by_one_run(spec, best, front, tuple(notes))
    return _decide(spec, whole, front, tuple(notes))


def rule(spec: TuneSpec) -> str:
    """How the best was chosen, in words."""
    first = f"lowest held-out loss at step {spec.steps} among the trials that ran to their end"
    if len(spec.objectives) > 1:
        first += " and that no other beats in all objectives"
    if spec.finals is None:
        return first
    costs = ", ".join([*(goal.metric for goal in spec.objectives[1:]), "trained parameters", "seconds a step"])
    return (
        f"the {spec.finals.finalists} with the {first}, each run with {spec.finals.repeats} seeds: the lowest mean; "
        f"of those tied with it (Student's t by seed, Holm, alpha={spec.finals.alpha:g}) the best in {costs}"
    )


def _decide(
    spec: TuneSpec, whole: Sequence[Finalist], front: tuple[str, ...], notes: tuple[str, ...]
) -> SearchDecision:
    """Take the lowest mean over seeds, and of those tied with it the cheapest."""
    assert spec.finals is not None
    best = min(whole, key=lambda one: one.loss)
    contrasts = contrasts_of(best, whole, spec.finals.alpha)
    by_id = {one.trial.trial_id: one for one in whole}
    tied = [best, *(by_id[one.other_id] for one in contrasts if one.tied)]
    taken = cheapest(spec.objectives[1:], {one.trial.trial_id: one.runs for one in tied})
    names = {key: one.name for key, one in by_id.items()}
    said = [*_win_sentences(best, contrasts, names), *_tie_sentences(best, contrasts, names, taken)]
    if len(whole) == 1:
        said = [f"{best.name} is the only finalist all of whose runs reached their end"]
    return SearchDecision(taken.trial_id, best.trial.trial_id, "; ".join(said), rule(spec), contrasts, front, notes)


def contrasts_of(best: Finalist, whole: Sequence[Finalist], alpha: float) -> tuple[FinalistComparison, ...]:
    """Compare the best with each other finalist, the closest first.

    The best is known only after the runs, so Holm's family are all pairs. Over the pairs with the best alone, five
    equal finalists give a false finding in 8 % of sweeps at alpha=0.05.
    """
    pairs = list(combinations([one.trial.trial_id for one in whole], 2))
    losses = {one.trial.trial_id: np.array(one.losses) for one in whole}
    found = {pair: stats.student_mean(losses[pair[1]] - losses[pair[0]], alpha) for pair in pairs}
    adjusted = dict(zip(found, stats.holm([one.p_value for one in found.values()]), strict=True))
    contrasts = []
    for (first, second), one in found.items():
        if best.trial.trial_id not in (first, second):
            continue
        sign = 1 if first == best.trial.trial_id else -1
        low, high = sorted((sign * one.interval.low, sign * one.interval.high))
        other = second if sign == 1 else first
        p_value = adjusted[first, second]
        contrasts.append(
            FinalistComparison(other, sign * one.mean, low, high, p_value, len(best.losses), p_value < alpha)
        )
    return tuple(sorted(contrasts, key=lambda one: one.difference))


def gathered(spec: TuneSpec, taking_part: Sequence[TrialRecord], trials: Sequence[TrialRecord]) -> Iterator[Finalist]:
    names = label_points([trial.values for trial in taking_part])
    for trial, name in zip(taking_part, names, strict=True):
        repeats = {one.values["seed"]: one for one in trials if one.repeat_of == trial.trial_id}
        runs = [repeats[seed] for seed in seeds_of(spec)[1:] if seed in repeats]
        yield Finalist(trial, name, (trial, *(run for run in runs if run.state == "finished")))


def _decide_by_one_run(
    spec: TuneSpec, best: Sequence[TrialRecord], front: tuple[str, ...], notes: tuple[str, ...] = ()
) -> SearchDecision:
    """By one run a point."""
    lowest = best[0].losses[-1][1]
    equal = {trial.trial_id: (trial,) for trial in best if trial.losses[-1][1] == lowest}
    taken = cheapest(spec.objectives[1:], equal).trial_id
    labels = label_points([trial.values for trial in best])
    name = labels[[trial.trial_id for trial in best].index(taken)]
    if len(best) == 1:
        said = f"{name} is the only trial that ran to its end: it was compared with nothing"
    else:
        said = (
            f"{name} has the lowest loss, {lowest:.4f}, of {len(best)} points run once each, "
            "which cannot tell a better point from a luckier seed"
        )
    more = "" if spec.finals else " (`finals: {}` runs the best again with other seeds)"
    return SearchDecision(taken, best[0].trial_id, said + more, rule(spec), (), front, notes)


def _win_sentences(best: Finalist, contrasts: Sequence[FinalistComparison], names: Mapping[str, str]) -> Iterator[str]:
    for one in contrasts:
        if one.beaten:
            by = f"{one.difference:.4f} nats [{one.low:.4f}, {one.high:.4f}]"
            yield f"{best.name} beats {names[one.other_id]} by {by} over {one.seeds} seeds"
        elif not one.tied:
            by = f"{one.difference:.4f} nats [{one.low:.4f}, {one.high:.4f}] ahead of {names[one.other_id]}"
            yield f"{best.name} is {by}, which is not certain over all pairs (p={one.p_value:.2g})"


def _tie_sentences(
    best: Finalist, contrasts: Sequence[FinalistComparison], names: Mapping[str, str], taken: Cheapest
) -> Iterator[str]:
    behind = [one for one in contrasts if one.tied]
    if not behind:
        return
    *first, last = [best.name, *(names[one.other_id] for one in behind)]
    gaps = ", ".join(
        f"{names[one.other_id]} is {one.difference:.4f} nats [{one.low:.4f}, {one.high:.4f}] behind" for one in behind
    )
    yield f"{', '.join(first)} and {last} are tied ({gaps} over {len(best.losses)} seeds)"
    if taken.by is None:
        yield f"they cost the same, so the lower mean loss is taken, {best.name}"
    else:
        which = {"trained_parameters": "cheaper one", "step_s": "faster one"}.get(taken.by, f"better {taken.by}")
        yield f"the {which} is taken, {names[taken.trial_id]}: {taken.figures}"


def _none_finished(spec: TuneSpec, trials: Sequence[TrialRecord]) -> RunError:
    states = [trial.state for trial in trials]
    found = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    errors = [trial.error for trial in trials if trial.error]
    return RunError(
        f"a sweep of {len(trials)} trials",
        f"none ran to step {spec.steps}: {found}" + (f"; first error: {errors[0]}" if errors else ""),
        "the best trial is one that ran to its end",
        "lower the learning rates in `space`; with `scheduler: null` none is stopped early",
    )


# The finals: once the search has no more, its best trials run again with other seeds, each with the same ones.
#
# A seed decides the order of the rows and the adapter's first weights. Finalists that share it share that luck, so
# their losses are compared seed by seed.


@dataclass(frozen=True)
class WithFinals:
    """A search, then the repeats of its finalists. They are not part of what the search sees."""

    search: Search
    spec: TuneSpec

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
        for seed in seeds_of(self.spec)[1:]:  # seed by seed, so that an interrupted sweep has whole pairs
            for finalist in finalists(self.spec, searched):
                values = repeated(finalist.values, seed)
                if digest(values) not in known:
                    return Suggestion(values, repeat_of=finalist.trial_id)
        return None


def with_finals(spec: TuneSpec, search: Search) -> Search:
    """The search itself for a spec without finals."""
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
