"""What a job names in its namespace must be there: Secrets and their keys, an account, a claim, a priority class."""

from graftwork.cluster.backend import Finding, Job
from graftwork.cluster.kuberay import api_errors
from graftwork.cluster.kuberay.api import ApiResponse, KubeApi, cluster_path, namespaced
from graftwork.cluster.kuberay.findings import Found, refuse, warn

STORE_KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")


def secret_findings(api: KubeApi, job: Job) -> Found:
    """Names and keys alone; values are not looked at."""
    for (name, where), keys in _wanted_secrets(job).items():
        answer = api.ask("GET", namespaced("", "v1", api.place.namespace, "secrets", name))
        if answer.absent:
            yield refuse("SECRET-ABSENT", where, f"there is no Secret {name!r} in {api.place.namespace}",
                "pods that name a Secret wait for it", f"kubectl create secret generic {name} --namespace "
                f"{api.place.namespace} " + " ".join(f"--from-file={key}=FILE" for key in keys),
            )  # fmt: skip
        elif not answer.ok:
            yield unchecked(api.on, "Secrets and their keys", answer)
            return
        else:
            lacking = [key for key in keys if key not in answer.body.get("data", {})]
            if lacking:
                yield refuse("SECRET-KEY", where, f"the Secret {name!r} has no key {', '.join(lacking)}",
                              f"it has {', '.join(sorted(answer.body.get('data', {}))) or 'none'}",
                              "correct the key, or add it to the Secret")  # fmt: skip


def _wanted_secrets(job: Job) -> dict[tuple[str, str], list[str]]:
    """Keys by Secret and by the spec's key that names it."""
    cluster = job.cluster
    wanted: dict[tuple[str, str], list[str]] = {}
    for name, reference in cluster.secret_env.items():
        secret, _, key = reference.partition("/")
        wanted.setdefault((secret, f"secret_env.{name}"), []).append(key)
    for given, where, keys in (
        (cluster.storage.secret, "storage.secret", STORE_KEYS), (cluster.auth.secret, "auth.secret", ("auth_token",)),
        (cluster.image_pull_secret, "image_pull_secret", (".dockerconfigjson",)),
        (cluster.gcs.redis_secret, "gcs.redis_secret", ("password",)),
    ):  # fmt: skip
        if given is not None:
            wanted[given, where] = list(keys)
    return wanted


def name_findings(api: KubeApi, job: Job) -> Found:
    """A service account, a priority class, a volume claim."""
    cluster, namespace = job.cluster, api.place.namespace
    yield from _exists(
        api, namespaced("", "v1", namespace, "serviceaccounts", cluster.service_account), "service_account",
        "service account", "ACCOUNT-ABSENT", "kubectl apply -k k8s/base",
    )  # fmt: skip
    if cluster.storage.claim is not None:
        yield from _exists(
            api, namespaced("", "v1", namespace, "persistentvolumeclaims", cluster.storage.claim), "storage.claim",
            "PersistentVolumeClaim", "CLAIM-ABSENT", "create it with access mode ReadWriteMany",
        )  # fmt: skip
    if cluster.priority is not None and cluster.queue is None:
        yield from _exists(
            api,
            cluster_path("scheduling.k8s.io", "v1", "priorityclasses", cluster.priority),
            "priority",
            "PriorityClass",
            "PRIORITY-ABSENT",
            "kubectl get priorityclasses lists those there are",
        )


def _exists(api: KubeApi, path: str, where: str, what: str, code: str, hint: str) -> Found:
    name, answer = path.rpartition("/")[2], api.ask("GET", path)
    if answer.absent:
        yield refuse(code, where, f"there is no {what} {name!r}", "what pods name must be there", hint)
    elif not answer.ok:
        yield unchecked(api.on, f"the {what} {name!r}", answer)


def unchecked(on: str, what: str, answer: ApiResponse) -> Finding:
    """A warning that something could not be looked at, and what it would take."""
    rule = api_errors.missing_rule(answer.message) if answer.code == 403 else None
    why = "this API server has no such kind" if answer.unserved else f"{answer.code} {answer.message[:200]}"
    return warn("NOT-CHECKED", on, f"not checked: {what} ({why})", "",
                f"the rule {rule} would let us look" if rule else "look with kubectl")  # fmt: skip
