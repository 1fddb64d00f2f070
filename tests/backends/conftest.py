"""Each test of this folder runs in all places. Marks: which places, and which of them in CI.

local and address: the `core` cases are `long`, which CI runs; the others are `soak`. kuberay: all are `k8s`, as
`make test-k8s` runs them.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest

from graftwork.cluster.jobs.supervisor import end_all
from tests.backends.local_target import Ground, Here
from tests.backends.target_fixtures import GROUNDS

FOLDER = Path(__file__).parent


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent == FOLDER and isinstance(item, pytest.Function):
            core = item.get_closest_marker("core") is not None
            away = item.callspec.params["ground"] == "kuberay"
            item.add_marker("k8s" if away else "long" if core else "soak")


@pytest.fixture(scope="session", params=GROUNDS)
def ground(request: pytest.FixtureRequest) -> Iterator[Ground]:
    with GROUNDS[request.param]() as found:
        yield found


@pytest.fixture
def here(ground: Ground, tmp_path: Path) -> Iterator[Here]:
    """Nothing of a test that failed stays at work."""
    (tmp_path / "store").mkdir()
    here = Here(ground, tmp_path / "store")
    try:
        yield here
    finally:
        for job_id in here.runs.job_ids():
            end_all(lambda: here.processes(job_id))  # noqa: B023  # called at once
