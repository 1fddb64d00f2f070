"""A study's numbers as its record: each arm's scores with intervals, all over and by group, and the sentence."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from examples.studies.measure import Measured
from examples.studies.schema import StudyClaim, StudyMeasure, StudyScore
from examples.studies.scores import mean_interval
from examples.studies.spec import StudySpec
from graftwork import stats
from graftwork.metrics import BIAS, CHOICE, NATS, SCORES, Metric, signature
from graftwork.report.schema import MetricInfo
from graftwork.serving.evaluation.compare import arm_kind
from graftwork.serving.spec import ArmSpec

METRICS: Mapping[str, Metric] = {metric.name: metric for metric in (*SCORES, NATS, CHOICE, BIAS)}


def measure_record(study: StudySpec, found: Measured, base_digest: str) -> StudyMeasure:
    """All scores of a measure."""
    measure, scores = found.spec, found.scores
    infos = [METRICS[name] for name in measure.metrics]
    return StudyMeasure(
        name=measure.name,
        kind=measure.kind,
        questions=len(scores.units),
        units=len(set(scores.units)),
        unit="question" if measure.unit == "id" else "document",
        by=measure.by,
        failed=found.failed,
        metrics=tuple(
            MetricInfo(name=m.name, unit=m.unit, better=m.better, kind=m.kind, meaning=m.meaning) for m in infos
        ),
        scores=tuple(_scores(study, found, base_digest)),
        data_fingerprint=found.fingerprint,
    )


def _scores(study: StudySpec, found: Measured, base_digest: str) -> Iterator[StudyScore]:
    for group in ("", *found.scores.group_names):
        for arm in found.spec.arms:
            for metric in found.spec.metrics:
                yield _score(study, found, arm, metric, group, base_digest)


def _score(study: StudySpec, found: Measured, arm: ArmSpec, metric: str, group: str, base_digest: str) -> StudyScore:
    here = found.scores.of(group or None)
    values = here.per_unit(arm.name, metric)
    n = len(values)
    if METRICS[metric].kind == "binary" and bool(np.isin(values, (0.0, 1.0)).all()):
        method, interval = "wilson", stats.wilson(int(values.sum()), n, study.alpha)
    else:
        lowest = -1.0 if metric == "bias" else 0.0
        several = here.several and metric != "nats"
        method = "bca-units" if several else "bca"
        interval = mean_interval(values, study.alpha, lowest=lowest, several=several, seed=study.seed)
    recipe = {
        "arm": arm.name,
        "adapter": arm.adapter or "none",
        "base": base_digest[:8],
        "quant": study.quant.kind,
        "ci": method,
        "seed": study.seed,
        **({"of": group} if group else {}),
    }
    return StudyScore(
        arm=arm.name,
        kind=arm_kind(arm),
        metric=metric,
        group=group,
        value=float(values.mean()),
        low=interval.low,
        high=interval.high,
        level=1 - study.alpha,
        method=method,
        n=n,
        signature=signature(metric, n, recipe),
    )


def sentence(claims: Sequence[StudyClaim]) -> str:
    """How many of the published patterns show here."""
    counts = Counter(claim.outcome for claim in claims)
    parts = [
        f"{counts[outcome]} {outcome}" for outcome in ("reproduced", "not reproduced", "undecided") if counts[outcome]
    ]
    return f"Of {len(claims)} published patterns: {', '.join(parts)}."
