"""Which engine replica a request goes to: where its adapter is, unless that one has more than its share of the load.

Runs in the process that calls (the ingress). Ray Serve makes one router a handle and tells it the replicas, what each
last recorded (`EngineReplica.record_routing_stats`) and how many requests each holds. The adapter comes with the call
as its `multiplexed_model_id`; a call without one is for the base, which is everywhere.
"""

import hashlib
import math
import random
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RunningReplica

from graftwork.compat.ray_serve import TwinSafeRouter

RESIDENTS = "residents"
"""Key of the routing stats: the references (`task@alias`, `task@version`) a replica answers without loading."""
BALANCE = 1.25
"""A replica is preferred while it holds at most this multiple of the mean load (consistent hashing with bounded loads,
Mirrokni, Thorup and Zadimoghaddam, arXiv 1608.01350: a factor of 1.25 keeps most of the affinity)."""


class AdapterRouter(TwinSafeRouter):
    """Prefers replicas that hold the adapter, the emptier of two of them; others when those are overloaded.

    A cold adapter's home is the first of its rendezvous order (Thaler and Ravishankar 1998), so that all callers send
    its first requests to one replica, and one replica more or less moves few homes.
    """

    queue_len_response_deadline_s = 1.0
    """Ray's 0.1 s is missed, with a warning on the terminal, where a replica's engine and event loop share cores."""

    def initialize_state(self, *, free_load: int) -> None:
        """free_load: requests that a replica takes on at no loss to the others: it decodes them in one batch."""
        self._free_load = free_load

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Ranks: Ray Serve takes the emptiest of the first rank that has a place free, else goes to the next."""
        adapter = ""
        if pending_request is not None:
            adapter = pending_request.metadata.multiplexed_model_id
            pending_request.routing_context.should_backoff = True  # all are ranked: when all are full, wait a little
        by_name = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        if not adapter:
            return [random.sample(candidate_replicas, len(candidate_replicas))]
        loads = {name: self._load(replica.replica_id) for name, replica in by_name.items()}
        residents = [name for name, replica in by_name.items() if adapter in _residents(replica.routing_stats)]
        ranks = rank(adapter, loads, residents, free_load=self._free_load)
        return [[by_name[name] for name in names] for names in ranks]

    def _load(self, replica: ReplicaID) -> int:
        """Requests that the replica holds; 0 where nothing was heard of it for a while, which means it is idle."""
        return self.replica_queue_len_cache.get(replica) or 0


def rank(
    adapter: str,
    loads: Mapping[str, int],
    residents: Iterable[str],
    *,
    free_load: int,
    chance: random.Random | None = None,
) -> list[list[str]]:
    """Replica names in the order of preference; within a rank the emptiest is taken.

    loads: requests that each replica holds. First two of the residents that are not overloaded, drawn at random;
    without one, the first of the rendezvous order that is not overloaded; then everybody else.
    """
    limit = max(free_load, math.ceil(BALANCE * (sum(loads.values()) + 1) / max(len(loads), 1)))
    order = rendezvous(adapter, loads)
    near = [name for name in residents if loads[name] < limit]
    first = (
        (chance or random).sample(near, min(2, len(near))) or [n for n in order if loads[n] < limit][:1] or order[:1]
    )
    rest = [name for name in order if name not in first]
    return [first, rest] if rest else [first]


def rendezvous(key: str, names: Iterable[str]) -> list[str]:
    """The names from the highest to the lowest hash of (key, name): taking one away moves no other."""
    return sorted(
        names, key=lambda name: hashlib.blake2b(f"{key}\0{name}".encode(), digest_size=8).digest(), reverse=True
    )


def _residents(stats: Mapping[str, Any]) -> Sequence[str]:
    found: Sequence[str] = stats.get(RESIDENTS, ())
    return found
