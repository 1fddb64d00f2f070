"""An endpoint that a Serve config deployed on the Ray at hand, loaded by callers while its config changes.

`deploy` is what the dashboard does with a config that KubeRay's operator sends (Ray 2.60, `put_all_applications`).
"""

import asyncio
import itertools
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from ray.serve._private.api import serve_start
from ray.serve.context import _get_global_client
from ray.serve.schema import ServeDeploySchema

from graftwork.artifacts import publish as artifact
from graftwork.base import load as base_model
from graftwork.base.source import BaseSpec
from graftwork.cluster.kuberay.objects import LIVE, serve_config
from graftwork.serving.live_config import digest, live_of
from graftwork.serving.ray_serve_lifecycle import shut_down
from graftwork.serving.spec import ServeSpec
from graftwork.storage.store import Store
from tests.adapters import facts
from tests.engines import write_lora
from tests.ports import free_port
from tests.tiny import write_tiny_base

TASKS = ("card", "agent", "third", "fourth")
KEYS, OWNER = "GRAFTWORK_TEST_KEYS", "GRAFTWORK_TEST_OWNER"
TOKEN, OWNER_TOKEN = "a caller's key", "the owner's key"
TAKEN_WITHIN_S, UP_WITHIN_S = 120.0, 240.0
ALWAYS = ("base", "arm/plain", "arm/tuned", "base:card", "base:agent@latest", "experiment/ab")
"""Models that every config of a test answers to."""


@dataclass
class Made:
    """A base and two versions of each task."""

    base: Path
    store: Store
    versions: dict[str, list[str]]


def publish(tmp: Path) -> Made:
    """Write and publish them; the first version of each task is `latest`."""
    base, store = write_tiny_base(tmp / "base"), Store(str(tmp / "root"))
    known = facts(base_digest=base_model.resolve(BaseSpec(uri=str(base))).digest, prompt={"system": None})
    versions: dict[str, list[str]] = {}
    for number, task in enumerate(TASKS):
        for turn in range(2):
            folder = write_lora(
                base, tmp / f"{task}{turn}", 2 * number + turn, r=4, target_modules=["q_proj", "v_proj"]
            )
            alias = None if turn else "latest"
            versions.setdefault(task, []).append(artifact.publish(store, task, folder, **known, alias=alias).version)
    return Made(base, store, versions)


@dataclass
class Service:
    """The endpoint, and all that its callers saw."""

    url: str
    spec: ServeSpec
    made: Made
    answered: int = 0
    failed: list[str] = field(default_factory=list)
    slowest_s: float = 0.0
    versions: Counter[str] = field(default_factory=Counter)
    """Adapter versions that answered."""

    def config(self, **changed: Any) -> tuple[dict[str, Any], str]:
        """The Serve config of the spec with these keys, and the digest of its live part."""
        spec = self.spec.with_(changed)
        config = serve_config(spec.model_dump(mode="json"))
        config["http_options"] = {"host": "127.0.0.1", "port": self.spec.port}  # a test's port, on loopback alone
        (application,) = config["applications"]
        application["runtime_env"] = {"env_vars": {KEYS: f"someone:{TOKEN}", OWNER: OWNER_TOKEN}}  # a pod's, elsewhere
        return config, digest(live_of(spec))

    async def change(self, client: httpx.AsyncClient, **changed: Any) -> tuple[float, dict[str, Any]]:
        """Deploy another config; seconds until it is served or refused, and what the endpoint says of it."""
        config, wanted = self.config(**changed)
        began = time.monotonic()
        await asyncio.to_thread(deploy, config)
        while time.monotonic() < began + TAKEN_WITHIN_S:
            told = await self.told(client)
            refused = told["refused"]
            if told["config"] == wanted or (refused is not None and refused["config"] == wanted):
                return time.monotonic() - began, told
            await asyncio.sleep(0.02)
        raise AssertionError(f"not taken within {TAKEN_WITHIN_S} s: {told}, {details()['applications']}")

    async def told(self, client: httpx.AsyncClient) -> dict[str, Any]:
        """GET /v1/admin/config."""
        answer = await client.get("/v1/admin/config", headers={"authorization": f"Bearer {OWNER_TOKEN}"})
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = answer.json()
        return found

    async def admin(self, client: httpx.AsyncClient, verb: str, **body: Any) -> None:
        """An admin verb; it may not fail."""
        answer = await client.post(
            f"/v1/admin/adapters/{verb}", json=body, headers={"authorization": f"Bearer {OWNER_TOKEN}"}
        )
        assert answer.status_code == 200, answer.text

    @asynccontextmanager
    async def loaded(self, callers: int = 8, tokens: int = 6) -> AsyncIterator[httpx.AsyncClient]:
        """Callers ask without a pause, one request each at a time, for the time of the block."""
        stop, numbers = asyncio.Event(), itertools.count()
        async with self.client() as client:

            async def caller() -> None:
                while not stop.is_set():
                    await self.ask(client, next(numbers), tokens)

            tasks = [asyncio.create_task(caller()) for _ in range(callers)]
            try:
                yield client
            finally:
                stop.set()
                await asyncio.gather(*tasks)

    def client(self) -> httpx.AsyncClient:
        """A caller's."""
        limits = httpx.Limits(max_connections=64, max_keepalive_connections=64)
        headers = {"authorization": f"Bearer {TOKEN}"}
        return httpx.AsyncClient(base_url=self.url, headers=headers, timeout=120, limits=limits)

    async def ask(self, client: httpx.AsyncClient, number: int, tokens: int) -> None:
        """One request, every third of them a stream. Whatever is no whole answer is a failure."""
        model, stream = ALWAYS[number % len(ALWAYS)], number % 3 == 0
        turn = {"role": "user", "content": f"Question {number % 50}"}
        body = {
            "model": model,
            "messages": [turn],
            "max_tokens": tokens,
            "stream": stream,
            "user": f"user{number % 200}",
        }
        began = time.monotonic()
        try:
            answer = await client.post("/v1/chat/completions", json=body)
            whole = answer.text.rstrip().endswith("data: [DONE]") if stream else "choices" in answer.json()
            if answer.status_code != 200 or not whole:
                self.failed.append(f"{model}: {answer.status_code} {answer.text[-300:]}")
            self.versions[answer.headers.get("x-graftwork-adapter-version", "")] += 1
        except (httpx.HTTPError, ValueError) as error:
            self.failed.append(f"{model}: {error!r}")
        self.answered += 1
        self.slowest_s = max(self.slowest_s, time.monotonic() - began)


@contextmanager
def running_service(tmp: Path, **changed: Any) -> Iterator[Service]:
    """Deployed and answering, on the Ray that this process has."""
    made = publish(tmp)
    usual: dict[str, Any] = {
        "name": "service",
        "base": str(made.base),
        "root": made.store.uri,
        "quant": {"kind": "none"},
        "port": free_port(),
        "num_replicas": 2,
        "num_cpus": 0.5,
        "token_env": KEYS,
        "admin_token_env": OWNER,
        "engine": {"max_seq_len": 512, "num_threads": 1, "max_rank": 8},
        **variant(made, 0),
    }
    spec = ServeSpec.model_validate({**usual, **changed})
    service = Service(f"http://127.0.0.1:{spec.port}", spec, made)
    try:
        deploy(service.config()[0])
        _until_running(service)
        yield service
    finally:
        shut_down()


def deploy(config: dict[str, Any]) -> None:
    """Give Serve a config; it is started with the first."""
    schema = ServeDeploySchema.model_validate(config)
    serve_start(schema.http_options.model_dump(), proxy_location=schema.proxy_location).deploy_apps(schema)


def details() -> dict[str, Any]:
    """What Serve says of itself: applications, replicas, proxies."""
    found: dict[str, Any] = _get_global_client().get_serve_details()
    return found


def replicas() -> dict[str, int]:
    """Pid by replica, of all applications; one that is being started has none yet and is left out."""
    return {
        replica["replica_id"]: replica["pid"]
        for application in details()["applications"].values()
        for deployment in application["deployments"].values()
        for replica in deployment["replicas"]
        if replica.get("pid")
    }


def variant(made: Made, turn: int) -> dict[str, Any]:
    """The live keys of one of many configs: each turn has other adapters, arms, weights and limits than the last."""
    weight = (turn % 9 + 1) / 10
    tuned = f"card@{made.versions['card'][turn % 2]}" if turn % 3 else "card@latest"
    arms: list[dict[str, Any]] = [
        {"name": "plain", "prompt": {"system": f"Answer briefly ({turn % 5})."}, "max_new_tokens": 16},
        {"name": "tuned", "adapter": tuned, "max_new_tokens": 16},
        {"name": f"extra{turn % 4}", "adapter": f"{TASKS[turn % 4]}@latest"},
    ]
    ab = {
        "name": "ab",
        "control": "plain",
        "primary": "latency_ms",
        "arms": [{"name": "plain", "weight": weight}, {"name": "tuned", "weight": 1 - weight}],
    }
    some = [f"{task}@latest" for number, task in enumerate(TASKS) if (turn >> number) & 1]
    limits = {"max_n": 2 + turn % 3, "max_prompt_tokens": 300 + turn % 7, "requests_per_min": 1_000_000 + turn}
    return {"adapters": some, "arms": arms, "limits": limits, "experiments": [ab]}


def _until_running(service: Service) -> None:
    end = time.monotonic() + UP_WITHIN_S
    while time.monotonic() < end:
        found = details()["applications"].get(service.spec.name, {})
        if found.get("status") == "RUNNING":
            return
        assert found.get("status") not in ("DEPLOY_FAILED", "UNHEALTHY"), found
        time.sleep(0.1)
    raise AssertionError(f"not running within {UP_WITHIN_S} s: {found}")


assert set(LIVE) == {"adapters", "arms", "limits", "experiments"}, "a variant names every live key"
