"""What objects are called, and how long a name may be: an attempt's RayJob has the attempt's id."""

import re

from graftwork.cluster.backend import Finding

MAX_NAME = {"RayCluster": 53, "RayJob": 47, "RayService": 47, "RayCronJob": 36}
"""Longest names that KubeRay 1.7 takes (its controllers/ray/utils/constant.go): the pods' names append to them."""
DNS_1035 = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
LABEL_VALUE = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?)?")
MAX_LABEL = 63


def check_name(kind: str, name: str) -> list[Finding]:
    """Findings on the name of an object of KubeRay's."""
    found, most = [], MAX_NAME[kind]
    if len(name) > most:
        found.append(Finding(
            "E-NAME-TOO-LONG", "error", "metadata.name",
            f"{name!r} has {len(name)} characters, {len(name) - most} too many",
            f"a {kind} has at most {most}, since the names of its pods begin with it",
            f"shorten `name` by {len(name) - most}",
        ))  # fmt: skip
    if not DNS_1035.fullmatch(name):
        found.append(Finding(
            "E-NAME-FORM", "error", "metadata.name", repr(name),
            "a letter first, then small letters, digits and hyphens, no hyphen last (RFC 1035)",
            "rename the job, e.g. " + (_mended(name) or "run-1"),
        ))  # fmt: skip
    return found


def label_value(text: str) -> str:
    """As much of a text as a label's value holds."""
    return re.sub(r"[^A-Za-z0-9._-]", "-", text)[:MAX_LABEL].strip("-_.")


def _mended(name: str) -> str:
    return re.sub(r"^[^a-z]+|-+$", "", re.sub(r"[^-a-z0-9]", "-", name.lower()))
