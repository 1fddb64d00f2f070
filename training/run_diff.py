"""Unfinished runs of the same name, and the keys in which a new spec differs from the newest of them."""

import re
from collections.abc import Mapping
from typing import Any

import yaml
from pydantic import ValidationError

from graftwork.storage.store import RunPaths
from graftwork.training.checkpoint import Checkpoints
from graftwork.training.spec import TrainSpec

SHOWN = 6
"""Most keys that are named."""


def warn_about_similar_runs(spec: TrainSpec, run: RunPaths) -> list[str]:
    """How a run that has not begun differs from the newest unfinished one of its name; empty where there is none."""
    if run.store.exists(*run.spec()):
        return []
    found = [(began, other) for other in namesakes(run) if (began := unfinished_since(other)) is not None]
    if not found:
        return []
    other = max(found, key=lambda pair: pair[0])[1]
    mark = Checkpoints(other).newest()
    reached = f"step {mark.step}" if mark else "its start"
    return [
        f"this begins a new run, {run.run_id}: {other.run_id} is unfinished at {reached} and differs in "
        f"{_differences(spec, other)}. With the same values the same command goes on with it"
    ]


def namesakes(run: RunPaths) -> list[RunPaths]:
    """The other runs of its name."""
    pattern = re.compile(re.escape(run.name) + "-([0-9a-f]{8})")
    names = [found for name in run.store.list("runs") if (found := pattern.fullmatch(name))]
    return [RunPaths(run.store, run.name, found[1]) for found in names if found[0] != run.run_id]


def unfinished_since(run: RunPaths) -> str | None:
    """When a run began, as UTC text; None when it is finished, or no run."""
    if not all(run.store.exists(*key) for key in (run.status(), run.provenance(), run.spec())):
        return None
    if run.store.read_json(*run.status())["state"] == "finished":
        return None
    return str(run.store.read_json(*run.provenance())["time"])


def _differences(spec: TrainSpec, other: RunPaths) -> str:
    try:
        before = TrainSpec.model_validate(yaml.safe_load(other.store.read_text(*other.spec())))
    except ValidationError:
        return "its form: another version of graftwork wrote it"
    told = changed_keys(before.recipe(), spec.recipe())
    return told or "the contents of its base or data, or in the adapter that it starts from"


def changed_keys(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """The keys of two trees that differ, with their values there (`before`) and here; empty when none does."""
    old, new = dict(_leaves(before)), dict(_leaves(now))
    keys = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
    more = f" and {len(keys) - SHOWN} more" if len(keys) > SHOWN else ""
    return ", ".join(f"{key} ({old.get(key)} there, {new.get(key)} here)" for key in keys[:SHOWN]) + more


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for key, value in tree.items():
        found += _leaves(value, f"{prefix}{key}.") if isinstance(value, Mapping) else [(f"{prefix}{key}", value)]
    return found
