"""Callables of other packages, found by entry point. Nothing is loaded that a spec does not name."""

import difflib
from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from graftwork.errors import ConfigError


def installed(group: str) -> tuple[EntryPoint, ...]:
    """Return the entry points of a group, of all installed packages."""
    return tuple(entry_points(group=group))


def load(group: str, name: str, asked: str, *, own: tuple[str, ...] = ()) -> Callable[..., Any]:
    """Return the callable that an entry point names. `own`: built-in names, for the hint. Raises ConfigError."""
    found = installed(group)
    named = [entry for entry in found if entry.name == name]
    if len(named) != 1:
        known = sorted({entry.name for entry in found})
        near = difflib.get_close_matches(name, [*own, *known], n=1)
        raise ConfigError(
            asked,
            f"{len(named)} entry points of this name; installed: {', '.join(known) or 'none'}"
            + (f"; built in: {', '.join(own)}" if own else ""),
            f"it is one entry point of the group {group}",
            f"did you mean {near[0]!r}?" if near else "install its package on every machine",
        )
    try:
        loaded = named[0].load()
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            asked,
            f"{named[0].value} cannot be imported ({error})",
            "",
            "repair its installation on every machine: pip install --force-reinstall PACKAGE",
        ) from error
    if not callable(loaded):
        raise ConfigError(asked, f"{named[0].value} is no function", "an entry point here names a callable")
    return loaded  # type: ignore[no-any-return]
