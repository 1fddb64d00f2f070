"""Each test of this folder runs in all places. Marks: which places, and which of them in CI.

local: all cases are `long`. address: the `core` ones are `long`, the others `soak`: Ray takes some 4 s to start a
driver. kuberay: `k8s`, with `make test-k8s`.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.backends.grounds import GROUNDS
from tests.backends.here import Ground, Here

FOLDER = Path(__file__).parent


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent == FOLDER and isinstance(item, pytest.Function):
            core = item.get_closest_marker("core") is not None
            marks = {"local": "long", "address": "long" if core else "soak", "kuberay": "k8s"}
            item.add_marker(marks[str(item.callspec.params["ground"])])


@pytest.fixture(scope="session", params=GROUNDS)
def ground(request: pytest.FixtureRequest) -> Iterator[Ground]:
    with GROUNDS[request.param]() as found:
        yield found


@pytest.fixture
def here(ground: Ground, tmp_path: Path) -> Here:
    (tmp_path / "store").mkdir()
    return Here(ground, tmp_path / "store")
