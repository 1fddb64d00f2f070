"""What changes of a serving endpoint cost its callers: failed requests, restarted replicas, seconds until they hold.

    python -m benchmarks.live_changes          about four minutes on two idle cores

A Serve config deploys a tiny base with two engine replicas on a private Ray, as KubeRay's operator does it. Eight
callers ask without a pause: the base, arms, adapters, an experiment; every third answer is a stream. Meanwhile other
configs are deployed one after the other: each has other adapters, arms, limits and weights; after each an alias moves
and an adapter is loaded or unloaded. Then wrong configs: each is to be refused. With `--rolling`, last, the engine:
Serve makes its replicas anew one by one, while the callers go on.
"""

import argparse
import asyncio
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.record import Clock, figure, write
from graftwork.cluster.session import session
from graftwork.errors import ConfigError
from tests.service import Service, deploy, replicas, running_service, variant

REQUESTS = 10_000
WRONG: tuple[dict[str, Any], ...] = (
    {"adapters": ["nobody@latest"]},
    {"adapters": ["card@0123456789ab"]},
    {"arms": [{"name": "plain"}, {"name": "plain"}]},
    {"arms": [{"name": "plain", "adapter": "nobody@latest"}]},
    {"arms": [{"name": "plain", "grammar": {"regex": "("}}], "experiments": []},
    {"arms": [{"name": "plain", "retriever": {"corpus": "/no/such/corpus.jsonl", "k": 1}}], "experiments": []},
    {"arms": [{"name": "plain"}]},  # the experiment's other arm is gone
)


async def changes(service: Service, requests: int) -> list[float]:
    """Seconds that each change took until it was served."""
    took: list[float] = []
    card = service.made.versions["card"]
    async with service.loaded() as client:
        while service.answered < requests:
            seconds, told = await service.change(client, **variant(service.made, len(took) + 1))
            assert told["refused"] is None, told
            took.append(seconds)
            await service.admin(client, "promote", adapter="card@latest", version=card[len(took) % 2])
            await service.admin(client, "unload" if len(took) % 2 else "load", adapter="fourth@latest")
    return took


async def wrong(service: Service) -> list[float]:
    """1 for each wrong config that was refused while the old one served on."""
    async with service.client() as client:
        _, told = await service.change(client, **variant(service.made, 1))
        served, refused = told["config"], []
        for one in WRONG:
            try:
                _, told = await service.change(client, **{**variant(service.made, 1), **one})
            except ConfigError:  # no spec at all: nothing was sent
                told = {**(await service.told(client)), "refused": "by the spec"}
            refused.append(float(told["refused"] is not None and told["config"] == served))
        await service.change(client, **variant(service.made, 2))
    return refused


async def rolling(service: Service) -> float:
    """Make the engines anew under load; the longest answer (s)."""
    before, service.slowest_s = set(replicas()), 0.0
    engine = {**service.spec.engine.model_dump(mode="json"), "max_batch": 16}
    async with service.loaded():
        config, _ = service.config(**variant(service.made, 2), engine=engine)
        await asyncio.to_thread(deploy, config)
        while set(now := await asyncio.to_thread(replicas)) & before or len(now) != len(before):
            await asyncio.sleep(0.2)
    return service.slowest_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=REQUESTS)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rolling", action="store_true", help="make the engines anew under load as well")
    args = parser.parse_args()
    clock = Clock()
    with (
        session("local", num_cpus=4),
        tempfile.TemporaryDirectory(prefix="live-") as name,
        running_service(Path(name)) as service,
    ):
        before = replicas()
        took = asyncio.run(changes(service, args.requests))
        after, answered, failed = replicas(), service.answered, list(service.failed)
        kept = [float(after.get(replica) == pid) for replica, pid in before.items()]
        refused = asyncio.run(wrong(service))
        service.answered, service.failed = 0, []
        slowest = asyncio.run(rolling(service)) if args.rolling else None
    figures = {
        "answered": figure([1 - len(failed) / answered], "share"),
        "kept": figure([sum(kept) / len(kept)], "share"),
        "change": figure(took, "s"),
        "wrong_refused": figure([sum(refused) / len(refused)], "share"),
    }
    if slowest is not None:
        figures["rolling_answered"] = figure([1 - len(service.failed) / service.answered], "share")
        figures["rolling_slowest"] = figure([slowest], "s")
    detail = {
        "requests": answered,
        "changes": len(took),
        "failures": failed[:20],
        "adapter_versions": dict(service.versions),
        "wrong_configs": len(WRONG),
        "rolling_requests": service.answered,
        "rolling_failures": service.failed[:20],
    }
    meta = {"engine_replicas": service.spec.num_replicas, "callers": 8, "tokens": 6}
    write("live_changes", args.out, figures, detail, meta, clock)


if __name__ == "__main__":
    main()
