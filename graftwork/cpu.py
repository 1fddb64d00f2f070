"""What Linux says of this machine's CPU in /proc/cpuinfo."""

import functools
import re
from pathlib import Path


@functools.cache
def facts() -> dict[str, str]:
    """Its fields by name, of one core; empty on systems without it."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return {}
    return dict(re.findall(r"^([^\t:]+?)\s*:\s*(.*)$", text, re.M))


def flags() -> frozenset[str]:
    """Instruction sets; empty where they are not told."""
    return frozenset((facts().get("flags") or facts().get("Features") or "").split())


def vendor() -> str:
    """The maker, "AuthenticAMD" for one; empty where it is not told."""
    return facts().get("vendor_id", "")
