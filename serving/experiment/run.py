"""A comparison as a run: deploy (or take an endpoint), ask, judge, record."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from graftwork import artifact, base_model
from graftwork.data import Row, read_fields, read_rows
from graftwork.provenance import collect
from graftwork.report.records import CompareReport
from graftwork.serving.app import Endpoint
from graftwork.serving.experiment.compare import compare, primary_metric, score_arms
from graftwork.serving.experiment.endpoints import Endpoints
from graftwork.serving.experiment.offline import CompareProgress, count_unanswered, run_offline
from graftwork.serving.experiment.probes.ask import Prober
from graftwork.serving.experiment.probes.card import make_card, reference_arm
from graftwork.serving.experiment.probes.gold import GoldPassages
from graftwork.serving.experiment.probes.right import Judge
from graftwork.serving.experiment.probes.run import adapter_facts, probe, probed_corpus, prompt_of
from graftwork.serving.experiment.scorers.load import Scorers, load_scorers
from graftwork.serving.experiment.scorers.schema import AnswerSchema
from graftwork.serving.experiment.spec import CompareSpec
from graftwork.serving.experiment.verdict import ScoredArms
from graftwork.serving.spec import ArmSpec
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
    asked = _Asked.read(spec)
    rows, store = asked.rows, Store(spec.root)
    manifests = {arm.name: artifact.resolve(store, arm.adapter) for arm in spec.arms if arm.adapter}
    pinned = {arm.name: _pinned(arm, manifests.get(arm.name)) for arm in spec.arms}
    versions = {name: manifest.version for name, manifest in manifests.items()}
    run = RunPaths(store, spec.name, spec.identity())
    folder = store.local_dir(*run.file())
    store.write_bytes(yaml.safe_dump(spec.model_dump(mode="json"), sort_keys=False).encode(), *run.spec())
    store.write_json(collect(spec.seed), *run.provenance())

    seen: list[CompareProgress] = []

    def progress(now: CompareProgress) -> None:
        seen.append(now)
        if on_progress is not None:
            on_progress(now)

    path = folder / "answers.jsonl"
    with Endpoints(spec, endpoint, pinned) as live:
        if count_unanswered(spec, rows, path, versions):
            live.open()
        answers = asyncio.run(run_offline(spec, rows, live.ask, path, versions=versions, on_progress=progress))
        card = None
        if spec.probes is not None:
            reference = spec.probes.reference or reference_arm(
                spec, score_arms(spec, rows, answers, asked.schema), asked.primary
            )
            prober = Prober(
                spec, spec.probes, rows, answers, Judge(spec, asked.scorers, asked.primary), asked.passages,
                prompts={arm.name: prompt_of(arm, manifests.get(arm.name)) for arm in spec.arms},
                versions=versions, reference=reference,
            )  # fmt: skip
            found = probe(prober, live, folder / "probes.jsonl", on_progress)
            card = make_card(prober, found, {name: adapter_facts(m) for name, m in manifests.items()})
        new = len(answers) - seen[0].reused
        stats = asyncio.run(_stats(live.endpoint)) if live.endpoint is not None and new else {}
    template = base_model.template(base_model.resolve(spec.base))
    report = compare(spec, rows, answers, asked.schema, template_digest=template.digest, fields=asked.fields, card=card)
    _record(store, run, folder, report)
    scored = score_arms(spec, rows, answers, asked.schema)
    return CompareOutcome(run.run_id, report, new, seen[0].reused, stats, scored)


@dataclass(frozen=True)
class _Asked:
    """What the spec names, read and checked before anything is deployed."""

    rows: list[Row]
    schema: AnswerSchema | None
    scorers: Scorers
    primary: str
    fields: Mapping[str, Sequence[str]]
    passages: GoldPassages

    @classmethod
    def read(cls, spec: CompareSpec) -> "_Asked":
        """Raises UserError."""
        rows = read_rows(spec.eval, limit=spec.limit, need="eval")
        schema = AnswerSchema.load(spec.answer_schema) if spec.answer_schema else None
        scorers = load_scorers(spec.scorers, schema)
        scorers.check(rows)
        names = [*spec.slices, *([spec.cluster] if spec.cluster else [])]
        fields = read_fields(spec.eval, names, limit=spec.limit) if names else {}
        passages = GoldPassages.read(probed_corpus(spec, rows) if spec.probes else None)
        return cls(rows, schema, scorers, primary_metric(spec, scorers.metrics), fields, passages)


def _pinned(arm: ArmSpec, manifest: artifact.AdapterManifest | None) -> ArmSpec:
    return arm.with_({"adapter": manifest.ref}) if manifest else arm


async def _stats(endpoint: Endpoint) -> dict[str, Any]:
    stats: dict[str, Any] = await endpoint.handle.stats.remote()
    return stats


def _record(store: Store, run: RunPaths, folder: Path, report: CompareReport) -> None:
    store.write_json(report.model_dump(mode="json"), *run.file("compare.json"))
    if not store.is_local:
        for name in ("answers.jsonl", "probes.jsonl"):
            if (folder / name).exists():
                store.upload(folder / name, *run.file(name))
    store.write_json({"state": "finished", "n": report.n, "advice": report.advice.sentence}, *run.status())
