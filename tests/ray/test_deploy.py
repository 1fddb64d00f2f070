"""Deployments on a real Ray: specs that are refused before anything starts, and the engine without HTTP."""

import asyncio
import socket
from pathlib import Path

import pytest

from graftwork.cluster.session import Session
from graftwork.errors import ArtifactError, ConfigError
from graftwork.prompts.render import Message
from graftwork.serving.deploy import Endpoint, deploy
from graftwork.serving.messages import ArmAnswer
from graftwork.serving.spec import ArmSpec
from tests.serve_world import NEW_TOKENS, QUESTIONS, TASKS, World
from tests.tiny import write_tiny_base


def test_a_port_in_use_is_named_before_anything_starts(ray_cluster: Session, world: World) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port={port} on 127.0.0.1"), deploy(world.spec(port=port)):
            pytest.fail("it deployed")


def test_a_sequence_longer_than_the_base_takes_is_refused(ray_cluster: Session, world: World) -> None:
    with pytest.raises(ConfigError, match="max_seq_len=4096"), deploy(world.spec(engine={"max_seq_len": 4096})):
        pytest.fail("it deployed")


def test_what_the_engine_finds_at_its_start_is_told_in_its_own_words(ray_cluster: Session, world: World) -> None:
    limits = {"max_seq_len": 1024, "kv_tokens": 512}
    with (
        pytest.raises(ConfigError, match=r"engine\.kv_tokens") as caught,
        deploy(world.spec(engine=limits), http=False),
    ):
        pytest.fail("it deployed")
    assert caught.value.rule
    assert caught.value.hint


def test_more_cpus_than_there_are_is_refused(ray_cluster: Session, world: World) -> None:
    with pytest.raises(ConfigError, match="num_cpus=400"), deploy(world.spec(num_cpus=400)):
        pytest.fail("it deployed")


def test_an_adapter_of_another_base_is_refused_before_anything_starts(
    ray_cluster: Session, world: World, tmp_path: Path
) -> None:
    other = write_tiny_base(tmp_path / "other", seed=1)
    with pytest.raises(ArtifactError, match="trained on base"), deploy(world.spec(base=str(other))):
        pytest.fail("it deployed")


def test_without_http_the_engine_answers_hundreds_of_calls_at_once(ray_cluster: Session, world: World) -> None:
    """What an offline comparison does: no proxy, no port, all requests in one batch."""
    arms = [ArmSpec(name="base", max_new_tokens=NEW_TOKENS)]
    arms += [ArmSpec(name=t, adapter=f"{t}@latest", max_new_tokens=NEW_TOKENS) for t in TASKS]
    jobs = [(arm, question) for arm in arms for question in QUESTIONS] * 16  # 192

    async def ask_all(endpoint: Endpoint) -> list[ArmAnswer]:
        asks = [
            endpoint.ask(arm, [Message("user", question)], f"job-{number}")
            for number, (arm, question) in enumerate(jobs)
        ]
        return await asyncio.gather(*asks)

    with deploy(world.spec(), http=False) as endpoint:
        answers = asyncio.run(ask_all(endpoint))
        found = endpoint.handle.snapshot.remote().result()
    for (arm, question), answer in zip(jobs, answers, strict=True):
        version = world.versions.get(arm.name)
        assert (answer.adapter_version, answer.text) == (version, world.texts[version, question])
    assert found.engine.most_adapters_in_step == len(TASKS)


def test_a_token_that_is_not_set_is_named(ray_cluster: Session, world: World) -> None:
    with pytest.raises(ConfigError, match="token_env=NO_SUCH_TOKEN"), deploy(world.spec(token_env="NO_SUCH_TOKEN")):
        pytest.fail("it deployed")
