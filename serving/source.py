"""The published adapters that one base can serve: looked up, checked against the base, brought to this machine."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from graftwork import artifact, artifact_local
from graftwork.artifact import AdapterManifest
from graftwork.artifact_listing import Listing
from graftwork.chat import PromptSpec
from graftwork.errors import ArtifactError, DataError, StorageError
from graftwork.serving.arms import warm
from graftwork.storage import Store


@dataclass(frozen=True)
class AdapterSource:
    """Adapters of a store made for the base with this digest. All methods block: call them off the event loop."""

    store: Store
    base_digest: str

    @cached_property
    def _listing(self) -> Listing:
        return Listing(self.store)

    def resolve(self, ref: str) -> AdapterManifest:
        """The manifest that `task@alias` or `task@version` means now. Raises ArtifactError, of which UnknownAdapter."""
        manifest = artifact.resolve(self.store, ref)
        artifact.require_base(manifest, self.base_digest)
        return manifest

    def fetch(self, manifest: AdapterManifest) -> Path:
        """Its files in a folder here, of the right sizes; the worked examples of its training prompt are read too."""
        try:
            warm(trained_prompt(manifest), None)
        except (DataError, StorageError) as error:
            raise ArtifactError(
                f"adapter {manifest.task}@{manifest.version}: its training prompt", error.text()
            ) from error
        return artifact_local.bring(self.store, manifest)

    def discard_damaged(self, manifest: AdapterManifest) -> None:
        """Forget a copy that isn't as published, so that the next request brings it again."""
        artifact_local.discard_damaged(self.store, manifest)

    def list_published(self) -> list[tuple[AdapterManifest, list[str]]]:
        """Every version for this base with the aliases that point at it, as the store is now."""
        return [(m, aliases) for m, aliases in self._listing.read() if m.base_digest == self.base_digest]

    def describe_version(self, ref: str, followed: str | None) -> "Published":
        """As `as_served` gives it for one `task@alias-or-version`; nothing where there is no such version.

        followed: the version that requests for it get, where one is followed.
        """
        task, _, name = ref.partition("@")
        for wanted in (f"{task}@{followed}", ref) if followed else (ref,):
            try:
                manifest = self.resolve(wanted)
            except ArtifactError:  # unknown, damaged or of another base: no listing has it
                continue
            return [(manifest, [] if name == manifest.version else [name])]
        return []


Published = list[tuple[AdapterManifest, list[str]]]


def as_served(found: Published, followed: Mapping[str, str]) -> Published:
    """Return `AdapterSource.list_published` with each alias at the version that requests get: one that was moved in the
    store is followed only after a swap. followed: `AdapterCache.resolved_refs`."""
    names: dict[tuple[str, str], list[str]] = {(m.task, m.version): [] for m, _ in found}
    for manifest, aliases in found:
        for alias in aliases:
            version = followed.get(f"{manifest.task}@{alias}", manifest.version)
            here = (manifest.task, version if (manifest.task, version) in names else manifest.version)
            names[here].append(alias)
    return [(manifest, sorted(names[manifest.task, manifest.version])) for manifest, _ in found]


def trained_prompt(manifest: AdapterManifest) -> PromptSpec:
    """The prompt that stood around the adapter's training rows."""
    return PromptSpec.model_validate(manifest.prompt)
