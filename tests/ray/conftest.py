"""One private Ray for all tests of this folder, and a store of adapters for the tests of endpoints."""

from collections.abc import Iterator

import pytest

from graftwork.cluster.session import Session, session
from graftwork.serving.deploy import Endpoint, deploy
from tests.serve_world import ADMIN_TOKEN, TOKEN, World, make_world


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[Session]:
    """A private Ray with 4 logical CPUs, so that two workers and a driver's helper actors fit."""
    with session("local", num_cpus=4) as here:
        yield here


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("serve"))


@pytest.fixture(scope="module")
def endpoint(ray_cluster: Session, world: World) -> Iterator[Endpoint]:
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("GRAFTWORK_TEST_TOKEN", TOKEN)
        environment.setenv("GRAFTWORK_TEST_OWNER", ADMIN_TOKEN)
        settings = {"token_env": "GRAFTWORK_TEST_TOKEN", "admin_token_env": "GRAFTWORK_TEST_OWNER"}
        with deploy(world.spec(**settings)) as running:
            yield running
