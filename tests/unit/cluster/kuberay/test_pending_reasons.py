"""Whether a Kueue ClusterQueue could ever admit a job's pods: one flavor a pod set, quotas added up."""

from typing import Any

import pytest

from graftwork.cluster.kuberay.pending_reasons import amount, nominal_findings
from graftwork.cluster.spec import ClusterSpec

GPU = "nvidia.com/gpu"


def flavor(name: str, cpu: str, memory: str, gpus: str, borrows: dict[str, str] | None = None) -> dict[str, Any]:
    borrows = borrows or {}
    quotas = {"cpu": cpu, "memory": memory, GPU: gpus}
    return {
        "name": name,
        "resources": [
            {"name": key, "nominalQuota": value, **({"borrowingLimit": borrows[key]} if key in borrows else {})}
            for key, value in quotas.items()
        ],
    }


def queue(*flavors: dict[str, Any], covered: tuple[str, ...] = ("cpu", "memory", GPU), **spec: Any) -> dict[str, Any]:
    groups = [{"coveredResources": list(covered), "flavors": list(flavors)}]
    return {"metadata": {"name": "team"}, "spec": {"resourceGroups": groups, **spec}}


CPUS, CARDS = flavor("cpu", "64", "256Gi", "0"), flavor("gpu", "64", "512Gi", "8")


def machines(*groups: dict[str, Any]) -> ClusterSpec:
    return ClusterSpec.model_validate({"head": {"cpu": "4", "memory": "16Gi"}, "workers": list(groups)})


def group(count: int, cpu: int, memory: int, gpu: int = 0, name: str = "w") -> dict[str, Any]:
    return {"name": name, "count": count, "cpu": str(cpu), "memory": f"{memory}Gi", "gpu": gpu}


@pytest.mark.parametrize(
    ("groups", "fits"),
    [
        ([group(4, 8, 32)], True),
        ([group(4, 8, 64, 1)], True),
        ([group(8, 8, 64, 1)], True),  # all of the flavor
        ([group(8, 9, 64, 1)], False),  # 72 of 64 CPU
        ([group(9, 4, 32, 1)], False),  # 9 of 8 GPUs
        ([group(4, 8, 129, 1)], False),  # 516 of 512 GiB
        ([group(16, 4, 30)], True),  # on CPUs of the GPU flavor, the head on the other
        ([group(16, 4, 33)], False),  # no flavor holds the group, though both together would
        ([group(6, 8, 40, 0, "a"), group(2, 8, 40, 1, "b")], True),
        ([group(8, 8, 30, 0, "a"), group(8, 8, 64, 1, "b")], False),  # the head has no CPU left
        ([group(7, 8, 30, 0, "a"), group(8, 8, 64, 1, "b")], True),
        ([group(0, 99, 9999, 8)], True),  # no machine of it
    ],
)
def test_each_pod_set_gets_one_flavor_and_flavors_add_up(groups: list[dict[str, Any]], fits: bool) -> None:
    found = list(nominal_findings(queue(CPUS, CARDS), machines(*groups)))
    assert [one.code for one in found] == ([] if fits else ["E-QUEUE-QUOTA"])


def test_the_finding_has_the_figures() -> None:
    [found] = nominal_findings(queue(CPUS, CARDS), machines(group(8, 16, 128, 1, "h100")))
    assert "head 4 cpu, 16Gi memory; h100 128 cpu, 1024Gi memory, 8 nvidia.com/gpu" in found.problem
    assert "gpu 64 cpu, 512Gi memory, 8 nvidia.com/gpu" in found.problem


@pytest.mark.parametrize(
    ("spec", "flavors", "fits"),
    [
        ({}, CARDS, False),
        ({"cohort": "all"}, CARDS, True),  # borrows without a limit
        ({"cohortName": "all"}, CARDS, True),  # of v1beta2
        ({"cohort": "all"}, flavor("gpu", "64", "512Gi", "8", {"cpu": "64", "memory": "1Ti", GPU: "0"}), True),
        ({"cohort": "all"}, flavor("gpu", "64", "512Gi", "8", {"cpu": "32", "memory": "1Ti", GPU: "0"}), False),
        ({}, flavor("gpu", "64", "512Gi", "8", {"cpu": "64", "memory": "1Ti"}), False),  # a limit without a cohort
    ],
)
def test_a_queue_of_a_cohort_may_borrow(spec: dict[str, Any], flavors: dict[str, Any], fits: bool) -> None:
    assert (list(nominal_findings(queue(flavors, **spec), machines(group(7, 16, 128, 1)))) == []) == fits


def test_a_resource_without_a_quota_is_never_admitted() -> None:
    bare = queue({"name": "cpu", "resources": [{"name": "cpu", "nominalQuota": "64"}]}, covered=("cpu",))
    [found] = nominal_findings(bare, machines(group(1, 1, 1, 1)))
    assert found.problem == "the ClusterQueue 'team' has no memory, nvidia.com/gpu"


@pytest.mark.parametrize(
    ("text", "value"), [("8", 8), ("500m", 0.5), ("1e3", 1000), ("2Pi", 2 * 2**50), ("1Ti", 2**40)]
)
def test_quantities_of_a_server_have_more_forms_than_those_of_a_spec(text: str, value: float) -> None:
    assert amount(text) == value
