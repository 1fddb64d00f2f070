"""A measure run: all arms on the same questions, answers and likelihoods stored in the study's run, scores returned."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from examples.studies.likelihood import read_weighed, scores_of, weigh_all, weigh_key
from examples.studies.scores import Scores
from examples.studies.spec import MeasureSpec, StudySpec
from graftwork.base import load as base_model
from graftwork.datasets.rows import DatasetRow, fingerprint, read_fields, read_rows
from graftwork.errors import ConfigError, DataError
from graftwork.scoring import Choices
from graftwork.serving.deploy import deploy
from graftwork.serving.evaluation.answers import check_ids
from graftwork.serving.evaluation.run import run_compare
from graftwork.serving.spec import ArmSpec, ServeSpec
from graftwork.storage.store import RunPaths, Store


@dataclass(frozen=True)
class MeasureProgress:
    """Questions done and in all, over all arms."""

    done: int
    total: int


OnProgress = Callable[[MeasureProgress], None]


@dataclass(frozen=True)
class Measured:
    """A finished measure."""

    spec: MeasureSpec
    scores: Scores
    failed: int
    reused: bool
    """Nothing was asked now."""
    fingerprint: str


def run_measure(
    study: StudySpec, measure: MeasureSpec, versions: Mapping[str, str], *, on_progress: OnProgress
) -> Measured:
    """Ask every arm. versions: by task, of the adapters that the study trained. Needs an initialised Ray.

    Raises UserError before anything is asked; RunError when the endpoint is gone.
    """
    measure = measure.with_({"arms": [_pinned(arm, versions).model_dump(mode="json") for arm in measure.arms]})
    rows = read_rows(measure.eval, limit=measure.limit, need="eval")
    check_ids(rows)
    units, groups = _units(measure, rows), _groups(measure, rows)
    ask = _answers if measure.kind == "answers" else _likelihoods
    values, failed, reused = ask(study, measure, rows, on_progress)
    return Measured(measure, Scores(values, units, groups), failed, reused, fingerprint(rows))


def check_measure(study: StudySpec, measure: MeasureSpec) -> None:
    """Find what is wrong with a measure's rows, and with the groups that claims name. Raises UserError."""
    rows = read_rows(measure.eval, limit=measure.limit, need="eval")
    check_ids(rows)
    _units(measure, rows)
    groups = sorted(set(_groups(measure, rows)))
    for claim in study.claims:
        for key, group in (("of", claim.of), ("than_of", claim.than_of)):
            if study.measure_of(claim) is measure and group is not None and str(group) not in groups:
                raise ConfigError(
                    f"claims: {key}={group!r}",
                    "no question of this group",
                    f"by={measure.by!r} parts the questions into {', '.join(groups)}",
                    "name one of them",
                )
    if measure.kind == "likelihood":
        for row in rows:
            Choices.from_row(row)


def _pinned(arm: ArmSpec, versions: Mapping[str, str]) -> ArmSpec:
    task = arm.adapter.partition("@")[0] if arm.adapter else ""
    return arm.with_({"adapter": f"{task}@{versions[task]}"}) if task in versions else arm


def _units(measure: MeasureSpec, rows: Sequence[DatasetRow]) -> list[str]:
    if measure.unit == "id":
        return [row.id for row in rows]
    for row in rows:
        if row.doc_id is None:
            raise DataError(
                f"{measure.eval}: row {row.id}",
                "it has no doc_id",
                "unit=doc_id groups questions by it",
                "add doc_id, or set unit=id",
            )
    return [str(row.doc_id) for row in rows]


def _groups(measure: MeasureSpec, rows: Sequence[DatasetRow]) -> Sequence[str]:
    """The field that `by` names, of each row."""
    if measure.by is None:
        return [""] * len(rows)
    return read_fields(measure.eval, [measure.by], limit=measure.limit)[measure.by]


Found = tuple[dict[str, dict[str, Any]], int, bool]
"""(scores by arm and metric, failed requests, nothing asked now)"""


def _answers(study: StudySpec, measure: MeasureSpec, rows: Sequence[DatasetRow], on_progress: OnProgress) -> Found:
    found = run_compare(
        study.comparison(measure), on_progress=lambda now: on_progress(MeasureProgress(now.done, now.total))
    )
    values = {arm: dict(scores) for arm, scores in found.scored.values.items()}
    return values, sum(arm.errors for arm in found.report.arms), found.asked == 0


def _likelihoods(study: StudySpec, measure: MeasureSpec, rows: Sequence[DatasetRow], on_progress: OnProgress) -> Found:
    choices = {row.id: Choices.from_row(row) for row in rows}
    base = {"digest": base_model.resolve(study.base).digest, "quant": study.quant.model_dump(mode="json")}
    keys = {(arm.name, row.id): weigh_key(arm, row, base, choices[row.id]) for arm in measure.arms for row in rows}
    run = RunPaths(Store(study.root), f"{study.name}-{measure.name}"[:63], measure.identity())
    path = run.store.local_dir(*run.file()) / "likelihoods.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = read_weighed(path)
    jobs = {
        keys[arm.name, row.id]: (arm, row, choices[row.id])
        for row in rows
        for arm in measure.arms
        if keys[arm.name, row.id] not in kept
    }
    if jobs:
        serve = ServeSpec(
            name=run.name, root=study.root, base=study.base, quant=study.quant, num_cpus=study.num_cpus, num_gpus=0
        )
        with deploy(serve, http=False) as endpoint:
            done, total = len(keys) - len(jobs), len(keys)
            asyncio.run(
                weigh_all(jobs, endpoint.likelihood, path, lambda now: on_progress(MeasureProgress(done + now, total)))
            )
        kept = read_weighed(path)
    values = {
        arm.name: scores_of([kept[keys[arm.name, row.id]] for row in rows], [choices[row.id] for row in rows])
        for arm in measure.arms
    }
    return {arm: dict(scores) for arm, scores in values.items()}, 0, not jobs
