"""Comparison run: deploys or takes an endpoint, asks all arms, compares and writes the report."""

import asyncio
import contextlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from graftwork.artifacts.manifest import AdapterManifest
from graftwork.artifacts.registry import resolve
from graftwork.base import load as base_model
from graftwork.base.support import check_serving
from graftwork.datasets.rows import DatasetRow, fingerprint, key_check, read_fields, read_rows, resolve_prompt
from graftwork.environment import collect
from graftwork.errors import ConfigError
from graftwork.planning.hardware import accelerators_here, with_gpus
from graftwork.report import BuiltReport, build
from graftwork.report.render import ReportInput
from graftwork.report.schema import CompareReport, DecisionCard, JudgeReport
from graftwork.scoring import AnswerSchema
from graftwork.serving.api.status import replica_stats
from graftwork.serving.arms import messages_of
from graftwork.serving.deploy import Endpoint, deploy
from graftwork.serving.evaluation.answers import (
    AnswerSet,
    CompareProgress,
    EvalRequest,
    Send,
    alone_jobs,
    ask_jobs,
    count_missing,
    count_unanswered,
    option_jobs,
    run_offline,
)
from graftwork.serving.evaluation.compare import compare, primary_metric, score_arms
from graftwork.serving.evaluation.differences import ScoredArms
from graftwork.serving.evaluation.failures.card import adapter_facts, make_card, probed_corpus, prompt_of, reference_arm
from graftwork.serving.evaluation.failures.classify import CorrectnessCheck
from graftwork.serving.evaluation.failures.probe import GoldPassages, Prober
from graftwork.serving.evaluation.llm_judge import JudgeRun, OtherEndpoint
from graftwork.serving.evaluation.scorers.load import Scorers, load_scorers
from graftwork.serving.evaluation.spec import CompareSpec
from graftwork.serving.spec import ArmSpec, ServeSpec
from graftwork.storage.store import RunPaths, Store

# Endpoint of a comparison: a given one, or its own.


class Endpoints:
    """The endpoint that was given, or one that is deployed when it is first needed."""

    def __init__(self, spec: CompareSpec, given: Endpoint | None, pinned: Mapping[str, ArmSpec]) -> None:
        self._spec, self._pinned, self.endpoint = spec, pinned, given
        self._open = contextlib.ExitStack()

    def __enter__(self) -> "Endpoints":
        self._open.__enter__()
        return self

    def __exit__(self, *exc: Any) -> None:
        self._open.__exit__(*exc)

    def open(self) -> None:
        """Deploys, where nothing is. Not within a running event loop."""
        spec = self._spec
        if self.endpoint is None:
            serve = ServeSpec(
                name=f"compare-{spec.name}"[:63],
                root=spec.root,
                base=spec.base,
                quant=spec.quant,
                engine=spec.engine,
                max_ongoing_requests=max(512, 2 * spec.concurrency),
                num_cpus=spec.num_cpus,
                num_gpus=spec.num_gpus,
            )
            self.endpoint = self._open.enter_context(deploy(serve, http=False))

    async def ask(self, arm: ArmSpec, messages: list[dict[str, str]], request_id: str) -> Mapping[str, Any]:
        """An arm's answer."""
        assert self.endpoint is not None, "an answer is asked for although all are on disk"
        answer = await self.endpoint.ask(self._as_pinned(arm), messages_of(messages), request_id)
        return asdict(answer)

    async def send(self, job: EvalRequest) -> Mapping[str, Any]:
        """An answer, or likelihoods."""
        if not job.continuations:
            return await self.ask(job.arm, job.messages, job.request_id)
        assert self.endpoint is not None, "likelihoods are asked for although all are on disk"
        messages = messages_of(job.messages)
        found = await self.endpoint.likelihood(self._as_pinned(job.arm), messages, job.continuations, job.request_id)
        return {"logprobs": [(one.logprob, one.tokens) for one in found]}

    def _as_pinned(self, arm: ArmSpec) -> ArmSpec:
        """A derived arm keeps its arm's version; one of another name (the judge) comes with its own."""
        pinned = self._pinned.get(arm.name)
        return arm.with_({"adapter": pinned.adapter}) if arm.adapter and pinned else arm


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
    files: BuiltReport
    """report.json and report.html in the run's folder."""
    scores_uri: str
    """scores.jsonl: what each answer scored."""


def run_compare(
    spec: CompareSpec,
    *,
    endpoint: Endpoint | None = None,
    on_progress: Callable[[CompareProgress], None] | None = None,
) -> CompareOutcome:
    """Ask all arms (on `endpoint`, or on an engine deployed for it) and judge. Needs an initialised Ray.

    Each alias is resolved once, here; the run is named by the spec and those versions, so a rerun after an update asks
    the updated arms again and reuses the others. Raises UserError before anything is deployed.
    """
    spec, _ = with_gpus(spec, accelerators_here())
    if endpoint is None:
        check_serving(spec)
    asked = _Asked.read(spec)
    rows, store = asked.rows, Store(spec.root)
    manifests = {arm.name: resolve(store, arm.adapter) for arm in spec.arms if arm.adapter}
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
        more = _More(spec, asked, manifests, live, folder, on_progress)
        alone = more.alone()
        if count_unanswered(spec, rows, path, versions):
            live.open()
        answers = asyncio.run(run_offline(spec, rows, live.ask, path, versions=versions, on_progress=progress))
        options = more.options()
        scored = score_arms(spec, rows, answers, asked.schema, options, alone)
        card, judged = more.card(answers, scored, alone), more.judged(answers, scored)
        new = len(answers) - seen[0].reused
        stats = asyncio.run(_stats(live.endpoint)) if live.endpoint is not None and new else {}
    template = base_model.template(base_model.resolve(spec.base))
    report = compare(
        spec,
        rows,
        answers,
        asked.schema,
        template_digest=template.digest,
        fields=asked.fields,
        options=options,
        alone=alone,
        card=card,
        judged=judged,
        notes=(*asked.notes, *_trained_on(rows, manifests)),
    )
    store.write_bytes(_score_lines(rows, answers, scored), *run.file("scores.jsonl"))
    files = _record(spec, store, run, folder, report)
    return CompareOutcome(
        run.run_id, report, new, seen[0].reused, stats, scored, files, store.path(*run.file("scores.jsonl"))
    )


@dataclass(frozen=True)
class _More:
    """Requests beyond the questions themselves. Each kind has a file of its own next to the answers."""

    spec: CompareSpec
    asked: "_Asked"
    manifests: Mapping[str, AdapterManifest]
    live: Endpoints
    folder: Path
    on_progress: Callable[[CompareProgress], None] | None

    @property
    def versions(self) -> dict[str, str]:
        """Of the arms' adapters."""
        return {name: manifest.version for name, manifest in self.manifests.items()}

    def alone(self) -> AnswerSet:
        """Answers with one request in flight, where a scorer needs times: before all others."""
        jobs = alone_jobs(self.spec, self.asked.rows, self.versions) if self.asked.scorers.needs_times else []
        return self._ask(jobs, "alone.jsonl", self.live.send, concurrency=1)

    def options(self) -> AnswerSet:
        """Likelihoods of the options of every choice scorer."""
        jobs = option_jobs(self.spec, self.asked.rows, self.asked.scorers.choices, self.versions)
        return self._ask(jobs, "options.jsonl", self.live.send)

    def card(self, answers: AnswerSet, scored: ScoredArms, alone: AnswerSet) -> DecisionCard | None:
        spec, asked = self.spec, self.asked
        if spec.probes is None:
            return None
        prober = Prober(
            spec,
            spec.probes,
            asked.rows,
            answers,
            CorrectnessCheck(spec, asked.scorers, asked.primary),
            asked.passages,
            prompts={arm.name: prompt_of(arm, self.manifests.get(arm.name)) for arm in spec.arms},
            versions=self.versions,
            reference=spec.probes.reference or reference_arm(spec, scored, asked.primary),
        )
        first = prober.first_requests()
        found = self._ask(first, "probes.jsonl", self.live.send)
        found = self._ask(first + prober.followup_requests(found), "probes.jsonl", self.live.send)
        return make_card(prober, found, {name: adapter_facts(m) for name, m in self.manifests.items()}, alone)

    def judged(self, answers: AnswerSet, scored: ScoredArms) -> JudgeReport | None:
        judge = self.spec.judge
        if judge is None:
            return None
        manifest = resolve(Store(self.spec.root), judge.adapter) if judge.adapter else None
        run = JudgeRun(self.spec, judge, self.asked.rows, answers, manifest)
        found = self._ask(run.jobs(), "judge.jsonl", OtherEndpoint(judge).send if judge.url else self.live.send)
        return run.report(found, scored, self.asked.primary)

    def _ask(self, jobs: Sequence[EvalRequest], file: str, send: Send, concurrency: int | None = None) -> AnswerSet:
        """On the endpoint, deployed where something is missing that only it can answer."""
        path = self.folder / file
        if send == self.live.send and count_missing(jobs, path):
            self.live.open()
        if not jobs:
            return AnswerSet()
        return asyncio.run(ask_jobs(jobs, send, path, concurrency or self.spec.concurrency, self.on_progress))


@dataclass(frozen=True)
class _Asked:
    """Inputs that the spec names, read and checked before anything is deployed."""

    rows: list[DatasetRow]
    schema: AnswerSchema | None
    scorers: Scorers
    primary: str
    fields: Mapping[str, Sequence[str]]
    passages: GoldPassages
    notes: tuple[str, ...]
    """Keys of the questions, and of the prompts' worked examples, that are ignored."""

    @classmethod
    def read(cls, spec: CompareSpec) -> "_Asked":
        """Raises UserError."""
        names = [*spec.slices, *([spec.cluster] if spec.cluster else [])]
        keys, shots = key_check("eval", names), key_check("train")
        rows = read_rows(spec.eval, limit=spec.limit, need="eval", keys=keys)
        for arm in spec.arms:
            if arm.prompt is not None:
                resolve_prompt(arm.prompt, shots)
        schema = AnswerSchema.load(spec.answer_schema) if spec.answer_schema else None
        scorers = load_scorers(spec.scorers, schema)
        scorers.check(rows)
        fields = read_fields(spec.eval, names, limit=spec.limit) if names else {}
        passages = GoldPassages.read(probed_corpus(spec, rows) if spec.probes else None)
        primary = primary_metric(spec, scorers.tested)
        if spec.probes and primary in {choice.name for choice in scorers.choices}:
            raise ConfigError(
                f"probes with primary={primary!r}",
                "nothing is written for a choice",
                "probes read written answers",
                "leave out probes, or name another primary",
            )
        notes = (*keys.note("eval"), *shots.note("prompt.few_shot_file"))
        return cls(rows, schema, scorers, primary, fields, passages, notes)


def _trained_on(rows: Sequence[DatasetRow], manifests: Mapping[str, AdapterManifest]) -> list[str]:
    """A note on each arm whose adapter was trained on exactly these rows, by its manifest's digest of them."""
    asked = fingerprint(rows)
    return [
        f"{arm}: its adapter {manifest.ref} was trained on these very questions, so its scores say nothing about "
        "others."
        for arm, manifest in manifests.items()
        if manifest.data_fingerprint == asked
    ]


def _pinned(arm: ArmSpec, manifest: AdapterManifest | None) -> ArmSpec:
    return arm.with_({"adapter": manifest.ref}) if manifest else arm


async def _stats(endpoint: Endpoint) -> dict[str, Any]:
    return replica_stats(await endpoint.handle.snapshot.remote())


def _score_lines(rows: Sequence[DatasetRow], answers: AnswerSet, scored: ScoredArms) -> bytes:
    """Return the scores as JSON lines, one for each answer; a measure that was not taken is absent."""
    lines = []
    for place, row in enumerate(rows):
        for arm, by_metric in scored.values.items():
            answer = answers.get(arm, row.id)
            scores = {name: float(values[place]) for name, values in by_metric.items() if not math.isnan(values[place])}
            line = {
                "row_id": row.id,
                "arm": arm,
                "text": answer.text,
                "error": answer.error,
                "finish_reason": answer.finish_reason,
                "scores": scores,
            }
            lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    return "".join(lines).encode()


def _record(spec: CompareSpec, store: Store, run: RunPaths, folder: Path, report: CompareReport) -> BuiltReport:
    """Write compare.json, the same bytes for the same answers and seed, and the page with time and place."""
    store.write_json(report.model_dump(mode="json"), *run.file("compare.json"))
    if not store.is_local:
        for name in ("answers.jsonl", "alone.jsonl", "options.jsonl", "probes.jsonl", "judge.jsonl"):
            if (folder / name).exists():
                store.upload(folder / name, *run.file(name))
    page = ReportInput(
        title="Finetuned or RAG?",
        subtitle=spec.name,
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        compare=report,
        provenance=collect(spec.seed),
    )
    files = build(page, store, *run.file())
    store.write_json({"state": "finished", "n": report.n, "advice": report.advice.sentence}, *run.status())
    return files
