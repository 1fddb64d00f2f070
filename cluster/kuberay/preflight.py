"""All that can be said of a job for KubeRay without asking its cluster: the spec, the fit, the rules, the schema."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from graftwork.cluster.backend import Attempt, Finding
from graftwork.cluster.kuberay.findings import dig
from graftwork.cluster.kuberay.fit import check_fit
from graftwork.cluster.kuberay.rayjob import build_rayjob
from graftwork.cluster.kuberay.rules import check_rules
from graftwork.cluster.kuberay.schema import check_schema
from graftwork.cluster.kuberay.spec_rules import check_spec
from graftwork.cluster.secret_like import why_secret_text

ANY_WHEEL = "wheels/graftwork-0+000000000000-py3-none-any.whl"
"""Stands for the wheel, which is built and written after preflight."""


def preflight(
    attempt: Attempt,
    namespace: str,
    crd: Mapping[str, Any] | None = None,
    objects: Sequence[Mapping[str, Any]] | None = None,
) -> list[Finding]:
    """Findings on an attempt, errors first; each code and fact once. Pure: nothing is reached or written.

    `objects` are what would be made, where it is not a RayJob alone; `crd` is the live definition of their kind.
    """
    job = attempt.job
    if objects is None:
        wheel = f"{job.root}/{ANY_WHEEL}" if job.cluster.code == "wheel" else None
        objects = [build_rayjob(attempt, namespace, wheel)]
    found = [*check_spec(job, namespace), *check_fit(job)]
    for made in objects:
        found += [*check_rules(made), *check_schema(made, crd if _is_of(made, crd) else None)]
    return once(found)


def once(found: Iterable[Finding]) -> list[Finding]:
    """Errors first; what two pods have in common is said of the first."""
    first: dict[tuple[str, str], Finding] = {}
    for finding in map(_masked, found):
        first.setdefault((finding.code, finding.problem), finding)
    return sorted(first.values(), key=lambda finding: finding.level)


def _masked(finding: Finding) -> Finding:
    """Without a value that looks like a secret, whichever rule quotes it."""
    hidden: dict[str, Any] = {name: "(hidden)" for name in ("where", "problem", "rule", "hint")
              if why_secret_text(getattr(finding, name)) is not None}  # fmt: skip
    return replace(finding, **hidden) if hidden else finding


def _is_of(made: Mapping[str, Any], crd: Mapping[str, Any] | None) -> bool:
    return crd is not None and dig(crd, "spec", "names", "kind") == made.get("kind")
