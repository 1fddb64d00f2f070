"""One API server, one stand-in operator and one Ray head for all tests of this folder."""

from collections.abc import Iterator

import pytest

from tests.k8s.cluster import KubeCluster, kube_cluster


@pytest.fixture(scope="session")
def kube() -> Iterator[KubeCluster]:
    with kube_cluster() as cluster:
        yield cluster
