"""Training on top of a published adapter (`stack_on`): found, compared, pinned to a version before anything starts."""

import json
from pathlib import Path

from graftwork import artifact
from graftwork.artifact_check import CONFIG_FILE
from graftwork.base_model import ResolvedBase
from graftwork.storage import Store
from graftwork.training.adapters.merge_spec import require_deltas
from graftwork.training.spec import TrainSpec


def pin_stack(spec: TrainSpec, base: ResolvedBase) -> TrainSpec:
    """`spec` with `stack_on` naming a version. Raises ArtifactError (another base, nothing that can be added to)."""
    if spec.stack_on is None:
        return spec
    store = Store(spec.root)
    found = artifact.resolve(store, spec.stack_on)
    artifact.require_base(found, base.digest)
    folder = artifact.fetch(store, found.task, found.version)
    config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    require_deltas(f"stack_on={spec.stack_on}", config)
    return spec.with_({"stack_on": found.ref})


def folder_below(spec: TrainSpec) -> Path:
    """Folder on this machine with the verified adapter that a pinned spec stands on."""
    assert spec.stack_on is not None
    task, _, version = spec.stack_on.partition("@")
    return artifact.fetch(Store(spec.root), task, version)
