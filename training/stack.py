"""Training on top of a published adapter (`base_adapter`), pinned to a version before the run starts."""

import json
from pathlib import Path

from graftwork import artifact
from graftwork.artifact_check import CONFIG_FILE
from graftwork.base_model import ResolvedBase
from graftwork.storage import Store
from graftwork.training.adapters.merge_spec import require_deltas
from graftwork.training.spec import TrainSpec


def pin_stack(spec: TrainSpec, base: ResolvedBase) -> TrainSpec:
    """Return `spec` with the version that `base_adapter` means now.

    Raises ArtifactError (another base, an adapter that nothing can be added to).
    """
    if spec.base_adapter is None:
        return spec
    store = Store(spec.root)
    found = artifact.resolve(store, spec.base_adapter)
    artifact.require_base(found, base.digest)
    folder = artifact.fetch(store, found.task, found.version)
    config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    require_deltas(f"base_adapter={spec.base_adapter}", config)
    return spec.with_({"base_adapter": found.ref})


def folder_below(spec: TrainSpec) -> Path:
    """Folder on this machine with the verified adapter that a pinned spec stands on."""
    assert spec.base_adapter is not None
    task, _, version = spec.base_adapter.partition("@")
    return artifact.fetch(Store(spec.root), task, version)
