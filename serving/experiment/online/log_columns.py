"""Rows of the log as columns: what the monitor reads of them, from `LogRow`s and from Arrow batches alike.

No object is made for a row of a batch: a million rows take a second.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from graftwork.serving.experiment.online.log_row import LogRow
from graftwork.serving.experiment.online.rules import MEASURES, OnlineRules
from graftwork.stats import Floats


@dataclass(frozen=True)
class LogColumns:
    """As many entries in each as there are rows. A number that is missing is NaN."""

    kind: Sequence[str]
    role: Sequence[str]
    arm: Sequence[str]
    unit: Sequence[str]
    request_id: Sequence[str]
    at: Sequence[float]
    probability: Sequence[float]
    failed: Sequence[bool]
    cold: Sequence[bool]
    empty: Sequence[bool]
    """No passage was retrieved."""
    event: Sequence[str | None]
    detail: Sequence[str | None]
    numbers: dict[str, Floats]
    """Each of `numbers_of(rules)`."""

    def __len__(self) -> int:
        return len(self.kind)


def numbers_of(rules: OnlineRules) -> tuple[str, ...]:
    """Measures and scores that the rules need."""
    names = [rules.metric]
    for guard in rules.guardrails:
        if guard.kind == "latency":
            names.append("latency_ms")
        elif guard.kind in ("schema_invalid", "fairness_gap"):
            names += [guard.score, *(guard.groups or ())]
    return tuple(dict.fromkeys(names))


def columns_of_rows(rows: Sequence[LogRow], names: Sequence[str]) -> LogColumns:
    """From rows as they are written."""
    return LogColumns(
        kind=[row.kind for row in rows], role=[row.role for row in rows], arm=[row.arm for row in rows],
        unit=[row.unit for row in rows], request_id=[row.request_id for row in rows], at=[row.at for row in rows],
        probability=[np.nan if row.probability is None else row.probability for row in rows],
        failed=[row.error is not None for row in rows], cold=[row.cold for row in rows],
        empty=[not row.retrieved_ids for row in rows], event=[row.event for row in rows],
        detail=[row.detail for row in rows],
        numbers={name: np.array([_number(row, name) for row in rows], dtype=np.float64) for name in names},
    )  # fmt: skip


def columns_of_batch(batch: Any, names: Sequence[str]) -> LogColumns:
    """From a pyarrow RecordBatch with the fields of `LogRow`; `scores` is a struct of numbers, or is not there."""
    import pyarrow.compute as pc

    def listed(name: str) -> Any:
        return batch.column(name).to_pylist()

    retrieved = pc.fill_null(pc.list_value_length(batch.column("retrieved_ids")), 0)
    return LogColumns(
        kind=listed("kind"), role=listed("role"), arm=listed("arm"), unit=listed("unit"),
        request_id=listed("request_id"), at=listed("at"), probability=_floats(batch.column("probability")).tolist(),
        failed=batch.column("error").is_valid().to_pylist(), cold=listed("cold"),
        empty=pc.equal(retrieved, 0).to_pylist(), event=listed("event"), detail=listed("detail"),
        numbers={name: _batch_number(batch, name) for name in names},
    )  # fmt: skip


def _number(row: LogRow, name: str) -> float:
    value = getattr(row, name) if name in MEASURES else row.scores.get(name)
    return np.nan if value is None else float(value)


def _batch_number(batch: Any, name: str) -> Floats:
    import pyarrow as pa
    import pyarrow.compute as pc

    if name in MEASURES:
        return _floats(batch.column(name))
    if "scores" not in batch.schema.names:
        return np.full(len(batch), np.nan)
    scores = batch.column("scores")
    found = [field.name for field in scores.type]
    return _floats(pc.struct_field(scores, found.index(name)) if name in found else pa.nulls(len(batch), pa.float64()))


def _floats(column: Any) -> Floats:
    import pyarrow.compute as pc

    values: Floats = pc.cast(column, "float64").to_numpy(zero_copy_only=False)
    return values
