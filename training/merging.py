"""Published adapters merged into a new version, offline: no base, no GPU, no cluster."""

import hashlib
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from graftwork import artifact, base_model, provenance
from graftwork.artifact import AdapterManifest
from graftwork.chat import PromptSpec
from graftwork.config import canonical_json
from graftwork.errors import ArtifactError
from graftwork.storage import Store
from graftwork.training.adapters.merge_spec import MergeSpec


@dataclass(frozen=True)
class Merged:
    """What a merge gave."""

    manifest: AdapterManifest
    rank: int
    distance: float
    """Of its delta from the weighted sum of the others', relative; 0 is the sum itself."""
    notes: tuple[str, ...]


def merge_published(
    store: Store, task: str, refs: Sequence[str], spec: MergeSpec, *, alias: str | None = "latest"
) -> Merged:
    """Merge the adapters behind `refs` and publish the result as `task`, its parents recorded.

    Raises ArtifactError: unknown or damaged ones, other bases, kinds or ranks that can't be added.
    """
    base_model.import_bitsandbytes()
    from graftwork.training.adapters.merge import MergeSource, merge

    found = [artifact.resolve(store, ref) for ref in refs]
    first = found[0]
    for other in found[1:]:
        _require_same_base(first, other)
    with tempfile.TemporaryDirectory(prefix="gw-merge-") as name:
        folder = Path(name)
        adapters = [MergeSource.read(one.ref, artifact.fetch(store, one.task, one.version)) for one in found]
        rank, distance = merge(adapters, spec, folder)
        prompt, notes = _prompt(found)
        day, notes_on_day = _template_date(found)
        manifest = artifact.publish(
            store,
            task,
            folder,
            base_digest=first.base_digest,
            quant=first.quant,
            template_digest=first.template_digest,
            template_date=day,
            tokenizer_digest=first.tokenizer_digest,
            method={**_method(found, rank), "merge": spec.record()},
            prompt=prompt,
            data_fingerprint=_digest([one.data_fingerprint for one in found]),
            metrics={"distance_from_sum": distance},
            run=f"merge-{_digest([spec.record(), [one.ref for one in found]])[:8]}",
            provenance=provenance.collect(spec.seed),
            merged_from=[one.ref for one in found],
            alias=alias,
        )
    return Merged(manifest, rank, distance, (*notes, *notes_on_day))


def _require_same_base(first: AdapterManifest, other: AdapterManifest) -> None:
    if other.base_digest != first.base_digest:
        raise ArtifactError(
            f"merge {first.ref} and {other.ref}",
            f"trained on base {first.base_digest[:12]} and on {other.base_digest[:12]}",
            "deltas of different bases have no sum",
            f"train {other.task} again on the base of run {first.run}",
        )


def _method(found: Sequence[AdapterManifest], rank: int) -> dict[str, object]:
    """As a LoRA's, so that training can go on from it. Alpha equals the rank: the scale is in the weights."""
    targets = {str(one.method.get("targets")) for one in found}
    kinds = {str(one.method.get("objective", "sft")) for one in found}
    return {
        "kind": "lora",
        "rank": rank,
        "alpha": float(rank),
        "targets": targets.pop() if len(targets) == 1 else "mixed",
        "rslora": False,
        "dora": False,
        "objective": kinds.pop() if len(kinds) == 1 else "mixed",
    }


def _prompt(found: Sequence[AdapterManifest]) -> tuple[dict[str, object], tuple[str, ...]]:
    prompts = {canonical_json(one.prompt): one.prompt for one in found}
    if len(prompts) == 1:
        return dict(found[0].prompt), ()
    none = PromptSpec().model_dump(mode="json")
    return none, ("the prompts differ, so the merged one is recorded without: an arm sets its own",)


def _template_date(found: Sequence[AdapterManifest]) -> tuple[date | None, tuple[str, ...]]:
    days = {one.template_date for one in found}
    if len(days) == 1:
        return days.pop(), ()
    return None, ("the adapters' template dates differ, so the merged adapter records none and uses the base's",)


def _digest(value: object) -> str:
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()
