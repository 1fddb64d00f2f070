"""What the stages return, as the records that the report shows."""

from collections.abc import Mapping
from typing import Any, Literal

from graftwork.data import read_rows
from graftwork.demo.specs import DemoSpecs
from graftwork.report.records import Trial, TuneRecord
from graftwork.tuning.run import TuneReport
from graftwork.tuning.spec import TuneSpec


def base_name(uri: str) -> str:
    """The last part of a base's URI, without a file ending."""
    return uri.rstrip("/").rsplit("/", 1)[-1].removesuffix(".gguf")


def build_data(specs: DemoSpecs) -> str:
    """Read every dataset once (recipes are built on first use). Returns how many rows each gives."""
    uris = dict.fromkeys([*(spec.data.train for spec in specs.train), specs.compare.eval])
    return ", ".join(f"{len(read_rows(uri, need='train'))} rows in {uri.removeprefix('recipe://')}" for uri in uris)


def tune_record(found: TuneReport, spec: TuneSpec) -> TuneRecord:
    """The sweep; its best trial is the one whose values were chosen."""
    best = next(trial for trial in found.trials if trial.trial_id == found.best_id)
    trials = tuple(
        Trial(id=t.trial_id, values=_plain(t.values), losses=t.losses, state=_ended(t.state), wall_s=t.wall_s)
        for t in found.trials
    )
    return TuneRecord(
        name=spec.name, trials=trials, best_id=best.trial_id, rows=found.eval_rows, seed=spec.seed, reused=found.reused
    )


def _plain(values: Mapping[str, Any]) -> dict[str, str | int | float | bool | None]:
    """Lists and mappings as text: a report shows one value a key."""
    return {key: value if isinstance(value, str | int | float | None) else str(value) for key, value in values.items()}


def _ended(state: str) -> Literal["finished", "stopped", "failed"]:
    return "finished" if state == "finished" else "stopped" if state == "stopped" else "failed"
