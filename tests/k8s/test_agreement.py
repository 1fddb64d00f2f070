"""The strict API server and our own check of the schema say the same of good and of bad objects."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from graftwork.cluster.jobs.models import Attempt
from graftwork.cluster.kuberay.objects import build_rayjob
from graftwork.cluster.kuberay.rules import check_rules
from graftwork.cluster.kuberay.schema import check_schema
from graftwork.cluster.spec import ClusterSpec
from tests.k8s.cluster import JOBS, KubeCluster
from tests.k8s.commands import CLUSTER, command

pytestmark = pytest.mark.k8s
Change = Callable[[dict[str, Any]], object]


def spec(made: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = made["spec"]
    return found


def head(made: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = spec(made)["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    return found


GOOD: dict[str, Change] = {
    "as built": lambda made: None,
    "suspended": lambda made: spec(made).update(suspend=True),
    "metadata": lambda made: spec(made).update(metadata={"a": "b"}),
    "a number as quantity": lambda made: head(made)["containers"][0]["resources"]["limits"].update(cpu=4),
}
BAD: dict[str, Change] = {
    "a field that is not there": lambda made: spec(made).update(entrypiont="x"),
    "a text for a number": lambda made: spec(made).update(ttlSecondsAfterFinished="10"),
    "a number for a text": lambda made: spec(made).update(entrypoint=3),
    "a text for a truth": lambda made: spec(made).update(shutdownAfterJobFinishes="yes"),
    "no quantity": lambda made: head(made)["containers"][0]["resources"]["limits"].update(memory="16 GiB"),
    "an unknown mode": lambda made: spec(made)["rayClusterSpec"]["authOptions"].update(mode="tokens"),
    "no head": lambda made: spec(made)["rayClusterSpec"].pop("headGroupSpec"),
    "a container without name": lambda made: head(made)["containers"][0].pop("name"),
    "a typo in a pod": lambda made: head(made).update(serviceAcountName="x"),
    "a list for an object": lambda made: spec(made).update(rayClusterSpec=[]),
    "another manager": lambda made: spec(made).update(managedBy="me"),
}


@pytest.mark.parametrize("name", [*GOOD, *BAD])
def test_server_and_check_agree(kube: KubeCluster, tmp_path: Path, name: str) -> None:
    cluster = ClusterSpec.model_validate(CLUSTER.model_dump(mode="json"))
    attempt = Attempt(command(tmp_path, "agree", "print(1)", cluster), 1)
    made = copy.deepcopy(dict(build_rayjob(attempt, kube.namespace, None)))
    {**GOOD, **BAD}[name](made)
    crd = kube.server.ask("GET", "/apis/apiextensions.k8s.io/v1/customresourcedefinitions/rayjobs.ray.io")[1]
    code, answer = kube.server.ask("POST", f"{JOBS}?dryRun=All&fieldValidation=Strict", made)
    assert (code == 201) == (name in GOOD), answer
    for known in (crd, None):
        errors = [finding for finding in [*check_rules(made), *check_schema(made, known)] if finding.level == "error"]
        assert bool(errors) == (name in BAD), (answer, errors)
