"""Rules beyond the schema: objects that KubeRay's operator refuses after the API server accepted them, or that do harm.

The operator's own rules are those of KubeRay v1.7.0, controllers/ray/utils/validation.go, in our words, with the
settings of its default install. Each rule is a function over an object; all findings are reported, not the first.
"""

from collections.abc import Mapping
from typing import Any

from graftwork.cluster.jobs.models import Finding
from graftwork.cluster.kuberay.object_view import ClusterView, dig, mapping
from graftwork.cluster.kuberay.objects import MAX_NAME, check_name
from graftwork.cluster.kuberay.rules.cluster import AUTOSCALER_RULES, GROUP_RULES, managers_are_known
from graftwork.cluster.kuberay.rules.deletion import DELETION_RULES
from graftwork.cluster.kuberay.rules.feature_gates import GATE_RULES
from graftwork.cluster.kuberay.rules.gcs_fault_tolerance import SURVIVAL_RULES
from graftwork.cluster.kuberay.rules.job import JOB_RULES, QUEUE_RULES
from graftwork.cluster.kuberay.rules.pods import POD_RULES, SECURITY_RULES
from graftwork.cluster.kuberay.rules.service import SERVICE_RULES

PART_RULES = (*GROUP_RULES, *AUTOSCALER_RULES, *SURVIVAL_RULES, *GATE_RULES, *POD_RULES, *SECURITY_RULES)
OBJECT_RULES = {
    "RayJob": (*JOB_RULES, *DELETION_RULES, *QUEUE_RULES),
    "RayService": SERVICE_RULES,
}
PART_PATHS = {"RayJob": ("spec", "rayClusterSpec"), "RayService": ("spec", "rayClusterConfig"), "RayCluster": ("spec",)}


def check_rules(made: Mapping[str, Any]) -> list[Finding]:
    """All findings on a RayJob, RayService or RayCluster; none on other kinds."""
    kind = str(made.get("kind"))
    if kind not in PART_PATHS:
        return []
    found = check_name(kind, str(dig(made, "metadata", "name") or "")) if kind in MAX_NAME else []
    found += [finding for rule in OBJECT_RULES.get(kind, ()) for finding in rule(made)]
    if kind != "RayCluster":
        found += managers_are_known(ClusterView(kind, "spec", mapping(made.get("spec")), {}))
    spec = dig(made, *PART_PATHS[kind])
    if isinstance(spec, Mapping):
        annotations = mapping(dig(made, "metadata", "annotations"))
        part = ClusterView(kind, ".".join(PART_PATHS[kind]), spec, annotations)
        found += [finding for rule in PART_RULES for finding in rule(part)]
    return found
