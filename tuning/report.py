"""Report of a sweep: the records of its trials, and `report.json` and `report.html` in its folder."""

import itertools
import math
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal

import yaml
from pydantic import JsonValue
from scipy.stats import kendalltau

from graftwork.config import canonical_json
from graftwork.report import BuiltReport, build
from graftwork.report.render import ReportInput
from graftwork.report.sweep_schema import (
    FinalistRecord,
    FinalsRecord,
    FrontPoint,
    FrontRecord,
    Plain,
    RungRecord,
    StoppedTrial,
    StopsRecord,
    SweepKey,
    SweepRecord,
    SweepTrial,
    in_space,
)
from graftwork.report.sweep_views import sentence
from graftwork.storage.store import RunPaths
from graftwork.tuning.finals import finalists, gathered, rule
from graftwork.tuning.search_space import CategoricalSpace, Domain, IntRange, LogUniform, PowerOfTwo
from graftwork.tuning.space_analysis import MOST_VALUES, heat, importance
from graftwork.tuning.spec import TuneSpec
from graftwork.tuning.trials import SearchDecision, TrialRecord, TuneReport, pareto, value_of


def _finals_record(spec: TuneSpec, trials: Sequence[TrialRecord], choice: SearchDecision) -> FinalsRecord | None:
    """Return the finals; None where none took place."""
    taking_part = finalists(spec, trials)
    if spec.finals is None or not taking_part or not choice.contrasts:
        return None
    behind = {one.other_id: one for one in choice.contrasts}
    found = []
    for finalist in gathered(spec, taking_part, trials):
        trial = finalist.trial
        if trial.trial_id not in behind and trial.trial_id != choice.best_id:
            continue  # a run of it is missing: `choice.notes` names it
        against = behind.get(trial.trial_id)
        found.append(
            FinalistRecord(
                id=trial.trial_id,
                values={key: to_plain(value) for key, value in trial.values.items()},
                losses=finalist.losses,
                mean=finalist.loss,
                difference=against.difference if against else None,
                low=against.low if against else None,
                high=against.high if against else None,
                p_adjusted=against.p_value if against else None,
                beaten=against is not None and against.beaten,
            )
        )
    ordered = sorted(found, key=lambda one: one.mean)
    return FinalsRecord(alpha=spec.finals.alpha, verdict=choice.verdict, finalists=tuple(ordered), notes=choice.notes)


@dataclass(frozen=True)
class SweepEnd:
    """State at the end of an attempt, and the figures that the trials do not have."""

    state: Literal["finished", "interrupted", "failed"]
    rows: int
    """Held-out rows behind each loss."""
    sampler: str
    """How the trials were drawn, in words."""
    wall_s: float
    choice: SearchDecision | None = None
    reused: bool = False
    error: str | None = None

    @classmethod
    def of(cls, report: TuneReport) -> "SweepEnd":
        """Return the end of a finished sweep."""
        return cls("finished", report.eval_rows, report.sampler, report.wall_s, report.choice, report.reused)


def sweep_record(spec: TuneSpec, trials: Sequence[TrialRecord], ended: SweepEnd) -> SweepRecord:
    """Return the record of a sweep, for its page and for `--json`."""
    keys = [_key_of(name, domain) for name, domain in spec.space.items()]
    shown = [trial_of(trial) for trial in trials]
    searched = [trial for trial in shown if trial.repeat_of is None and in_space(keys, trial)]
    choice = ended.choice
    best_id = choice.trial_id if choice else None
    best = next((trial.values for trial in trials if trial.trial_id == best_id), None)
    found = importance(keys, searched, spec.seed)
    return SweepRecord(
        name=spec.name,
        trials=tuple(shown),
        best_id=best_id,
        rows=ended.rows,
        seed=spec.seed,
        reused=ended.reused,
        state=ended.state,
        error=ended.error,
        steps=spec.steps,
        keys=tuple(keys),
        settings=settings(best) if best else "",
        sampler=ended.sampler,
        rule=rule(spec),
        scheduler=spec.scheduler.kind if spec.scheduler else "",
        at_once=most_at_once(trials),
        cpus=spec.train.cpus_per_worker,
        gpus=spec.train.gpus,
        wall_s=ended.wall_s,
        importance=found,
        heat=heat(keys, searched, found),
        stops=stops(searched, best_id, spec.steps) if spec.scheduler else None,
        front=_pareto_front(spec, trials),
        finals=_finals_record(spec, trials, choice) if choice else None,
    )


def most_at_once(trials: Sequence[TrialRecord]) -> int:
    """Return the most trials that ran at the same time."""
    spans = [(trial.started_s, trial.started_s + trial.wall_s) for trial in trials if trial.state != "pending"]
    return max((sum(began <= start < end for began, end in spans) for start, _ in spans), default=1) or 1


def _pareto_front(spec: TuneSpec, trials: Sequence[TrialRecord]) -> FrontRecord | None:
    """Return the trials by objective; None for one objective."""
    if len(spec.objectives) < 2:
        return None
    best = {trial.trial_id for trial in pareto(trials, spec.objectives)}
    points = []
    for trial in trials:
        values = [value for goal in spec.objectives if (value := value_of(trial, goal)) is not None]
        if trial.state == "finished" and trial.repeat_of is None and len(values) == len(spec.objectives):
            points.append(FrontPoint(id=trial.trial_id, values=tuple(values), on_front=trial.trial_id in best))
    names = tuple(goal.metric for goal in spec.objectives)
    return FrontRecord(objectives=names, points=tuple(points))


def _key_of(name: str, domain: Domain) -> SweepKey:
    """A key of the space with its values as text or numbers."""
    if isinstance(domain, CategoricalSpace):
        return SweepKey(name=name, values=tuple(to_plain(value) for value in domain.values))
    if isinstance(domain, PowerOfTwo) or (isinstance(domain, IntRange) and len(domain.listed()) <= MOST_VALUES):
        return SweepKey(name=name, values=tuple(domain.listed()))
    log = isinstance(domain, LogUniform) or (isinstance(domain, IntRange) and domain.log)
    return SweepKey(name=name, low=domain.low, high=domain.high, log=log)


def trial_of(trial: TrialRecord) -> SweepTrial:
    """A trial with its values as text or numbers."""
    return SweepTrial(
        id=trial.trial_id,
        values={key: to_plain(value) for key, value in trial.values.items()},
        losses=trial.losses,
        state=trial.state,
        wall_s=trial.wall_s or None,
        started_s=trial.started_s or None,
        error=trial.error,
        notes=trial.notes,
        metrics=trial.metrics,
        repeat_of=trial.repeat_of,
    )


# Early stops: steps saved, and the regret. The end of a stopped trial was not measured. The estimate comes from the
# trials that ran to their end: how far the order of the losses at a rung is that at the end, and how many of them
# caught up on the winner by as much as the stopped trial lacked. They are the better ones at each rung, so a stopped
# trial may differ from them.

CLOSEST = 5


def stops(trials: Sequence[SweepTrial], best_id: str | None, steps: int) -> StopsRecord | None:
    """Return the early stops; None where no trial was stopped."""
    stopped = [trial for trial in trials if trial.state == "stopped" and trial.losses]
    if not stopped:
        return None
    finished = [trial for trial in trials if trial.state == "finished"]
    best = next((trial for trial in finished if trial.id == best_id), None)
    saved = sum(steps - trial.last_step for trial in stopped)
    taken = sum(trial.last_step for trial in trials)
    lacked = _gaps_of_stopped(stopped, finished, best) if best else []
    most = [max(_caught_up(finished, best, one.step)) - one.gap for one in lacked if one.n] if best else []
    timed = [trial for trial in trials if trial.wall_s and trial.last_step]  # starts are spread over their steps
    steps_timed = sum(trial.last_step for trial in timed)
    at_rungs = sorted(Counter(trial.last_step for trial in stopped).items())
    return StopsRecord(
        stopped=len(stopped),
        saved_steps=saved,
        all_steps=taken + saved,
        saved_s=saved * sum(trial.wall_s or 0.0 for trial in timed) / steps_timed if steps_timed else None,
        rungs=tuple(_rung(step, count, finished) for step, count in at_rungs),
        closest=tuple(lacked[:CLOSEST]),
        regret=max(0.0, *most) if most else None,
    )


def _rung(step: int, count: int, finished: Sequence[SweepTrial]) -> RungRecord:
    pairs = [(here, trial.losses[-1][1]) for trial in finished if (here := trial.loss_at(step)) is not None]
    tau = float(kendalltau(*zip(*pairs, strict=True)).statistic) if len(pairs) > 2 else math.nan
    couples = list(itertools.combinations(pairs, 2))
    return RungRecord(
        step=step,
        stopped=count,
        finished=len(pairs),
        tau=None if math.isnan(tau) else tau,
        reversed_pairs=sum((a[0] - b[0]) * (a[1] - b[1]) < 0 for a, b in couples),
        pairs=len(couples),
    )


def _gaps_of_stopped(
    stopped: Sequence[SweepTrial], finished: Sequence[SweepTrial], best: SweepTrial
) -> list[StoppedTrial]:
    """Gap of each stopped trial to the best at its last step, the one most likely to have caught up first."""
    found = []
    for trial in stopped:
        there = best.loss_at(trial.last_step)
        if there is None:
            continue
        gap = trial.losses[-1][1] - there
        caught = _caught_up(finished, best, trial.last_step)
        found.append(
            StoppedTrial(
                id=trial.id, step=trial.last_step, gap=gap, n=len(caught), caught_up=sum(by >= gap for by in caught)
            )
        )
    return sorted(found, key=lambda one: (-one.caught_up / one.n if one.n else 0.0, one.gap))


def _caught_up(finished: Sequence[SweepTrial], best: SweepTrial, step: int) -> list[float]:
    """Return by how much each other finished trial came closer to the winner between a step and the end."""
    there = best.loss_at(step)
    assert there is not None
    return [
        (here - there) - (trial.losses[-1][1] - best.losses[-1][1])
        for trial in finished
        if trial is not best and (here := trial.loss_at(step)) is not None
    ]


def to_plain(value: JsonValue) -> Plain:
    """Return lists and mappings as text: a kind by its name, with the other keys."""
    if isinstance(value, Mapping):
        kind, more = value.get("kind"), {key: other for key, other in value.items() if key != "kind"}
        said = ", ".join(f"{key}={to_plain(other)}" for key, other in more.items())
        return " ".join(part for part in (str(kind) if kind else "", said) if part) or "{}"
    if isinstance(value, list):
        return ", ".join(str(to_plain(item)) for item in value) or "[]"
    return value


def settings(values: Mapping[str, JsonValue]) -> str:
    """`--set key=value ...` as a shell takes it."""

    def text(value: JsonValue) -> str:  # YAML, of which JSON is a part
        return value if isinstance(value, str) and yaml.safe_load(value) == value else canonical_json(value)

    return " ".join(f"--set {shlex.quote(f'{key}={text(value)}')}" for key, value in values.items())


def write_page(run: RunPaths, spec: TuneSpec, record: SweepRecord) -> BuiltReport:
    """Write `report.json` and `report.html`, whenever an attempt ends. Raises StorageError."""
    page = ReportInput(
        title=spec.name,
        subtitle=run.run_id,
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        verdict=sentence(record),
        tune=record,
        provenance={**run.store.read_json(*run.provenance()), "spec": spec.model_dump(mode="json")},
    )
    return build(page, run.store, *run.file())
