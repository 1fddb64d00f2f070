"""Two sides that answered the same questions: their means, the difference, and how sure it is."""

from collections.abc import Sequence

import numpy as np

from graftwork import metrics, stats
from graftwork.metrics import Metric
from graftwork.report.outcome_records import Level, PairedTest
from graftwork.stats import Floats, Interval


def level(values: Floats, metric: Metric, units: Sequence[str], alpha: float, seed: int) -> Level:
    """The mean over questions and its interval: Wilson for shares, BCa else, over clusters where units repeat."""
    mean = float(np.mean(values))
    if metric.kind == "binary" and not _clustered(units):
        found = stats.wilson(int(np.sum(values)), len(values), alpha)
    else:
        found = _bootstrap(values, units, alpha, _lowest(metric), seed)
    return Level(value=mean, low=found.low, high=found.high)


def paired(a: Floats, b: Floats, metric: Metric, units: Sequence[str], alpha: float, seed: int) -> PairedTest:
    """a minus b. The mean over questions; its uncertainty that of the units."""
    gap, count = a - b, len(set(units))
    sd = float(np.std(gap, ddof=1)) if len(gap) > 1 else 0.0
    if _clustered(units):
        interval, p_value = _bootstrap(gap, units, alpha, -1.0, seed), stats.cluster_sign_flip(gap, units, seed=seed)
        sums, sizes = stats.cluster_sums(gap, units)
        sd = float(np.std(sums / sizes, ddof=1)) if count > 1 else 0.0
        names = ("cluster-bca", "cluster-sign-flip")
    elif metric.kind == "binary":
        interval, p_value = stats.newcombe_scores(a, b, alpha), stats.mcnemar_exact(int(np.sum(gap > 0)),
                                                                                    int(np.sum(gap < 0)))  # fmt: skip
        names = ("newcombe-10", "mcnemar-exact")
    else:
        interval, p_value = _bootstrap(gap, units, alpha, -1.0, seed), stats.sign_flip(gap, seed=seed)
        names = ("bca", "sign-flip")
    return PairedTest(
        n=count, questions=len(gap), value=float(np.mean(gap)), low=interval.low, high=interval.high,
        interval=names[0], test=names[1], p_value=p_value, detects=stats.mde_graded(count, sd, alpha),
    )  # fmt: skip


def _lowest(metric: Metric) -> float:
    """Of its values; of a measure in units of the largest."""
    return 0.0 if metric.kind == "binary" or (metric.kind == "graded" and metric.unit != metrics.BIAS.unit) else -1.0


def _clustered(units: Sequence[str]) -> bool:
    return len(set(units)) < len(units)


def _bootstrap(values: Floats, units: Sequence[str], alpha: float, lowest: float, seed: int) -> Interval:
    """Measures may pass 1, which the intervals of scores are cut at: they are taken in units of the largest."""
    scale = max(1.0, float(np.max(np.abs(values))))
    if _clustered(units):
        found = stats.cluster_bootstrap(values / scale, units, alpha, lowest=lowest, seed=seed)
    else:
        found = stats.bca_mean(values / scale, alpha, lowest=lowest, seed=seed)
    return Interval(scale * found.low, scale * found.high)
