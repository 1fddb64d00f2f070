"""Other sweeps of the same name: what a person who meant to go on with one has changed."""

from typing import Any

import yaml
from pydantic import ValidationError

from graftwork.errors import StorageError
from graftwork.storage import RunPaths
from graftwork.training.relatives import changed_keys, namesakes, unfinished_since
from graftwork.tuning.ledger import TRIALS
from graftwork.tuning.spec import TuneSpec


def warn_about_similar_sweeps(spec: TuneSpec, run: RunPaths) -> list[str]:
    """How a sweep that has not begun differs from the newest unfinished one of its name; empty where there is none."""
    if run.store.exists(*run.spec()):
        return []
    found = [(began, other) for other in namesakes(run) if (began := unfinished_since(other)) is not None]
    for _, other in sorted(found, key=lambda pair: pair[0], reverse=True):
        tree = yaml.safe_load(other.store.read_text(*other.spec()))
        if tree.get("kind") == spec.kind:
            return [
                f"this begins a new sweep, {run.run_id}, and takes over no trial: {other.run_id} ({_reached(other)}) "
                f"differs in {_differences(spec, tree)}. With the same values the same command goes on with it"
            ]
    return []


def _differences(spec: TuneSpec, tree: dict[str, Any]) -> str:
    try:
        before = TuneSpec.model_validate(tree)
    except ValidationError:
        return "its form: another version of graftwork wrote it"
    old, new = ({**sweep.recipe(), "train": sweep.train.recipe()} for sweep in (before, spec))
    return changed_keys(old, new) or "the contents of its base or data"


def _reached(run: RunPaths) -> str:
    state = run.store.read_json(*run.status())["state"]
    try:
        trials = run.store.read_json(*run.file(TRIALS))["trials"]
        ended = sum(trial["state"] not in ("pending", "running") for trial in trials)
    except (StorageError, KeyError, TypeError):
        return f"{state}, its trials can't be read"
    return f"{state}, {ended} of {len(trials)} trials ended"
