"""The API server of a Kubernetes cluster: one way to ask it, with time limits and retries, over `kubernetes`.

Every call that we make may be made twice: what is created has our name, what is deleted may be gone.
"""

import json
import os
import re
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import quote

import yaml

from graftwork.cluster.jobs.models import Finding, warn
from graftwork.cluster.kuberay.labels import pod_selector
from graftwork.cluster.kuberay.object_view import KubeView, dig, listed, mapping
from graftwork.errors import ClusterError, ConfigError

TIMEOUT_S = (5.0, 10.0)
"""To connect, and to answer."""
PATIENCE_S = 6.0
"""How long a call is tried again where the server is overloaded, failing or not heard."""
FIRST_PAUSE_S = 0.25
BUSY = frozenset({429, 500, 502, 503, 504})
HELM = (
    "helm install kuberay-operator kuberay/kuberay-operator --version 1.7.0 --values k8s/operator-values.yaml "
    "--namespace kuberay-system --create-namespace"
)
PAGE = 500
"""Objects of one answer to a listing."""
Method = Literal["GET", "POST", "PUT", "DELETE"]


@dataclass(frozen=True)
class KubeNamespace:
    """A namespace of a context, as `--target k8s:CONTEXT/NAMESPACE` names it. A context may hold slashes."""

    context: str
    namespace: str

    @classmethod
    def parse(cls, on: str) -> "KubeNamespace":
        """Raises ConfigError unless both are named."""
        context, slash, namespace = on.removeprefix("k8s:").rpartition("/")
        if not slash or not context or not namespace:
            raise ConfigError(
                f"--target {on}",
                "it does not name a context and a namespace",
                "k8s:CONTEXT/NAMESPACE",
                "kubectl config get-contexts lists the contexts",
            )
        return cls(context, namespace)


@dataclass(frozen=True)
class ApiResponse:
    """Answer of the server. `body` is an object, a list or a Status."""

    code: int
    body: KubeView
    text: str = ""

    @property
    def ok(self) -> bool:
        return 200 <= self.code < 300

    @property
    def absent(self) -> bool:
        """The kind is served, and there is no such object."""
        return self.code == 404 and bool(self.body.get("details", {}).get("name"))

    @property
    def unserved(self) -> bool:
        """The server does not know the kind."""
        return self.code == 404 and not self.absent

    @property
    def message(self) -> str:
        """Return the message of the server."""
        return str(self.body.get("message") or self.text).strip()[:1000]


class KubeApi:
    """Opens the kubeconfig at the first call. Raises ClusterError with exit code 3 where no answer could be had."""

    def __init__(self, on: str) -> None:
        self.on = on
        self.place = KubeNamespace.parse(on)
        self._client: Any = None

    def ask(
        self, method: Method, path: str, body: KubeView | None = None, query: Mapping[str, str] | None = None
    ) -> ApiResponse:
        """One call, tried again for PATIENCE_S where the server is busy or silent. Any other answer is the caller's."""
        began, pause = time.monotonic(), FIRST_PAUSE_S
        while True:
            answer, wait_s, failure = self._ask_once(method, path, body, query)
            if answer is not None and answer.code not in BUSY:
                if answer.code == 401:
                    raise self._error(
                        f"the API server does not take the context's credentials (401 {_shorten(answer.message)})",
                        "a certificate or token expires; a machine whose clock is off is refused too",
                        "log in to the cluster again, or fetch its kubeconfig again; then `kubectl auth whoami`",
                    )
                return answer
            pause_s, took_s = max(pause, wait_s), time.monotonic() - began
            if took_s + pause_s > PATIENCE_S and answer is not None:
                raise self._error(
                    f"the API server answers {answer.code} for {took_s:.0f} s ({_shorten(answer.message)})",
                    "calls are tried again while it is overloaded or failing",
                    "try again in a while; look at the API server",
                )
            if took_s + pause_s > PATIENCE_S:
                raise self._error(
                    f"the API server at {self._server()} does not answer ({_shorten(failure)})",
                    "the context's server must be reachable from here",
                    "check the network, the VPN, and `kubectl version`",
                )
            time.sleep(pause_s)
            pause *= 2

    def get(self, path: str) -> KubeView | None:
        """An object; None where it is absent. Raises ClusterError for anything else."""
        answer = self.ask("GET", path)
        if answer.absent:
            return None
        return self.required(answer, f"read {path}")

    def list(self, path: str, selector: str = "") -> list[KubeView]:
        """All objects of a kind that bear the labels, in as few answers as the server gives."""
        query = {"limit": str(PAGE), **({"labelSelector": selector} if selector else {})}
        found: list[KubeView] = []
        while True:
            page = self.required(self.ask("GET", path, query=query), f"list {path}")
            found += page.get("items", [])
            token = page.get("metadata", {}).get("continue")
            if not token:
                return found
            query["continue"] = token

    def required(self, answer: ApiResponse, asked: str) -> KubeView:
        """The body of a good answer. Raises ClusterError that says what a bad one means."""
        if answer.ok:
            return answer.body
        said, rule = _shorten(answer.message), missing_rule(answer.message)
        if answer.code == 403 and rule is None:
            hint = "ask who runs the cluster; `graftwork doctor` shows quotas and queues"
            raise self._error(f"the API server refuses it (403 {said})", "", hint)
        if answer.code == 403:
            raise self._error(
                f"RBAC does not allow it ({said})",
                "the user of the context needs the rule",
                f"add to its Role: {rule}; k8s/base/accounts.yaml has all that are needed",
            )
        if answer.unserved:
            problem = f"{asked}: the cluster does not know this kind"
            raise self._error(problem, "KubeRay v1.7 or newer is installed there", HELM)
        hint = "graftwork doctor --target ... looks further"
        raise self._error(f"{asked}: the API server says {answer.code} ({said})", "", hint)

    def _error(self, problem: str, rule: str, hint: str) -> ClusterError:
        return ClusterError(f"--target {self.on}", problem, rule, hint)

    def _ask_once(
        self, method: Method, path: str, body: KubeView | None, query: Mapping[str, str] | None
    ) -> tuple[ApiResponse | None, float, str]:
        """Return the answer, the seconds to wait before the next call, and the failure if there is no answer."""
        if self._client is None:
            self._client = open_context(self.on, self.place.context)
        client = self._client
        from kubernetes.client.exceptions import ApiException
        from urllib3.exceptions import HTTPError

        headers = {"Accept": "application/json", "Content-Type": "application/json"}
        asked = list((query or {}).items())
        client.update_params_for_auth(headers, asked, ["BearerToken"])  # a token is renewed here
        try:
            # Below `call_api`, which fails on a connection without an answer (kubernetes 36, api_client.py)
            got = client.rest_client.request(
                method,
                f"{self._server()}{path}",
                query_params=asked,
                headers=headers,
                body=dict(body) if body else None,
                _preload_content=False,
                _request_timeout=TIMEOUT_S,
            )
            return _answer(got.status, got.data), 0.0, ""
        except ApiException as error:
            if not error.status:
                why = str(error.reason)
                raise self._error(
                    f"no trusted connection to {self._server()} ({_shorten(why)})",
                    "the server's certificate is valid now and signed by the context's certificate-authority",
                    "the server's certificate has expired, or this machine's clock is wrong: renew it, or run `date`"
                    if "expired" in why
                    else "fetch the kubeconfig again from the cluster's provider",
                ) from None
            wait = (error.headers or {}).get("Retry-After", "0")
            return _answer(error.status, error.body or ""), float(wait) if wait.isdigit() else 0.0, ""
        except HTTPError as error:
            return None, 0.0, str(error)

    def _server(self) -> str:
        return str(self._client.configuration.host)


def open_context(on: str, context: str) -> Any:
    """The `ApiClient` of a context of the kubeconfig. Raises ClusterError with the contexts that there are."""
    subject = f"--target {on}"
    try:
        from kubernetes import client, config
        from kubernetes.config.config_exception import ConfigException
    except ImportError:
        raise ClusterError(
            subject,
            "the package `kubernetes` is not installed here",
            "it is the extra `k8s`",
            "pip install 'kubernetes>=35,<37' 'kubernetes-validate>=1.34'",
        ) from None
    settings = client.Configuration()
    file = os.environ.get("KUBECONFIG") or "~/.kube/config"  # `kubernetes` would keep that of its import
    names: list[str] = []
    try:
        names += [str(found["name"]) for found in config.list_kube_config_contexts(file)[0] or []]
        if context in names:
            config.load_kube_config(file, context, settings)
    except (ConfigException, OSError, yaml.YAMLError, TypeError, AttributeError) as error:  # of a file of another form
        raise ClusterError(
            subject,
            f"there is no usable kubeconfig ({file}: {str(error).strip()})",
            "clusters are found in $KUBECONFIG, else in ~/.kube/config",
            "set KUBECONFIG to the cluster's file",
        ) from None
    if context not in names:
        raise ClusterError(
            subject,
            f"the kubeconfig has no context {context!r}; it has {', '.join(sorted(names)) or 'none'}",
            "k8s:CONTEXT/NAMESPACE",
            "take one of these, or set KUBECONFIG to another file",
        )
    settings.retries = False  # ours are in `ask`; urllib3's would triple the time limits
    return client.ApiClient(settings)


def _answer(code: int, data: bytes | str) -> ApiResponse:
    text = data.decode(errors="replace") if isinstance(data, bytes) else data
    try:
        body = json.loads(text)
    except ValueError:
        body = {}
    return ApiResponse(code, body if isinstance(body, dict) else {}, text)


def namespaced(group: str, version: str, namespace: str, plural: str, name: str = "") -> str:
    """Path of a kind's objects in a namespace, or of one of them. An empty group holds the core kinds."""
    root = f"/apis/{group}/{version}" if group else f"/api/{version}"
    return f"{root}/namespaces/{quote(namespace, safe='')}/{plural}" + (f"/{quote(name, safe='')}" if name else "")


def cluster_path(group: str, version: str, plural: str, name: str = "") -> str:
    """Path of a kind of the whole cluster."""
    root = f"/apis/{group}/{version}" if group else f"/api/{version}"
    return f"{root}/{plural}" + (f"/{quote(name, safe='')}" if name else "")


FORBIDDEN = re.compile(
    r'cannot (?P<verb>\w+) resource "(?P<resource>[^"]+)" in API group "(?P<group>[^"]*)"(?P<where>.*)', re.DOTALL
)
"""How the API server words what RBAC does not allow (k8s.io/apiserver, responsewriters/errors.go)."""


def rule_yaml(verb: str, resource: str, group: str) -> str:
    """The RBAC rule that allows it, to be put under `rules:` of a Role."""
    return f'{{apiGroups: ["{group}"], resources: [{resource}], verbs: [{verb}]}}'


def missing_rule(message: str) -> str | None:
    """Return the RBAC rule that a refusal names as missing; None for another refusal."""
    found = FORBIDDEN.search(message)
    return rule_yaml(found["verb"], found["resource"], found["group"]) if found else None


def unchecked(on: str, what: str, answer: ApiResponse) -> Finding:
    """A warning that something could not be looked at, and what it would take."""
    rule = missing_rule(answer.message) if answer.code == 403 else None
    why = "this API server has no such kind" if answer.unserved else f"{answer.code} {answer.message[:200]}"
    return warn(
        "NOT-CHECKED",
        on,
        f"not checked: {what} ({why})",
        "a check needs the right to read its objects",
        f"add this rule to a Role of the namespace: {rule}" if rule else "check it with kubectl",
    )


def _shorten(text: str) -> str:
    return " ".join(text.split())[-400:]


# Waiting until a deleted object of KubeRay's is gone, with its clusters and pods, for as long as these may take.
#
# A deletion in the foreground keeps the object until all that belongs to it has gone. Each pod has its
# `terminationGracePeriodSeconds`, in which a worker saves a checkpoint; with Redis, KubeRay then runs a Job that
# deletes the head's keys.


GRACE_S = 30
"""Kubernetes' own terminationGracePeriodSeconds, where a template has none."""
REDIS_CLEANUP_S = 300
"""activeDeadlineSeconds of the Job `redis-cleanup` (KubeRay 1.7, raycluster_controller.go, buildRedisCleanupJob)."""
MARGIN_S = 30
"""For the operator, which looks at a cluster that ends every 2 to 10 s, and for the garbage collector."""
REPORT_S = 5.0
QUICK_S, POLL_INTERVAL_S, SLOW_POLL_INTERVAL_S = 10.0, 0.1, 1.0
"""Most objects go within QUICK_S; after that they are looked at less often."""
CLUSTER_PARTS = {"RayJob": "rayClusterSpec", "RayService": "rayClusterConfig"}
SHOWN = 3


def removal_s(found: KubeView) -> int:
    """Return the seconds that the deletion of an object may take: grace of its pods, Redis' cleanup and a margin."""
    part = dig(found, "spec", CLUSTER_PARTS.get(str(found.get("kind")), ""))
    groups = [dig(part, "headGroupSpec"), *listed(dig(part, "workerGroupSpecs"))]
    given = [dig(group, "template", "spec", "terminationGracePeriodSeconds") for group in groups if group]
    grace_s = max((GRACE_S if seconds is None else int(seconds) for seconds in given), default=0)
    options = dig(part, "gcsFaultToleranceOptions")
    has_redis = options is not None and dig(options, "backend") in (None, "redis")
    return grace_s + (REDIS_CLEANUP_S if has_redis else 0) + MARGIN_S


def remove(api: KubeApi, path: str, kind: str) -> bool:
    """Delete an object with its clusters and pods; return False where it is absent.

    Prints what it waits for, every REPORT_S, on stderr. Raises ClusterError where the object is still there after
    `removal_s`; Kubernetes goes on with the deletion.
    """
    found = api.get(path)
    answer = None if found is None else api.ask("DELETE", path, query={"propagationPolicy": "Foreground"})
    if found is None or answer is None or answer.absent:
        return False
    name = str(found["metadata"]["name"])
    api.required(answer, f"delete {kind} {name}")
    _wait_until_gone(api, path, name, {"kind": kind, **found})
    return True


def _wait_until_gone(api: KubeApi, path: str, name: str, found: KubeView) -> None:
    kind, limit_s = found["kind"], removal_s(found)
    began, said = time.monotonic(), 0.0
    while (left := api.get(path)) is not None:
        took = time.monotonic() - began
        if took > limit_s:
            raise ClusterError(
                f"delete {kind} {name} in {api.on}",
                f"still there after {limit_s} s: {_holders(api, left)}",
                "its pods' grace, the cleanup of Redis and a margin for the operator have passed; the operator removes "
                "its finalizers once the cluster is gone",
                "see that the operator runs: graftwork doctor --target ...; the deletion goes on meanwhile",
            )
        if took - said >= REPORT_S:
            said = took
            print(
                f"delete {kind} {name}: {took:.0f} s of at most {limit_s} s: {_holders(api, left)}",
                file=sys.stderr,
                flush=True,
            )
        time.sleep(POLL_INTERVAL_S if took < QUICK_S else SLOW_POLL_INTERVAL_S)


def _holders(api: KubeApi, left: KubeView) -> str:
    """Return what keeps an object: its pods that are there, as far as they may be listed, and its finalizers."""
    selector = pod_selector(str(dig(left, "kind")), mapping(dig(left, "metadata", "labels")))
    path = namespaced("", "v1", api.place.namespace, "pods")
    answer = api.ask("GET", path, query={"labelSelector": selector}) if selector else None
    found = listed(answer.body.get("items")) if answer is not None and answer.ok else []
    pods = [str(dig(pod, "metadata", "name")) for pod in found]
    more = f" and {len(pods) - SHOWN} more" if len(pods) > SHOWN else ""
    said = [f"pods that end: {', '.join(pods[:SHOWN])}{more}"] if pods else []
    finalizers = dig(left, "metadata", "finalizers") or []
    return "; ".join([*said, f"finalizers: {', '.join(finalizers) or 'none'}"])
