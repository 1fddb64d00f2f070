"""Rules beyond the schema: objects that KubeRay's operator refuses after the API server accepted them, or that do harm.

The operator's own rules are those of KubeRay v1.7.0, controllers/ray/utils/validation.go, in our words, with the
settings of its default install. Each rule is a function over an object; all findings are reported, not the first.
"""

from collections.abc import Mapping

from graftwork.cluster.jobs.models import Finding
from graftwork.cluster.kuberay.object_view import ClusterView, KubeView, dig, mapping
from graftwork.cluster.kuberay.objects import MAX_NAME, check_name
from graftwork.cluster.kuberay.rules.cluster import CLUSTER_RULES, check_manager
from graftwork.cluster.kuberay.rules.gcs_fault_tolerance import GCS_RULES
from graftwork.cluster.kuberay.rules.job import JOB_RULES
from graftwork.cluster.kuberay.rules.pods import POD_RULES
from graftwork.cluster.kuberay.rules.service import SERVICE_RULES

PART_RULES = (*CLUSTER_RULES, *GCS_RULES, *POD_RULES)
OBJECT_RULES = {"RayJob": JOB_RULES, "RayService": SERVICE_RULES}
PART_PATHS = {"RayJob": ("spec", "rayClusterSpec"), "RayService": ("spec", "rayClusterConfig"), "RayCluster": ("spec",)}


def check_rules(made: KubeView) -> list[Finding]:
    """All findings on a RayJob, RayService or RayCluster; none on other kinds."""
    kind = str(made.get("kind"))
    if kind not in PART_PATHS:
        return []
    found = check_name(kind, str(dig(made, "metadata", "name") or "")) if kind in MAX_NAME else []
    found += [finding for rule in OBJECT_RULES.get(kind, ()) for finding in rule(made)]
    if kind != "RayCluster":
        found += check_manager(ClusterView(kind, "spec", mapping(made.get("spec")), {}))
    spec = dig(made, *PART_PATHS[kind])
    if isinstance(spec, Mapping):
        annotations = mapping(dig(made, "metadata", "annotations"))
        part = ClusterView(kind, ".".join(PART_PATHS[kind]), spec, annotations)
        found += [finding for rule in PART_RULES for finding in rule(part)]
    return found
