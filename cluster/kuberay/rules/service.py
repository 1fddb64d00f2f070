"""A RayService: its configuration, and how one cluster takes over from another."""

import re
from collections.abc import Mapping
from typing import Any

import yaml

from graftwork.cluster.jobs.environment import secrets_in
from graftwork.cluster.kuberay.object_view import Found, dig, mapping, number, refuse, warn

UPGRADES = ("NewCluster", "NewClusterWithIncrementalUpgrade", "None")
TIMEOUT_ANNOTATION = "ray.io/initializing-timeout"
_DURATION = re.compile(r"([0-9]+(\.[0-9]+)?(ns|us|ms|s|m|h))+|[0-9]+")
LEAST_DELAY_S = 60
Object = Mapping[str, Any]


def serve_config_is_yaml(made: Object) -> Found:
    text, where = dig(made, "spec", "serveConfigV2"), "spec.serveConfigV2"
    try:
        config = yaml.safe_load(str(text or ""))
    except yaml.YAMLError as error:
        yield refuse("SERVE-CONFIG", where, f"no YAML: {str(error).splitlines()[0]}", "a YAML mapping")
        return
    if not isinstance(config, Mapping) or not config.get("applications"):
        yield refuse("SERVE-CONFIG", where, "no applications", "a mapping with `applications`")
        return
    for path, why in secrets_in(config):
        yield refuse("SECRET-VALUE", f"{where}.{path}", why, "a secret is a Secret's", "secret_env: {NAME: SECRET/KEY}")


def upgrade_is_one(made: Object) -> Found:
    kind = dig(made, "spec", "upgradeStrategy", "type")
    if kind not in (None, *UPGRADES):
        yield refuse("UPGRADE-TYPE", "spec.upgradeStrategy.type", repr(kind), f"one of {', '.join(UPGRADES)}")


def old_cluster_stays_a_while(made: Object) -> Found:
    """kuberay#3602: requests in flight are cut with the old cluster."""
    delay = number(dig(made, "spec", "rayClusterDeletionDelaySeconds"))
    if delay is None:
        return
    if delay < 0:
        yield refuse("NEGATIVE", "spec.rayClusterDeletionDelaySeconds", f"{delay}", "0 or more")
    elif delay < LEAST_DELAY_S:
        yield warn(
            "DELETION-DELAY",
            "spec.rayClusterDeletionDelaySeconds",
            f"{delay} s",
            "requests that the old cluster has taken end with it",
            "longer than the longest request",
        )


def incremental(made: Object) -> Found:
    spec = mapping(made.get("spec"))
    if dig(spec, "upgradeStrategy", "type") != "NewClusterWithIncrementalUpgrade":
        return
    where, options = "spec.upgradeStrategy.clusterUpgradeOptions", dig(spec, "upgradeStrategy", "clusterUpgradeOptions")
    if dig(spec, "rayClusterConfig", "enableInTreeAutoscaling") is not True:
        yield refuse("INCREMENTAL-AUTOSCALER", where, "the autoscaler is off", "both clusters share the machines by it")
    if not isinstance(options, Mapping):
        yield refuse("INCREMENTAL-OPTIONS", where, "none", "stepSizePercent, intervalSeconds, gatewayClassName")
        return
    surge, step = number(options.get("maxSurgePercent", 100)), number(options.get("stepSizePercent"))
    for key, value in (("maxSurgePercent", surge), ("stepSizePercent", step)):
        if value is None or not 0 <= value <= 100:
            yield refuse("INCREMENTAL-PERCENT", f"{where}.{key}", f"{value}", "0 to 100")
    if surge is not None and step is not None and step > surge:
        yield refuse("INCREMENTAL-STEP", f"{where}.stepSizePercent", f"{step} > {surge}", "at most maxSurgePercent")
    if (number(options.get("intervalSeconds")) or 0) <= 0:
        yield refuse("INCREMENTAL-INTERVAL", f"{where}.intervalSeconds", f"{options.get('intervalSeconds')}", "over 0")
    if not options.get("gatewayClassName"):
        yield refuse("INCREMENTAL-GATEWAY", f"{where}.gatewayClassName", "none", "a GatewayClass moves the traffic")


def head_service_has_no_name(made: Object) -> Found:
    name = dig(made, "spec", "rayClusterConfig", "headGroupSpec", "headService", "metadata", "name")
    if name:
        yield refuse(
            "HEAD-SERVICE-NAME",
            "spec.rayClusterConfig.headGroupSpec.headService.metadata.name",
            str(name),
            "two clusters of a service cannot have one service name",
        )


def initializing_timeout(made: Object) -> Found:
    text = dig(made, "metadata", "annotations", TIMEOUT_ANNOTATION)
    if text and (not _DURATION.fullmatch(str(text)) or not re.search("[1-9]", str(text))):
        yield refuse(
            "INITIALIZING-TIMEOUT",
            f"metadata.annotations.{TIMEOUT_ANNOTATION}",
            repr(text),
            "seconds, or a duration like 30m, over 0",
        )


def exposed(made: Object) -> Found:
    kind = dig(made, "spec", "serveService", "spec", "type")
    if kind not in (None, "ClusterIP"):
        yield refuse(
            "SERVE-EXPOSED",
            "spec.serveService.spec.type",
            str(kind),
            "ClusterIP: what leads to it from outside asks who one is",
            "an Ingress or Gateway of yours with authentication",
        )


SERVICE_RULES = (
    serve_config_is_yaml,
    upgrade_is_one,
    old_cluster_stays_a_while,
    incremental,
    head_service_has_no_name,
    initializing_timeout,
    exposed,
)
