"""What a finished run leaves: an adapter version, or a base of its own where all weights were trained."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypedDict

from graftwork import artifact, base_model, base_publish
from graftwork.training.adapter_spec import FullSpec
from graftwork.training.checkpoint import Checkpoints
from graftwork.training.init import parent_of
from graftwork.training.job import LoopResult
from graftwork.training.records import TrainReport
from graftwork.training.steplog import read_steps

if TYPE_CHECKING:
    from graftwork.training.run import Run


class Facts(TypedDict):
    """How it came to be, as both kinds of manifest record it."""

    method: Mapping[str, object]
    prompt: Mapping[str, object]
    data_fingerprint: str
    metrics: Mapping[str, float]
    run: str
    provenance: Mapping[str, object]


@dataclass(frozen=True)
class Published:
    """What can be named from now on."""

    version: str
    adapter: str | None = None
    """`task@version`."""
    base: str | None = None
    """A place, as `base:` takes it."""


def publish(run: "Run", result: LoopResult) -> Published:
    """Publish what the last checkpoint holds. Raises ArtifactError, StorageError."""
    store, name = run.paths.store, run.spec.name
    with Checkpoints(run.paths).adapter(result.steps) as folder:
        if isinstance(run.spec.adapter, FullSpec):
            made = base_publish.publish(store, name, folder, run.base, **_facts(run, result))
            return Published(made.version, base=base_publish.place(store, name, made.version))
        template = base_model.template(run.base)
        manifest = artifact.publish(
            store,
            name,
            folder,
            base_digest=run.base.digest,
            quant=run.spec.quant.model_dump(mode="json"),
            template_digest=template.digest,
            tokenizer_digest=template.tokenizer_digest,
            parent=parent_of(run.spec),
            alias=run.spec.alias,
            **_facts(run, result),
        )
        return Published(manifest.version, adapter=manifest.ref)


def still_there(run: "Run", report: TrainReport) -> bool:
    """Whether what a finished run published can be had; an adapter's alias that is gone is set again."""
    store, name = run.paths.store, run.spec.name
    if report.base is not None:
        return base_publish.find(store, name, report.version) is not None
    try:
        artifact.open_adapter(store, name, report.version)
    except artifact.UnknownAdapter:
        return False
    if run.spec.alias and artifact.aliases(store, name).get(run.spec.alias) is None:
        artifact.promote(store, name, run.spec.alias, report.version)
    return True


def _facts(run: "Run", result: LoopResult) -> Facts:
    spec, steps = run.spec, read_steps(run.paths)
    metrics = {"train_loss": result.train_loss[-1][1], "steps": float(result.steps), "tokens": float(result.tokens),
               "train_s": math.fsum(step.step_s for step in steps)}  # fmt: skip
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
