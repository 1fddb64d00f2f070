"""The manifests of k8s/: built by kustomize, valid for Kubernetes, closed to strangers."""

import functools
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from tests.process_races import ROOT

K8S = ROOT / "k8s"
BUILT = ("base", *sorted(f"overlays/{path.name}" for path in (K8S / "overlays").iterdir()))
LISTED_OPENINGS = {  # k8s/README.md lists them
    "names",
    "ray-among-itself",
    "operator-to-ray",
    "clients-to-endpoints",
    "ray-to-stores",
    "autoscaler-to-api",
    "ray-to-store-inside",
    "ray-to-redis",
    "heads-to-redis",
    "prometheus-to-metrics",
    "exporter-to-store",
}
CORE = (
    "v1",
    "apps/v1",
    "networking.k8s.io/v1",
    "rbac.authorization.k8s.io/v1",
    "policy/v1",
    "scheduling.k8s.io/v1",
    "admissionregistration.k8s.io/v1",
)

pytestmark = pytest.mark.skipif(
    shutil.which("kustomize") is None, reason="no kustomize here: apt-get install kustomize"
)


@functools.cache
def built(folder: str) -> tuple[dict[str, Any], ...]:
    done = subprocess.run(["kustomize", "build", str(K8S / folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return tuple(yaml.load_all(done.stdout, Loader=yaml.CSafeLoader))


def of_kind(folder: str, *kinds: str) -> list[dict[str, Any]]:
    return [found for found in built(folder) if found["kind"] in kinds]


@pytest.mark.parametrize("folder", BUILT)
def test_every_object_is_valid_for_kubernetes(folder: str) -> None:
    import kubernetes_validate

    checked = 0
    for found in built(folder):
        if found["apiVersion"] in CORE:
            kubernetes_validate.validate(found, "1.34", strict=True)
            checked += 1
    assert checked >= 10


@pytest.mark.parametrize("folder", BUILT)
def test_nothing_passes_but_what_is_listed(folder: str) -> None:
    policies = {found["metadata"]["name"]: found["spec"] for found in of_kind(folder, "NetworkPolicy")}
    closed = policies.pop("nothing-by-default")
    assert closed == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    assert set(policies) <= LISTED_OPENINGS
    for name, spec in policies.items():
        for rule in spec.get("ingress", []):
            assert rule.get("from"), f"{name} lets everybody in"
        for rule in spec.get("egress", []):
            assert rule.get("to"), f"{name} lets everything out"
            blocks = [peer["ipBlock"] for peer in rule["to"] if "ipBlock" in peer]
            assert all("169.254.0.0/16" in block["except"] for block in blocks), f"{name} reaches cloud credentials"
    assert not of_kind(folder, "Ingress", "Gateway", "HTTPRoute")
    assert {found["spec"].get("type", "ClusterIP") for found in of_kind(folder, "Service")} <= {"ClusterIP"}


@pytest.mark.parametrize("folder", BUILT)
def test_pods_are_restricted(folder: str) -> None:
    for found in of_kind(folder, "Deployment", "StatefulSet", "Job", "DaemonSet"):
        pod = found["spec"]["template"]["spec"]
        assert pod["automountServiceAccountToken"] is False
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in pod["containers"]:
            security = container["securityContext"]
            assert security["readOnlyRootFilesystem"] is True
            assert security["allowPrivilegeEscalation"] is False
            assert security["capabilities"] == {"drop": ["ALL"]}
            assert "@sha256:" in container["image"]
            assert set(container["resources"]["limits"]) == {"cpu", "memory"}
            assert not [variable for variable in container.get("env", []) if "value" in variable]
    [namespace] = of_kind(folder, "Namespace")
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"


@pytest.mark.parametrize("folder", BUILT)
def test_nobody_may_more_than_they_must(folder: str) -> None:
    assert not of_kind(folder, "ClusterRole", "ClusterRoleBinding", "Secret")
    for role in of_kind(folder, "Role"):
        for rule in role["rules"]:
            assert "*" not in [*rule["apiGroups"], *rule["resources"], *rule["verbs"]]
            assert not {
                "secrets",
                "configmaps",
                "pods/exec",
                "pods/attach",
                "pods/portforward",
                "roles",
                "rolebindings",
                "serviceaccounts/token",
            } & set(rule["resources"])
            assert not {"escalate", "bind", "impersonate"} & set(rule["verbs"])
    for account in of_kind(folder, "ServiceAccount"):
        assert account["automountServiceAccountToken"] is False


def test_no_manifest_holds_a_secret() -> None:
    for path in [*K8S.rglob("*.yaml"), *K8S.rglob("Dockerfile"), *K8S.rglob("*.json")]:
        text = path.read_text(encoding="utf-8")
        assert "BEGIN PRIVATE KEY" not in text, path
        assert "AKIA" not in text, path


def test_the_images_wheel_needs_nothing_but_python(tmp_path: Path) -> None:
    """The Dockerfile builds it in a bare Python, before any dependence is there."""
    code = (
        "import sys; sys.path[:] = [p for p in sys.path if 'site-packages' not in p]\n"
        "import runpy; sys.argv = ['packaging', 'wheel', sys.argv[1]]\n"
        "runpy.run_module('graftwork.cluster.jobs.packaging', run_name='__main__')"
    )
    import sys

    for folder in ("a", "b"):
        done = subprocess.run(
            [sys.executable, "-S", "-c", code, str(tmp_path / folder)],
            cwd=ROOT,
            check=False,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
    [one], [other] = (list((tmp_path / folder).iterdir()) for folder in ("a", "b"))
    assert one.name == other.name
    assert one.read_bytes() == other.read_bytes(), "the same sources give the same bytes"


@pytest.mark.parametrize("extras", ["", "vllm,dense,pdf"])
def test_the_image_has_the_dependences_and_the_extras_that_are_asked_for(extras: str) -> None:
    """The command of the Dockerfile, as a shell runs it."""
    import sys
    import tomllib

    text = (K8S / "image" / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", "")
    [command] = re.findall(r"^RUN python (-c .*?) > /tmp/requirements\.txt", text, re.MULTILINE)
    command = command.replace("/tmp/pyproject.toml", str(ROOT / "pyproject.toml"))
    done = subprocess.run(
        ["sh", "-c", f"{sys.executable} {command}"],
        env={**os.environ, "EXTRAS": extras},
        capture_output=True,
        text=True,
        check=True,
    )
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    asked = [project["optional-dependencies"][name] for name in extras.split(",") if name]
    assert done.stdout.splitlines() == sum(asked, project["dependencies"])


def test_the_image_has_what_offloading_to_nvme_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training names the packages that it lacks; the Dockerfile installs them."""
    from graftwork.errors import ConfigError
    from graftwork.training import strategies
    from graftwork.training.spec import TrainSpec

    monkeypatch.setattr("ctypes.util.find_library", lambda name: None)
    spec = TrainSpec.model_construct(strategy=SimpleNamespace(offload_optimizer="nvme", offload_weights="none"))
    with pytest.raises(ConfigError) as caught:
        strategies.check_here(spec)
    named = set(re.findall(r"apt-get install ([\w-]+)", str(caught.value)))
    text = (K8S / "image" / "Dockerfile").read_text(encoding="utf-8")
    [installed] = re.findall(r"apt-get install -y --no-install-recommends (.*?) \\", text)
    assert named
    assert named | {"g++"} <= set(installed.split())


def test_dashboards_are_those_of_their_source() -> None:
    import runpy

    source = runpy.run_path(str(K8S / "overlays/monitoring/build_dashboards.py"))
    for name in source["DASHBOARDS"]:
        text = (K8S / f"overlays/monitoring/dashboards/{name}.json").read_text(encoding="utf-8")
        assert text == source["text_of"](name), "run k8s/overlays/monitoring/build_dashboards.py"
        assert json.loads(text)["panels"]


def test_policies_and_scrapes_select_the_pods_that_are_built() -> None:
    """Labels and port names of the manifests are those of `cluster/kuberay`."""
    from graftwork.cluster.kuberay.labels import pod_labels
    from graftwork.cluster.kuberay.pods import HEAD_PORTS, SERVE_PORT, PodSettings, head_template
    from graftwork.cluster.spec import ClusterSpec

    labels = pod_labels(ClusterSpec(), "name", None, "serve")
    facts = PodSettings(ClusterSpec(), labels, "s3://bucket/prefix", None, serves=True)
    operators = {"ray.io/node-type": "head", "ray.io/cluster": "made-by-the-operator"}
    pod = {**head_template(facts, autoscales=True)["metadata"]["labels"], **operators}
    [autoscaler] = [f for f in of_kind("base", "NetworkPolicy") if f["metadata"]["name"] == "autoscaler-to-api"]
    assert autoscaler["spec"]["podSelector"]["matchLabels"].items() <= pod.items()
    monitors = {found["metadata"]["name"]: found["spec"] for found in of_kind("overlays/monitoring", "PodMonitor")}
    assert monitors["graftwork-endpoints"]["selector"]["matchLabels"].items() <= pod.items()
    ports = {name for name, _ in (*HEAD_PORTS, SERVE_PORT)}
    for name in ("graftwork-endpoints", "graftwork-ray"):
        assert {end["port"] for end in monitors[name]["podMetricsEndpoints"]} <= ports
    of_a_job = pod_labels(ClusterSpec(), "name", "name-0123456789", "train")
    assert set(monitors["graftwork-ray"]["podTargetLabels"]) <= {*pod, *of_a_job}


def test_submitters_may_make_each_call_of_the_target() -> None:
    """`renew` of cluster/targets/kuberay.py sends PUT, which is the verb `update`."""
    [role] = [found for found in of_kind("base", "Role") if found["metadata"]["name"] == "graftwork-submitter"]
    verbs = {name: set(rule["verbs"]) for rule in role["rules"] for name in rule["resources"]}
    for name in ("rayservices", "poddisruptionbudgets"):
        assert verbs[name] >= {"create", "get", "list", "update", "delete"}
