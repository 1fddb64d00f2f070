"""A spec becomes an index, and an index is searched by what its spec says."""

from collections.abc import Callable
from dataclasses import replace

from graftwork.errors import DataError
from graftwork.retrieval import Retriever, open_retriever
from graftwork.retrieval.dense import shared_embedder
from graftwork.retrieval.sources import read_corpus
from graftwork.retrieval.versions import PublishedIndex
from graftwork.serving.rag.spec import RagSpec


def make_index(spec: RagSpec, *, on_progress: Callable[[int, int], None] | None = None) -> PublishedIndex:
    """Read the sources and make their index current; only what changed since the last one is worked on.

    on_progress: called with (passages embedded, of how many). Raises DataError, StorageError, BaseModelError.
    """
    ignored: list[str] = []
    passages = read_corpus(spec.sources, spec.chunk, ignored)
    embedder = (spec.embedder.uri, shared_embedder(spec.embedder)) if spec.needs_vectors else None
    done = spec.home.publish(
        spec.name, passages, made_from=spec.made_from(), sources=[source.uri for source in spec.sources],
        embedder=embedder, on_progress=on_progress,
    )  # fmt: skip
    return replace(done, notes=tuple(ignored))


def open_made(spec: RagSpec, kind: str) -> Retriever:
    """A retriever over the current index. Raises DataError where that was made from other sources."""
    manifest = spec.home.current()
    if manifest.made_from != spec.made_from():
        raise DataError(f"index {spec.home.store.uri}", f"it was made from {', '.join(manifest.sources)}, or cut "
                        "another way", "an index is searched by the spec that made it",
                        "run `graftwork rag index FILE` with this spec, or give it another name")  # fmt: skip
    return open_retriever(spec.retriever(kind))  # type: ignore[arg-type]  # checked by the caller's Literal
