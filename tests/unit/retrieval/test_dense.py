"""Vectors beside words: exact, taken over from version to version, fused by rank, refused where they don't belong."""

from pathlib import Path

import numpy as np
import pytest
from pydantic import TypeAdapter

from graftwork.errors import DataError
from graftwork.prompts.render import Passage
from graftwork.retrieval import Hit, Retriever, RetrieverSpec, dense, open_retriever
from graftwork.retrieval.dense import DenseIndex, QueryEmbedder, write_vectors
from graftwork.retrieval.embedder import Embedder, EmbedderSpec
from graftwork.retrieval.hybrid import fuse
from graftwork.retrieval.index_store import IndexHome
from tests.tiny_embedder import write_tiny_embedder

WORDS = ("cat", "mat", "quick", "brown", "fox", "jumps", "lazy", "dog", "again", "over", "sits")
CORPUS = [Passage(str(n), f"the {WORDS[n % 11]} {WORDS[n * 3 % 11]} {WORDS[n * 7 % 11]}") for n in range(50)]
LONG = Passage("long", " ".join(WORDS[n % 10] for n in range(300)) + " sits")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_embedder(tmp_path_factory.mktemp("embedder"))


@pytest.fixture
def embedder(folder: Path) -> QueryEmbedder:
    return QueryEmbedder(EmbedderSpec(uri=str(folder)))


def index(place: Path, passages: list[Passage], embedder: QueryEmbedder, before: Path | None = None) -> DenseIndex:
    place.mkdir()
    write_vectors(place, passages, embedder, before=before)
    return DenseIndex(place, passages, lambda _: None, embedder)


def same(found: list[Hit], wanted: list[Hit]) -> None:
    """Scores differ in the last bits by what stood in a batch beside a text."""
    assert {hit.passage for hit in found} == {hit.passage for hit in wanted}
    np.testing.assert_allclose([hit.score for hit in found], [hit.score for hit in wanted], atol=1e-5)


def test_the_nearest_are_those_of_the_dot_product(tmp_path: Path, folder: Path, embedder: QueryEmbedder) -> None:
    made = index(tmp_path / "v", CORPUS, embedder)
    vectors = Embedder(folder).embed([passage.text for passage in CORPUS]).vectors_BH
    for query in ("the lazy dog", "quick fox jumps"):
        scores = vectors @ Embedder(folder).embed([query]).vectors_BH[0]
        best = sorted(range(50), key=lambda n: (-round(float(scores[n]), 5), n))[:7]
        hits = made.search(query, 7)
        np.testing.assert_allclose([hit.score for hit in hits], scores[best], atol=1e-5)
        assert {hit.passage for hit in hits[:3]} <= {CORPUS[n] for n in best}
    assert made.search("", 3) == made.search("dog", 0) == []


def test_a_long_passage_is_found_by_its_end(tmp_path: Path, embedder: QueryEmbedder) -> None:
    """It is longer than the embedder takes: each piece has a vector, and the best one counts."""
    parts = embedder.pieces(LONG.text)
    assert len(parts) > 4
    assert " ".join(parts) == LONG.text
    made = index(tmp_path / "v", [*CORPUS, LONG], embedder)
    best = made.search(parts[-1], 1)[0]
    assert (best.passage.id, round(best.score, 4)) == ("long", 1.0)
    assert made.search(LONG.text, 3)  # a question may be long, too


def test_vectors_of_texts_that_stay_are_not_computed_again(tmp_path: Path, embedder: QueryEmbedder) -> None:
    first = index(tmp_path / "a", [*CORPUS, LONG], embedder)
    moved = [Passage("new", "the dog sits again"), LONG, *CORPUS[:20]]
    (tmp_path / "b").mkdir()
    assert write_vectors(tmp_path / "b", moved, embedder, before=tmp_path / "a") == 1
    anew = index(tmp_path / "c", moved, embedder)
    same(DenseIndex(tmp_path / "b", moved, lambda _: None, embedder).search("lazy dog", 5), anew.search("lazy dog", 5))
    assert first.search("lazy dog", 1)


def test_vectors_of_another_corpus_or_embedder_are_refused(
    tmp_path: Path, embedder: QueryEmbedder, folder: Path
) -> None:
    index(tmp_path / "v", CORPUS, embedder)
    with pytest.raises(DataError, match="another corpus"):
        DenseIndex(tmp_path / "v", CORPUS[1:], lambda _: None, embedder)
    (tmp_path / "v" / "dense.json").write_text('{"embedder": "e"}')
    with pytest.raises(DataError, match="another embedder"):
        DenseIndex(tmp_path / "v", CORPUS, lambda _: None, embedder)
    with pytest.raises(DataError, match="cannot be read"):
        DenseIndex(tmp_path, CORPUS, lambda _: None, embedder)


def test_many_vectors_are_searched_in_a_graph(
    tmp_path: Path, embedder: QueryEmbedder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """HNSW over 51 passages finds what comparing all finds. Source: faiss."""
    pytest.importorskip("faiss")
    exact = index(tmp_path / "exact", [*CORPUS, LONG], embedder)
    monkeypatch.setattr(dense, "EXACT_UP_TO", 10)
    graph = index(tmp_path / "graph", [*CORPUS, LONG], embedder)
    for query in ("the lazy dog", "quick fox jumps", LONG.text[-60:]):
        wanted, found = exact.search(query, 5), graph.search(query, 5)
        np.testing.assert_allclose([h.score for h in found], [h.score for h in wanted], atol=1e-5)


def hits(*ids: str) -> list[Hit]:
    return [Hit(Passage(identity, identity), 0.0) for identity in ids]


def test_ranks_are_fused_as_in_the_paper() -> None:
    found = fuse([hits("a", "b", "c"), hits("c", "d", "a")], (1.0, 0.25))
    scores = {"a": 1 / 61 + 0.25 / 63, "c": 1 / 63 + 0.25 / 61, "b": 1 / 62, "d": 0.25 / 62}
    assert [hit.passage.id for hit in found] == ["a", "c", "b", "d"]
    assert [hit.score for hit in found] == pytest.approx([scores[hit.passage.id] for hit in found])
    assert [hit.passage.id for hit in fuse([hits(), hits("x")], (1.0, 0.25))] == ["x"]


def test_a_corpus_and_a_published_index_answer_alike(
    tmp_path: Path, folder: Path, embedder: QueryEmbedder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRAFTWORK_CACHE", str(tmp_path / "cache"))
    lines = "".join(f'{{"id": "{p.id}", "text": "{p.text}"}}\n' for p in CORPUS)
    (tmp_path / "c.jsonl").write_text(lines)
    home = IndexHome.from_root(str(tmp_path), "docs")
    home.publish("docs", CORPUS, made_from="x", sources=["s"], embedder=(str(folder), embedder))

    def opened(kind: str, corpus: str) -> Retriever:
        tree = {"kind": kind, "corpus": corpus, **({} if kind == "lexical" else {"embedder": str(folder)})}
        return open_retriever(TypeAdapter[RetrieverSpec](RetrieverSpec).validate_python(tree))

    for kind in ("lexical", "dense", "hybrid"):
        alone, published = (
            opened(kind, uri).search("lazy dog", 5) for uri in (str(tmp_path / "c.jsonl"), home.store.uri)
        )
        same(alone, published)
        assert len(alone) == 5
