"""Published adapters that a run starts from (`init_from`) or trains on top of (`base_adapter`), pinned to a version."""

import json
from collections.abc import Callable
from pathlib import Path

from graftwork.artifacts import registry
from graftwork.artifacts.manifest import AdapterManifest
from graftwork.artifacts.publish import fetch, require_base
from graftwork.artifacts.registry import open_adapter, resolve
from graftwork.artifacts.verify import CONFIG_FILE
from graftwork.base.load import ResolvedBase
from graftwork.errors import ConfigError
from graftwork.storage.store import Store
from graftwork.training.spec import TrainSpec

FREE = ("dropout",)
"""Keys of the adapter that may differ from those of the one gone on from: all others decide its weights' meaning."""


def pin_init(spec: TrainSpec, base: ResolvedBase, run_id: Callable[[str], str]) -> TrainSpec:
    """`spec` with its `init_from` naming a version. Raises ArtifactError, ConfigError (another kind of adapter).

    `run_id(version)` is the run that going on from a version would be. An alias may have moved to what this very run
    published; then the version before it is meant, or each rerun would train on from its own result.
    """
    assert spec.init_from is not None
    store = Store(spec.root)
    found = resolve(store, spec.init_from)
    while found.parent is not None and found.run == run_id(found.parent):
        found = resolve(store, registry.parents(found)[0])
    require_base(found, base.digest)
    _require_equal_method(spec, found)
    return spec.with_({"init_from": found.ref})


def adapter_folder(spec: TrainSpec) -> Path:
    """Folder on this machine with the verified adapter that a pinned spec goes on from."""
    assert spec.init_from is not None
    task, _, version = spec.init_from.partition("@")
    store = Store(spec.root)
    return fetch(store, task, open_adapter(store, task, version).version)


def parent_of(spec: TrainSpec) -> str | None:
    """The version that a pinned spec goes on from, `task@version` where it is another task's."""
    task, _, version = (spec.init_from or "").partition("@")
    return (version if task == spec.name else spec.init_from) or None


def _require_equal_method(spec: TrainSpec, found: AdapterManifest) -> None:
    if (found.method.get("objective") == "reward") != (spec.objective.kind == "reward"):
        raise ConfigError(
            f"objective.kind={spec.objective.kind} with init_from={spec.init_from}",
            f"{found.ref} was trained with objective.kind={found.method.get('objective', 'sft')}",
            "a reward model has a score head in place of the language head: it goes on as a reward model alone",
            "start from another adapter, or leave init_from out",
        )
    ours = spec.adapter.model_dump(mode="json")
    theirs = {**type(spec.adapter)().model_dump(mode="json"), **found.method}  # keys younger than it had defaults
    for key in (key for key in ours if key not in FREE):
        if theirs[key] != ours[key]:
            raise ConfigError(
                f"adapter.{key}={ours[key]} with init_from={spec.init_from}",
                f"{found.ref} was trained with {key}={theirs[key]}",
                "an adapter goes on with its own shape and scale",
                f"--set adapter.{key}={theirs[key]}",
            )


def pin_stack(spec: TrainSpec, base: ResolvedBase) -> TrainSpec:
    """Return `spec` with the version that `base_adapter` means now.

    Raises ArtifactError (another base, an adapter that nothing can be added to).
    """
    from graftwork.training.adapters.merge import require_deltas  # torch and PEFT: 4 s that most runs save

    assert spec.base_adapter is not None
    store = Store(spec.root)
    found = resolve(store, spec.base_adapter)
    require_base(found, base.digest)
    folder = fetch(store, found.task, found.version)
    config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    require_deltas(f"base_adapter={spec.base_adapter}", config)
    return spec.with_({"base_adapter": found.ref})


def folder_below(spec: TrainSpec) -> Path:
    """Folder on this machine with the verified adapter that a pinned spec stands on."""
    assert spec.base_adapter is not None
    task, _, version = spec.base_adapter.partition("@")
    return fetch(Store(spec.root), task, version)
