"""An endpoint deployed by a Serve config, as KubeRay deploys it: changes under load fail nobody and restart nothing."""

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

from graftwork.cluster.session import Session
from tests.service import Service, deploy, details, replicas, running_service, variant


@pytest.fixture(scope="module")
def service(ray_cluster: Session, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with running_service(tmp_path_factory.mktemp("service")) as running:
        yield running


async def changed_under_load(service: Service, requests: int) -> int:
    """Configs and admin verbs, one after the other, until the callers have had so many answers. Changes made."""
    turn, card = 0, service.made.versions["card"]
    async with service.loaded() as client:
        while service.answered < requests:
            turn += 1
            _, told = await service.change(client, **variant(service.made, turn))
            assert told["refused"] is None, told
            await service.admin(client, "promote", adapter="card@latest", version=card[turn % 2])
            await service.admin(client, "unload" if turn % 2 else "load", adapter="fourth@latest")
    return turn


def refused_under_load(service: Service) -> list[dict[str, Any]]:
    """What the endpoint says of wrong configs, and that it still serves the right one."""
    wrong: list[dict[str, Any]] = [
        {"adapters": ["nobody@latest"]},
        {"arms": [{"name": "plain", "adapter": "card@0123456789ab"}]},
        {"limits": {"max_n": 1}, "adapters": ["nobody@latest"]},
    ]

    async def act() -> list[dict[str, Any]]:
        async with service.loaded(callers=2) as client:
            return [(await service.change(client, **{**variant(service.made, 1), **one}))[1] for one in wrong]

    return asyncio.run(act())


@pytest.mark.long
def test_three_hundred_requests_see_no_change_of_the_config(service: Service) -> None:
    before = replicas()
    turns = asyncio.run(changed_under_load(service, 300))
    assert service.failed == []
    assert turns >= 3
    for told in refused_under_load(service):
        assert told["refused"]["waits"] is False
    assert service.failed == []
    assert replicas() == before, "the same replicas in the same processes"
    assert {version for card in service.made.versions["card"] for version in [card]} <= set(service.versions)


@pytest.mark.soak
def test_ten_thousand_requests_see_no_change_of_the_config(service: Service) -> None:
    before, controller = replicas(), details()["controller_info"]["actor_id"]
    turns = asyncio.run(changed_under_load(service, service.answered + 10_000))
    assert service.failed == []
    assert turns >= 100
    assert replicas() == before
    assert details()["controller_info"]["actor_id"] == controller


@pytest.mark.soak
def test_engines_that_are_made_anew_under_load_fail_nobody(service: Service) -> None:
    """A change of the engine: Serve restarts replicas one by one, each finishes its requests first."""
    before = set(replicas())

    async def act() -> None:
        async with service.loaded() as client:
            await service.change(client, **variant(service.made, 2))
            engine = {**service.spec.engine.model_dump(mode="json"), "max_batch": 16}
            await asyncio.to_thread(deploy, service.config(**variant(service.made, 2), engine=engine)[0])
            while set(replicas()) & before or len(replicas()) != len(before):
                await asyncio.sleep(0.5)

    asyncio.run(act())
    assert service.failed == []
