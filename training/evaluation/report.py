"""Outcomes of a run: both sides of each item as stored, the paired change of each metric, and its verdict."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from graftwork import metrics, stats
from graftwork.metrics import FAIR_AT_ZERO, Metric, signature
from graftwork.report.evaluation_schema import Change, GeneratedText, Level, OutcomesReport, PairedTest
from graftwork.report.schema import MetricInfo
from graftwork.stats import Floats, Interval
from graftwork.storage.store import RunPaths
from graftwork.training.evaluation.questions import Probe
from graftwork.training.evaluation.spec import ItemGroup, ItemOutput
from graftwork.training.spec import TrainSpec


def level(values: Floats, metric: Metric, units: Sequence[str], alpha: float, seed: int) -> Level:
    """The mean over questions and its interval: Wilson for shares, BCa else, over clusters where units repeat."""
    mean = float(np.mean(values))
    if metric.kind == "binary" and not _has_clusters(units):
        found = stats.wilson(int(np.sum(values)), len(values), alpha)
    else:
        found = _bootstrap(values, units, alpha, _lowest_value(metric), seed)
    return Level(value=mean, low=found.low, high=found.high)


def paired(a: Floats, b: Floats, metric: Metric, units: Sequence[str], alpha: float, seed: int) -> PairedTest:
    """a minus b. The mean over questions; its uncertainty that of the units."""
    gap, count = a - b, len(set(units))
    sd = float(np.std(gap, ddof=1)) if len(gap) > 1 else 0.0
    if _has_clusters(units):
        interval, p_value = _bootstrap(gap, units, alpha, -1.0, seed), stats.cluster_sign_flip(gap, units, seed=seed)
        sums, sizes = stats.cluster_sums(gap, units)
        sd = float(np.std(sums / sizes, ddof=1)) if count > 1 else 0.0
        names = ("cluster-bca", "cluster-sign-flip")
    elif metric.kind == "binary":
        interval, p_value = (
            stats.newcombe_scores(a, b, alpha),
            stats.mcnemar_exact(int(np.sum(gap > 0)), int(np.sum(gap < 0))),
        )
        names = ("newcombe-10", "mcnemar-exact")
    else:
        interval, p_value = _bootstrap(gap, units, alpha, -1.0, seed), stats.sign_flip(gap, seed=seed)
        names = ("bca", "sign-flip")
    return PairedTest(
        n=count,
        questions=len(gap),
        value=float(np.mean(gap)),
        low=interval.low,
        high=interval.high,
        interval=names[0],
        test=names[1],
        p_value=p_value,
        detects=stats.mde_graded(count, sd, alpha),
    )


def _lowest_value(metric: Metric) -> float:
    """Of its values; of a measure in units of the largest."""
    return 0.0 if metric.kind == "binary" or (metric.kind == "graded" and metric.unit != metrics.BIAS.unit) else -1.0


def _has_clusters(units: Sequence[str]) -> bool:
    return len(set(units)) < len(units)


def _bootstrap(values: Floats, units: Sequence[str], alpha: float, lowest: float, seed: int) -> Interval:
    """Measures may pass 1, which the intervals of scores are cut at: they are taken in units of the largest."""
    scale = max(1.0, float(np.max(np.abs(values))))
    if _has_clusters(units):
        found = stats.cluster_bootstrap(values / scale, units, alpha, lowest=lowest, seed=seed)
    else:
        found = stats.bca_mean(values / scale, alpha, lowest=lowest, seed=seed)
    return Interval(scale * found.low, scale * found.high)


FILE = "outcomes.json"


@dataclass(frozen=True)
class PartOutcome:
    """Outputs for a part's items, in their order."""

    digest: str
    before: tuple[ItemOutput, ...]
    after: tuple[ItemOutput, ...]


def read_parts(run: RunPaths) -> dict[str, PartOutcome]:
    """The parts of a run that were measured."""
    if not run.store.exists(*run.file(FILE)):
        return {}
    outcomes = {}
    for name, found in run.store.read_json(*run.file(FILE)).items():
        before, after = (tuple(ItemOutput.from_dict(one) for one in found[key]) for key in ("before", "after"))
        outcomes[name] = PartOutcome(found["digest"], before, after)
    return outcomes


def write_part(run: RunPaths, part: ItemGroup, before: Sequence[ItemOutput], after: Sequence[ItemOutput]) -> None:
    """Add a part to the run's record. Rank 0."""
    known = run.store.read_json(*run.file(FILE)) if run.store.exists(*run.file(FILE)) else {}
    both = {"before": [one.as_dict() for one in before], "after": [one.as_dict() for one in after]}
    items = [item.id for item in part.items]
    run.store.write_json({**known, part.name: {"digest": part.digest(), "items": items, **both}}, *run.file(FILE))


def missing(run: RunPaths, parts: Sequence[ItemGroup]) -> tuple[ItemGroup, ...]:
    """The parts that are still to be measured, or were with other questions."""
    known = read_parts(run)
    return tuple(part for part in parts if part.name not in known or known[part.name].digest != part.digest())


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
    found = [one for probe in probes for one in _compare_part(probe, parts[probe.part.name], alpha, spec.seed)]
    adjusted = iter(stats.holm([one.test.p_value for one in found if one.main]))
    changes = tuple(_change(spec, one, next(adjusted) if one.main else None) for one in found)
    known = {metric.name: metric for probe in probes for metric in probe.metrics}
    infos = tuple(
        MetricInfo(name=one.name, unit=one.unit, better=one.better, kind=one.kind, meaning=one.meaning)
        for one in known.values()
    )
    written = tuple(one for probe in probes for one in _sample_texts(probe, parts[probe.part.name]))
    return OutcomesReport(
        alpha=alpha,
        family=sum(one.main for one in found),
        changes=changes,
        metrics=infos,
        written=written,
        notes=_notes(changes),
    )


def _compare_part(probe: Probe, outcome: PartOutcome, alpha: float, seed: int) -> list[_Found]:
    """The change of each metric in each group."""
    before, after, found = probe.scores(outcome.before), probe.scores(outcome.after), []
    for group in dict.fromkeys(probe.groups):
        inside = np.array([one == group for one in probe.groups])
        units = [unit for unit, keep in zip(probe.units, inside, strict=True) if keep]
        for place, metric in enumerate(probe.metrics):
            sides = before[metric.name][inside], after[metric.name][inside]
            was, became = (level(side, metric, units, alpha, seed) for side in sides)
            test = paired(sides[1], sides[0], metric, units, alpha, seed)
            found.append(_Found(probe, metric, group, place < probe.main, was, became, test))
    return found


def _change(spec: TrainSpec, one: _Found, p_adjusted: float | None) -> Change:
    alpha = spec.outcomes.alpha
    # above 0 where the change is one to the better; of a bias, where it came nearer to 0
    gain = one.test.value if one.metric.better == "higher" else -one.test.value
    if one.metric.name in FAIR_AT_ZERO:
        gain = abs(one.before.value) - abs(one.after.value)
    recipe = {
        "asked": one.probe.about,
        **({"group": one.group} if one.group else {}),
        "base": spec.base.uri,
        "quant": spec.quant.kind,
        "interval": one.test.interval,
        "test": one.test.test,
        "seed": spec.seed,
        "questions": one.probe.part.digest()[:8],
    }
    return Change(
        part=one.probe.part.name,
        group=one.group,
        metric=one.metric.name,
        before=one.before,
        after=one.after,
        test=one.test,
        p_adjusted=p_adjusted,
        verdict=None if p_adjusted is None else stats.decide(gain, p_adjusted, False, alpha),
        signature=signature(one.metric.name, one.test.n, recipe),
    )


def _sample_texts(probe: Probe, outcome: PartOutcome) -> list[GeneratedText]:
    """Some answers that were won and some that were lost, of parts that write."""
    if not probe.prompts:
        return []
    own = probe.metrics[0].name
    before, after = probe.scores(outcome.before)[own], probe.scores(outcome.after)[own]
    told = [
        GeneratedText(
            part=probe.part.name,
            prompt=probe.prompts[at],
            before=outcome.before[at].text,
            after=outcome.after[at].text,
            held_before=before[at] == 1,
            held_after=after[at] == 1,
        )
        for at in range(len(before))
        if before[at] != after[at]
    ]
    lost, won = ([one for one in told if one.held_before == side] for side in (True, False))
    return lost[:SHOWN] + won[:SHOWN]


def _notes(changes: Sequence[Change]) -> tuple[str, ...]:
    turned = [one for one in changes if one.metric in FAIR_AT_ZERO and one.after.high < 0]
    return tuple(
        f"{one.part} {one.group}: {one.metric} is below 0 after training: it leans against the stereotype."
        for one in turned
    )
