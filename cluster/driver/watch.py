"""Why a driver must end its command: a limit is reached, it is asked to, or another driver has taken its place."""

import contextlib
import threading
import time

from graftwork.cluster.cost import usd_per_hour
from graftwork.cluster.fence import Fence
from graftwork.cluster.run_store import JobStore, StopReason
from graftwork.cluster.spec import ClusterSpec
from graftwork.errors import StorageError

ASK_S = 1.0


class LimitMonitor:
    """Looks into the store every ASK_S in a thread of its own: limits hold while the store is out of reach."""

    def __init__(
        self, runs: JobStore, fence: Fence, cluster: ClusterSpec, spent_s: float = 0.0, spent_usd: float = 0.0
    ) -> None:
        """`spent_s`: since the attempt's first driver started; `spent_usd`: by earlier attempts."""
        self._runs, self._fence, self._limits = runs, fence, cluster.limits
        self._usd_hour = usd_per_hour(cluster)
        self._began, self._end = time.monotonic() - spent_s, threading.Event()
        self._spent_usd = spent_usd
        self._asked: StopReason | None = None
        threading.Thread(target=self._poll, name="limit-monitor", daemon=True).start()

    def usd(self) -> float | None:
        """What the job has cost, all attempts together."""
        return None if self._usd_hour is None else self._spent_usd + self._usd_hour * self.elapsed_s() / 3600

    def elapsed_s(self) -> float:
        """Since the attempt's first start."""
        return time.monotonic() - self._began

    def reason(self) -> StopReason | None:
        """Why to end now; None where nothing says so. Never waits."""
        if self._asked is not None:
            return self._asked
        if self._limits.deadline is not None and self.elapsed_s() > self._limits.deadline:
            return "deadline"
        spent = self.usd()
        if self._limits.budget_usd is not None and spent is not None and spent > self._limits.budget_usd:
            return "budget"
        return None

    def look(self) -> StopReason | None:
        """As `reason`, after a look into the store now. For a command that has ended: its workers look too, and may
        have seen a request first."""
        with contextlib.suppress(StorageError):  # an outage: the command's own exit code stands
            self._asked = self._asked or self._find_reason()
        return self.reason()

    def close(self) -> None:
        """Look no more."""
        self._end.set()

    def _poll(self) -> None:
        while self._asked is None and not self._end.is_set():
            with contextlib.suppress(StorageError):  # an outage: asked again
                self._asked = self._find_reason()
            self._end.wait(ASK_S)

    def _find_reason(self) -> StopReason | None:
        if self._fence.superseded():
            return "superseded"
        return self._runs.cancel_reason(self._fence.job_id, self._fence.attempt)
