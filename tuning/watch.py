"""What Tune tells of its trials, written into the ledger as it happens, and how Ctrl-C ends them: all in the driver."""

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import ray
from ray import cloudpickle
from ray.tune import Callback, Stopper
from ray.tune.experiment import Trial

from graftwork.errors import GraftworkError
from graftwork.tuning.judge import Judge
from graftwork.tuning.ledger import Ledger


class Interrupt(Stopper):  # type: ignore[misc]  # Ray carries no types
    """Ends the sweep between two steps of Tune once Ctrl-C or SIGTERM came.

    An exception out of a signal handler would leave Tune without its clean-up, and the trials' placement groups with it
    (Ray 2.60). Trials that are in the middle of a step are given ten seconds, then killed.
    """

    asked = False

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """No trial is stopped for its result; that is the scheduler's."""
        return False

    def stop_all(self) -> bool:
        """Tune asks after each of its steps."""
        return self.asked

    @contextlib.contextmanager
    def on_signals(self) -> Iterator[None]:
        """Take SIGINT and SIGTERM for the block; raise KeyboardInterrupt at its end when one came. A second one raises
        at once. Main thread only, elsewhere nothing is taken."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

        def ask(_number: int, _frame: FrameType | None) -> None:
            if self.asked:
                raise KeyboardInterrupt
            self.asked = True

        for number in before:
            signal.signal(number, ask)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        if self.asked:
            raise KeyboardInterrupt


class Watch(Callback):  # type: ignore[misc]  # Ray carries no types
    """Tune calls these between its steps, one at a time: each report goes into the ledger and before the judge, and the
    verdict onto the board before Tune lets the trial go on. `on_change` is called after each."""

    def __init__(self, ledger: Ledger, judge: Judge, board: Any, last_step: int, on_change: Callable[[], None]) -> None:
        self._ledger, self._judge, self._board = ledger, judge, board
        self._last_step, self._on_change = last_step, on_change
        self._started: dict[str, float] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Tune pickles its callbacks for a restore that never comes: a rerun goes by the ledger."""
        return {}

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **_: Any) -> None:
        for trial_id in trial.config["trials"]:
            self._started[trial_id] = time.monotonic()
            self._change(trial_id, state="running")
        self._on_change()

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **_: Any
    ) -> None:
        stopped = []
        for trial_id, (step, loss) in result["trials"].items():
            losses = (*self._ledger.records[trial_id].losses, (step, loss))
            why, notes = self._judge.reason_to_stop(trial_id, step, loss), self._ledger.records[trial_id].notes
            state = "finished" if step >= self._last_step else "stopped" if why else "running"
            if state == "stopped" and why:
                stopped.append(trial_id)
                notes = (*notes, why)
            costs = {"peak_rss_bytes": result["peak_rss_bytes"], "metrics": result["metrics"][trial_id]}
            self._change(trial_id, losses=losses, steps=step, state=state, notes=notes, **costs)
        if stopped:
            ray.get(self._board.stop.remote(stopped))
        self._on_change()

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **_: Any) -> None:
        for trial_id in trial.config["trials"]:
            if not self._ledger.records[trial_id].ended:
                self._change(trial_id, state="failed", error=_reason(trial))
        self._on_change()

    def _change(self, trial_id: str, **changes: Any) -> None:
        wall_s = round(time.monotonic() - self._started[trial_id], 3)
        self._ledger.update(trial_id, wall_s=wall_s, **changes)


def _reason(trial: Trial) -> str:
    """The error that ended a trial: ours in its first line, any other in its last."""
    if trial.pickled_error_file is None:
        return Path(trial.error_file).read_text(encoding="utf-8").strip().splitlines()[-1]
    error = cloudpickle.loads(Path(trial.pickled_error_file).read_bytes())
    error = getattr(error, "cause", None) or error
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return str(lines[0] if isinstance(error, GraftworkError) else lines[-1])
