"""How long a removal may take, from the objects themselves."""

from typing import Any

import pytest

from graftwork.cluster.kuberay.client import removal_s
from graftwork.cluster.kuberay.objects import build_disruption_budget
from tests.kuberay_objects import GONE, changed, cluster, job, rayjob, rayservice

REDIS = {"gcs": {"backend": "redis", "redis_address": "redis:6379", "redis_secret": "redis"}}
WORKER = "spec.rayClusterSpec.workerGroupSpecs.0.template.spec.terminationGracePeriodSeconds"
HEAD = "spec.rayClusterSpec.headGroupSpec.template.spec.terminationGracePeriodSeconds"


@pytest.mark.parametrize(
    ("made", "seconds"),
    [
        (rayjob(), 120 + 30),
        (rayjob(**REDIS), 120 + 300 + 30),
        (rayjob(gcs={"backend": "rocksdb"}), 120 + 30),
        (rayservice(), 120 + 30),
        (rayservice(**REDIS), 120 + 300 + 30),
        (changed(rayjob(), {WORKER: 600}), 600 + 30),
        (changed(rayjob(), {WORKER: GONE, HEAD: GONE}), 30 + 30),
        (changed(rayjob(), {"spec.rayClusterSpec.gcsFaultToleranceOptions": {"redisAddress": "r:1"}}), 120 + 300 + 30),
        (build_disruption_budget(job(cluster(), kind="serve"), "team-a"), 30),
    ],
)
def test_a_removal_may_take_grace_cleanup_and_a_margin(made: dict[str, Any], seconds: int) -> None:
    assert removal_s(made) == seconds
