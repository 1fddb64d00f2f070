"""What was said before and after -> how each metric changed, and of which changes one can be sure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from graftwork import stats
from graftwork.metrics import FAIR_AT_ZERO, Metric, signature
from graftwork.report.outcome_records import Change, GeneratedText, Level, OutcomesReport, PairedTest
from graftwork.report.records import MetricInfo
from graftwork.stats import Floats
from graftwork.training.outcomes.paired import level, paired
from graftwork.training.outcomes.probes import Probe
from graftwork.training.outcomes.record import PartOutcome
from graftwork.training.spec import TrainSpec

SHOWN = 3
"""Written answers shown of each kind: won, lost."""


@dataclass(frozen=True)
class _Found:
    """One metric of one group, before it is set against all others."""

    probe: Probe
    metric: Metric
    group: str
    main: bool
    before: Level
    after: Level
    test: PairedTest


def outcomes_report(spec: TrainSpec, probes: Sequence[Probe], parts: Mapping[str, PartOutcome]) -> OutcomesReport:
    """The record of a run whose parts were all measured."""
    alpha = spec.outcomes.alpha
    found = [one for probe in probes for one in _measured(probe, parts[probe.part.name], alpha, spec.seed)]
    adjusted = iter(stats.holm([one.test.p_value for one in found if one.main]))
    changes = tuple(_change(spec, one, next(adjusted) if one.main else None) for one in found)
    known = {metric.name: metric for probe in probes for metric in probe.metrics}
    infos = tuple(MetricInfo(name=one.name, unit=one.unit, better=one.better, kind=one.kind, meaning=one.meaning)
                  for one in known.values())  # fmt: skip
    written = tuple(one for probe in probes for one in _sample_texts(probe, parts[probe.part.name]))
    return OutcomesReport(alpha=alpha, family=sum(one.main for one in found), changes=changes, metrics=infos,
                          written=written, notes=_notes(changes))  # fmt: skip


def _measured(probe: Probe, outcome: PartOutcome, alpha: float, seed: int) -> list[_Found]:
    before, after = probe.scores(outcome.before), probe.scores(outcome.after)
    return [
        _compared(probe, metric, group, place < probe.main, before[metric.name], after[metric.name], alpha, seed)
        for group in dict.fromkeys(probe.groups) for place, metric in enumerate(probe.metrics)
    ]  # fmt: skip


def _compared(
    probe: Probe, metric: Metric, group: str, main: bool, before: Floats, after: Floats, alpha: float, seed: int
) -> _Found:
    kept = np.array([one == group for one in probe.groups])
    units = [unit for unit, keep in zip(probe.units, kept, strict=True) if keep]
    was, became = (level(side[kept], metric, units, alpha, seed) for side in (before, after))
    test = paired(after[kept], before[kept], metric, units, alpha, seed)
    return _Found(probe, metric, group, main, was, became, test)


def _change(spec: TrainSpec, one: _Found, p_adjusted: float | None) -> Change:
    alpha = spec.outcomes.alpha
    recipe = {"asked": one.probe.about, **({"group": one.group} if one.group else {}), "base": spec.base.uri,
              "quant": spec.quant.kind, "interval": one.test.interval, "test": one.test.test, "seed": spec.seed,
              "questions": one.probe.part.digest()[:8]}  # fmt: skip
    return Change(
        part=one.probe.part.name, group=one.group, metric=one.metric.name, before=one.before, after=one.after,
        test=one.test, p_adjusted=p_adjusted,
        verdict=None if p_adjusted is None else stats.decide(_gain(one), p_adjusted, False, alpha),
        signature=signature(one.metric.name, one.test.n, recipe),
    )  # fmt: skip


def _gain(one: _Found) -> float:
    """Above 0 where the change is one to the better; of a bias, where it came nearer to 0."""
    if one.metric.name in FAIR_AT_ZERO:
        return abs(one.before.value) - abs(one.after.value)
    return one.test.value if one.metric.better == "higher" else -one.test.value


def _sample_texts(probe: Probe, outcome: PartOutcome) -> list[GeneratedText]:
    """Some answers that were won and some that were lost, of parts that write."""
    if not probe.prompts:
        return []
    own = probe.metrics[0].name
    before, after = probe.scores(outcome.before)[own], probe.scores(outcome.after)[own]
    told = [
        GeneratedText(part=probe.part.name, prompt=probe.prompts[at], before=outcome.before[at].text,
                after=outcome.after[at].text, held_before=before[at] == 1, held_after=after[at] == 1)
        for at in range(len(before)) if before[at] != after[at]
    ]  # fmt: skip
    lost, won = ([one for one in told if one.held_before == side] for side in (True, False))
    return lost[:SHOWN] + won[:SHOWN]


def _notes(changes: Sequence[Change]) -> tuple[str, ...]:
    turned = [one for one in changes if one.metric in FAIR_AT_ZERO and one.after.high < 0]
    return tuple(f"{one.part} {one.group}: {one.metric} is below 0 after training: it leans against the stereotype."
                 for one in turned)  # fmt: skip
