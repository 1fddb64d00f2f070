"""Rules for a RayService: its Serve config, upgrades between clusters, and exposure."""

import re
from collections.abc import Mapping

import yaml

from graftwork.cluster.jobs.checks import secrets_in
from graftwork.cluster.jobs.models import Findings, refuse, warn
from graftwork.cluster.kuberay.object_view import KubeView, dig, mapping, number

UPGRADES = ("NewCluster", "NewClusterWithIncrementalUpgrade", "None")
TIMEOUT_ANNOTATION = "ray.io/initializing-timeout"
_DURATION = re.compile(r"([0-9]+(\.[0-9]+)?(ns|us|ms|s|m|h))+|[0-9]+")
LEAST_DELAY_S = 60


def check_serve_config(made: KubeView) -> Findings:
    text, where = dig(made, "spec", "serveConfigV2"), "spec.serveConfigV2"
    try:
        config = yaml.safe_load(str(text or ""))
        problem = "" if isinstance(config, Mapping) and config.get("applications") else "no applications"
    except yaml.YAMLError as error:
        problem = f"no YAML: {str(error).splitlines()[0]}"
    if problem:
        yield refuse(
            "SERVE-CONFIG",
            where,
            problem,
            "serveConfigV2 is a YAML mapping with `applications`",
            "correct the YAML at the line that the parser reports"
            if problem.startswith("no YAML")
            else "serveConfigV2: {applications: [{name: NAME, import_path: MODULE:APP}]}",
        )
        return
    for path, why in secrets_in(config):
        yield refuse(
            "SECRET-VALUE",
            f"{where}.{path}",
            why,
            "a secret value comes from a Kubernetes Secret",
            "secret_env: {NAME: SECRET/KEY}",
        )


def check_deletion_delay(made: KubeView) -> Findings:
    """Time that the old cluster stays: requests in flight are cut with it (kuberay#3602)."""
    delay = number(dig(made, "spec", "rayClusterDeletionDelaySeconds"))
    if delay is None:
        return
    if delay < 0:
        yield refuse(
            "NEGATIVE",
            "spec.rayClusterDeletionDelaySeconds",
            f"{delay}",
            "a delay is 0 s or more",
            "rayClusterDeletionDelaySeconds: 300",
        )
    elif delay < LEAST_DELAY_S:
        yield warn(
            "DELETION-DELAY",
            "spec.rayClusterDeletionDelaySeconds",
            f"{delay} s",
            "requests that the old cluster has taken end with it",
            "rayClusterDeletionDelaySeconds: 60, or longer than the longest request",
        )


def check_upgrade(made: KubeView) -> Findings:
    kind = dig(made, "spec", "upgradeStrategy", "type")
    if kind not in (None, *UPGRADES):
        yield refuse(
            "UPGRADE-TYPE",
            "spec.upgradeStrategy.type",
            repr(kind),
            f"one of {', '.join(UPGRADES)}",
            "upgradeStrategy: {type: NewCluster}",
        )
    elif kind == "NewClusterWithIncrementalUpgrade":
        yield from _incremental_findings(mapping(made.get("spec")))


def _incremental_findings(spec: KubeView) -> Findings:
    where, options = "spec.upgradeStrategy.clusterUpgradeOptions", dig(spec, "upgradeStrategy", "clusterUpgradeOptions")
    if dig(spec, "rayClusterConfig", "enableInTreeAutoscaling") is not True:
        yield refuse(
            "INCREMENTAL-AUTOSCALER",
            where,
            "the autoscaler is off",
            "during an incremental upgrade the autoscaler moves machines between both clusters",
            "enableInTreeAutoscaling: true, or upgradeStrategy: {type: NewCluster}",
        )
    if not isinstance(options, Mapping):
        yield refuse(
            "INCREMENTAL-OPTIONS",
            where,
            "none",
            "an incremental upgrade needs stepSizePercent, intervalSeconds and gatewayClassName",
            "clusterUpgradeOptions: {stepSizePercent: 20, intervalSeconds: 30, gatewayClassName: CLASS}",
        )
        return
    surge, step = number(options.get("maxSurgePercent", 100)), number(options.get("stepSizePercent"))
    for key, value in (("maxSurgePercent", surge), ("stepSizePercent", step)):
        if value is None or not 0 <= value <= 100:
            yield refuse(
                "INCREMENTAL-PERCENT",
                f"{where}.{key}",
                f"{value}",
                "a percentage is 0 to 100",
                f"{key}: {100 if key == 'maxSurgePercent' else 20}",
            )
    if surge is not None and step is not None and step > surge:
        yield refuse(
            "INCREMENTAL-STEP",
            f"{where}.stepSizePercent",
            f"{step} > {surge}",
            "stepSizePercent is at most maxSurgePercent",
            f"stepSizePercent: {surge:g}",
        )
    if (number(options.get("intervalSeconds")) or 0) <= 0:
        yield refuse(
            "INCREMENTAL-INTERVAL",
            f"{where}.intervalSeconds",
            f"{options.get('intervalSeconds')}",
            "an interval is more than 0 s",
            "intervalSeconds: 30",
        )
    if not options.get("gatewayClassName"):
        yield refuse(
            "INCREMENTAL-GATEWAY",
            f"{where}.gatewayClassName",
            "none",
            "a gateway of a GatewayClass moves the traffic",
            "gatewayClassName: CLASS, from `kubectl get gatewayclasses`",
        )


def check_initializing_timeout(made: KubeView) -> Findings:
    text = dig(made, "metadata", "annotations", TIMEOUT_ANNOTATION)
    if text and (not _DURATION.fullmatch(str(text)) or not re.search("[1-9]", str(text))):
        yield refuse(
            "INITIALIZING-TIMEOUT",
            f"metadata.annotations.{TIMEOUT_ANNOTATION}",
            repr(text),
            "a duration over 0: seconds, or a value like 30m",
            f"{TIMEOUT_ANNOTATION}: 30m",
        )


def check_services(made: KubeView) -> Findings:
    name = dig(made, "spec", "rayClusterConfig", "headGroupSpec", "headService", "metadata", "name")
    if name:
        yield refuse(
            "HEAD-SERVICE-NAME",
            "spec.rayClusterConfig.headGroupSpec.headService.metadata.name",
            str(name),
            "during an upgrade two clusters of the service run, and each needs a service name of its own",
            "remove headService.metadata.name",
        )
    kind = dig(made, "spec", "serveService", "spec", "type")
    if kind not in (None, "ClusterIP"):
        yield refuse(
            "SERVE-EXPOSED",
            "spec.serveService.spec.type",
            str(kind),
            "ClusterIP: access from outside needs authentication",
            "type: ClusterIP, behind an Ingress or Gateway with authentication",
        )


SERVICE_RULES = (check_serve_config, check_deletion_delay, check_upgrade, check_initializing_timeout, check_services)
