"""The objects that jobs become: who may do what in their pods, which machines they take, how they end."""

import json
from dataclasses import replace
from typing import Any

import pytest

from graftwork.cluster.jobs.driver import LIMIT_GRACE_S
from graftwork.cluster.kuberay.objects import build_disruption_budget, build_rayjob, build_rayservice
from tests.kuberay_objects import GPUS, IMAGE, ROOT, attempt, cluster, job, raycluster

WHEEL = f"{ROOT}/wheels/graftwork-0.1.0+0123456789ab-py3-none-any.whl"


def rayjob(wheel: str | None = WHEEL, **changes: Any) -> dict[str, Any]:
    return build_rayjob(attempt(cluster(**changes)), "team-a", wheel)


def pods(made: dict[str, Any]) -> list[dict[str, Any]]:
    """Pod specs of the head and of each group."""
    spec = made["spec"]
    part = spec.get("rayClusterSpec") or spec.get("rayClusterConfig") or spec
    templates = [part["headGroupSpec"]["template"], *(group["template"] for group in part["workerGroupSpecs"])]
    return [template["spec"] for template in templates]


def ray(pod: dict[str, Any]) -> dict[str, Any]:
    """The container that KubeRay starts Ray in: the first one."""
    container: dict[str, Any] = pod["containers"][0]
    return container


def test_a_job_is_submitted_once_under_its_attempts_name_and_goes_away_by_itself() -> None:
    made = rayjob(ttl_s=120)
    spec = made["spec"]
    assert (made["kind"], made["metadata"]["name"], spec["jobId"]) == ("RayJob", *["airport-ababababab-a1"] * 2)
    assert spec["submissionMode"] == "HTTPMode"
    assert spec["entrypoint"] == f"python -m graftwork.cluster.jobs.driver {ROOT} airport-ababababab 1 job"
    assert (spec["shutdownAfterJobFinishes"], spec["ttlSecondsAfterFinished"]) == (True, 120)
    assert (spec["submitterConfig"], spec["backoffLimit"]) == ({"backoffLimit": 0}, 0)


def test_the_operators_deadline_leaves_the_drivers_one_time_for_a_checkpoint() -> None:
    spec = rayjob(limits={"deadline": "1h", "pending": "10m"})["spec"]
    assert spec["preRunningDeadlineSeconds"] == 600
    assert spec["activeDeadlineSeconds"] > 3600 + 600 + LIMIT_GRACE_S
    assert "activeDeadlineSeconds" not in rayjob(limits={})["spec"]


@pytest.mark.parametrize("made", [rayjob(workers=[GPUS]), raycluster()])
def test_pods_are_closed(made: dict[str, Any]) -> None:
    """Pod Security's `restricted`, and a root that cannot be written."""
    for pod in pods(made):
        assert pod["automountServiceAccountToken"] is False
        assert pod["serviceAccountName"] == "graftwork"
        for container in [*pod.get("initContainers", []), *pod["containers"]]:
            closed = container["securityContext"]
            assert closed["runAsNonRoot"] is True
            assert closed["readOnlyRootFilesystem"] is True
            assert closed["allowPrivilegeEscalation"] is False
            assert closed["capabilities"] == {"drop": ["ALL"]}
            assert closed["seccompProfile"] == {"type": "RuntimeDefault"}
            assert container["resources"]["requests"] == container["resources"]["limits"]
            assert container["image"] == IMAGE
        writable = {mount["mountPath"] for mount in ray(pod)["volumeMounts"]}
        assert writable >= {"/tmp", "/dev/shm", "/scratch"}


def test_the_head_takes_no_work_and_only_tokens_open_it() -> None:
    part = rayjob(auth={"secret": "ray-token"})["spec"]["rayClusterSpec"]
    assert part["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert part["headGroupSpec"]["serviceType"] == "ClusterIP"
    assert part["authOptions"] == {"mode": "token", "secretName": "ray-token"}
    assert part["rayVersion"] == "2.60.0"


def test_secrets_are_named_and_never_written() -> None:
    made = rayjob(secret_env={"HF_TOKEN": "hub/token"}, storage={"uri": ROOT, "secret": "s3", "endpoint": "http://s:1"})
    for pod in pods(made):
        env = {entry["name"]: entry for entry in ray(pod)["env"]}
        assert env["HF_TOKEN"]["valueFrom"] == {"secretKeyRef": {"name": "hub", "key": "token"}}
        assert env["AWS_ENDPOINT_URL"]["value"] == "http://s:1"
        assert env["AWS_EC2_METADATA_DISABLED"]["value"] == "true"
        assert ray(pod)["envFrom"] == [{"secretRef": {"name": "s3"}}]
    assert "AWS_SECRET" not in json.dumps(made)


def test_the_code_comes_as_a_wheel_or_is_the_images() -> None:
    for pod in pods(rayjob()):
        (code,) = pod["initContainers"]
        assert code["command"] == ["python", "-m", "graftwork.cluster.jobs.packaging", "unpack", WHEEL, "/code"]
        assert {"name": "PYTHONPATH", "value": "/code"} in ray(pod)["env"]
        assert {"name": "GRAFTWORK_WHEEL", "value": WHEEL} in ray(pod)["env"]
    assert "GRAFTWORK_WHEEL" not in json.dumps(rayjob(wheel=None))


def test_gpus_on_spot_machines() -> None:
    made = rayjob(workers=[{**GPUS, "spot": True}], retry={"max_attempts": 3})
    head, worker = pods(made)
    assert ray(worker)["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert worker["nodeSelector"] == {"example.com/gpu": "h100", "graftwork.dev/spot": "true"}
    assert {taint["key"] for taint in worker["tolerations"]} == {"nvidia.com/gpu", "graftwork.dev/spot"}
    assert worker["terminationGracePeriodSeconds"] == 120
    (command,) = [ray(worker)["lifecycle"]["preStop"]["exec"]["command"]]
    assert command == ["python", "-m", "graftwork.cluster.kuberay.prestop", "110"]
    assert "nodeSelector" not in head
    assert made["spec"]["backoffLimit"] == 1


def test_a_queue_of_kueues_holds_the_job_back() -> None:
    made = rayjob(queue="gpu", priority="urgent")
    labels = made["metadata"]["labels"]
    assert labels["kueue.x-k8s.io/queue-name"] == "gpu"
    assert labels["kueue.x-k8s.io/priority-class"] == "urgent"
    assert made["spec"]["suspend"] is True
    assert "priorityClassName" not in pods(made)[0]
    assert pods(rayjob(priority="urgent"))[0]["priorityClassName"] == "urgent"


@pytest.mark.parametrize(
    ("gang", "label"),
    [("volcano", "volcano.sh/queue-name"), ("kai", "kai.scheduler/queue"), ("yunikorn", "yunikorn.apache.org/queue")],
)
def test_schedulers_of_gangs_find_their_queue(gang: str, label: str) -> None:
    labels = rayjob(gang=gang, gang_queue="root.a")["metadata"]["labels"]
    assert labels[label] == "root.a"
    assert ("ray.io/gang-scheduling-enabled" in labels) == (gang == "yunikorn")


def test_the_heads_state_outlives_it() -> None:
    redis = {"backend": "redis", "redis_address": "redis:6379", "redis_secret": "redis"}
    options = rayjob(gcs=redis)["spec"]["rayClusterSpec"]["gcsFaultToleranceOptions"]
    assert options["redisPassword"] == {"valueFrom": {"secretKeyRef": {"name": "redis", "key": "password"}}}
    assert rayjob(gcs={"backend": "rocksdb"})["spec"]["rayClusterSpec"]["gcsFaultToleranceOptions"]["storage"]


def test_a_shared_folder_is_mounted_where_the_store_says() -> None:
    made = rayjob(storage={"uri": "file:///mnt/runs", "claim": "runs"})
    for pod in pods(made):
        assert {"name": "store", "mountPath": "/mnt/runs"} in ray(pod)["volumeMounts"]
        assert {"name": "store", "persistentVolumeClaim": {"claimName": "runs"}} in pod["volumes"]


def test_only_a_service_grows_and_only_its_head_has_a_token() -> None:
    group = {**GPUS, "count": 1, "max_count": 4}
    (fixed,) = rayjob(workers=[group])["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert (fixed["minReplicas"], fixed["replicas"], fixed["maxReplicas"]) == (1, 1, 1)
    service = build_rayservice(job(cluster(workers=[group]), kind="serve"), "team-a", {"applications": []})
    part = service["spec"]["rayClusterConfig"]
    assert part["enableInTreeAutoscaling"] is True
    assert part["autoscalerOptions"]["version"] == "v2"
    assert part["workerGroupSpecs"][0]["maxReplicas"] == 4
    head, worker = pods(service)
    assert head["automountServiceAccountToken"] is True
    assert "serviceAccountName" not in head  # the operator makes one with the rights it needs, and no more
    assert worker["automountServiceAccountToken"] is False


def test_a_change_of_the_served_spec_changes_no_machine() -> None:
    first, second = (
        build_rayservice(job(cluster(), kind="serve"), "team-a", {"applications": [{"user_config": user}]})
        for user in ("a", "b")
    )
    assert first["metadata"]["name"] == second["metadata"]["name"] == "airport"
    assert first["spec"]["rayClusterConfig"] == second["spec"]["rayClusterConfig"]
    assert first["spec"]["serveConfigV2"] != second["spec"]["serveConfigV2"]


def test_an_old_cluster_stays_until_its_longest_request_has_ended() -> None:
    spec = build_rayservice(job(cluster(), kind="serve"), "team-a", {})["spec"]
    assert spec["rayClusterDeletionDelaySeconds"] > 600
    assert spec["excludeHeadPodFromServeSvc"] is True
    assert spec["upgradeStrategy"] == {"type": "NewCluster"}


def test_pods_of_a_service_live_as_long_as_its_replicas_may_take_to_finish() -> None:
    asked = job(cluster(), kind="serve")
    asked = replace(asked, spec={**asked.spec, "graceful_shutdown_timeout_s": 300.0, "request_timeout_s": 900.0})
    made = build_rayservice(asked, "team-a", {})
    assert made["spec"]["rayClusterDeletionDelaySeconds"] > 900
    assert {pod["terminationGracePeriodSeconds"] for pod in pods(made)} == {315}


ONE_GPU: dict[str, Any] = {**GPUS, "count": 1}


@pytest.mark.parametrize(
    ("workers", "spec", "least"),
    [
        ([GPUS], {"num_replicas": 2, "num_gpus": 1.0}, 1),
        ([{**GPUS, "count": 4}], {"num_replicas": 4, "num_gpus": 1.0}, 3),
        ([ONE_GPU], {"num_replicas": 1, "num_gpus": 1.0}, 0),  # one worker: a drain evicts it
        ([GPUS], {"num_replicas": 1, "num_gpus": 1.0}, 0),  # the second worker has no replica and is not ready
        ([{**GPUS, "gpu": 4}], {"num_replicas": 4, "num_gpus": 1.0}, 0),  # all four may be on one worker
        ([{**ONE_GPU, "max_count": 4}], {"num_replicas": 3, "num_gpus": 1.0}, 2),
        ([{**ONE_GPU, "max_count": 4}], {"autoscaling": {"min_replicas": 1, "max_replicas": 4}, "num_gpus": 1.0}, 0),
        ([{**ONE_GPU, "max_count": 4}], {"autoscaling": {"min_replicas": 2, "max_replicas": 4}, "num_gpus": 1.0}, 1),
        ([{**GPUS, "count": 2}], {"num_replicas": 6, "num_gpus": 1.0}, 1),  # four replicas find no worker
        ([{"count": 3, "cpu": "4"}], {"num_replicas": 3, "num_cpus": 4.0, "num_gpus": 0.0}, 2),
        ([{"count": 3, "cpu": "600m"}], {"num_replicas": 3, "num_cpus": 0.2, "num_gpus": 0.0}, 0),
        ([{"count": 3, "cpu": "8"}], {"num_replicas": 3, "num_cpus": 2.0, "num_gpus": 0.0}, 0),
    ],
)
def test_the_disruption_budget_lets_one_serving_worker_go(
    workers: list[dict[str, Any]], spec: dict[str, Any], least: int
) -> None:
    """The disruption controller compares ready workers with `minAvailable`: a drain goes on if one more is ready."""
    made = job(cluster(workers=workers), kind="serve")
    budget = build_disruption_budget(replace(made, spec={**made.spec, **spec}), "team-a")["spec"]
    assert budget["minAvailable"] == least
    assert type(budget["minAvailable"]) is int, "RayCluster has no scale subresource, which other forms need"
    assert "maxUnavailable" not in budget
    assert budget["unhealthyPodEvictionPolicy"] == "AlwaysAllow"


def test_the_disruption_budget_covers_workers_and_no_head() -> None:
    """With the label that KubeRay 1.7 sets on a pod by its group."""
    made = job(cluster(), kind="serve")
    (selector,) = build_disruption_budget(made, "team-a")["spec"]["selector"].values()
    part = build_rayservice(made, "team-a", {})["spec"]["rayClusterConfig"]
    for group, kind in ((part["headGroupSpec"], "head"), (part["workerGroupSpecs"][0], "worker")):
        labels = {**group["template"]["metadata"]["labels"], "ray.io/node-type": kind}
        assert (selector.items() <= labels.items()) == (kind == "worker")


def test_the_disruption_budget_of_another_version_is_another_plan() -> None:
    """Otherwise the budget would keep the label of the first job, and go with it."""
    first = job(cluster(), kind="serve")
    plans = [
        build_disruption_budget(one, "team-a")["metadata"]["annotations"]["graftwork.dev/plan"]
        for one in (first, first, replace(first, digest="cd" * 32))
    ]
    assert plans[0] == plans[1] != plans[2]


def test_equal_plans_have_equal_hashes() -> None:
    hashes = [made["metadata"]["annotations"]["graftwork.dev/plan"] for made in (rayjob(), rayjob(), rayjob(ttl_s=1))]
    assert hashes[0] == hashes[1] != hashes[2]
