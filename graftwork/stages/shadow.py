"""Shadow test of a sweep's winner: its experiment spec, written next to the sweep's records, and its start.

Not part of `tuning`, which does not import serving.
"""

from pathlib import Path
from typing import Any

import yaml

from graftwork import config
from graftwork.errors import ConfigError
from graftwork.serving.ab_test.spec import ExperimentSpec
from graftwork.serving.api.auth import own_token
from graftwork.serving.arms import base_name
from graftwork.serving.client import Client
from graftwork.storage.store import Store
from graftwork.tuning.spec import TuneSpec
from graftwork.tuning.trials import TuneReport

CURRENT, WINNER = "current", "winner"
SET_HERE = {"mode", "arms", "control"}


def check_shadow(spec: TuneSpec) -> None:
    """Raise ConfigError when the shadow could not be written once the sweep is done."""
    if spec.winner is not None and spec.winner.shadow is not None:
        shadow_spec(spec, "a", "b")


def shadow_spec(spec: TuneSpec, current: str, winner: str) -> ExperimentSpec:
    """Two versions of the task: the current one answers, the winner answers copies. Raises ConfigError."""
    assert spec.winner is not None
    assert spec.winner.shadow is not None
    tree = _given_keys(spec.winner.shadow.experiment)
    model = f"{base_name(spec.train.base.uri)}:{spec.train.name}"
    arms = [{"name": CURRENT, "model": f"{model}@{current}"}, {"name": WINNER, "model": f"{model}@{winner}"}]
    given = {"name": f"{spec.train.name}-shadow", **tree, "kind": "experiment"}
    given |= {"mode": "shadow", "arms": arms, "control": CURRENT}
    return config.validate(ExperimentSpec, given, where="winner.shadow.experiment")


def place_shadow(spec: TuneSpec, report: TuneReport) -> dict[str, Any]:
    """Write the experiment spec and start it if requested; return what was done, for `--json`.

    Raises ClusterError (no endpoint answers), ApiError (it refuses).
    """
    assert spec.winner is not None
    assert spec.winner.shadow is not None
    assert report.winner is not None
    current, winner = report.winner.beside, report.winner.train.version
    if current is None or current == winner:
        return {
            "why": f"{spec.train.name}@{spec.winner.shadow.against} is the winner itself: nothing to compare it with"
        }
    asked = shadow_spec(spec, current, winner)
    text = yaml.safe_dump(asked.model_dump(mode="json", exclude_unset=True), sort_keys=False, allow_unicode=True)
    found: dict[str, Any] = {
        "spec": _write(Store(spec.root), report.run_id, f"shadow-{winner}.yaml", text),
        "current": current,
        "winner": winner,
        "started": None,
    }
    if spec.winner.shadow.start:
        token = own_token(asked.admin_token_env, "admin_token_env")
        with Client(asked.endpoint, token) as client:
            found["started"] = client.experiment("start", spec=asked.model_dump(mode="json"))
    return found


def _write(store: Store, run_id: str, name: str, text: str) -> str:
    """Into the sweep's folder; returns the path that a command can read: of S3 a copy in this folder."""
    store.write_bytes(text.encode(), "runs", run_id, name)
    if store.is_local:
        return store.path("runs", run_id, name)
    Path(name).write_text(text, encoding="utf-8")
    return name


def _given_keys(experiment: str | dict[str, Any]) -> dict[str, Any]:
    """The keys that are given; of a file those that the sweep does not set."""
    if isinstance(experiment, str):
        tree = config.load(experiment, expect="experiment").model_dump(mode="json", exclude_unset=True)
        return {key: value for key, value in tree.items() if key not in SET_HERE}
    if clash := SET_HERE & experiment.keys():
        raise ConfigError(
            f"winner.shadow.experiment.{min(clash)}",
            "the sweep sets it",
            "the current version is the control, the winner its shadow",
            "leave it out",
        )
    return experiment
