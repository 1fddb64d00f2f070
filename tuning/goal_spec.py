"""What a sweep tries to make good: held-out loss, and beside it what a trial costs."""

import difflib
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from graftwork.config import Spec
from graftwork.errors import ConfigError

EVAL_LOSS = "eval_loss"
METRICS = {
    EVAL_LOSS: "held-out loss of the last report, nats a trained token",
    "trained_parameters": "numbers of the adapter; of the whole base where all weights are trained",
    "adapter_bytes": "size of its published tensors: 4 bytes a trained parameter",
    "step_s": "mean seconds of an optimizer step",
    "wall_s": "seconds of the trial, loading and evaluations included",
    "tokens": "tokens processed, padding left out",
    "peak_rss_bytes": "largest resident set of the trial's process",
}
"""What every trial reports, by name."""


def _known(metric: str) -> str:
    if metric not in METRICS:
        near = difflib.get_close_matches(metric, METRICS, n=1, cutoff=0.5)
        raise ConfigError(
            f"objectives: metric={metric!r}",
            "no trial reports it",
            f"a trial reports {', '.join(METRICS)}",
            f"did you mean {near[0]!r}?" if near else "",
        )
    return metric


class Goal(Spec):
    """One figure of a trial and which way is better."""

    metric: Annotated[str, AfterValidator(_known)] = EVAL_LOSS
    direction: Literal["min", "max"] = "min"


def _from_name(value: Any) -> Any:
    return {"metric": value} if isinstance(value, str) else value


def _loss_first(objectives: tuple[Goal, ...]) -> tuple[Goal, ...]:
    names = [goal.metric for goal in objectives]
    if objectives[0] != Goal():
        raise ConfigError(
            f"objectives={names}",
            f"the first is {objectives[0].metric} ({objectives[0].direction})",
            "early stopping and reports use the held-out loss, so it is the first objective",
            f"write objectives: [{', '.join([EVAL_LOSS, *(name for name in names if name != EVAL_LOSS)])}]",
        )
    if len(set(names)) < len(names):
        raise ValueError(f"objectives must differ, found {names}")
    return objectives


NamedGoal = Annotated[Goal, BeforeValidator(_from_name)]
"""In YAML a plain string is its `metric`."""
Goals = Annotated[tuple[NamedGoal, ...], Field(min_length=1), AfterValidator(_loss_first)]
