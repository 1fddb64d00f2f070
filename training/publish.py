"""Publishing of a finished run: an adapter version, or a new base where all weights were trained."""

import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from graftwork.artifacts import publish as artifact
from graftwork.artifacts.manifest import AdapterManifest, aliases
from graftwork.artifacts.registry import UnknownAdapter, open_adapter
from graftwork.base import load as base_model
from graftwork.base import publish as base_publish
from graftwork.prompts.template import Template
from graftwork.training.checkpoint import Checkpoints
from graftwork.training.report import TrainReport
from graftwork.training.warm_start import folder_below, parent_of
from graftwork.training.worker_messages import LoopResult, StepReport

if TYPE_CHECKING:
    from graftwork.training.run import ResolvedRun


class Facts(TypedDict):
    """How it came to be, as both kinds of manifest record it."""

    method: Mapping[str, object]
    prompt: Mapping[str, object]
    data_fingerprint: str
    metrics: Mapping[str, float]
    run: str
    provenance: Mapping[str, object]


@dataclass(frozen=True)
class PublishedModel:
    """What can be named from now on."""

    version: str
    adapter: str | None = None
    """`task@version`."""
    base: str | None = None
    """A place, as `base:` takes it."""


def publish(run: "ResolvedRun", result: LoopResult, steps: Sequence[StepReport]) -> PublishedModel:
    """Publish the adapter or base of the last checkpoint. Raises ArtifactError, StorageError."""
    store, name = run.paths.store, run.spec.name
    template, facts = base_model.template(run.base), _facts(run, result, steps)
    with Checkpoints(run.paths).adapter(result.steps) as folder:
        if run.spec.adapter.trains_base:
            made = base_publish.publish(store, name, folder, run.base, template_date=template.date, **facts)
            return PublishedModel(made.version, base=base_publish.place(store, name, made.version))
        if run.spec.base_adapter is None:
            manifest = _publish_adapter(run, template, folder, facts, ())
        else:
            manifest = _publish_stack(run, template, folder, facts, run.spec.base_adapter)
        return PublishedModel(manifest.version, adapter=manifest.ref)


def _publish_stack(run: "ResolvedRun", template: Template, folder: Path, facts: Facts, below: str) -> AdapterManifest:
    """The trained adapter and the one that it was trained on top of, as one: it works on the base alone."""
    from graftwork.training.adapters.attach import sum_of

    with tempfile.TemporaryDirectory(prefix="gw-stack-") as name:
        rank = sum_of(folder, folder_below(run.spec), Path(name))
        shape = {"rank": rank, "alpha": float(rank), "rslora": False, "targets": "mixed", "stacked_on": below}
        return _publish_adapter(run, template, Path(name), {**facts, "method": {**facts["method"], **shape}}, (below,))


def _publish_adapter(
    run: "ResolvedRun", template: Template, folder: Path, facts: Facts, merged_from: Sequence[str]
) -> AdapterManifest:
    return artifact.publish(
        run.paths.store,
        run.spec.name,
        folder,
        base_digest=run.base.digest,
        quant=run.spec.quant.model_dump(mode="json"),
        template_digest=template.digest,
        template_date=template.date,
        tokenizer_digest=template.tokenizer_digest,
        parent=parent_of(run.spec),
        merged_from=merged_from,
        alias=run.spec.alias,
        **facts,
    )


def still_there(run: "ResolvedRun", report: TrainReport) -> bool:
    """Whether what a finished run published can be had; an adapter's alias that is gone is set again."""
    store, name = run.paths.store, run.spec.name
    if report.base is not None:
        return base_publish.find(store, name, report.version) is not None
    try:
        open_adapter(store, name, report.version)
    except UnknownAdapter:
        return False
    if run.spec.alias and aliases(store, name).get(run.spec.alias) is None:
        artifact.promote(store, name, run.spec.alias, report.version)
    return True


def _facts(run: "ResolvedRun", result: LoopResult, steps: Sequence[StepReport]) -> Facts:
    spec = run.spec
    metrics = {
        "train_loss": result.train_loss[-1][1],
        "steps": float(result.steps),
        "tokens": float(result.tokens),
        "train_s": math.fsum(step.step_s for step in steps),
    }
    if result.eval_loss:
        metrics["eval_loss"] = result.eval_loss[-1][1]
    return {
        "method": {**spec.adapter.model_dump(mode="json"), "objective": spec.objective.kind},
        "prompt": spec.prompt.model_dump(mode="json"),
        "data_fingerprint": run.data.fingerprint,
        "metrics": metrics,
        "run": run.paths.run_id,
        "provenance": run.paths.store.read_json(*run.paths.provenance()),
    }
