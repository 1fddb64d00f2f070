"""A RayJob: how it is submitted, how it ends, what it may run."""

import re
from collections.abc import Mapping
from typing import Any

import yaml

from graftwork.cluster.kuberay.findings import Found, dig, mapping, number, refuse, warn
from graftwork.cluster.secret_like import secrets_in, why_secret_text

MODES = ("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode")
PLAIN_WORDS = re.compile(r"[A-Za-z0-9_./:=@%+,-]+( [A-Za-z0-9_./:=@%+,-]+)*")
INSTALLS = ("pip", "conda", "uv")
Object = Mapping[str, Any]


def mode_is_one(made: Object) -> Found:
    """The schema takes any text, and the operator then does nothing at all."""
    mode = dig(made, "spec", "submissionMode")
    if mode not in (None, *MODES):
        yield refuse("SUBMISSION-MODE", "spec.submissionMode", repr(mode), f"one of {', '.join(MODES)}")
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
        yield refuse("SUSPEND-NEEDS-SHUTDOWN", "spec.suspend", "shutdownAfterJobFinishes is not true",
                     "a job that keeps its cluster is not suspended", "shutdownAfterJobFinishes: true")  # fmt: skip


def a_cluster_is_named_or_made(made: Object) -> Found:
    spec = mapping(made.get("spec"))
    selector = spec.get("clusterSelector")
    if not selector and spec.get("rayClusterSpec") is None:
        yield refuse("NO-CLUSTER", "spec", "neither rayClusterSpec nor clusterSelector", "one of them")
    if not selector:
        return
    if not mapping(selector).get("ray.io/cluster"):
        yield refuse("SELECTOR-EMPTY", "spec.clusterSelector", "no ray.io/cluster", "it names the cluster")
    if spec.get("suspend") is True:
        yield refuse(
            "SELECTOR-SUSPEND", "spec.suspend", "with clusterSelector", "the cluster is not this job's to stop"
        )
    if (number(spec.get("backoffLimit")) or 0) > 0:
        yield refuse("SELECTOR-BACKOFF", "spec.backoffLimit", "with clusterSelector", "a retry is a new cluster")
    if spec.get("submissionMode") == "SidecarMode":
        yield refuse("SELECTOR-SIDECAR", "spec.submissionMode", "SidecarMode with clusterSelector",
                     "the sidecar lies in a head that the job makes")  # fmt: skip


def interactive_is_not_retried(made: Object) -> Found:
    spec = mapping(made.get("spec"))
    if spec.get("submissionMode") == "InteractiveMode" and (number(spec.get("backoffLimit")) or 0) > 0:
        yield refuse("INTERACTIVE-BACKOFF", "spec.backoffLimit", f"{spec['backoffLimit']}",
                     "a job that a person submits is not submitted again")  # fmt: skip


def sidecars_have_no_submitter(made: Object) -> Found:
    spec = mapping(made.get("spec"))
    if spec.get("submissionMode") != "SidecarMode":
        return
    for field in ("submitterPodTemplate", "submitterConfig"):
        if spec.get(field) is not None:
            yield refuse("SIDECAR-SUBMITTER", f"spec.{field}", "with SidecarMode", "there is no submitter's pod")
    restart = dig(spec, "rayClusterSpec", "headGroupSpec", "template", "spec", "restartPolicy")
    if restart not in (None, "", "Never"):
        yield refuse("SIDECAR-RESTART", "spec.rayClusterSpec.headGroupSpec.template.spec.restartPolicy", str(restart),
                     "a head with a sidecar is not restarted", "leave it out, or Never")  # fmt: skip


def numbers_are_positive(made: Object) -> Found:
    spec = mapping(made.get("spec"))
    for field, least in (("activeDeadlineSeconds", 1), ("preRunningDeadlineSeconds", 1), ("backoffLimit", 0),
                         ("ttlSecondsAfterFinished", 0)):  # fmt: skip
        value = number(spec.get(field))
        if value is not None and value < least:
            yield refuse("NEGATIVE", f"spec.{field}", f"{value}", f"{least} or more")


def it_ends(made: Object) -> Found:
    """kuberay#4217: a job whose head is gone is Running for ever, and its GPUs stay taken."""
    spec = mapping(made.get("spec"))
    if spec.get("activeDeadlineSeconds") is None:
        yield warn("NO-DEADLINE", "spec.activeDeadlineSeconds", "none", "a job that hangs keeps its machines",
                   "limits: {deadline: 12h}")  # fmt: skip
    if spec.get("preRunningDeadlineSeconds") is None:
        yield warn("NO-PENDING-DEADLINE", "spec.preRunningDeadlineSeconds", "none",
                   "a job that never starts waits for ever", "limits: {pending: 15m}")  # fmt: skip
    if spec.get("shutdownAfterJobFinishes") is not True and spec.get("deletionStrategy") is None:
        yield warn("NO-SHUTDOWN", "spec.shutdownAfterJobFinishes", "not true", "the cluster outlives the job")


def entrypoint_is_plain_words(made: Object) -> Found:
    """kuberay#3802, #3561: the rest of a line after `;` runs in another pod; `$` is another pod's."""
    text = dig(made, "spec", "entrypoint")
    if dig(made, "spec", "submissionMode") == "InteractiveMode":
        return
    if not text:
        yield refuse("ENTRYPOINT-EMPTY", "spec.entrypoint", "none", "a job runs something")
    elif not PLAIN_WORDS.fullmatch(str(text)):
        odd = sorted({char for char in str(text) if not re.fullmatch(r"[A-Za-z0-9_./:=@%+, -]", char)})
        yield refuse("ENTRYPOINT-SHELL", "spec.entrypoint", f"it has {' '.join(map(repr, odd)) or 'empty words'}",
                     "plain words: a shell on the head reads it", "rename what has these signs")  # fmt: skip
    if text and why_secret_text(str(text)) is not None:
        yield refuse(
            "SECRET-VALUE", "spec.entrypoint", str(why_secret_text(str(text))), "an entrypoint is shown to all"
        )


def runtime_env_installs_nothing(made: Object) -> Found:
    """ray#26332, #39502: pip at run time hangs as PENDING; env_vars are shown by the dashboard."""
    text, where = dig(made, "spec", "runtimeEnvYAML"), "spec.runtimeEnvYAML"
    if not text:
        return
    try:
        env = yaml.safe_load(str(text))
    except yaml.YAMLError as error:
        yield refuse("RUNTIME-ENV-YAML", where, f"no YAML: {str(error).splitlines()[0]}", "a YAML mapping")
        return
    if not isinstance(env, Mapping):
        yield refuse("RUNTIME-ENV-YAML", where, f"a {type(env).__name__}", "a YAML mapping")
        return
    for key in INSTALLS:
        if env.get(key):
            yield refuse("RUNTIME-ENV-INSTALLS", f"{where}.{key}", "packages", "what a job needs is in its image",
                         "build it into the image")  # fmt: skip
    for path, why in secrets_in(env):
        yield refuse("SECRET-VALUE", f"{where}.{path}", why, "a secret is a Secret's", "secret_env: {NAME: SECRET/KEY}")


JOB_RULES = (
    mode_is_one, suspend_needs_shutdown, a_cluster_is_named_or_made, interactive_is_not_retried,
    sidecars_have_no_submitter, numbers_are_positive, it_ends, entrypoint_is_plain_words, runtime_env_installs_nothing,
)  # fmt: skip
