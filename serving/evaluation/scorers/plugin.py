"""Scorer `own`: a scorer of an installed package, found by entry point. Only named ones are loaded."""

import math
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Protocol, cast

from pydantic import Field

from graftwork import plugins
from graftwork.config import Spec
from graftwork.datasets.rows import DatasetRow
from graftwork.errors import ConfigError, RunError
from graftwork.metrics import Metric
from graftwork.scoring import AnswerSchema
from graftwork.serving.evaluation.scorers.protocol import ModelReply, Scorer
from graftwork.storage.store import NAME_PATTERN

GROUP = "graftwork.scorers"


class OwnSpec(Spec):
    """A scorer of an installed package, entry point group `graftwork.scorers`. Only what is named here is loaded."""

    kind: Literal["own"]
    needs_gold: ClassVar[bool] = False
    name: Annotated[str, Field(pattern=NAME_PATTERN)]
    """Name of the entry point."""

    @property
    def metric_names(self) -> tuple[str, ...]:
        return ()

    def build(self, schema: AnswerSchema | None) -> Scorer:
        """Return the scorer of this key."""
        return PluginScorer(self)


class PluginScore(Protocol):
    """Object that an entry point names: a callable with its metric (binary or graded: 0..1)."""

    metric: Metric

    def __call__(self, text: str, gold: Mapping[str, Any] | None) -> float: ...


class PluginScorer:
    """Adapter of such a callable: one value for each answer."""

    def __init__(self, spec: OwnSpec) -> None:
        self._name, self._call = spec.name, _load(spec.name)
        self.metrics = (self._call.metric,)

    def check(self, row: DatasetRow) -> None:
        """Accept every row: the scorer itself rejects a row when it scores."""

    def score(self, reply: ModelReply) -> dict[str, float]:
        value = float(self._call(reply.text, reply.gold))
        metric = self.metrics[0]
        allowed = value in (0, 1) if metric.kind == "binary" else 0 <= value <= 1
        if not (allowed if metric.kind != "measure" else math.isfinite(value)):
            raise RunError(
                f"scorer {self._name!r}",
                f"it returned {value}",
                f"a {metric.kind} metric has {'0 or 1' if metric.kind == 'binary' else '0 to 1'} an answer",
                "fix the scorer, or its metric's kind",
            )
        return {metric.name: value}


def _load(name: str) -> PluginScore:
    asked = f"scorers: own {name!r}"
    loaded = plugins.load(GROUP, name, asked)
    if not isinstance(getattr(loaded, "metric", None), Metric):
        raise ConfigError(asked, "it is no scorer", "a scorer is callable (text, gold) and has a `metric`")
    return cast(PluginScore, loaded)
