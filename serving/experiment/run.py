"""A comparison as a run: deploy (or take an endpoint), ask, judge, record."""

import asyncio
import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from graftwork import artifact, base_model
from graftwork.data import read_fields, read_rows
from graftwork.provenance import collect
from graftwork.report.records import CompareReport
from graftwork.serving.app import Endpoint, deploy
from graftwork.serving.experiment.compare import compare, primary_metric, score_arms
from graftwork.serving.experiment.offline import CompareProgress, count_unanswered, run_offline
from graftwork.serving.experiment.scorers.load import load_scorers
from graftwork.serving.experiment.scorers.schema import AnswerSchema
from graftwork.serving.experiment.spec import CompareSpec
from graftwork.serving.experiment.verdict import ScoredArms
from graftwork.serving.spec import ArmSpec, ServeSpec
from graftwork.storage import RunPaths, Store


@dataclass(frozen=True)
class CompareOutcome:
    """A finished comparison. `asked` counts the answers of this run, `reused` those found on disk."""

    run_id: str
    report: CompareReport
    asked: int
    reused: int
    stats: Mapping[str, Any]
    """The engine's counters after the last answer; empty where nothing was asked."""
    scored: ScoredArms
    """Each answer's scores, in the order of the questions."""


def run_compare(
    spec: CompareSpec,
    *,
    endpoint: Endpoint | None = None,
    on_progress: Callable[[CompareProgress], None] | None = None,
) -> CompareOutcome:
    """Ask all arms (on `endpoint`, or on an engine deployed for it) and judge. Needs an initialised Ray.

    Each alias is resolved once, here; the run is named by the spec and those versions, so a rerun after an update asks
    the updated arms anew and reuses the others. Raises UserError before anything is deployed.
    """
    rows = read_rows(spec.eval, limit=spec.limit, need="eval")
    schema = AnswerSchema.load(spec.answer_schema) if spec.answer_schema else None
    scorers = load_scorers(spec.scorers, schema)
    primary_metric(spec, scorers.metrics)
    scorers.check(rows)
    names = [*spec.slices, *([spec.cluster] if spec.cluster else [])]
    fields = read_fields(spec.eval, names, limit=spec.limit) if names else {}
    store = Store(spec.root)
    pinned = {arm.name: _pin(store, arm) for arm in spec.arms}
    versions = {name: arm.adapter.partition("@")[2] for name, arm in pinned.items() if arm.adapter}
    run = RunPaths(store, spec.name, spec.identity())
    folder = store.local_dir(*run.file())
    store.write_bytes(yaml.safe_dump(spec.model_dump(mode="json"), sort_keys=False).encode(), *run.spec())
    store.write_json(collect(spec.seed), *run.provenance())

    seen: list[CompareProgress] = []

    def progress(now: CompareProgress) -> None:
        seen.append(now)
        if on_progress is not None:
            on_progress(now)

    async def ask(arm: ArmSpec, messages: list[dict[str, str]], request_id: str) -> Mapping[str, Any]:
        assert live is not None, "an answer is asked for although all are on disk"
        return await live.ask(pinned[arm.name], messages, request_id)

    path = folder / "answers.jsonl"
    with _endpoint(spec, endpoint, needed=count_unanswered(spec, rows, path, versions) > 0) as live:
        answers = asyncio.run(run_offline(spec, rows, ask, path, versions=versions, on_progress=progress))
        stats = asyncio.run(_stats(live)) if live is not None and len(answers) > seen[0].reused else {}
    template = base_model.template(base_model.resolve(spec.base))
    report = compare(spec, rows, answers, schema, template_digest=template.digest, fields=fields)
    _record(store, run, path, report)
    asked, reused = len(answers) - seen[0].reused, seen[0].reused
    return CompareOutcome(run.run_id, report, asked, reused, stats, score_arms(spec, rows, answers, schema))


def _pin(store: Store, arm: ArmSpec) -> ArmSpec:
    if arm.adapter is None:
        return arm
    manifest = artifact.resolve(store, arm.adapter)
    return arm.with_({"adapter": f"{manifest.task}@{manifest.version}"})


@contextlib.contextmanager
def _endpoint(spec: CompareSpec, given: Endpoint | None, *, needed: bool) -> Iterator[Endpoint | None]:
    if given is not None or not needed:
        yield given
        return
    serve = ServeSpec(
        name=f"compare-{spec.name}"[:63], root=spec.root, base=spec.base, quant=spec.quant, engine=spec.engine,
        max_ongoing_requests=max(512, 2 * spec.concurrency), num_cpus=spec.num_cpus, num_gpus=spec.num_gpus,
    )  # fmt: skip
    with deploy(serve, http=False) as endpoint:
        yield endpoint


async def _stats(endpoint: Endpoint) -> dict[str, Any]:
    stats: dict[str, Any] = await endpoint.handle.stats.remote()
    return stats


def _record(store: Store, run: RunPaths, answers: Path, report: CompareReport) -> None:
    store.write_json(report.model_dump(mode="json"), *run.file("compare.json"))
    if not store.is_local:
        store.upload(answers, *run.file("answers.jsonl"))
    store.write_json({"state": "finished", "n": report.n, "advice": report.advice.sentence}, *run.status())
