"""Quantization run: reads the material, measures each precision in a process of its own, writes the report."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pydantic
import ray
import yaml
from ray.exceptions import OutOfMemoryError, RayTaskError, WorkerCrashedError

from graftwork.base import load as base_model
from graftwork.base.load import ResolvedBase
from graftwork.base.support import check_serving
from graftwork.config import canonical_json
from graftwork.datasets.readers import KeyCheck
from graftwork.datasets.rows import DatasetRow, key_check, read_rows, read_text
from graftwork.environment import collect
from graftwork.errors import ConfigError, DataError, GraftworkError, RunError
from graftwork.planning.hardware import accelerators_here, with_gpus
from graftwork.prompts import render as chat
from graftwork.prompts.render import Message
from graftwork.prompts.template import Template
from graftwork.quantization import Precision
from graftwork.report import BuiltReport, ReportInput, build
from graftwork.report.evaluation_schema import QuantizeReport
from graftwork.scoring import AnswerSchema
from graftwork.serving.deploy import require_resources
from graftwork.serving.evaluation.answers import check_ids
from graftwork.serving.models import AdapterSource
from graftwork.serving.quantize.measure import Material, PrecisionResult, measure
from graftwork.serving.quantize.report import judge
from graftwork.serving.quantize.spec import QuantizeSpec
from graftwork.serving.spec import ArmSpec
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
    base = base_model.resolve(spec.base)
    template = base_model.template(base)
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
    arms = tuple(_pin(source, arm) for arm in spec.arms)
    ids, what = _text(spec, rows, template)
    text = spec.text
    said = f"{what}: {len(ids)} tokens in windows of {text.window}, {text.stride} apart"
    return Material(arms, rows, ids), said


def _pin(source: AdapterSource, arm: ArmSpec) -> ArmSpec:
    if arm.adapter is None:
        return arm
    manifest = source.resolve(arm.adapter)
    return arm.with_({"adapter": f"{manifest.task}@{manifest.version}"})


def _text(spec: QuantizeSpec, rows: Sequence[DatasetRow], template: Template) -> tuple[tuple[int, ...], str]:
    """The ids that perplexity is taken on, and where they come from."""
    ids: list[int] = []
    if spec.text.uri is not None:
        ids, what = list(template.encode(read_text(spec.text.uri))), spec.text.uri
    else:
        for row in rows:
            ids += chat.render(_answered(row), template, generate=False).ids
            if len(ids) >= spec.text.max_tokens:
                break
        what = f"questions and gold answers of {spec.eval}"
    if len(ids) < 2:
        raise DataError(f"text.uri={spec.text.uri}", f"{len(ids)} tokens", "perplexity needs two tokens at least")
    return tuple(ids[: spec.text.max_tokens]), what


def _answered(row: DatasetRow) -> tuple[Message, ...]:
    if row.answer is not None:
        return row.messages
    return (*row.messages, Message("assistant", canonical_json(dict(row.gold or {}))))


def _measurement(precision: Precision) -> tuple[str, str]:
    return "precisions", f"{precision}.json"


def _reusable(run: RunPaths, precision: Precision, base: ResolvedBase, material: Material) -> PrecisionResult | None:
    """A measurement of this run on the same base and material, with the adapter versions of now."""
    found = run.store.find_bytes(*run.file(*_measurement(precision)))
    if found is None:
        return None
    try:
        measured = PrecisionResult.model_validate_json(found)
    except pydantic.ValidationError:  # another version of this code wrote it
        return None
    return measured if (measured.base_digest, measured.material) == (base.digest, material.digest) else None


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
    run.store.write_bytes(measured.model_dump_json(indent=1).encode(), *run.file(*_measurement(precision)))
    return measured
