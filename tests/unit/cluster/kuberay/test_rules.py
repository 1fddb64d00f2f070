"""Each rule refuses what it is for, and lets pass what is next to it."""

from typing import Any

import pytest

from graftwork.cluster.kuberay.rules import check_rules
from tests.kuberay_objects import GONE, GPUS, changed, raycluster, rayjob, rayservice

GROWS = {**GPUS, "count": 1, "max_count": 4}
OBJECTS = {
    "job": rayjob(workers=[GPUS, {"name": "cpu"}]),
    "kueue": rayjob(workers=[GPUS], queue="gpu"),
    "kai": rayjob(workers=[GPUS], gang="kai", gang_queue="team-a"),
    "redis": rayjob(gcs={"backend": "redis", "redis_address": "redis:6379", "redis_secret": "redis"}),
    "rocksdb": rayjob(gcs={"backend": "rocksdb"}),
    "service": rayservice(workers=[GROWS]),
    "fixed service": rayservice(workers=[GPUS]),
    "cluster": raycluster(workers=[GPUS]),
}
PART = {"service": "spec.rayClusterConfig", "fixed service": "spec.rayClusterConfig", "cluster": "spec"}
RULES = {  # one condition of deletion rules, used below
    "workers": {"policy": "DeleteWorkers", "condition": {"jobStatus": "SUCCEEDED", "ttlSeconds": 60}},
    "cluster": {"policy": "DeleteCluster", "condition": {"jobStatus": "SUCCEEDED", "ttlSeconds": 120}},
    "early": {"policy": "DeleteCluster", "condition": {"jobStatus": "SUCCEEDED", "ttlSeconds": 30}},
    "both": {"policy": "DeleteSelf", "condition": {"jobStatus": "FAILED", "jobDeploymentStatus": "Failed"}},
}
BY_RULES = {"spec.shutdownAfterJobFinishes": False, "spec.ttlSecondsAfterFinished": 0}
STRATEGY = "spec.deletionStrategy"
HEAD, WORKER = "~.headGroupSpec", "~.workerGroupSpecs.0"
POD, RAY = f"{HEAD}.template.spec", f"{HEAD}.template.spec.containers.0"
SELECTS = {"spec.clusterSelector": {"ray.io/cluster": "warm"}, "spec.rayClusterSpec": GONE}
INCREMENTAL = {
    "type": "NewClusterWithIncrementalUpgrade",
    "clusterUpgradeOptions": {"stepSizePercent": 10, "intervalSeconds": 30, "gatewayClassName": "istio"},
}
INIT = "metadata|annotations|ray.io/initializing-timeout"
OPTIONS = "spec.upgradeStrategy.clusterUpgradeOptions"

Case = tuple[str, str, dict[str, Any], dict[str, Any]]
"""Code, object, what makes it refused, what is next to it and passes."""
CASES: list[Case] = [
    # names
    ("E-NAME-TOO-LONG", "job", {"metadata.name": "a" * 48}, {"metadata.name": "a" * 47}),
    ("E-NAME-TOO-LONG", "service", {"metadata.name": "a" * 48}, {"metadata.name": "a" * 47}),
    ("E-NAME-TOO-LONG", "cluster", {"metadata.name": "a" * 54}, {"metadata.name": "a" * 53}),
    ("E-NAME-FORM", "job", {"metadata.name": "2nd"}, {"metadata.name": "second-2"}),
    # the job
    ("E-SUBMISSION-MODE", "job", {"spec.submissionMode": "Foo"}, {"spec.submissionMode": "HTTPMode"}),
    ("W-SUBMISSION-MODE", "job", {"spec.submissionMode": "K8sJobMode"}, {}),
    ("E-SUSPEND-NEEDS-SHUTDOWN", "job", {"spec.suspend": True, **BY_RULES}, {"spec.suspend": True}),
    ("E-TTL-NEEDS-SHUTDOWN", "job", {"spec.shutdownAfterJobFinishes": False}, BY_RULES),
    ("E-NO-CLUSTER", "job", {"spec.rayClusterSpec": GONE}, SELECTS),
    ("E-SELECTOR-EMPTY", "job", {"spec.clusterSelector": {"a": "b"}, "spec.rayClusterSpec": GONE}, SELECTS),
    ("E-SELECTOR-SUSPEND", "job", {**SELECTS, "spec.suspend": True}, SELECTS),
    ("E-SELECTOR-BACKOFF", "job", {**SELECTS, "spec.backoffLimit": 1}, SELECTS),
    ("E-SELECTOR-SIDECAR", "job", {**SELECTS, "spec.submissionMode": "SidecarMode"}, SELECTS),
    (
        "E-INTERACTIVE-BACKOFF",
        "job",
        {"spec.submissionMode": "InteractiveMode", "spec.backoffLimit": 1},
        {"spec.submissionMode": "InteractiveMode"},
    ),
    (
        "E-SIDECAR-SUBMITTER",
        "job",
        {"spec.submissionMode": "SidecarMode"},
        {"spec.submissionMode": "SidecarMode", "spec.submitterConfig": GONE},
    ),
    (
        "E-SIDECAR-RESTART",
        "job",
        {"spec.submissionMode": "SidecarMode", f"{POD}.restartPolicy": "Always"},
        {"spec.submissionMode": "SidecarMode", f"{POD}.restartPolicy": "Never"},
    ),
    ("E-NEGATIVE", "job", {"spec.activeDeadlineSeconds": 0}, {"spec.activeDeadlineSeconds": 1}),
    ("E-NEGATIVE", "job", {"spec.preRunningDeadlineSeconds": 0}, {"spec.preRunningDeadlineSeconds": 1}),
    ("E-NEGATIVE", "job", {"spec.backoffLimit": -1}, {"spec.backoffLimit": 0}),
    ("E-NEGATIVE", "job", {"spec.ttlSecondsAfterFinished": -1}, {"spec.ttlSecondsAfterFinished": 0}),
    ("W-NO-DEADLINE", "job", {"spec.activeDeadlineSeconds": GONE}, {}),
    ("W-NO-PENDING-DEADLINE", "job", {"spec.preRunningDeadlineSeconds": GONE}, {}),
    ("W-NO-SHUTDOWN", "job", BY_RULES, {}),
    ("E-ENTRYPOINT-EMPTY", "job", {"spec.entrypoint": ""}, {"spec.entrypoint": "python -m app"}),
    *[
        ("E-ENTRYPOINT-SHELL", "job", {"spec.entrypoint": f"python -m app {text}"}, {"spec.entrypoint": "python a.py"})
        for text in ("; ls", "&& ls", "$HOME", "`ls`", "| tee", "'a b'", "> out", "*.py", "a\nb", "~/a")
    ],
    ("E-RUNTIME-ENV-YAML", "job", {"spec.runtimeEnvYAML": "a: [b"}, {"spec.runtimeEnvYAML": "env_vars: {A: b}"}),
    ("E-RUNTIME-ENV-YAML", "job", {"spec.runtimeEnvYAML": "just text"}, {"spec.runtimeEnvYAML": ""}),
    *[
        ("E-RUNTIME-ENV-INSTALLS", "job", {"spec.runtimeEnvYAML": f"{key}: [x]"}, {"spec.runtimeEnvYAML": "pip: []"})
        for key in ("pip", "conda", "uv")
    ],
    (
        "E-SECRET-VALUE",
        "job",
        {"spec.runtimeEnvYAML": "env_vars: {API_KEY: abcdefgh}"},
        {"spec.runtimeEnvYAML": "env_vars: {MAX_TOKENS: '12'}"},
    ),
    ("E-SECRET-VALUE", "job", {"spec.entrypoint": "python a.py --token=abc"}, {"spec.entrypoint": "python a.py --n=3"}),
    ("E-GROUP-HOSTS", "job", {f"{WORKER}.numOfHosts": 0}, {f"{WORKER}.numOfHosts": 1}),
    ("E-GROUP-HOSTS", "service", {f"{WORKER}.numOfHosts": -1}, {f"{WORKER}.numOfHosts": 4}),
    (
        "E-GROUP-LABEL-RESERVED",
        "job",
        {f"{WORKER}.labels": {"ray.io/node-id": "x"}},
        {f"{WORKER}.labels": {"ray.io/market-type": "spot", "example.com/rack": "a"}},
    ),
    (
        "E-GROUP-LABEL-RESERVED",
        "cluster",
        {f"{HEAD}.labels": {"ray.io/node-group": "x"}},
        {f"{HEAD}.labels": {"ray.io/region": "eu"}},
    ),
    ("E-GROUP-SUSPENDED", "job", {f"{WORKER}.suspend": True}, {f"{WORKER}.suspend": False}),
    ("E-MANAGED-BY", "job", {"spec.managedBy": "me"}, {"spec.managedBy": "kueue.x-k8s.io/multikueue"}),
    # deletion
    (
        "E-DELETION-SHUTDOWN",
        "job",
        {f"{STRATEGY}.deletionRules": [RULES["workers"]]},
        {**BY_RULES, f"{STRATEGY}.deletionRules": [RULES["workers"]]},
    ),
    (
        "E-DELETION-LEGACY",
        "job",
        {**BY_RULES, STRATEGY: {"deletionRules": [RULES["workers"]], "onSuccess": {}}},
        {**BY_RULES, STRATEGY: {"deletionRules": [RULES["workers"]]}},
    ),
    ("E-DELETION-EMPTY", "job", {**BY_RULES, STRATEGY: {}}, {**BY_RULES, STRATEGY: {"deletionRules": [RULES["both"]]}}),
    (
        "E-DELETION-EMPTY",
        "job",
        {STRATEGY: {"onSuccess": {"policy": "DeleteSelf"}}},
        {STRATEGY: {"onSuccess": {"policy": "DeleteSelf"}, "onFailure": {"policy": "DeleteSelf"}}},
    ),
    (
        "E-DELETION-POLICY",
        "job",
        {STRATEGY: {"onSuccess": {}, "onFailure": {"policy": "DeleteSelf"}}},
        {STRATEGY: {"onSuccess": {"policy": "DeleteSelf"}, "onFailure": {"policy": "DeleteSelf"}}},
    ),
    (
        "E-DELETION-NONE",
        "job",
        {STRATEGY: {"onSuccess": {"policy": "DeleteNone"}, "onFailure": {}}},
        {**BY_RULES, STRATEGY: {"onSuccess": {"policy": "DeleteNone"}, "onFailure": {}}},
    ),
    (
        "E-DELETION-CONDITION",
        "job",
        {**BY_RULES, f"{STRATEGY}.deletionRules": [RULES["both"]]},
        {**BY_RULES, f"{STRATEGY}.deletionRules": [RULES["cluster"]]},
    ),
    (
        "E-DELETION-TWICE",
        "job",
        {**BY_RULES, f"{STRATEGY}.deletionRules": [RULES["cluster"], RULES["early"]]},
        {**BY_RULES, f"{STRATEGY}.deletionRules": [RULES["cluster"], RULES["workers"]]},
    ),
    (
        "E-DELETION-ORDER",
        "job",
        {**BY_RULES, f"{STRATEGY}.deletionRules": [RULES["workers"], RULES["early"]]},
        {**BY_RULES, f"{STRATEGY}.deletionRules": [RULES["workers"], RULES["cluster"]]},
    ),
    (
        "E-DELETION-SELECTOR",
        "job",
        {**BY_RULES, **SELECTS, f"{STRATEGY}.deletionRules": [RULES["cluster"]]},
        {**BY_RULES, f"{STRATEGY}.deletionRules": [RULES["cluster"]]},
    ),
    (
        "E-DELETION-AUTOSCALER",
        "job",
        {**BY_RULES, "~.enableInTreeAutoscaling": True, f"{STRATEGY}.deletionRules": [RULES["workers"]]},
        {**BY_RULES, "~.enableInTreeAutoscaling": True, f"{STRATEGY}.deletionRules": [RULES["cluster"]]},
    ),
    (
        "E-NEGATIVE",
        "job",
        {
            **BY_RULES,
            f"{STRATEGY}.deletionRules": [
                {"policy": "DeleteSelf", "condition": {"jobStatus": "FAILED", "ttlSeconds": -1}}
            ],
        },
        {},
    ),
    # queues
    ("E-KUEUE-SHUTDOWN", "kueue", {"spec.shutdownAfterJobFinishes": False}, {}),
    ("E-KUEUE-SELECTOR", "kueue", SELECTS, {}),
    ("E-KUEUE-GROUPS", "kueue", {"~.workerGroupSpecs": [{}] * 8}, {"~.workerGroupSpecs": [{}] * 7}),
    ("E-KUEUE-AUTOSCALER", "kueue", {"~.enableInTreeAutoscaling": True}, {}),
    ("W-TWO-QUEUES", "kueue", {"metadata|labels|volcano.sh/queue-name": "b"}, {}),
    ("E-KAI-SUBMITTER", "kai", {"spec.submissionMode": GONE}, {}),
    # groups
    ("E-NO-CONTAINER", "job", {f"{POD}.containers": []}, {}),
    ("E-NO-CONTAINER", "job", {f"{WORKER}.template.spec.containers": []}, {}),
    ("E-RESOURCES-TWICE", "job", {f"{HEAD}.resources": {"CPU": "1"}}, {f"{WORKER}.resources": {"CPU": "1"}}),
    ("E-LABELS-IN-PARAMS", "job", {f"{WORKER}.rayStartParams.labels": "a=b"}, {f"{WORKER}.labels": {"a": "b"}}),
    ("E-LABEL-FORM", "job", {f"{WORKER}.labels": {"a b": "c"}}, {f"{WORKER}.labels": {"ray.io/market": "spot"}}),
    ("E-LABEL-FORM", "job", {f"{WORKER}.labels": {"a": "-"}}, {f"{WORKER}.labels": {"a": ""}}),
    ("W-GROUP-BOUNDS", "job", {f"{WORKER}.minReplicas": GONE}, {}),
    ("E-GROUP-NEGATIVE", "job", {f"{WORKER}.minReplicas": -1}, {f"{WORKER}.minReplicas": 0}),
    ("E-GROUP-ORDER", "job", {f"{WORKER}.minReplicas": 3}, {f"{WORKER}.minReplicas": 2}),
    ("E-GROUP-REPLICAS", "job", {f"{WORKER}.replicas": 3}, {f"{WORKER}.replicas": 2}),
    ("E-GROUP-NAME-TWICE", "job", {f"{WORKER}.groupName": "cpu"}, {f"{WORKER}.groupName": "cpu-2"}),
    ("E-GROUP-IDLE-V2", "job", {f"{WORKER}.idleTimeoutSeconds": 60}, {}),
    ("E-GROUP-NEGATIVE", "service", {f"{WORKER}.idleTimeoutSeconds": -1}, {f"{WORKER}.idleTimeoutSeconds": 60}),
    ("E-GROUP-PRIORITY-V2", "job", {f"{WORKER}.priority": 1}, {f"{WORKER}.priority": 0}),
    (
        "E-GROUP-PRIORITY-VERSION",
        "service",
        {f"{WORKER}.priority": 1, "~.rayVersion": "2.55.0"},
        {f"{WORKER}.priority": 1},
    ),
    ("E-GROUP-SUSPEND", "service", {f"{WORKER}.suspend": True}, {f"{WORKER}.suspend": False}),
    ("E-UPGRADE-CHILD", "job", {"~.upgradeStrategy": {"type": "Recreate"}}, {}),
    ("E-MANAGED-BY", "job", {"~.managedBy": "me"}, {"~.managedBy": "ray.io/kuberay-operator"}),
    # the autoscaler
    (
        "E-AUTOSCALER-ENV",
        "job",
        {f"{RAY}.env": [{"name": "RAY_enable_autoscaler_v2", "value": "1"}]},
        {f"{RAY}.env": [{"name": "RAY_enable_autoscaler_v2", "value": "0"}]},
    ),
    ("E-AUTOSCALER-TWICE", "service", {f"{RAY}.env": [{"name": "RAY_enable_autoscaler_v2", "value": "1"}]}, {}),
    ("E-AUTOSCALER-RESTART", "service", {f"{POD}.restartPolicy": "Always"}, {f"{POD}.restartPolicy": "Never"}),
    ("E-AUTOSCALER-RESTART", "service", {f"{WORKER}.template.spec.restartPolicy": "OnFailure"}, {}),
    ("E-AUTOSCALER-IDLE", "service", {"~.autoscalerOptions.idleTimeoutSeconds": -1}, {}),
    (
        "E-AUTOSCALER-START",
        "service",
        {"~.autoscalerOptions.env": [{"name": "KUBERAY_GEN_AUTOSCALER_START_CMD", "value": "x"}]},
        {"~.autoscalerOptions.env": [{"name": "OTHER", "value": "x"}]},
    ),
    # the head's state
    ("E-REDIS-UNSAID", "job", {f"{RAY}.env": [{"name": "RAY_REDIS_ADDRESS", "value": "r:1"}]}, {}),
    ("E-REDIS-TWICE", "redis", {"metadata|annotations|ray.io/ft-enabled": "true"}, {}),
    ("E-REDIS-TWICE", "redis", {f"{RAY}.env": [{"name": "REDIS_PASSWORD", "value": "$X"}]}, {}),
    ("E-REDIS-PASSWORD", "redis", {f"{HEAD}.rayStartParams.redis-password": "x"}, {}),
    ("E-REDIS-PASSWORD", "redis", {"~.gcsFaultToleranceOptions.redisPassword": {"value": "x"}}, {}),
    ("E-REDIS-USERNAME", "redis", {f"{HEAD}.rayStartParams.redis-username": "x"}, {}),
    ("E-REDIS-STORAGE", "redis", {"~.gcsFaultToleranceOptions.storage": {"size": "1Gi"}}, {}),
    ("E-ROCKSDB-REDIS", "rocksdb", {"~.gcsFaultToleranceOptions.redisAddress": "r:1"}, {}),
    (
        "E-ROCKSDB-CLAIM",
        "rocksdb",
        {"~.gcsFaultToleranceOptions.storage": {"size": "1Gi", "claimName": "c"}},
        {"~.gcsFaultToleranceOptions.storage": {"claimName": "c"}},
    ),
    ("E-ROCKSDB-MANAGED", "rocksdb", {f"{RAY}.volumeMounts.0": {"name": "x", "mountPath": "/data/gcs"}}, {}),
    ("W-GATE-ROCKSDB", "rocksdb", {}, {"~.gcsFaultToleranceOptions": {"backend": "redis", "redisAddress": "r:1"}}),
    # gates
    ("W-GATE-OFF", "job", {"~.tlsOptions": {"enabled": True}}, {}),
    (
        "E-TLS-MANAGED",
        "job",
        {"~.tlsOptions": {"enabled": True}, f"{RAY}.env": [{"name": "RAY_USE_TLS", "value": "1"}]},
        {"~.tlsOptions": {"enabled": True}},
    ),
    (
        "E-NETWORK-MODE",
        "job",
        {"~.networkPolicy": {"mode": "DenyAllEgress", "head": {"ingressRules": [{}]}}},
        {"~.networkPolicy": {"mode": "DenyAllIngress", "head": {"ingressRules": [{}]}}},
    ),
    (
        "E-NETWORK-GROUP",
        "job",
        {"~.networkPolicy": {"workerGroups": [{"groupName": "none"}]}},
        {"~.networkPolicy": {"workerGroups": [{"groupName": "gpu"}]}},
    ),
    ("E-GROUP-NAME", "job", {"~.networkPolicy": {}, f"{WORKER}.groupName": "GPU"}, {f"{WORKER}.groupName": "GPU"}),
    (
        "E-HISTORY-COLLECTOR",
        "job",
        {"~.historyServerOptions": {"collectorOptions": {"image": "a"}}},
        {"~.historyServerOptions": {"collectorOptions": {"image": "a", "env": [{"name": "STORAGE_BACKEND"}]}}},
    ),
    # who may speak to it
    ("E-AUTH-OPEN", "job", {"~.authOptions.mode": "disabled"}, {}),
    ("E-AUTH-OPEN", "service", {"~.authOptions": GONE}, {}),
    ("E-AUTH-VERSION", "job", {"~.rayVersion": GONE}, {"~.rayVersion": "2.52.0"}),
    ("E-AUTH-VERSION", "job", {"~.rayVersion": "2.51.9"}, {"~.rayVersion": "2.52"}),
    ("E-AUTH-VERSION", "job", {"~.rayVersion": "latest"}, {"~.rayVersion": "2.60.0-py312"}),
    ("E-AUTH-K8S-KIND", "job", {"~.authOptions.enableK8sTokenAuth": True}, {"~.authOptions.enableK8sTokenAuth": False}),
    ("E-AUTH-K8S-KIND", "service", {"~.authOptions.enableK8sTokenAuth": True}, {}),
    (
        "E-AUTH-K8S-MODE",
        "cluster",
        {"~.authOptions": {"enableK8sTokenAuth": True}},
        {"~.authOptions.enableK8sTokenAuth": True},
    ),
    (
        "E-AUTH-K8S-SECRET",
        "cluster",
        {"~.authOptions.enableK8sTokenAuth": True, "~.authOptions.secretName": "a"},
        {"~.authOptions.enableK8sTokenAuth": True},
    ),
    (
        "E-AUTH-K8S-VERSION",
        "cluster",
        {"~.authOptions.enableK8sTokenAuth": True, "~.rayVersion": "2.54.0"},
        {"~.authOptions.enableK8sTokenAuth": True, "~.rayVersion": "2.55.0"},
    ),
    ("E-HEAD-EXPOSED", "job", {f"{HEAD}.serviceType": "LoadBalancer"}, {f"{HEAD}.serviceType": GONE}),
    ("E-HEAD-EXPOSED", "job", {f"{HEAD}.enableIngress": True}, {f"{HEAD}.enableIngress": False}),
    # pods
    ("E-IMAGE-DIGEST", "job", {f"{RAY}.image": "rayproject/ray:2.60.0"}, {}),
    ("E-IMAGE-DIGEST", "job", {f"{WORKER}.template.spec.initContainers.0.image": "a:b"}, {}),
    ("E-HEAD-MEMORY", "job", {f"{RAY}.resources.limits.memory": "7Gi"}, {f"{RAY}.resources.limits.memory": "8Gi"}),
    ("E-HEAD-MEMORY", "job", {f"{RAY}.resources": {}}, {}),
    ("E-HEAD-WORKS", "job", {f"{HEAD}.rayStartParams": {}}, {}),
    (
        "E-SECRET-VALUE",
        "job",
        {f"{RAY}.env": [{"name": "HF_TOKEN", "value": "abc"}]},
        {f"{RAY}.env": [{"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": {"name": "a", "key": "b"}}}]},
    ),
    ("E-ENV-TWICE", "job", {f"{RAY}.env": [{"name": "A", "value": "1"}] * 2}, {f"{RAY}.env": [{"name": "A"}]}),
    ("E-ENV-RESERVED", "job", {f"{RAY}.env": [{"name": "RAY_AUTH_MODE", "value": "disabled"}]}, {}),
    ("E-POD-HOST", "job", {f"{POD}.hostNetwork": True}, {f"{POD}.hostNetwork": False}),
    ("E-POD-PRIVILEGES", "job", {f"{RAY}.securityContext.privileged": True}, {}),
    ("E-POD-ROOT", "job", {f"{RAY}.securityContext.runAsUser": 0}, {f"{RAY}.securityContext.runAsUser": 1000}),
    ("E-POD-CAPABILITIES", "job", {f"{RAY}.securityContext.capabilities": GONE}, {}),
    ("E-POD-SECCOMP", "job", {f"{RAY}.securityContext.seccompProfile.type": "Unconfined"}, {}),
    ("W-POD-WRITABLE", "job", {f"{RAY}.securityContext.readOnlyRootFilesystem": False}, {}),
    # the service
    ("E-SERVE-CONFIG", "service", {"spec.serveConfigV2": "a: [b"}, {}),
    ("E-SERVE-CONFIG", "service", {"spec.serveConfigV2": "{}"}, {"spec.serveConfigV2": "applications: [{name: a}]"}),
    ("E-SECRET-VALUE", "service", {"spec.serveConfigV2": "applications: [{k: hf_abcdefghijklmnopqrstuv}]"}, {}),
    ("E-UPGRADE-TYPE", "service", {"spec.upgradeStrategy.type": "Rolling"}, {"spec.upgradeStrategy.type": "None"}),
    ("E-NEGATIVE", "service", {"spec.rayClusterDeletionDelaySeconds": -1}, {"spec.rayClusterDeletionDelaySeconds": 60}),
    ("W-DELETION-DELAY", "service", {"spec.rayClusterDeletionDelaySeconds": 5}, {}),
    ("E-INCREMENTAL-AUTOSCALER", "fixed service", {"spec.upgradeStrategy": INCREMENTAL}, {}),
    (
        "E-INCREMENTAL-OPTIONS",
        "service",
        {"spec.upgradeStrategy.type": INCREMENTAL["type"]},
        {"spec.upgradeStrategy": INCREMENTAL},
    ),
    *[
        (
            f"E-INCREMENTAL-{what}",
            "service",
            {"spec.upgradeStrategy": INCREMENTAL, f"{OPTIONS}.{key}": value},
            {"spec.upgradeStrategy": INCREMENTAL},
        )
        for what, key, value in (
            ("PERCENT", "stepSizePercent", 101),
            ("STEP", "maxSurgePercent", 5),
            ("INTERVAL", "intervalSeconds", 0),
            ("GATEWAY", "gatewayClassName", ""),
        )
    ],
    (
        "E-HEAD-SERVICE-NAME",
        "service",
        {f"{HEAD}.headService": {"metadata": {"name": "a"}}},
        {f"{HEAD}.headService": {"metadata": {"labels": {}}}},
    ),
    ("E-INITIALIZING-TIMEOUT", "service", {INIT: "soon"}, {INIT: "30m"}),
    ("E-INITIALIZING-TIMEOUT", "service", {INIT: "0"}, {INIT: "600"}),
    ("E-SERVE-EXPOSED", "service", {"spec.serveService.spec.type": "NodePort"}, {"spec.serveService": GONE}),
]


def codes(kind: str, changes: dict[str, Any]) -> set[str]:
    """Codes of the findings on an object after changes; `~` is its cluster."""
    part = PART.get(kind, "spec.rayClusterSpec")
    copy = changed(OBJECTS[kind], {path.replace("~", part): value for path, value in changes.items()})
    return {finding.code for finding in check_rules(copy)}


@pytest.mark.parametrize("case", CASES, ids=[f"{index}-{case[0]}" for index, case in enumerate(CASES)])
def test_a_rule_refuses_and_accepts(case: Case) -> None:
    code, kind, bad, good = case
    assert code in codes(kind, bad)
    assert code not in codes(kind, good)


@pytest.mark.parametrize("kind", OBJECTS)
def test_what_is_built_breaks_no_rule(kind: str) -> None:
    assert codes(kind, {}) <= {"W-GATE-ROCKSDB"}


def test_no_finding_shows_a_secret() -> None:
    token = "hf_abcdefghijklmnopqrstuvwx"
    made = changed(
        OBJECTS["job"],
        {
            "spec.runtimeEnvYAML": f"env_vars: {{T: {token}}}",
            "spec.entrypoint": f"python a.py --token={token}",
            "spec.rayClusterSpec.headGroupSpec.template.spec.containers.0.env": [{"name": "A", "value": token}],
        },
    )
    found = check_rules(made)
    assert len([finding for finding in found if finding.code == "E-SECRET-VALUE"]) == 3
    assert token not in str(found)
