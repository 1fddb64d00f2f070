"""One API server, one fake operator and one Ray head for all tests of this folder."""

from collections.abc import Iterator

import pytest

from tests.k8s.cluster import KubeCluster, kube_cluster


@pytest.fixture(scope="session")
def kube() -> Iterator[KubeCluster]:
    """Its jobs stay pending: their cluster comes up for ever."""
    with kube_cluster(ray=False) as cluster:
        yield cluster


@pytest.fixture
def kube_ray(kube: KubeCluster) -> KubeCluster:
    """Its jobs run."""
    return kube.with_ray()
