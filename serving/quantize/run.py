"""Quantization run: the material is read, each precision measured in a process of its own, one recommended."""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pydantic
import ray
import yaml
from ray.exceptions import OutOfMemoryError, RayTaskError, WorkerCrashedError

from graftwork import metrics
from graftwork.base import load
from graftwork.base.load import ResolvedBase
from graftwork.base.support import check_serving
from graftwork.config import canonical_json
from graftwork.datasets.keys import KeyCheck
from graftwork.datasets.rows import DatasetRow, fingerprint, key_check, read_rows, read_text
from graftwork.environment import collect
from graftwork.errors import ConfigError, DataError, GraftworkError, RunError
from graftwork.metrics import distribution
from graftwork.planning.hardware import accelerators_here, with_gpus
from graftwork.prompts.render import Message, render
from graftwork.prompts.template import Template
from graftwork.quantization import Precision
from graftwork.report import BuiltReport, ReportInput, build
from graftwork.report.evaluation_schema import PrecisionArm, PrecisionFacts, PrecisionRow, QuantizeReport
from graftwork.report.schema import Difference
from graftwork.scoring import AnswerSchema, FieldScores, GoldAnswer, score
from graftwork.serving.deploy import require_resources
from graftwork.serving.evaluation.answers import check_ids
from graftwork.serving.evaluation.differences import Rules, ScoredArms, arm_score, family
from graftwork.serving.models import AdapterSource
from graftwork.serving.quantize.measure import AnswerText, Material, MeasuredArm, PrecisionResult, measure
from graftwork.serving.quantize.spec import QuantizeSpec
from graftwork.stats import Floats
from graftwork.storage.store import RunPaths, Store


@dataclass(frozen=True)
class QuantizeProgress:
    """Progress of the measurements; `text` names the precision that is measured now."""

    done: int
    total: int
    text: str


@dataclass(frozen=True)
class QuantizeOutcome:
    """A finished run. `reused` counts precisions whose measurement was found on disk."""

    run_id: str
    report: QuantizeReport
    files: BuiltReport
    reused: int


def run_quantize(
    spec: QuantizeSpec, *, on_progress: Callable[[QuantizeProgress], None] | None = None
) -> QuantizeOutcome:
    """Measure every precision in a process of its own, one after the other, and judge. Needs an initialised Ray.

    A precision that the run has measured with these adapter versions and this base is not measured again. Raises
    UserError before anything is started; RunError where a process dies, e.g. for want of memory: what was measured
    before is kept.
    """
    spec, _ = with_gpus(spec, accelerators_here())
    check_serving(spec)
    require_resources(spec.num_cpus, spec.gpus)
    spec = spec.with_({"root": Store(spec.root).uri})  # resolved in the driver
    base = load.resolve(spec.base)
    template = load.template(base)
    keys = key_check("eval")
    material, said = _material(spec, base, template, keys)
    schema = AnswerSchema.load(spec.answer_schema)
    run = RunPaths(Store(spec.root), spec.name, spec.identity())
    run.store.write_bytes(yaml.safe_dump(spec.model_dump(mode="json"), sort_keys=False).encode(), *run.spec())
    provenance = collect(spec.seed)
    run.store.write_json(provenance, *run.provenance())
    measured, reused = [], 0
    for done, precision in enumerate(spec.precisions):
        if on_progress is not None:
            on_progress(QuantizeProgress(done, len(spec.precisions), precision))
        kept = _reusable(run, precision, base, material)
        reused += kept is not None
        measured.append(kept or _measure(run, spec, precision, material))
    report = judge(spec, measured, material.rows, schema, text=said, template_digest=template.digest)
    report = report.model_copy(update={"notes": (*keys.note("eval"), *report.notes)})
    page = ReportInput(
        title=f"Precisions of {spec.base.uri}", created_at=provenance["time"], quantize=report, provenance=provenance
    )
    files = build(page, run.store, *run.file())
    run.store.write_json({"state": "finished", "recommended": report.recommended}, *run.status())
    return QuantizeOutcome(run.run_id, report, files, reused)


def _material(spec: QuantizeSpec, base: ResolvedBase, template: Template, keys: KeyCheck) -> tuple[Material, str]:
    """Return the material, and a description of the text. Raises UserError."""
    longest = base.config.get("max_position_embeddings", spec.engine.max_seq_len)
    for key, length in (("engine.max_seq_len", spec.engine.max_seq_len), ("text.window", spec.text.window)):
        if length > longest:
            raise ConfigError(f"{key}={length}", f"the base takes {longest} tokens", "", f"--set {key}={longest}")
    rows = tuple(read_rows(spec.eval, limit=spec.limit, need="eval", keys=keys))
    check_ids(rows)
    source = AdapterSource(Store(spec.root), base.digest)
    pinned = {arm.adapter: source.resolve(arm.adapter) for arm in spec.arms if arm.adapter}
    arms = tuple(arm.with_({"adapter": pinned[arm.adapter].ref}) if arm.adapter else arm for arm in spec.arms)
    ids, what = _text(spec, rows, template)
    text = spec.text
    said = f"{what}: {len(ids)} tokens in windows of {text.window}, {text.stride} apart"
    return Material(arms, rows, ids), said


def _text(spec: QuantizeSpec, rows: Sequence[DatasetRow], template: Template) -> tuple[tuple[int, ...], str]:
    """The ids that perplexity is taken on, and where they come from."""
    ids: list[int] = []
    if spec.text.uri is not None:
        ids, what = list(template.encode(read_text(spec.text.uri))), spec.text.uri
    else:
        for row in rows:
            gold = () if row.answer is not None else (Message("assistant", canonical_json(dict(row.gold or {}))),)
            whole = (*row.messages, *gold)
            ids += render(whole, template, tools=row.tools, template_kwargs=row.template_kwargs, generate=False).ids
            if len(ids) >= spec.text.max_tokens:
                break
        what = f"questions and gold answers of {spec.eval}"
    if len(ids) < 2:
        raise DataError(f"text.uri={spec.text.uri}", f"{len(ids)} tokens", "perplexity needs two tokens at least")
    return tuple(ids[: spec.text.max_tokens]), what


def _reusable(run: RunPaths, precision: Precision, base: ResolvedBase, material: Material) -> PrecisionResult | None:
    """A measurement of this run on the same base and material, with the adapter versions of now."""
    found = run.store.find_bytes(*run.file("precisions", f"{precision}.json"))
    try:
        measured = PrecisionResult.model_validate_json(found) if found is not None else None
    except pydantic.ValidationError:  # another version of this code wrote it
        return None
    same = measured and (measured.base_digest, measured.material) == (base.digest, material.digest)
    return measured if same else None


def _measure(run: RunPaths, spec: QuantizeSpec, precision: Precision, material: Material) -> PrecisionResult:
    """In a worker that does nothing else before or after, so that its peak memory is this precision's."""
    task = ray.remote(max_calls=1, max_retries=0, num_cpus=spec.num_cpus, num_gpus=spec.gpus)(measure)
    try:
        measured: PrecisionResult = ray.get(task.remote(spec, precision, material))
    except RayTaskError as error:
        if isinstance(error.cause, GraftworkError):
            raise error.cause from None
        raise RunError(f"measure {precision}", f"{type(error.cause).__name__}: {error.cause}") from error
    except (WorkerCrashedError, OutOfMemoryError) as error:
        found = "it took too much memory" if isinstance(error, OutOfMemoryError) else "its process died"
        raise RunError(
            f"measure {precision}",
            f"{found} ({type(error).__name__})",
            "a precision is measured in one process that holds the whole base",
            "see `graftwork plan FILE` for its memory and free some, or leave it out of `precisions`",
        ) from error
    run.store.write_bytes(measured.model_dump_json(indent=1).encode(), *run.file("precisions", f"{precision}.json"))
    return measured


# Report: scores, intervals and tests are those of a comparison; an arm at a precision is an arm there.
#
# Recommendation: the smallest precision shown to keep score and speed, else the reference.
#
# A precision is good enough where, for every arm, 1. the paired interval of its score minus the reference's has its
# lower end above -margin (one side of TOST, at alpha / 2 because the interval is two-sided): a loss of the margin or
# more is ruled out, and 2. it decodes at `min_speed` times the reference's tokens per second or more, at the spec's
# last batch. Of those that are good enough, the reference among them, the one with the fewest resident bytes is
# recommended; where two take the same, the reference, else the faster. Few questions give wide intervals: then nothing
# is ruled out, and the reference stays.


@dataclass(frozen=True)
class Candidate:
    """One precision as the rule sees it."""

    precision: str
    resident_bytes: int
    tokens_per_s: Mapping[str, float]
    """Median at the last batch, by arm."""
    differences: Mapping[str, Difference]
    """Of the spec's metric against the reference, by arm; empty for the reference."""


@dataclass(frozen=True)
class Rule:
    """Acceptable losses of score and speed."""

    reference: str
    metric: str
    margin: float
    min_speed: float
    batch: int


@dataclass(frozen=True)
class PrecisionVerdict:
    """Result of the rule for one precision."""

    precision: str
    good_enough: bool
    why: str


@dataclass(frozen=True)
class Recommendation:
    """The precision to serve, the reason in a sentence, and the finding on each candidate in order."""

    precision: str
    sentence: str
    findings: tuple[PrecisionVerdict, ...]


def recommend(candidates: Sequence[Candidate], rule: Rule) -> Recommendation:
    """Apply the rule. `candidates` hold the reference."""
    by_name = {one.precision: one for one in candidates}
    reference = by_name[rule.reference]
    findings = tuple(_judge(one, reference, rule) for one in candidates)
    good = [by_name[finding.precision] for finding in findings if finding.good_enough]
    best = min(good, key=lambda one: (one.resident_bytes, one is not reference, -min(one.tokens_per_s.values())))
    return Recommendation(best.precision, _sentence(best, reference, findings, len(good), rule), findings)


def _judge(one: Candidate, reference: Candidate, rule: Rule) -> PrecisionVerdict:
    if one is reference:
        return PrecisionVerdict(one.precision, True, "the reference")
    problems, ratio = _score_problems(one, rule), _ratio(one, reference)
    if ratio < rule.min_speed:
        slow = f"{ratio:.2f}x the speed of {rule.reference} at batch {rule.batch}, {rule.min_speed:g}x is needed"
        problems.append(slow)
    good = f"{rule.metric} within {rule.margin:g} of {rule.reference}, {ratio:.2f}x its speed"
    return PrecisionVerdict(one.precision, not problems, "; ".join(problems) or good)


def _score_problems(one: Candidate, rule: Rule) -> list[str]:
    """The arm that fares worst, and how many more fail."""
    failing = {arm: d for arm, d in one.differences.items() if d.low <= -rule.margin}
    if not failing:
        return []
    arm, d = min(failing.items(), key=lambda item: item[1].low)
    decide = f"n={d.n}; {d.n_needed} questions would decide" if d.n_needed else f"n={d.n}"
    more = f", and {len(failing) - 1} more arms" if len(failing) > 1 else ""
    seen = f"{arm}{more}: {rule.metric} {d.value:+.3f} [{d.low:+.3f}, {d.high:+.3f}]"
    return [f"{seen} does not rule out a loss of {rule.margin:g} ({decide})"]


def _ratio(one: Candidate, reference: Candidate) -> float:
    """Speed against the reference on the arm where it is worst."""
    return min(one.tokens_per_s[arm] / reference.tokens_per_s[arm] for arm in one.tokens_per_s)


def _sentence(
    best: Candidate, reference: Candidate, findings: Sequence[PrecisionVerdict], good: int, rule: Rule
) -> str:
    if best is reference:
        others = [f"{finding.precision}: {finding.why}" for finding in findings if not finding.good_enough]
        reason = ". ".join(others) if others else "no other precision takes fewer bytes in memory"
        return f"Serve {best.precision}. {reason}."
    share = best.resident_bytes / reference.resident_bytes
    arm, d = min(best.differences.items(), key=lambda item: item[1].low)
    return (
        f"Serve {best.precision}: of {good} good enough, {rule.reference} included, it takes the fewest bytes "
        f"({share:.2f}x {rule.reference}'s), rules out a loss of {rule.margin:g} in {rule.metric} (worst arm {arm}: "
        f"{d.value:+.3f} [{d.low:+.3f}, {d.high:+.3f}], n={d.n}), and decodes at {_ratio(best, reference):.2f}x its "
        f"speed at batch {rule.batch}."
    )


_WRONG = FieldScores(0.0, 0.0, 0.0, 0.0, is_json=False)


def judge(
    spec: QuantizeSpec,
    measured: Sequence[PrecisionResult],
    rows: Sequence[DatasetRow],
    schema: AnswerSchema,
    *,
    text: str,
    template_digest: str,
) -> QuantizeReport:
    """The result, the same for the same measurements and seed. `text` says what perplexity was taken on."""
    digest = measured[0].base_digest
    scored = _score_arms(measured, rows, schema, {"base": digest[:8], "tmpl": template_digest[:8]})
    rules = Rules(spec.alpha, spec.margin, spec.seed)
    differences = _differences(spec, scored, rules)
    rule = Rule(spec.reference, spec.metric, spec.margin, spec.min_speed, spec.speed.batches[-1])
    found = recommend(_candidates(spec, measured, differences), rule)
    said = {finding.precision: finding for finding in found.findings}
    return QuantizeReport(
        name=spec.name,
        base_digest=digest,
        reference=spec.reference,
        metric=spec.metric,
        margin=spec.margin,
        min_speed=spec.min_speed,
        alpha=spec.alpha,
        seed=spec.seed,
        n=len(rows),
        data_fingerprint=fingerprint(rows),
        text=text,
        precisions=tuple(_row(one, said[one.precision], scored, rules) for one in measured),
        differences=differences,
        recommended=found.precision,
        sentence=found.sentence,
        notes=tuple(_notes(spec, measured, scored)),
    )


def label(precision: str, arm: str) -> str:
    """Return the name of an arm at a precision in differences and signatures."""
    return f"{precision}/{arm}"


def _score_arms(
    measured: Sequence[PrecisionResult], rows: Sequence[DatasetRow], schema: AnswerSchema, recipe: dict[str, object]
) -> ScoredArms:
    gold = [GoldAnswer.from_row(row) for row in rows]
    values = {label(one.precision, arm.arm): _values(arm.answers, gold, schema) for one in measured for arm in one.arms}
    return ScoredArms(values, recipe)


def _values(answers: Sequence[AnswerText], keys: Sequence[GoldAnswer], schema: AnswerSchema) -> dict[str, Floats]:
    pairs = zip(answers, keys, strict=True)
    found = [_WRONG if said.error is not None else score(said.text, key, schema) for said, key in pairs]
    return {m.name: np.array([getattr(one, m.name) for one in found], dtype=np.float64) for m in metrics.SCORES}


def _differences(spec: QuantizeSpec, scored: ScoredArms, rules: Rules) -> tuple[Difference, ...]:
    others = [precision for precision in spec.precisions if precision != spec.reference]
    sides = [(label(one, arm.name), label(spec.reference, arm.name)) for one in others for arm in spec.arms]
    families = (family(scored, [(a, b, metric.name) for a, b in sides], rules) for metric in metrics.SCORES)
    return tuple(difference for one in families for difference in one)


def _candidates(
    spec: QuantizeSpec, measured: Sequence[PrecisionResult], differences: Sequence[Difference]
) -> list[Candidate]:
    by_label = {difference.a: difference for difference in differences if difference.metric == spec.metric}
    batch = spec.speed.batches[-1]
    return [
        Candidate(
            one.precision,
            one.resident_bytes,
            {arm.arm: statistics.median(arm.tokens_per_s[batch]) for arm in one.arms},
            {arm.arm: by_label[label(one.precision, arm.arm)] for arm in one.arms}
            if one.precision != spec.reference
            else {},
        )
        for one in measured
    ]


def _row(one: PrecisionResult, finding: PrecisionVerdict, scored: ScoredArms, rules: Rules) -> PrecisionRow:
    facts = {key: getattr(one, key) for key in PrecisionFacts.model_fields}
    arms = tuple(_arm(one, arm, scored, rules) for arm in one.arms)
    return PrecisionRow(**facts, good_enough=finding.good_enough, why=finding.why, arms=arms)


def _arm(one: PrecisionResult, arm: MeasuredArm, scored: ScoredArms, rules: Rules) -> PrecisionArm:
    name = label(one.precision, arm.arm)
    return PrecisionArm(
        arm=arm.arm,
        adapter_version=arm.adapter_version,
        perplexity=math.exp(arm.nats),
        scores={metric.name: found for metric in metrics.SCORES if (found := arm_score(name, metric, scored, rules))},
        cut=sum(said.cut for said in arm.answers),
        failed=sum(said.error is not None for said in arm.answers),
        tokens_per_s={
            rows: speed
            for rows, values in arm.tokens_per_s.items()
            if (speed := distribution(values, "tokens/s")) is not None
        },
        merge_loss=arm.merge_loss,
    )


def _notes(spec: QuantizeSpec, measured: Sequence[PrecisionResult], scored: ScoredArms) -> list[str]:
    """Return the caveats of the numbers."""
    notes = [f"{one.precision}: {one.caveat}." for one in measured if one.caveat]
    if len(machines := {one.machine for one in measured}) > 1:
        notes.append(f"Measured on different machines, so that speeds do not compare: {'; '.join(sorted(machines))}.")
    for arm in spec.arms:
        mean = scored.mean(label(spec.reference, arm.name), spec.metric)
        if mean <= spec.margin:
            notes.append(
                f"{arm.name} has {spec.metric}={mean:.2f} at {spec.reference}: it has nothing to lose, "
                "so it says nothing about a precision."
            )
    losses = [loss for one in measured for arm in one.arms if (loss := arm.merge_loss) is not None]
    if losses:
        notes.append(
            f"Adapters stay separate from the base: merged into nf4 and quantised again, the delta would be off by "
            f"{100 * max(losses):.0f}% of its norm."
        )
    notes += [
        f"{one.precision}, {arm.arm}: {failed} of {len(arm.answers)} requests failed; they count as wrong."
        for one in measured
        for arm in one.arms
        if (failed := sum(said.error is not None for said in arm.answers))
    ]
    return notes
