"""What an endpoint's live config was when it was last taken: `serving/<name>/live.json` of its store.

Its ingress writes it; an ingress or an engine replica that takes another one's place begins with it.
"""

import hashlib
from collections.abc import Mapping
from typing import Any

from graftwork.cluster.kuberay.serve_config import LIVE
from graftwork.config import canonical_json, validate
from graftwork.errors import ConfigError
from graftwork.serving.arms import Dump
from graftwork.serving.spec import ServeSpec
from graftwork.storage import Store

FOLDER, FILE = "serving", "live.json"


def with_live(spec: ServeSpec, tree: Mapping[str, Any]) -> ServeSpec:
    """The spec with these live keys. Raises ConfigError for others, or where they do not fit the rest of it."""
    foreign = sorted(set(tree) - set(LIVE))
    if foreign:
        raise ConfigError(f"live config: {foreign[0]}", "not a live key", f"what may change is {', '.join(LIVE)}",
                          "change the spec itself: its engines start again")  # fmt: skip
    fixed = {key: value for key, value in spec.model_dump(mode="json").items() if key not in LIVE}
    return validate(ServeSpec, {**fixed, **tree}, where="live config")


def live_of(spec: ServeSpec) -> Dump:
    """Its live keys."""
    return {key: value for key, value in spec.model_dump(mode="json").items() if key in LIVE}


def digest(tree: Mapping[str, Any]) -> str:
    """What a live config is called where it is told of."""
    return hashlib.sha256(canonical_json(dict(tree)).encode()).hexdigest()[:10]


def read_live_record(spec: ServeSpec) -> ServeSpec | None:
    """The spec with what was last taken; None where nothing was, or nothing that this version understands.

    Raises StorageError.
    """
    data = Store(spec.root).find_bytes(FOLDER, spec.name, FILE)
    if data is None:
        return None
    try:
        return with_live(spec, Store(spec.root).read_json(FOLDER, spec.name, FILE))
    except ConfigError:
        return None


def write_live_record(spec: ServeSpec) -> None:
    """Write it down. Raises StorageError."""
    Store(spec.root).write_json(live_of(spec), FOLDER, spec.name, FILE)
