"""Versioned index on disk or in S3: a new version is written next to the old one, then named current.

    <root>/indexes/<name>/versions/<version>/{lexical.sqlite, vectors.npy, ..., manifest.json}
    <root>/indexes/<name>/{current.json, choice.json}

A version is named by the digest of what it answers from: passages, form of the index, embedder. Who searches keeps
the files that it has open; `LATEST_KEPT` versions stay for those who look them up a moment later.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory

from pydantic import BaseModel, ConfigDict, ValidationError

from graftwork.config import canonical_json
from graftwork.errors import DataError
from graftwork.prompts.render import Passage
from graftwork.retrieval.bm25 import FORM, LexicalIndex, corpus_digest
from graftwork.retrieval.dense import QueryEmbedder, write_vectors
from graftwork.storage.local import build_once
from graftwork.storage.store import Store, cache_root, json_bytes, open_uri

LATEST_KEPT = 3
LEXICAL_FILE = "lexical.sqlite"


class IndexManifest(BaseModel):
    """Manifest of one version of an index."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    version: str
    form: str
    """Version of the lexical format; an index of another one is rebuilt."""
    corpus: str
    """sha256 of its passages."""
    passages: int
    made_from: str
    """Digest of the part of the spec that says where the passages come from."""
    sources: tuple[str, ...]
    embedder: str | None = None
    """URI of the embedder; null: no vectors."""
    created_at: float


class RetrieverChoice(BaseModel):
    """Retriever that `graftwork rag eval` chose for a version of an index."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: str
    """One of `retriever.KINDS`."""
    version: str
    sentence: str


@dataclass(frozen=True)
class PublishedIndex:
    """An index made current, and what it took."""

    manifest: IndexManifest
    uri: str
    """Value of a retriever's `corpus`."""
    added: int
    removed: int
    kept: int
    embedded: int
    reused: bool
    """The current version was this one already."""
    notes: tuple[str, ...] = ()
    """Columns of the sources that are not part of a passage."""


class IndexHome:
    """The place of one index: `<root>/indexes/<name>`, or any such folder by its URI."""

    def __init__(self, store: Store) -> None:
        self.store = store

    @classmethod
    def from_root(cls, root: str, name: str) -> "IndexHome":
        """The index `name` of a root."""
        return cls(Store(Store(root).path("indexes", name)))

    @classmethod
    def at(cls, uri: str) -> "IndexHome | None":
        """The index behind a corpus URI; None where no index is."""
        if uri.startswith("recipe://"):
            return None
        store, key = open_uri(uri)
        home = cls(Store(store.path(key)))
        return home if home.store.exists("current.json") else None

    def current(self) -> IndexManifest:
        """Raises DataError where there is none yet, or it can't be read."""
        data = self.store.find_bytes("current.json")
        if data is None:
            raise DataError(
                f"index {self.store.uri}",
                "it does not exist",
                "an index is made before it is searched",
                "run `graftwork rag index FILE`",
            )
        try:
            return IndexManifest.model_validate_json(data)
        except ValidationError as error:
            raise DataError(
                f"index {self.store.uri}",
                f"its current.json can't be read ({error.error_count()} errors)",
                "graftwork rag index makes it",
                "index the corpus again",
            ) from error

    def folder(self, manifest: IndexManifest) -> Path:
        """The files of a version on this machine: of a local index its own, of one in S3 a copy."""
        if self.store.is_local:
            return Path(self.store.path("versions", manifest.version))

        def download(empty: Path) -> None:
            self.store.download(empty, "versions", manifest.version)

        return build_once(self._copy(manifest.version), download)

    def choice(self) -> RetrieverChoice | None:
        """Return the choice for the current version; None: nothing was measured on it."""
        data = self.store.find_bytes("choice.json")
        found = RetrieverChoice.model_validate_json(data) if data else None
        return found if found and found.version == self.current().version else None

    def choose(self, choice: RetrieverChoice) -> None:
        """Let retrievers of kind `auto` do what was found to be best."""
        self.store.write_bytes(json_bytes(choice.model_dump()), "choice.json")

    def publish(
        self,
        name: str,
        passages: Sequence[Passage],
        *,
        made_from: str,
        sources: Sequence[str],
        embedder: tuple[str, QueryEmbedder] | None = None,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> PublishedIndex:
        """Make the index of these passages current; what the version before it holds of them is taken over.

        Those who search meanwhile get the old version or the new one, whole. Raises StorageError.
        """
        before = self.current() if self.store.exists("current.json") else None
        digest = corpus_digest(passages)
        vectors = embedder[1].digest if embedder else None
        version = sha256(canonical_json([FORM, digest, vectors]).encode()).hexdigest()[:16]
        manifest = IndexManifest(
            name=name,
            version=version,
            form=FORM,
            corpus=digest,
            passages=len(passages),
            made_from=made_from,
            sources=tuple(sources),
            embedder=embedder[0] if embedder else None,
            created_at=time.time(),
        )
        if before and before.version == version and self.store.exists("versions", version, "manifest.json"):
            if before.made_from != made_from:
                self._name(manifest)
            return PublishedIndex(manifest, self.store.uri, 0, 0, len(passages), 0, True)
        with TemporaryDirectory(prefix="graftwork-index-") as temporary:
            made = self._make(Path(temporary), passages, before, embedder, on_progress)
            self.store.upload(Path(temporary), "versions", version)
        self.store.write_bytes(json_bytes(manifest.model_dump()), "versions", version, "manifest.json")
        self._name(manifest)
        self._forget_old()
        return PublishedIndex(manifest, self.store.uri, *made, False)

    def _make(
        self,
        folder: Path,
        passages: Sequence[Passage],
        before: IndexManifest | None,
        embedder: tuple[str, QueryEmbedder] | None,
        on_progress: Callable[[int, int], None] | None,
    ) -> tuple[int, int, int, int]:
        """(added, removed, kept, embedded)"""
        old = self.folder(before) if before and before.form == FORM else None
        added, removed, kept = len(passages), 0, 0
        if old is not None:
            _, found = LexicalIndex.open(old / LEXICAL_FILE).derive(passages, folder / LEXICAL_FILE)
            added, removed, kept = len(found.added), len(found.removed), found.kept
        else:
            LexicalIndex.build(passages, folder / LEXICAL_FILE)
        embedded = 0
        if embedder is not None:
            embedded = write_vectors(folder, passages, embedder[1], before=old, on_progress=on_progress)
        return added, removed, kept, embedded

    def _name(self, manifest: IndexManifest) -> None:
        self.store.write_bytes(json_bytes(manifest.model_dump()), "current.json")

    def _forget_old(self) -> None:
        """Versions but the latest few; a folder without a manifest is being written, or was left by a crash."""
        found = {name: self.store.find_bytes("versions", name, "manifest.json") for name in self.store.list("versions")}
        made = {name: IndexManifest.model_validate_json(data).created_at for name, data in found.items() if data}
        for name in sorted(made, key=made.__getitem__)[:-LATEST_KEPT]:
            self.store.delete("versions", name)

    def _copy(self, version: str) -> Path:
        """Return the folder of this machine's copy of a version in S3."""
        return cache_root() / "indexes" / f"{version}-{sha256(self.store.uri.encode()).hexdigest()[:12]}"
