"""What training changed: figures of held-out rows before the first step and after the last, in words."""

from collections.abc import Mapping, Sequence

from graftwork.training.steplog import StepReport

BEFORE, AFTER = "before_", "eval_"


def before_after(steps: Sequence[StepReport]) -> tuple[str, ...]:
    """A line a figure that the first step notes as `before_NAME` and the last as `eval_NAME`."""
    if not steps:
        return ()
    before = {key.removeprefix(BEFORE): value for key, value in steps[0].metrics.items() if key.startswith(BEFORE)}
    after = {key.removeprefix(AFTER): value for key, value in steps[-1].metrics.items() if key.startswith(AFTER)}
    if steps[-1].eval_loss is not None:
        after["loss"] = steps[-1].eval_loss
    return tuple(_lines(before, after))


def _lines(before: Mapping[str, float], after: Mapping[str, float]) -> list[str]:
    return [
        f"held-out {name.replace('_', ' ')}: {value:.4g} before, {after[name]:.4g} after"
        for name, value in before.items()
        if name in after
    ]
