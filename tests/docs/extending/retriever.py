"""A trigram retriever: it finds misspelt words over a corpus and an index, and `rag eval` measures and chooses it."""

import json
import sys
from pathlib import Path

import pydantic
import pytest

from graftwork.retrieval import Hit, RetrieverSpec, open_retriever
from graftwork.serving.rag.eval import make_index, run_eval
from graftwork.serving.rag.spec import RagSpec
from graftwork.serving.spec import ArmSpec
from tests.docs.extending.common import require_copy

CITIES = (
    "Kunming",
    "Reykjavik",
    "Johannesburg",
    "Ouagadougou",
    "Antananarivo",
    "Montevideo",
    "Tegucigalpa",
    "Vladivostok",
)


def misspelt(city: str) -> str:
    """Swap two letters in the middle: no word of the corpus is left for BM25."""
    at = len(city) // 2
    return city[: at - 1] + city[at] + city[at - 1] + city[at + 1 :]


def found(spec: RetrieverSpec, query: str) -> list[Hit]:
    return open_retriever(spec).search(query, 1)


def main(work: Path) -> None:
    require_copy(work)
    work.mkdir()
    corpus, asked = work / "corpus.jsonl", work / "questions.jsonl"
    corpus.write_text("".join(json.dumps({"id": city, "text": f"{city} airport"}) + "\n" for city in CITIES))
    questions = [{"id": city, "question": misspelt(city), "doc_id": city} for city in CITIES]
    asked.write_text("".join(json.dumps(one) + "\n" for one in questions))
    rag = RagSpec.model_validate(
        {
            "name": "cities",
            "root": str(work),
            "sources": [str(corpus)],
            "retrievers": ["trigram"],
            "questions": str(asked),
            "k": 1,
        }
    )
    make_index(rag)
    for place in (str(corpus), rag.home.store.uri):
        arm = ArmSpec.model_validate({"name": "a", "retriever": {"kind": "trigram", "corpus": place, "k": 1}})
        plain = ArmSpec.model_validate({"name": "b", "retriever": {"corpus": place, "k": 1}})
        assert arm.retriever is not None
        assert plain.retriever is not None
        for city in CITIES:
            assert [hit.passage.id for hit in found(arm.retriever, misspelt(city))] == [city], city
            assert found(plain.retriever, misspelt(city)) == [], city
        assert found(arm.retriever, "zzz") == [], "below min_share"
    with pytest.raises(pydantic.ValidationError, match="dense_weight"):
        ArmSpec.model_validate({"name": "a", "retriever": {"kind": "trigram", "corpus": "c", "dense_weight": 0.5}})
    report = run_eval(rag)
    assert report.chosen == "trigram", report.sentence
    auto = open_retriever(rag.retriever("auto"))
    assert [hit.passage.id for hit in auto.search(misspelt("Kunming"), 1)] == ["Kunming"]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
