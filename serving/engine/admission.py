"""Who may come in next.

The rule is first come, first served by the time a request reached the endpoint: an adapter that had to be fetched costs
its request the fetch, not its place. A slot is held only while a request runs. Three exceptions, each bounded:

1. No slot. A request whose adapter has no slot, where every slot is busy, lets younger ones pass that need none. Once
   `max_batch` of them have passed it, the busy version with the fewest running requests takes in nobody younger, so its
   slot empties soonest and goes to the one that waits. A version under constant traffic is never emptied for others
   that could wait for one of the many short ones, and no version keeps another out for good.
2. Half the rows. While others wait, one adapter (or the base) takes at most half of the rows, so that a flood of one
   tenant doubles the others' time at worst. What is left over when nobody else can come in goes to the flood.
3. A request that the KV memory has no room for waits at the head: nobody passes it, or a long one would never run.
"""

from collections import Counter
from collections.abc import Iterator, Sequence

from graftwork.serving.engine.seats import AdapterSlots
from graftwork.serving.engine.sequence import RunningRequest


class Admission:
    """The order in which waiting requests are offered a row."""

    def __init__(self, slots: AdapterSlots, *, max_batch: int) -> None:
        self._slots = slots
        self._bypass = max_batch
        self._share = max(1, max_batch // 2)
        self._rows: Counter[str | None] = Counter()
        self._held_up: list[RunningRequest] = []

    def offers(self, waiting: Sequence[RunningRequest], running: Sequence[RunningRequest]) -> Iterator[RunningRequest]:
        """Requests to seat, one at a time, `came_in` for each that gets a row. The caller stops when there is no more.

        waiting: by arrival.
        """
        self._rows = Counter(request.version for request in running)
        self._held_up = []
        closed = self._closed(waiting)
        crowded: list[RunningRequest] = []
        for request in waiting:
            if self._rows[request.version] >= self._share:
                crowded.append(request)
            elif self._no_slot(request, closed):
                self._held_up.append(request)
            else:
                yield request
        for request in crowded:
            if not self._no_slot(request, closed):
                yield request

    def came_in(self, request: RunningRequest) -> None:
        """An offered request runs now: older ones that have no slot remember it."""
        self._rows[request.version] += 1
        request.passed = 0
        for older in self._held_up:
            older.passed += older.arrival < request.arrival

    def _no_slot(self, request: RunningRequest, closed: dict[str, RunningRequest]) -> bool:
        version = request.version
        if version is None:
            return False
        waits = closed.get(version)
        return not self._slots.can_acquire(version) or (waits is not None and waits.arrival < request.arrival)

    def _closed(self, waiting: Sequence[RunningRequest]) -> dict[str, RunningRequest]:
        """{busy version: the request that was passed too often and waits for its slot}."""
        overdue: dict[str, RunningRequest] = {}
        for request in waiting:
            version = request.version
            if version is not None and request.passed >= self._bypass and not self._slots.can_acquire(version):
                overdue.setdefault(version, request)
        return dict(zip(self._slots.by_load(), overdue.values(), strict=False))
