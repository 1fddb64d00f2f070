"""Why a driver must end its command: it is asked to, a limit is reached, or another driver has taken its place."""

import time

from graftwork.cluster.cost import usd_per_hour
from graftwork.cluster.fence import Fence
from graftwork.cluster.run_store import RunStore, StopReason
from graftwork.cluster.spec import ClusterSpec

ASK_S = 1.0


class Watch:
    """Looks into the store at most once in ASK_S."""

    def __init__(self, runs: RunStore, fence: Fence, cluster: ClusterSpec) -> None:
        self._runs, self._fence, self._limits = runs, fence, cluster.limits
        self._usd_hour = usd_per_hour(cluster)
        self._began, self._asked_at = time.monotonic(), 0.0

    def usd(self) -> float | None:
        """What the attempt has cost so far."""
        return None if self._usd_hour is None else self._usd_hour * self._elapsed_s() / 3600

    def reason(self) -> StopReason | None:
        """Why to end now; None where nothing says so."""
        if self._limits.deadline is not None and self._elapsed_s() > self._limits.deadline:
            return "deadline"
        spent = self.usd()
        if self._limits.budget_usd is not None and spent is not None and spent > self._limits.budget_usd:
            return "budget"
        if time.monotonic() - self._asked_at < ASK_S:
            return None
        self._asked_at = time.monotonic()
        if self._fence.overtaken():
            return "superseded"
        found = self._runs.store.find_bytes(*self._fence.folder, "cancel.json")
        return self._runs.store.read_json(*self._fence.folder, "cancel.json")["reason"] if found else None

    def _elapsed_s(self) -> float:
        return time.monotonic() - self._began
