"""Comparison run: deploys or takes an endpoint, asks all arms, compares and writes the report."""

import asyncio
import contextlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from graftwork.artifacts.manifest import AdapterManifest
from graftwork.artifacts.registry import resolve
from graftwork.base.load import resolve as resolve_base
from graftwork.base.load import template
from graftwork.base.support import check_serving
from graftwork.datasets.rows import (
    DatasetRow,
    fingerprint,
    key_check,
    read_fields,
    read_rows,
    render_question,
    resolve_prompt,
)
from graftwork.environment import collect
from graftwork.errors import ConfigError
from graftwork.planning.hardware import accelerators_here, with_gpus
from graftwork.prompts.render import Prompt
from graftwork.report import BuiltReport, build
from graftwork.report.render import ReportInput
from graftwork.report.schema import CompareReport, DecisionCard, JudgeReport
from graftwork.scoring import AnswerSchema
from graftwork.serving.api.status import replica_stats
from graftwork.serving.arms import check_arms, messages_of
from graftwork.serving.deploy import Endpoint, deploy
from graftwork.serving.evaluation.answers import (
    AnswerSet,
    CompareProgress,
    EvalRequest,
    Send,
    alone_jobs,
    ask_jobs,
    count_missing,
    option_jobs,
    question_jobs,
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

    async def send(self, job: EvalRequest) -> Mapping[str, Any]:
        """An answer, or likelihoods."""
        assert self.endpoint is not None, "an answer is asked for although all are on disk"
        arm, messages = self._pin_arm(job.arm), messages_of(job.messages)
        if not job.continuations:
            return asdict(await self.endpoint.ask(arm, messages, job.request_id))
        found = await self.endpoint.likelihood(arm, messages, job.continuations, job.request_id)
        return {"logprobs": [(one.logprob, one.tokens) for one in found]}

    def _pin_arm(self, arm: ArmSpec) -> ArmSpec:
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
    inputs, store = _Inputs.read(spec), Store(spec.root)
    run = RunPaths(store, spec.name, spec.identity())
    folder = store.local_dir(*run.file())
    store.write_bytes(yaml.safe_dump(spec.model_dump(mode="json"), sort_keys=False).encode(), *run.spec())
    store.write_json(collect(spec.seed), *run.provenance())
    with Endpoints(spec, endpoint, inputs.pinned) as live:
        found = _Requests(spec, inputs, live, folder, on_progress).collect()
        snapshot = live.endpoint.handle.snapshot if live.endpoint is not None and found.asked else None
        stats = asyncio.run(_stats(snapshot)) if snapshot else {}
    report = compare(
        spec,
        inputs.rows,
        found.answers,
        inputs.schema,
        template_digest=template(resolve_base(spec.base)).digest,
        fields=inputs.fields,
        options=found.options,
        alone=found.alone,
        card=found.card,
        judged=found.judged,
        notes=(*inputs.notes, *_training_notes(inputs.rows, inputs.manifests)),
    )
    store.write_bytes(_score_lines(inputs.rows, found.answers, found.scored), *run.file("scores.jsonl"))
    files, reused = _record(spec, store, run, folder, report), len(found.answers) - found.asked
    scores_uri = store.path(*run.file("scores.jsonl"))
    return CompareOutcome(run.run_id, report, found.asked, reused, stats, found.scored, files, scores_uri)


@dataclass(frozen=True)
class _AllAnswers:
    """All answers of a comparison, and what follows from them."""

    answers: AnswerSet
    asked: int
    """Answers to questions that were not on disk."""
    options: AnswerSet
    alone: AnswerSet
    scored: ScoredArms
    card: DecisionCard | None
    judged: JudgeReport | None


@dataclass(frozen=True)
class _Requests:
    """Requests of a comparison. Each kind has a file of its own in the run's folder."""

    spec: CompareSpec
    inputs: "_Inputs"
    live: Endpoints
    folder: Path
    on_progress: Callable[[CompareProgress], None] | None

    def collect(self) -> _AllAnswers:
        """Ask in turn: what an answer takes alone, the questions, likelihoods of options, probes, the judge."""
        spec, inputs = self.spec, self.inputs
        rows, versions = inputs.rows, inputs.versions
        questions = question_jobs(spec, rows, versions)
        asked = count_missing(questions, self.folder / "answers.jsonl")
        timed = alone_jobs(spec, rows, versions) if inputs.scorers.needs_times else []
        alone = self._ask(timed, "alone.jsonl", self.live.send, concurrency=1)
        answers = self._ask(questions, "answers.jsonl", self.live.send)
        options = self._ask(option_jobs(spec, rows, inputs.scorers.choices, versions), "options.jsonl", self.live.send)
        scored = score_arms(spec, rows, answers, inputs.schema, options, alone)
        card, judged = self._card(answers, scored, alone), self._judge_report(answers, scored)
        return _AllAnswers(answers, asked, options, alone, scored, card, judged)

    def _card(self, answers: AnswerSet, scored: ScoredArms, alone: AnswerSet) -> DecisionCard | None:
        spec, inputs = self.spec, self.inputs
        if spec.probes is None:
            return None
        prober = Prober(
            spec,
            spec.probes,
            inputs.rows,
            answers,
            CorrectnessCheck(spec, inputs.scorers, inputs.primary),
            inputs.passages,
            prompts={arm.name: prompt_of(arm, inputs.manifests.get(arm.name)) for arm in spec.arms},
            versions=inputs.versions,
            reference=spec.probes.reference or reference_arm(spec, scored, inputs.primary),
        )
        first = prober.first_requests()
        found = self._ask(first, "probes.jsonl", self.live.send)
        found = self._ask(first + prober.followup_requests(found), "probes.jsonl", self.live.send)
        return make_card(prober, found, {name: adapter_facts(m) for name, m in inputs.manifests.items()}, alone)

    def _judge_report(self, answers: AnswerSet, scored: ScoredArms) -> JudgeReport | None:
        judge = self.spec.judge
        if judge is None:
            return None
        manifest = resolve(Store(self.spec.root), judge.adapter) if judge.adapter else None
        run = JudgeRun(self.spec, judge, self.inputs.rows, answers, manifest)
        found = self._ask(run.jobs(), "judge.jsonl", OtherEndpoint(judge).send if judge.url else self.live.send)
        return run.report(found, scored, self.inputs.primary)

    def _ask(self, jobs: Sequence[EvalRequest], file: str, send: Send, concurrency: int | None = None) -> AnswerSet:
        """On the endpoint, deployed where something is missing that only it can answer."""
        path = self.folder / file
        if send == self.live.send and count_missing(jobs, path):
            self.live.open()
        if not jobs:
            return AnswerSet()
        return asyncio.run(ask_jobs(jobs, send, path, concurrency or self.spec.concurrency, self.on_progress))


def _check_prompts(spec: CompareSpec, rows: Sequence[DatasetRow]) -> None:
    """Raise UserError for functions, calls or variables, of arms or rows, that the base's template does not take."""
    loaded = cache(lambda: template(resolve_base(spec.base)))
    check_arms(spec.arms, loaded)
    for row in rows:
        if row.tools or row.template_kwargs or any(turn.role == "tool" for turn in row.question):
            render_question(row, loaded(), Prompt(), (), "keep")


@dataclass(frozen=True)
class _Inputs:
    """Inputs that the spec names, read and checked before anything is deployed."""

    rows: list[DatasetRow]
    schema: AnswerSchema | None
    scorers: Scorers
    primary: str
    fields: Mapping[str, Sequence[str]]
    passages: GoldPassages
    notes: tuple[str, ...]
    """Keys of the questions, and of the prompts' worked examples, that are ignored."""
    manifests: Mapping[str, AdapterManifest]
    """By arm; each alias is resolved once, here."""
    pinned: Mapping[str, ArmSpec]
    """Arms with the versions of `manifests`."""

    @property
    def versions(self) -> dict[str, str]:
        """Of the arms' adapters."""
        return {name: manifest.version for name, manifest in self.manifests.items()}

    @classmethod
    def read(cls, spec: CompareSpec) -> "_Inputs":
        """Raises UserError."""
        names = [*spec.slices, *([spec.cluster] if spec.cluster else [])]
        keys, shots = key_check("eval", names), key_check("train")
        rows = read_rows(spec.eval, limit=spec.limit, need="eval", keys=keys)
        for arm in spec.arms:
            if arm.prompt is not None:
                resolve_prompt(arm.prompt, shots)
        _check_prompts(spec, rows)
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
        store = Store(spec.root)
        manifests = {arm.name: resolve(store, arm.adapter) for arm in spec.arms if arm.adapter}
        pinned = {
            arm.name: arm.with_({"adapter": manifests[arm.name].ref}) if arm.adapter else arm for arm in spec.arms
        }
        return cls(rows, schema, scorers, primary, fields, passages, notes, manifests, pinned)


def _training_notes(rows: Sequence[DatasetRow], manifests: Mapping[str, AdapterManifest]) -> list[str]:
    """A note on each arm whose adapter was trained on exactly these rows, by its manifest's digest of them."""
    asked = fingerprint(rows)
    return [
        f"{arm}: its adapter {manifest.ref} was trained on these very questions, so its scores say nothing about "
        "others."
        for arm, manifest in manifests.items()
        if manifest.data_fingerprint == asked
    ]


async def _stats(snapshot: Any) -> dict[str, Any]:
    return replica_stats(await snapshot.remote())


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
