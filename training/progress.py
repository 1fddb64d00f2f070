"""How far a run is, told in the driver while the run goes on."""

import contextlib
import threading
from collections.abc import Callable, Iterator
from concurrent import futures

from graftwork.errors import StoreUnreachable
from graftwork.storage import RunPaths
from graftwork.training.records import Progress
from graftwork.training.steplog import StepReport, read_steps

PROGRESS_S = 0.3
PACE_STEPS = 20
"""Steps that the shown pace is measured over."""
LEAVE_S = 1.0
"""How long a block that failed waits for the telling, which may hang in an outage of the store."""
OnProgress = Callable[[Progress], None]


@contextlib.contextmanager
def progress_told(run: RunPaths, on_progress: OnProgress) -> Iterator[None]:
    """Tell a run's progress for the time of the block, its last steps included where the block ends well.

    `on_progress` is called in a thread and the block, which waits for Ray, is the caller's, so that Ctrl-C takes it out
    of its wait. A thread left in a call of Ray's while Ray is shut down either waits for ever, and the process at its
    exit for the thread, or has Ray end the process on the spot (ray issue 48018, ray pull request 19115; Ray 2.60).
    The telling is a daemon, which no exit waits for. Raises what it raised, once the block has ended well.
    """
    ended, telling, look = threading.Event(), futures.Future[None](), _Looks(run, on_progress)

    def tell() -> None:
        try:
            while not ended.wait(PROGRESS_S):
                look()
        except Exception as error:
            telling.set_exception(error)
        else:
            telling.set_result(None)

    threading.Thread(target=tell, name="progress", daemon=True).start()
    try:
        yield
    finally:
        ended.set()
        futures.wait([telling], timeout=LEAVE_S)
    telling.result()
    look()


class _Looks:
    """Looks at the noted steps and tells what is new."""

    def __init__(self, run: RunPaths, on_progress: OnProgress) -> None:
        self._run, self._on_progress = run.patiently(0), on_progress
        self._shown = 0

    def __call__(self) -> None:
        try:
            steps = read_steps(self._run)
        except StoreUnreachable:
            return  # an outage: the workers wait it out
        if steps and steps[-1].step != self._shown:
            self._on_progress(progress_of(steps))
            self._shown = steps[-1].step


def progress_of(steps: list[StepReport]) -> Progress:
    """Progress from the steps noted so far, at least one."""
    last, recent = steps[-1], steps[-PACE_STEPS:]
    before = steps[-len(recent) - 1] if len(steps) > len(recent) else None
    tokens = last.tokens - (before.tokens if before else 0)
    seconds = last.elapsed_s - (before.elapsed_s if before else 0.0)
    return Progress(
        step=last.step,
        total_steps=last.total_steps,
        loss=last.loss,
        tokens_per_s=tokens / max(sum(step.step_s for step in recent), 1e-9),
        eta_s=(last.total_steps - last.step) * seconds / len(recent),
        eval_loss=next((step.eval_loss for step in reversed(steps) if step.eval_loss is not None), None),
    )
