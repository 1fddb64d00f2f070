"""Winner of a sweep: trained with the full budget of `train`, measured, published, and its alias moved.

    runs/<sweep>/winner.json    what was published, and where the aliases pointed before

A sweep that was killed here resumes here: the training from its last checkpoint, and an alias that was moved stays.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import yaml

from graftwork.artifacts import publish
from graftwork.artifacts.manifest import AdapterManifest, aliases
from graftwork.artifacts.registry import locate, open_adapter
from graftwork.errors import StorageError, StoreUnreachable
from graftwork.storage.store import RunPaths, Store
from graftwork.training.report import Progress, TrainReport
from graftwork.training.run import check, train
from graftwork.training.spec import TrainSpec
from graftwork.tuning.spec import TuneSpec
from graftwork.tuning.trials import Winner

WINNER = "winner.json"
SCORED_BY = (
    "base",
    "quant",
    "data.eval",
    "data.eval_rows",
    "data.columns",
    "data.template",
    "data.thinking",
    "data.context",
    "prompt",
    "max_length",
    "objective",
)
"""Keys of a training spec that decide which held-out rows are scored, and how."""


@dataclass(frozen=True)
class WinnerRecord:
    """Content of winner.json."""

    version: str
    alias: str | None
    before: str | None
    """Version that `alias` pointed at before; None: there was no such alias."""
    against: str | None
    beside: str | None
    """Version that `against` pointed at before."""
    moved: bool | None = None
    """None: killed before it was decided."""
    why: str = ""


def root_of(spec: TuneSpec) -> str:
    """Store of the winner: `train.root` where that is given, else the sweep's."""
    return spec.train.root if "root" in spec.train.model_fields_set else spec.root


def winner_spec(spec: TuneSpec, best: TrainSpec) -> TrainSpec:
    """The run that trains the winner: `train` with the best values."""
    assert spec.winner is not None
    changes: dict[str, Any] = {"alias": None, "root": root_of(spec)}
    if spec.winner.retention and best.outcomes.retention is None:
        changes["outcomes.retention"] = {}
    return best.with_(changes)


def require_winner(spec: TuneSpec) -> None:
    """Find the errors of the winner's training before the first trial. Raises UserErrors of all kinds."""
    if spec.winner is None:
        return
    wanted = winner_spec(spec, spec.train)
    check(wanted)
    if spec.winner.shadow is not None:
        locate(Store(wanted.root), f"{wanted.name}@{spec.winner.shadow.against}")


def train_winner(spec: TuneSpec, best: TrainSpec, sweep: RunPaths, on_progress: Callable[[Progress], None]) -> Winner:
    """Train, publish and place the winner, or find it done. Needs an initialised Ray; raises what `train` raises."""
    assert spec.winner is not None
    wanted = winner_spec(spec, best)
    report = train(wanted, on_progress=on_progress)
    if report.adapter is None:
        return Winner(report, None, None, None, False, "a base has no alias")
    store = Store(wanted.root)
    placed = _record_aliases(spec, store, wanted.name, report, sweep)
    if placed.moved is None:
        placed = move(store, wanted.name, placed)
        _write(sweep, placed)
    return Winner(report, placed.alias, placed.before, placed.beside, bool(placed.moved), placed.why)


def _record_aliases(spec: TuneSpec, store: Store, task: str, report: TrainReport, sweep: RunPaths) -> WinnerRecord:
    """Record the versions that the aliases point at before one of them moves."""
    assert spec.winner is not None
    alias, against = spec.winner.alias, spec.winner.shadow.against if spec.winner.shadow else None
    if sweep.store.exists(*sweep.file(WINNER)):
        placed = WinnerRecord(**sweep.store.read_json(*sweep.file(WINNER)))
        if (placed.version, placed.alias, placed.against) == (report.version, alias, against):
            return placed
    pointed = aliases(store, task)
    before, beside = (pointed.get(name) if name else None for name in (alias, against))
    placed = WinnerRecord(report.version, alias, before, against, beside)
    _write(sweep, placed)
    return placed


def _write(sweep: RunPaths, placed: WinnerRecord) -> None:
    sweep.store.write_json(asdict(placed), *sweep.file(WINNER))


def move(store: Store, task: str, placed: WinnerRecord) -> WinnerRecord:
    """Point the alias at the winner, unless what it points at was measured on the same rows and has the lower loss."""
    if placed.alias is None:
        return replace(placed, moved=False, why="no alias was asked for")
    if placed.before == placed.version:
        return replace(placed, moved=False, why="it pointed there before")
    why = "it is new"
    if placed.before is not None:
        before, now = (open_adapter(store, task, one) for one in (placed.before, placed.version))
        old, new = before.metrics.get("eval_loss"), now.metrics.get("eval_loss")
        if old is None or new is None or not _scored_alike(store, before, now):
            why = f"{placed.before} was not scored on the same rows: which is better is not known"
        elif old < new:
            why = f"{placed.before} has the lower held-out loss, {old:.4f} against {new:.4f}, by one run each"
            return replace(placed, moved=False, why=why)
        else:
            why = f"held-out loss {new:.4f} against {old:.4f} of {placed.before}, by one run each"
    publish.promote(store, task, placed.alias, placed.version)
    return replace(placed, moved=True, why=why)


def _scored_alike(store: Store, a: AdapterManifest, b: AdapterManifest) -> bool:
    """Return whether both were measured on the same held-out rows of the same base, by the specs of their runs."""
    if a.base_digest != b.base_digest:
        return False
    try:
        specs = [yaml.safe_load(store.read_text("runs", one.run, "spec.yaml")) for one in (a, b)]
    except StoreUnreachable:
        raise
    except StorageError:  # its run is gone, or was another's
        return False

    def value_at(tree: Any, dotted: str) -> Any:
        for key in dotted.split("."):
            tree = tree.get(key) if isinstance(tree, dict) else None
        return tree

    by_share = isinstance(value_at(specs[0], "data.eval"), float)  # of the training rows
    keys = (*SCORED_BY, "data.train") if by_share else SCORED_BY
    return all(value_at(specs[0], key) == value_at(specs[1], key) for key in keys)
