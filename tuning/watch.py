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
from graftwork.tuning.board import free
from graftwork.tuning.failures import TrialFailure, failure_of, hopeless, kernel_kills
from graftwork.tuning.judge import StoppingRule
from graftwork.tuning.ledger import Ledger
from graftwork.tuning.places import TrialPaths
from graftwork.tuning.records import State, TrialRecord


class Interrupt(Stopper):  # type: ignore[misc]  # Ray carries no types
    """Ends the sweep between two steps of Tune once Ctrl-C or SIGTERM came.

    An exception out of a signal handler would leave Tune without its clean-up, and the trials' placement groups with it
    (Ray 2.60). Trials that are in the middle of a step are given ten seconds, then killed.
    """

    asked = False
    error: GraftworkError | None = None

    def give_up(self, error: GraftworkError) -> None:
        """End the sweep with this error; an exception out of Tune's callbacks would leave its trials behind."""
        self.error = self.error or error

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """No trial is stopped for its result; that is the scheduler's."""
        return False

    def stop_all(self) -> bool:
        """Tune asks after each of its steps."""
        return self.asked or self.error is not None

    @contextlib.contextmanager
    def on_signals(self) -> Iterator[None]:
        """Take SIGINT and SIGTERM for the block; raise KeyboardInterrupt at its end when one came, or the error
        that the sweep was given up with. A second signal raises at once. Main thread only, elsewhere none is taken."""
        if threading.current_thread() is not threading.main_thread():
            yield
            if self.error is not None:
                raise self.error
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
        if self.error is not None:
            raise self.error


class TuneCallback(Callback):  # type: ignore[misc]  # Ray carries no types
    """Tune calls these between its steps, one at a time: each report goes into the ledger and before the judge, and the
    verdict onto the board before Tune lets the trial go on. `on_change` is called after each."""

    def __init__(
        self,
        ledger: Ledger,
        judge: StoppingRule,
        board: Any,
        last_step: int,
        on_change: Callable[[], None],
        after_failure: Callable[[TrialRecord, TrialFailure], dict[str, Any]],
        places: TrialPaths,
        interrupt: Interrupt,
    ) -> None:
        self._ledger, self._judge, self._board = ledger, judge, board
        self._last_step, self._on_change = last_step, on_change
        self._after_failure, self._places, self._interrupt = after_failure, places, interrupt
        self._started: dict[str, float] = {}
        self._attempt: dict[str, str] = {}
        """Tune's id of the newest attempt of each trial."""
        self._reported: dict[str, int] = {}
        """The last step of the newest attempt."""
        self._kernel_kills: dict[str, int] = {}
        self._judged: dict[str, int] = {}
        """The last step of each trial that the judge has seen: once, however often the trial is run."""

    def __getstate__(self) -> dict[str, Any]:
        """Tune pickles its callbacks for a restore that never comes: a rerun goes by the ledger."""
        return {}

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **_: Any) -> None:
        if self._interrupt.error is not None:
            return
        with self._giving_up():
            for trial_id in trial.config["trials"]:
                self._started[trial_id] = time.monotonic()
                self._kernel_kills[trial_id] = kernel_kills()
                self._attempt[trial_id], self._reported[trial_id] = trial.trial_id, 0
                self._change(trial_id, state="running")
            self._on_change()

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **_: Any
    ) -> None:
        if self._interrupt.error is not None:
            return
        with self._giving_up():
            stopped = []
            for trial_id, (step, loss) in result["trials"].items():
                if self._is_news(trial, trial_id, step) and self._report(trial_id, step, loss, result) == "stopped":
                    stopped.append(trial_id)
            for trial_id, message in result.get("lost", {}).items():
                self._record_failure(trial, trial_id, TrialFailure("diverged", message))
            if stopped:
                ray.get(self._board.stop.remote(stopped))
            self._on_change()

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **_: Any) -> None:
        """Its process has left the loop, by itself or because all were told to."""
        if self._interrupt.stop_all():
            return
        with self._giving_up():
            for trial_id in trial.config["trials"]:
                if self._ledger.records[trial_id].state == "running":
                    self._change(trial_id, state="failed", failure="error", error="its process left before its end")
            self._places.tidy(self._ledger.trials)
            self._on_change()

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **_: Any) -> None:
        if self._interrupt.error is not None:
            return
        with self._giving_up():
            for trial_id in trial.config["trials"]:
                kills = kernel_kills() - self._kernel_kills.get(trial_id, kernel_kills())
                self._record_failure(trial, trial_id, failure_of(_error(trial), kills))
                free(self._board, trial_id)
            if (error := hopeless(self._ledger.trials)) is not None:
                raise error
            self._on_change()

    def _record_failure(self, trial: Trial, trial_id: str, failure: TrialFailure) -> None:
        """Enter why this attempt of a trial ended, unless it is over already."""
        record = self._ledger.records[trial_id]
        if record.state == "running" and self._attempt.get(trial_id, trial.trial_id) == trial.trial_id:
            self._change(trial_id, **self._after_failure(record, failure))
            self._attempt.pop(trial_id, None)

    def _is_news(self, trial: Trial, trial_id: str, step: int) -> bool:
        """Neither a report of an attempt that is over nor one that was there before."""
        record = self._ledger.records[trial_id]
        return (
            self._attempt.get(trial_id) == trial.trial_id
            and record.state == "running"
            and step > self._reported[trial_id]
        )

    def _report(self, trial_id: str, step: int, loss: float, result: dict[str, Any]) -> State:
        """Enter a report; returns the state that the trial is in now."""
        record = self._ledger.records[trial_id]
        before = tuple(known for known in record.losses if known[0] < step)  # an earlier attempt may have come further
        losses, notes, why = (*before, (step, loss)), record.notes, None
        self._reported[trial_id] = step
        if record.repeat_of is None and step > self._judged.get(trial_id, 0):  # all of the finals run to their end
            self._judged[trial_id], why = step, self._judge.reason_to_stop(trial_id, step, loss)
        if record.until is not None and step >= record.until:
            why = why or f"its segment ends at step {step}"
        state: State = "finished" if step >= self._last_step else "stopped" if why else "running"
        if state == "stopped" and why:
            notes = (*notes, why)
        costs = {"peak_rss_bytes": result["peak_rss_bytes"], "metrics": result["metrics"][trial_id]}
        self._change(trial_id, losses=losses, steps=step, state=state, notes=notes, **costs)
        return state

    @contextlib.contextmanager
    def _giving_up(self) -> Iterator[None]:
        """An error of ours ends the sweep, cleanly; what Tune tells after that is told to nobody."""
        try:
            yield
        except GraftworkError as error:
            self._interrupt.give_up(error)

    def _change(self, trial_id: str, **changes: Any) -> None:
        wall_s = round(time.monotonic() - self._started.get(trial_id, time.monotonic()), 3)
        self._ledger.update(trial_id, wall_s=wall_s, **changes)


def _error(trial: Trial) -> BaseException | str:
    """What ended an attempt. Tune keeps the text alone of errors that are neither a task's nor an actor's."""
    if trial.pickled_error_file is None:
        return Path(trial.error_file).read_text(encoding="utf-8").strip()
    error: BaseException = cloudpickle.loads(Path(trial.pickled_error_file).read_bytes())
    return error
