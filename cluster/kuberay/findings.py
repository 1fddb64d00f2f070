"""Findings: the code first, then where, the problem, the rule and the hint."""

from collections.abc import Iterator, Mapping
from typing import Any

from graftwork.cluster.backend import Finding

Found = Iterator[Finding]


def refuse(code: str, where: str, problem: str, rule: str, hint: str = "") -> Finding:
    """One that keeps the job from being submitted."""
    return Finding(f"E-{code}", "error", where, problem, rule, hint)


def warn(code: str, where: str, problem: str, rule: str, hint: str = "") -> Finding:
    """One that is said, and the job goes on."""
    return Finding(f"W-{code}", "warning", where, problem, rule, hint)


def dig(tree: Mapping[str, Any], *path: str) -> Any:
    """What lies at a path, None where nothing does or a null stands on the way."""
    found: Any = tree
    for key in path:
        if not isinstance(found, Mapping):
            return None
        found = found.get(key)
    return found


def number(value: Any) -> float | None:
    """A number that is one: schema errors are the schema's to tell."""
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def mapping(value: Any) -> Mapping[str, Any]:
    """A mapping, empty where there is none."""
    return value if isinstance(value, Mapping) else {}


def listed(value: Any) -> list[Mapping[str, Any]]:
    """The mappings of a list, empty where there is none."""
    return [entry for entry in value if isinstance(entry, Mapping)] if isinstance(value, list) else []
