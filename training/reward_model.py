"""Finding a published reward model: told from other adapters by its manifest, before anything is loaded."""

from graftwork import artifact
from graftwork.base_model import ResolvedBase
from graftwork.errors import ArtifactError
from graftwork.storage import Store


def scoring_adapter(store: Store, ref: str, base: ResolvedBase) -> artifact.AdapterManifest:
    """The manifest of a published reward model for this base. Raises ArtifactError."""
    manifest = artifact.resolve(store, ref)
    if manifest.method.get("objective") != "reward":
        raise ArtifactError(
            f"reward model {ref}",
            f"it was trained with objective.kind={manifest.method.get('objective', 'sft')}",
            "a reward model is trained with objective.kind=reward",
            "name one, or train one on pairs first (examples/train-reward.yaml)",
        )
    artifact.require_base(manifest, base.digest)
    return manifest
