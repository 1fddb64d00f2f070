"""Rules for a RayJob: submission, entrypoint, runtime environment and queues."""

import re
from collections.abc import Mapping
from typing import Any

import yaml

from graftwork.cluster.jobs.environment import secrets_in, why_secret_text
from graftwork.cluster.kuberay.object_view import Found, dig, listed, mapping, number, refuse, warn
from graftwork.cluster.kuberay.objects import KAI_QUEUE, KUEUE_QUEUE, VOLCANO_QUEUE

Object = Mapping[str, Any]
MODES = ("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode")
PLAIN_WORDS = re.compile(r"[A-Za-z0-9_./:=@%+,-]+( [A-Za-z0-9_./:=@%+,-]+)*")
INSTALLS = ("pip", "conda", "uv")


def mode_is_one(made: Object) -> Found:
    """The schema takes any text, and the operator then does nothing at all."""
    mode = dig(made, "spec", "submissionMode")
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


def suspend_needs_shutdown(made: Object) -> Found:
    spec = mapping(made.get("spec"))
    if spec.get("suspend") is True and spec.get("shutdownAfterJobFinishes") is not True:
        yield refuse(
            "SUSPEND-NEEDS-SHUTDOWN",
            "spec.suspend",
            "shutdownAfterJobFinishes is not true",
            "a job that keeps its cluster is not suspended",
            "shutdownAfterJobFinishes: true, or remove suspend",
        )


def a_cluster_is_named_or_made(made: Object) -> Found:
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


def interactive_is_not_retried(made: Object) -> Found:
    spec = mapping(made.get("spec"))
    if spec.get("submissionMode") == "InteractiveMode" and (number(spec.get("backoffLimit")) or 0) > 0:
        yield refuse(
            "INTERACTIVE-BACKOFF",
            "spec.backoffLimit",
            f"{spec['backoffLimit']}",
            "the operator cannot repeat a submission that a person makes",
            "backoffLimit: 0",
        )


def sidecars_have_no_submitter(made: Object) -> Found:
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


def numbers_are_positive(made: Object) -> Found:
    spec = mapping(made.get("spec"))
    for field, least in (
        ("activeDeadlineSeconds", 1),
        ("preRunningDeadlineSeconds", 1),
        ("backoffLimit", 0),
        ("ttlSecondsAfterFinished", 0),
    ):
        value = number(spec.get(field))
        if value is not None and value < least:
            yield refuse(
                "NEGATIVE", f"spec.{field}", f"{value}", f"at least {least}", f"set {field}: {least}, or remove it"
            )


def it_ends(made: Object) -> Found:
    """kuberay#4217: a job whose head is gone stays Running, and its GPUs stay taken."""
    spec = mapping(made.get("spec"))
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
    if spec.get("shutdownAfterJobFinishes") is not True and spec.get("deletionStrategy") is None:
        yield warn(
            "NO-SHUTDOWN",
            "spec.shutdownAfterJobFinishes",
            "not true",
            "the cluster keeps its machines after the job has ended",
            "shutdownAfterJobFinishes: true",
        )


def entrypoint_is_plain_words(made: Object) -> Found:
    """kuberay#3802, #3561: the rest of a line after `;` runs in another pod; `$` is another pod's."""
    text = dig(made, "spec", "entrypoint")
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
    elif not PLAIN_WORDS.fullmatch(str(text)):
        odd = sorted({char for char in str(text) if not re.fullmatch(r"[A-Za-z0-9_./:=@%+, -]", char)})
        yield refuse(
            "ENTRYPOINT-SHELL",
            "spec.entrypoint",
            f"it has {' '.join(map(repr, odd)) or 'empty words'}",
            "plain words: a shell on the head reads it",
            "use only letters, digits and _./:=@%+,- in the entrypoint",
        )
    if text and why_secret_text(str(text)) is not None:
        yield refuse(
            "SECRET-VALUE",
            "spec.entrypoint",
            str(why_secret_text(str(text))),
            "everyone who may list jobs sees the entrypoint",
            "remove the value from the entrypoint and set secret_env: {NAME: SECRET/KEY}",
        )


def runtime_env_installs_nothing(made: Object) -> Found:
    """ray#26332, #39502: pip at run time hangs as PENDING; env_vars are shown by the dashboard."""
    text, where = dig(made, "spec", "runtimeEnvYAML"), "spec.runtimeEnvYAML"
    if not text:
        return
    try:
        env = yaml.safe_load(str(text))
    except yaml.YAMLError as error:
        yield refuse(
            "RUNTIME-ENV-YAML",
            where,
            f"no YAML: {str(error).splitlines()[0]}",
            "runtimeEnvYAML is a YAML mapping",
            'runtimeEnvYAML: "working_dir: /home/ray/code", or remove it',
        )
        return
    if not isinstance(env, Mapping):
        yield refuse(
            "RUNTIME-ENV-YAML",
            where,
            f"a {type(env).__name__}",
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


JOB_RULES = (
    mode_is_one,
    suspend_needs_shutdown,
    a_cluster_is_named_or_made,
    interactive_is_not_retried,
    sidecars_have_no_submitter,
    numbers_are_positive,
    it_ends,
    entrypoint_is_plain_words,
    runtime_env_installs_nothing,
)


# Queues and gang schedulers: their requirements for a RayJob, checked before it waits without end.


KUEUE_GROUPS = 7
"""A Workload of Kueue's has eight sets of pods, and one is the head."""


def kueue(made: Object) -> Found:
    if KUEUE_QUEUE not in _labels(made):
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


def two_queues(made: Object) -> Found:
    labels = _labels(made)
    others = [label for label in (VOLCANO_QUEUE, KAI_QUEUE) if label in labels]
    if KUEUE_QUEUE in labels and others:
        yield warn(
            "TWO-QUEUES",
            f"metadata.labels.{others[0]}",
            f"together with Kueue's {labels[KUEUE_QUEUE]!r}",
            "a job that one queue lets go may wait in the other and hold the first one's quota",
            "remove `queue` or `gang_queue` from cluster.yaml",
        )


def kai_has_no_submitter(made: Object) -> Found:
    mode = dig(made, "spec", "submissionMode")
    if KAI_QUEUE in _labels(made) and mode in (None, "K8sJobMode"):
        yield refuse(
            "KAI-SUBMITTER",
            "spec.submissionMode",
            "K8sJobMode",
            "KAI cannot place a submitter that comes after its cluster",
            "submissionMode: HTTPMode",
        )


def _labels(made: Object) -> Mapping[str, Any]:
    return mapping(dig(made, "metadata", "labels"))


QUEUE_RULES = (kueue, two_queues, kai_has_no_submitter)
