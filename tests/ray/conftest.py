"""One private Ray for all tests of this folder."""

from collections.abc import Iterator

import pytest

from graftwork.cluster.session import Session, session


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[Session]:
    """A private Ray with 4 logical CPUs, so that two workers and a driver's helper actors fit."""
    with session("local", num_cpus=4) as here:
        yield here
