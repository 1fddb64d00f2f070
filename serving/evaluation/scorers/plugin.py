"""Scorers of other packages, found by entry point. Nothing is loaded that the spec does not name."""

import math
from collections.abc import Mapping
from typing import Any, Protocol, cast

from graftwork import plugins
from graftwork.datasets.rows import DatasetRow
from graftwork.errors import ConfigError, RunError
from graftwork.metrics import Metric
from graftwork.serving.evaluation.scorers.spec import ModelReply, OwnSpec

GROUP = "graftwork.scorers"


class PluginScore(Protocol):
    """What an entry point names: a callable that knows its metric (binary or graded: 0..1)."""

    metric: Metric

    def __call__(self, text: str, gold: Mapping[str, Any] | None) -> float: ...


class PluginScorer:
    """A foreign scorer in the form of ours. It is asked for one number an answer."""

    needs_gold = False

    def __init__(self, spec: OwnSpec) -> None:
        self._name, self._call = spec.name, _load(spec.name)
        self.metrics = (self._call.metric,)

    def check(self, row: DatasetRow) -> None:
        """It says itself, when it scores, what it cannot take."""

    def score(self, reply: ModelReply) -> dict[str, float]:
        value = float(self._call(reply.text, reply.gold))
        metric = self.metrics[0]
        allowed = value in (0, 1) if metric.kind == "binary" else 0 <= value <= 1
        if not (allowed if metric.kind != "measure" else math.isfinite(value)):
            raise RunError(
                f"scorer {self._name!r}",
                f"it returned {value}",
                f"a {metric.kind} metric has {'0 or 1' if metric.kind == 'binary' else '0 to 1'} an answer",
                "mend the scorer, or its metric's kind",
            )
        return {metric.name: value}


def _load(name: str) -> PluginScore:
    asked = f"scorers: own {name!r}"
    loaded = plugins.load(GROUP, name, asked)
    if not isinstance(getattr(loaded, "metric", None), Metric):
        raise ConfigError(asked, "it is no scorer", "a scorer is callable (text, gold) and has a `metric`")
    return cast(PluginScore, loaded)
