"""Make what the trainer has written a whole checkpoint, beside the training: check, sum, send, commit, tidy.

Each rank has one thread for it. The threads talk over a gloo group of their own, as torch's asynchronous distributed
checkpoints do, so that they never meet the training's collectives.
"""

import contextlib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from typing import TypeVar

from graftwork.cluster.fence import Fence, SupersededError
from graftwork.errors import GraftworkError, RunError, StorageError
from graftwork.training.checkpoint import CheckpointMark, Checkpoints, surplus
from graftwork.training.checkpoint_files import FileSum, Shapes, faults_of_weights
from graftwork.training.checkpoint_spec import CheckpointSpec
from graftwork.training.ranks import all_gather_object, rank_and_world
from graftwork.training.steplog import StepLog

T = TypeVar("T")

SEND_S = 3600
"""Most seconds that one machine waits for the files of another, an outage left out."""


class CheckpointLost(RunError):
    """A checkpoint could not be made whole. Raised on all ranks at the same step."""


class Saver:
    """Makes checkpoints whole in the background, one at a time. Every rank has one and calls it alike."""

    def __init__(
        self,
        checkpoints: Checkpoints,
        keep: CheckpointSpec,
        trained: Shapes,
        log: StepLog,
        fence: Fence | None = None,
        *,
        sends: bool,
    ) -> None:
        """Collective. `trained`: shapes that each checkpoint holds. `sends`: this rank sends its machine's files."""
        import torch.distributed as dist

        self._checkpoints, self._keep, self._trained, self._log = checkpoints, keep, trained, log
        self._sends, self._fence = sends, fence
        self._rank, world = rank_and_world()
        patience = timedelta(seconds=keep.outage_s + SEND_S)
        self._group = dist.new_group(backend="gloo", timeout=patience) if world > 1 else None
        self._marks = {mark.step: mark for mark in all_gather_object(checkpoints.marks() if self._rank == 0 else [])[0]}
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def save(self, mark: CheckpointMark) -> None:
        """Take over files that every rank has written. Waits for the checkpoint before. Raises CheckpointLost, and
        SupersededError where another attempt of the job is at work."""
        self.wait()
        self._pending = self._pool.submit(self._bring, mark)

    def wait(self) -> None:
        """Return once all checkpoints are whole. Raises CheckpointLost."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Finish what was taken over and tidy up. Raises nothing: a run that failed has an error of its own."""
        with contextlib.suppress(Exception):
            self.wait()
        self._pool.shutdown()
        if self._sends:
            self._checkpoints.clear_cache()

    def _bring(self, mark: CheckpointMark) -> None:
        sent = _all_or_first_error(all_gather_object(_attempt(lambda: self._send(mark.step)), self._group))
        if isinstance(sent, GraftworkError):
            raise self._lost_error(mark.step, sent)
        whole = replace(mark, files={name: kept for part in sent for name, kept in part.items()})
        done = _all_or_first_error(all_gather_object(_attempt(lambda: self._commit(whole)), self._group))
        if isinstance(done, GraftworkError):
            raise self._lost_error(mark.step, done)

    def _send(self, step: int) -> dict[str, FileSum]:
        faults = faults_of_weights(self._checkpoints.folder(step), self._trained) if self._rank == 0 else []
        if faults:
            raise RunError(f"weights of step {step}", "; ".join(faults[:3]))
        return self._checkpoints.send(step) if self._sends else {}

    def _commit(self, mark: CheckpointMark) -> None:
        if self._rank == 0:
            if self._fence is not None:
                self._fence.require(self._keep.outage_s)
            if not self._checkpoints.run.store.is_local:
                self._log.flush(mark.step)
            self._checkpoints.commit(mark)
        self._marks[mark.step] = mark
        for step in surplus(list(self._marks.values()), self._keep):
            del self._marks[step]
            if self._rank == 0:
                self._checkpoints.drop(step)

    def _lost_error(self, step: int, cause: GraftworkError) -> GraftworkError:
        if isinstance(cause, SupersededError):
            return cause
        last = max((known for known in self._marks if known < step), default=None)
        kept = f"the checkpoint of step {last} is the last whole one" if last else "there is no whole checkpoint"
        return CheckpointLost(
            f"checkpoint of step {step} of run {self._checkpoints.run.run_id}",
            f"{cause.subject}: {cause.problem}; {kept}",
            f"storage may be out of reach for checkpoints.outage_s={self._keep.outage_s:g} seconds, and a checkpoint "
            "holds every trained tensor, finite and not all zero",
            f"{cause.hint + '; then ' if cause.hint else ''}run the same command: it continues from "
            + (f"step {last}" if last else "the start"),
        )


def _all_or_first_error(found: "list[T | GraftworkError]") -> "list[T] | GraftworkError":
    """What all ranks got, or the first error of any."""
    errors = [one for one in found if isinstance(one, GraftworkError)]
    return errors[0] if errors else [one for one in found if not isinstance(one, GraftworkError)]


def _attempt(call: Callable[[], T]) -> T | GraftworkError:
    try:
        return call()
    except GraftworkError as error:
        return error
    except OSError as error:
        return StorageError("the local copy", str(error))
