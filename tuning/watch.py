"""What Tune tells of its trials, written into the ledger as it happens. Runs in the driver."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ray import cloudpickle
from ray.tune import Callback
from ray.tune.experiment import Trial

from graftwork.errors import GraftworkError
from graftwork.tuning.trials import Ledger


class Watch(Callback):  # type: ignore[misc]  # Ray carries no types
    """Tune calls these between its steps, one at a time. `on_change` is called after each."""

    def __init__(self, ledger: Ledger, last_step: int, on_change: Callable[[], None]) -> None:
        self._ledger, self._last_step, self._on_change = ledger, last_step, on_change
        self._started: dict[str, float] = {}

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **_: Any) -> None:
        self._started[_id(trial)] = time.monotonic()
        self._change(trial, state="running")

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **_: Any
    ) -> None:
        record = self._ledger.records[_id(trial)]
        step, loss = int(result["step"]), float(result["eval_loss"])
        losses = (*record.losses, (step, loss))
        state = "finished" if step >= self._last_step else "running"
        self._change(trial, losses=losses, steps=step, state=state, peak_rss_bytes=int(result["peak_rss_bytes"]))

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **_: Any) -> None:
        if self._ledger.records[_id(trial)].state == "running":
            self._change(trial, state="stopped")

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **_: Any) -> None:
        self._change(trial, state="failed", error=_reason(trial))

    def _change(self, trial: Trial, **changes: Any) -> None:
        wall_s = round(time.monotonic() - self._started[_id(trial)], 3)
        self._ledger.update(_id(trial), wall_s=wall_s, **changes)
        self._on_change()


def _id(trial: Trial) -> str:
    return str(trial.config["trial_id"])


def _reason(trial: Trial) -> str:
    """The error that ended a trial: ours in its first line, any other in its last."""
    error = cloudpickle.loads(Path(trial.pickled_error_file).read_bytes())
    error = getattr(error, "cause", None) or error
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return str(lines[0] if isinstance(error, GraftworkError) else lines[-1])
