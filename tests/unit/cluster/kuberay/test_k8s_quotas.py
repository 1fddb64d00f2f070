"""The shipped examples fit the shipped quotas and flavors: computed from the objects that each example makes."""

import functools
import re
import runpy
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from kubernetes.utils.quantity import parse_quantity

from graftwork.cluster.kuberay.pending_reasons import pod_usage
from tests.process_races import ROOT

pytestmark = pytest.mark.skipif(
    shutil.which("kustomize") is None, reason="no kustomize here: apt-get install kustomize"
)
RENDER = SimpleNamespace(**runpy.run_path(str(ROOT / "k8s" / "examples" / "render.py")))
CLUSTERS = {path.stem: path for path in sorted(RENDER.CLUSTERS.glob("*.yaml"))}
OVERLAYS = {"cpu": "base", "gpu": "overlays/gpu", "gpu-spot-kueue": "overlays/kueue", "kind": "overlays/dev"}
"""The namespace that each example of examples/clusters is written for; its comment names it."""
Amounts = dict[str, float]


@functools.cache
def built(folder: str) -> tuple[dict[str, Any], ...]:
    done = subprocess.run(["kustomize", "build", str(ROOT / "k8s" / folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return tuple(yaml.load_all(done.stdout, Loader=yaml.CSafeLoader))


def of_kind(folder: str, kind: str) -> dict[str, dict[str, Any]]:
    return {one["metadata"]["name"]: one for one in built(folder) if one["kind"] == kind}


def quota(folder: str) -> Amounts:
    [found] = of_kind(folder, "ResourceQuota").values()
    return amounts(found["spec"]["hard"])


def amounts(given: Mapping[str, str]) -> Amounts:
    return {name: float(parse_quantity(text)) for name, text in given.items()}


def pod_sets(part: Mapping[str, Any]) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Yield the number of pods and their spec, for a cluster at its largest size."""
    yield 1, part["headGroupSpec"]["template"]["spec"]
    for group in part["workerGroupSpecs"]:
        yield group["maxReplicas"], group["template"]["spec"]


def pod_takes(pod: Mapping[str, Any], side: str) -> Amounts:
    """Return what a pod takes: the sum of its containers or its largest init container, whichever is more."""
    own = [amounts(container["resources"][side]) for container in pod["containers"]]
    before = [amounts(container["resources"][side]) for container in pod.get("initContainers", [])]
    names = {name for container in (*own, *before) for name in container}
    return {name: max(sum(c.get(name, 0.0) for c in own), *(c.get(name, 0.0) for c in before), 0.0) for name in names}


def cluster_takes(part: Mapping[str, Any]) -> Amounts:
    """Return what all pods take, by the names of a ResourceQuota."""
    total: Amounts = {}
    for count, pod in pod_sets(part):
        for side in ("requests", "limits"):
            for name, amount in pod_takes(pod, side).items():
                total[f"{side}.{name}"] = total.get(f"{side}.{name}", 0.0) + count * amount
    return total


def beyond(takes: Mapping[str, float], hard: Mapping[str, float]) -> dict[str, tuple[float, float]]:
    return {name: (takes[name], hard[name]) for name in takes.keys() & hard.keys() if takes[name] > hard[name]}


@pytest.mark.parametrize("name", CLUSTERS)
def test_an_example_fits_the_quota_of_its_namespace(name: str) -> None:
    part = RENDER.rayjob(CLUSTERS[name])["spec"]["rayClusterSpec"]
    takes, hard = cluster_takes(part), quota(OVERLAYS[name])
    assert takes.keys() >= {"requests.cpu", "limits.cpu", "requests.memory", "limits.memory"}
    assert beyond(takes, hard) == {}
    ours = pod_usage(RENDER.a_job(CLUSTERS[name], "train"))
    assert {key: ours[key] for key in takes if key in ours} == {key: takes[key] for key in takes if key in ours}


def test_an_endpoint_fits_while_it_is_upgraded() -> None:
    """A change of its base makes a second cluster of it; the first one goes when the second is ready."""
    service, *_ = RENDER.service(CLUSTERS["gpu"])
    takes = {name: 2 * amount for name, amount in cluster_takes(service["spec"]["rayClusterConfig"]).items()}
    assert beyond(takes, quota(OVERLAYS["gpu"])) == {}


def test_the_cluster_of_the_docs_fits(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "clusters.md").read_text(encoding="utf-8")
    [shown] = re.findall(r"```yaml\n(kind: cluster\n.*?)```", text, re.DOTALL)
    (tmp_path / "cluster.yaml").write_text(shown)
    assert beyond(pod_usage(RENDER.a_job(tmp_path / "cluster.yaml", "train")), quota("overlays/gpu")) == {}


@pytest.mark.parametrize("name", [name for name, path in CLUSTERS.items() if "queue:" in path.read_text()])
def test_a_queued_example_is_admitted(name: str) -> None:
    """As Kueue does it (kueue.sigs.k8s.io, "ResourceFlavor"): the pods of one group take all their resources from the
    first flavor that has room and suits their node selector. Of the selector, only keys count that some flavor has.
    """
    folder, made = OVERLAYS[name], RENDER.rayjob(CLUSTERS[name])
    local = of_kind(folder, "LocalQueue")[made["metadata"]["labels"]["kueue.x-k8s.io/queue-name"]]
    [group] = of_kind(folder, "ClusterQueue")[local["spec"]["clusterQueue"]]["spec"]["resourceGroups"]
    flavors = {flavor: one.get("spec", {}) for flavor, one in of_kind(folder, "ResourceFlavor").items()}
    labels = {one["name"]: flavors[one["name"]].get("nodeLabels", {}) for one in group["flavors"]}
    room = {
        one["name"]: {r["name"]: float(parse_quantity(r["nominalQuota"])) for r in one["resources"]}
        for one in group["flavors"]
    }
    keys = {key for own in labels.values() for key in own}
    for count, pod in pod_sets(made["spec"]["rayClusterSpec"]):
        needs = {name: count * amount for name, amount in pod_takes(pod, "requests").items()}
        assert needs.keys() <= set(group["coveredResources"])
        wanted = {key: value for key, value in pod.get("nodeSelector", {}).items() if key in keys}
        suits = [one for one in room if wanted.items() <= labels[one].items()]
        fits = [one for one in suits if not beyond(needs, room[one])]
        assert fits, f"no flavor of {suits} holds {needs}: {room}"
        room[fits[0]] = {resource: left - needs.get(resource, 0.0) for resource, left in room[fits[0]].items()}


def test_what_a_queue_admits_fits_the_quota() -> None:
    """Else the pods of an admitted job would not be made, and those that are would hold their GPUs."""
    hard, total = quota("overlays/kueue"), dict[str, float]()
    for queue in of_kind("overlays/kueue", "ClusterQueue").values():
        for group in queue["spec"]["resourceGroups"]:
            for one in (resource for flavor in group["flavors"] for resource in flavor["resources"]):
                key = f"requests.{one['name']}"
                total[key] = total.get(key, 0.0) + float(parse_quantity(one["nominalQuota"]))
    assert total.keys() <= hard.keys()
    assert beyond(total, hard) == {}


def test_each_example_names_what_its_namespace_has() -> None:
    assert CLUSTERS.keys() == OVERLAYS.keys()
    for name, folder in OVERLAYS.items():
        cluster = RENDER.a_job(CLUSTERS[name], "train").cluster
        assert cluster.service_account in of_kind(folder, "ServiceAccount")
        if cluster.queue is not None:
            assert cluster.queue in of_kind(folder, "LocalQueue")
        if cluster.priority is not None:
            kind = "PriorityClass" if cluster.queue is None else "WorkloadPriorityClass"
            assert cluster.priority in of_kind(folder, kind)
