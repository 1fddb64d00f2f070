"""Rules for a RayJob: submission, entrypoint, runtime environment, queues, and deletion after its end."""

import re
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import yaml

from graftwork.cluster.jobs.checks import secrets_in, why_secret_text
from graftwork.cluster.jobs.models import Findings, refuse, warn
from graftwork.cluster.kuberay.labels import KAI_QUEUE, KUEUE_QUEUE, VOLCANO_QUEUE
from graftwork.cluster.kuberay.object_view import KubeView, dig, listed, mapping, number

MODES = ("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode")
LEAST = {"activeDeadlineSeconds": 1, "preRunningDeadlineSeconds": 1, "backoffLimit": 0, "ttlSecondsAfterFinished": 0}
PLAIN_WORDS = re.compile(r"[A-Za-z0-9_./:=@%+,-]+( [A-Za-z0-9_./:=@%+,-]+)*")
INSTALLS = ("pip", "conda", "uv")
KUEUE_GROUPS = 7
"""A Workload of Kueue's has eight sets of pods, and one is the head."""
DELETION_ORDER = ("DeleteWorkers", "DeleteCluster", "DeleteSelf")
"""A later one has a time no shorter."""


def check_mode(made: KubeView) -> Findings:
    """Submission mode. The schema takes any text, and the operator then does nothing at all."""
    spec = mapping(made.get("spec"))
    mode = spec.get("submissionMode")
    if mode not in (None, *MODES):
        yield refuse(
            "SUBMISSION-MODE",
            "spec.submissionMode",
            repr(mode),
            f"one of {', '.join(MODES)}",
            "submissionMode: HTTPMode",
        )
    elif mode != "HTTPMode":
        yield warn(
            "SUBMISSION-MODE",
            "spec.submissionMode",
            f"{mode or 'K8sJobMode'}",
            "with HTTPMode no second pod can submit a job twice or lose it (kuberay#2154, #4945)",
            "submissionMode: HTTPMode",
        )
    if mode == "InteractiveMode" and (number(spec.get("backoffLimit")) or 0) > 0:
        yield refuse(
            "INTERACTIVE-BACKOFF",
            "spec.backoffLimit",
            f"{spec['backoffLimit']}",
            "the operator cannot repeat a submission that a person makes",
            "backoffLimit: 0",
        )


def check_sidecar(made: KubeView) -> Findings:
    spec = mapping(made.get("spec"))
    if spec.get("submissionMode") != "SidecarMode":
        return
    for field in ("submitterPodTemplate", "submitterConfig"):
        if spec.get(field) is not None:
            yield refuse(
                "SIDECAR-SUBMITTER",
                f"spec.{field}",
                "with SidecarMode",
                "SidecarMode starts no submitter pod",
                f"remove {field}, or set submissionMode: K8sJobMode",
            )
    restart = dig(spec, "rayClusterSpec", "headGroupSpec", "template", "spec", "restartPolicy")
    if restart not in (None, "", "Never"):
        yield refuse(
            "SIDECAR-RESTART",
            "spec.rayClusterSpec.headGroupSpec.template.spec.restartPolicy",
            str(restart),
            "a head with a sidecar is not restarted",
            "restartPolicy: Never",
        )


def check_cluster_source(made: KubeView) -> Findings:
    """A job makes a cluster of its own or selects one."""
    spec = mapping(made.get("spec"))
    selector = spec.get("clusterSelector")
    if not selector and spec.get("rayClusterSpec") is None:
        yield refuse(
            "NO-CLUSTER",
            "spec",
            "neither rayClusterSpec nor clusterSelector",
            "a job makes a cluster or selects one",
            "add rayClusterSpec, or clusterSelector: {ray.io/cluster: NAME}",
        )
    if not selector:
        return
    if not mapping(selector).get("ray.io/cluster"):
        yield refuse(
            "SELECTOR-EMPTY",
            "spec.clusterSelector",
            "no ray.io/cluster",
            "the label ray.io/cluster names the cluster",
            "clusterSelector: {ray.io/cluster: NAME}",
        )
    if spec.get("suspend") is True:
        yield refuse(
            "SELECTOR-SUSPEND",
            "spec.suspend",
            "with clusterSelector",
            "a job cannot suspend a cluster that it did not make",
            "remove suspend, or replace clusterSelector with rayClusterSpec",
        )
    if (number(spec.get("backoffLimit")) or 0) > 0:
        yield refuse(
            "SELECTOR-BACKOFF",
            "spec.backoffLimit",
            "with clusterSelector",
            "each retry makes a new cluster, and this job makes none",
            "backoffLimit: 0",
        )
    if spec.get("submissionMode") == "SidecarMode":
        yield refuse(
            "SELECTOR-SIDECAR",
            "spec.submissionMode",
            "SidecarMode with clusterSelector",
            "the sidecar runs in a head that the job makes",
            "submissionMode: HTTPMode, or replace clusterSelector with rayClusterSpec",
        )


def check_deadlines(made: KubeView) -> Findings:
    """Time limits. A job whose head is gone stays Running, and its GPUs stay reserved (kuberay#4217)."""
    spec = mapping(made.get("spec"))
    for field, least in LEAST.items():
        value = number(spec.get(field))
        if value is not None and value < least:
            yield refuse(
                "NEGATIVE", f"spec.{field}", f"{value}", f"at least {least}", f"set {field}: {least}, or remove it"
            )
    if spec.get("activeDeadlineSeconds") is None:
        yield warn(
            "NO-DEADLINE",
            "spec.activeDeadlineSeconds",
            "none",
            "a job that hangs keeps its machines",
            "limits: {deadline: 12h}",
        )
    if spec.get("preRunningDeadlineSeconds") is None:
        yield warn(
            "NO-PENDING-DEADLINE",
            "spec.preRunningDeadlineSeconds",
            "none",
            "a job that never starts waits without end",
            "limits: {pending: 15m}",
        )


def check_shutdown(made: KubeView) -> Findings:
    """Keys that need shutdownAfterJobFinishes."""
    spec = mapping(made.get("spec"))
    if spec.get("shutdownAfterJobFinishes") is True:
        return
    if spec.get("suspend") is True:
        yield refuse(
            "SUSPEND-NEEDS-SHUTDOWN",
            "spec.suspend",
            "shutdownAfterJobFinishes is not true",
            "a job that keeps its cluster is not suspended",
            "shutdownAfterJobFinishes: true, or remove suspend",
        )
    if (ttl := number(spec.get("ttlSecondsAfterFinished")) or 0) > 0:
        yield refuse(
            "TTL-NEEDS-SHUTDOWN",
            "spec.ttlSecondsAfterFinished",
            f"{ttl} without shutdownAfterJobFinishes",
            "nothing is deleted at that time",
            "shutdownAfterJobFinishes: true, or remove ttlSecondsAfterFinished",
        )
    if spec.get("deletionStrategy") is None:
        yield warn(
            "NO-SHUTDOWN",
            "spec.shutdownAfterJobFinishes",
            "not true",
            "the cluster keeps its machines after the job has ended",
            "shutdownAfterJobFinishes: true",
        )


def check_entrypoint(made: KubeView) -> Findings:
    """Plain words: what follows `;` runs in another pod, and `$` is another pod's (kuberay#3802, #3561)."""
    text = str(dig(made, "spec", "entrypoint") or "")
    if dig(made, "spec", "submissionMode") == "InteractiveMode":
        return
    if not text:
        yield refuse(
            "ENTRYPOINT-EMPTY",
            "spec.entrypoint",
            "none",
            "a job has a command",
            "entrypoint: python -m graftwork.cluster.jobs.driver ROOT JOB ATTEMPT job",
        )
    elif not PLAIN_WORDS.fullmatch(text):
        odd = sorted({char for char in text if not re.fullmatch(r"[A-Za-z0-9_./:=@%+, -]", char)})
        yield refuse(
            "ENTRYPOINT-SHELL",
            "spec.entrypoint",
            f"it has {' '.join(map(repr, odd)) or 'empty words'}",
            "plain words: a shell on the head reads it",
            "use only letters, digits and _./:=@%+,- in the entrypoint",
        )
    if (why := why_secret_text(text)) is not None:
        yield refuse(
            "SECRET-VALUE",
            "spec.entrypoint",
            why,
            "everyone who may list jobs sees the entrypoint",
            "remove the value from the entrypoint and set secret_env: {NAME: SECRET/KEY}",
        )


def check_runtime_env(made: KubeView) -> Findings:
    """No installation at run time: pip hangs as PENDING, and the dashboard shows env_vars (ray#26332, #39502)."""
    text, where = dig(made, "spec", "runtimeEnvYAML"), "spec.runtimeEnvYAML"
    if not text:
        return
    try:
        env = yaml.safe_load(str(text))
        problem = "" if isinstance(env, Mapping) else f"a {type(env).__name__}"
    except yaml.YAMLError as error:
        problem = f"no YAML: {str(error).splitlines()[0]}"
    if problem:
        yield refuse(
            "RUNTIME-ENV-YAML",
            where,
            problem,
            "runtimeEnvYAML is a YAML mapping",
            'runtimeEnvYAML: "working_dir: /home/ray/code", or remove it',
        )
        return
    for key in INSTALLS:
        if env.get(key):
            yield refuse(
                "RUNTIME-ENV-INSTALLS",
                f"{where}.{key}",
                "packages",
                "what a job needs is in its image",
                "install the packages in the image, and remove the key from runtimeEnvYAML",
            )
    for path, why in secrets_in(env):
        yield refuse(
            "SECRET-VALUE",
            f"{where}.{path}",
            why,
            "a secret value comes from a Kubernetes Secret",
            "secret_env: {NAME: SECRET/KEY}",
        )


def check_kueue(made: KubeView) -> Findings:
    """Requirements of Kueue, without which a job waits without end."""
    if KUEUE_QUEUE not in mapping(dig(made, "metadata", "labels")):
        return
    spec, where = mapping(made.get("spec")), f"metadata.labels.{KUEUE_QUEUE}"
    if spec.get("shutdownAfterJobFinishes") is not True:
        yield refuse(
            "KUEUE-SHUTDOWN",
            where,
            "shutdownAfterJobFinishes is not true",
            "Kueue frees the quota when the cluster is deleted",
            "shutdownAfterJobFinishes: true",
        )
    if spec.get("clusterSelector"):
        yield refuse(
            "KUEUE-SELECTOR",
            where,
            "with clusterSelector",
            "Kueue admits a job with its cluster, and this job makes none",
            f"remove the label {KUEUE_QUEUE}, or replace clusterSelector with rayClusterSpec",
        )
    groups = len(listed(dig(spec, "rayClusterSpec", "workerGroupSpecs")))
    if groups > KUEUE_GROUPS:
        yield refuse(
            "KUEUE-GROUPS",
            where,
            f"{groups} worker groups",
            f"Kueue admits the head and at most {KUEUE_GROUPS} worker groups",
            "merge groups with equal machines, and raise `count`",
        )
    if dig(spec, "rayClusterSpec", "enableInTreeAutoscaling") is True:
        yield refuse(
            "KUEUE-AUTOSCALER",
            where,
            "with the autoscaler",
            "Kueue admits a fixed number of machines",
            "enableInTreeAutoscaling: false, or leave `queue` out",
        )


def check_gang_queue(made: KubeView) -> Findings:
    """Queues of gang schedulers."""
    labels = mapping(dig(made, "metadata", "labels"))
    others = [label for label in (VOLCANO_QUEUE, KAI_QUEUE) if label in labels]
    if KUEUE_QUEUE in labels and others:
        yield warn(
            "TWO-QUEUES",
            f"metadata.labels.{others[0]}",
            f"together with Kueue's {labels[KUEUE_QUEUE]!r}",
            "a job that one queue lets go may wait in the other and hold the first one's quota",
            "remove `queue` or `gang_queue` from cluster.yaml",
        )
    if KAI_QUEUE in labels and dig(made, "spec", "submissionMode") in (None, "K8sJobMode"):
        yield refuse(
            "KAI-SUBMITTER",
            "spec.submissionMode",
            "K8sJobMode",
            "KAI cannot place a submitter that comes after its cluster",
            "submissionMode: HTTPMode",
        )


def check_deletion_strategy(made: KubeView) -> Findings:
    """Deletion by shutdown and a time, or by deletion rules; not by both."""
    strategy, where = dig(made, "spec", "deletionStrategy"), "spec.deletionStrategy"
    if not isinstance(strategy, Mapping):
        return
    rules, legacy = listed(strategy.get("deletionRules")), {"onSuccess", "onFailure"} & set(strategy)
    if rules and dig(made, "spec", "shutdownAfterJobFinishes") is True:
        yield refuse(
            "DELETION-SHUTDOWN",
            where,
            "deletionRules with shutdownAfterJobFinishes",
            "deletionRules and shutdownAfterJobFinishes exclude each other",
            "set shutdownAfterJobFinishes: false, or remove deletionRules",
        )
    if rules and legacy:
        yield refuse(
            "DELETION-LEGACY",
            where,
            f"deletionRules with {', '.join(sorted(legacy))}",
            "deletionRules replace onSuccess and onFailure",
            f"remove {' and '.join(sorted(legacy))}",
        )
    elif not rules and len(legacy) < 2:
        yield refuse(
            "DELETION-EMPTY",
            where,
            "neither deletionRules nor both onSuccess and onFailure",
            "a deletionStrategy has deletionRules, or both onSuccess and onFailure",
            "remove deletionStrategy, or add both onSuccess and onFailure: {policy: DeleteCluster}",
        )


def check_legacy_policies(made: KubeView) -> Findings:
    strategy = mapping(dig(made, "spec", "deletionStrategy"))
    for side in ("onSuccess", "onFailure"):
        if side not in strategy:
            continue
        where, policy = f"spec.deletionStrategy.{side}.policy", dig(strategy, side, "policy")
        if policy is None:
            yield refuse(
                "DELETION-POLICY",
                where,
                "none",
                "a policy names what is deleted",
                "policy: DeleteCluster (or DeleteWorkers, DeleteSelf, DeleteNone)",
            )
        if policy == "DeleteNone" and dig(made, "spec", "shutdownAfterJobFinishes") is True:
            yield refuse(
                "DELETION-NONE",
                where,
                "DeleteNone with shutdownAfterJobFinishes",
                "DeleteNone keeps the cluster, and shutdownAfterJobFinishes deletes it",
                "set shutdownAfterJobFinishes: false, or policy: DeleteCluster",
            )
        yield from _policy_findings(made, where, policy)


def check_deletion_rules(made: KubeView) -> Findings:
    where, times = "spec.deletionStrategy.deletionRules", dict[tuple[str, str, str], float]()
    for index, rule in enumerate(listed(dig(made, "spec", "deletionStrategy", "deletionRules"))):
        at, condition, policy = f"{where}[{index}]", mapping(rule.get("condition")), str(rule.get("policy"))
        fields = [key for key in ("jobStatus", "jobDeploymentStatus") if condition.get(key) is not None]
        if len(fields) != 1:
            yield refuse(
                "DELETION-CONDITION",
                f"{at}.condition",
                f"{len(fields)} of jobStatus, jobDeploymentStatus",
                "a condition has exactly one of jobStatus and jobDeploymentStatus",
                "condition: {jobStatus: SUCCEEDED, ttlSeconds: 300}",
            )
            continue
        if (ttl := number(condition.get("ttlSeconds")) or 0) < 0:
            yield refuse("NEGATIVE", f"{at}.condition.ttlSeconds", f"{ttl}", "a time is 0 s or more", "ttlSeconds: 0")
        yield from _policy_findings(made, f"{at}.policy", policy)
        key = (fields[0], str(condition[fields[0]]), policy)
        if key in times:
            yield refuse(
                "DELETION-TWICE",
                at,
                f"{policy} at {key[1]} is said before",
                "each policy appears once per status",
                f"remove deletionRules[{index}]",
            )
        times.setdefault(key, ttl)
    for field, status in dict.fromkeys((field, status) for field, status, _ in times):
        given = [
            (policy, times[field, status, policy]) for policy in DELETION_ORDER if (field, status, policy) in times
        ]
        for (first, early), (then, late) in pairwise(given):
            if late < early:
                yield refuse(
                    "DELETION-ORDER",
                    where,
                    f"at {status}: {then} after {late} s, {first} after {early} s",
                    "workers are deleted first, then the cluster, then the job",
                    f"set ttlSeconds of {then} to {early:g} or more",
                )


def _policy_findings(made: KubeView, where: str, policy: Any) -> Findings:
    if policy in ("DeleteCluster", "DeleteWorkers") and dig(made, "spec", "clusterSelector"):
        yield refuse(
            "DELETION-SELECTOR",
            where,
            f"{policy} with clusterSelector",
            "the cluster belongs to clusterSelector, not to this job",
            "policy: DeleteSelf, or DeleteNone",
        )
    if policy == "DeleteWorkers" and dig(made, "spec", "rayClusterSpec", "enableInTreeAutoscaling") is True:
        yield refuse(
            "DELETION-AUTOSCALER",
            where,
            "DeleteWorkers with the autoscaler",
            "the autoscaler starts deleted workers again",
            "policy: DeleteCluster, or enableInTreeAutoscaling: false",
        )


JOB_RULES = (
    *(check_mode, check_sidecar, check_cluster_source, check_deadlines, check_shutdown, check_entrypoint),
    *(check_runtime_env, check_kueue, check_gang_queue),
    *(check_deletion_strategy, check_legacy_policies, check_deletion_rules),
)
