"""Lexical retrieval: codes match exactly, any text is a query, one build a corpus."""

import json
import pickle
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graftwork.datasets.rows import ContextSpec, DatasetRow, read_rows
from graftwork.errors import DataError
from graftwork.prompts.render import Message, Passage
from graftwork.retrieval import STOP_WORDS, LexicalIndex, LexicalSpec, open_retriever, training_context
from graftwork.retrieval.bm25 import code_token, codes_of, is_code, words_of

TEXTS = {
    "kunming": "Kunming Wujiaba International Airport (ZPPP/KMG) in Kunming, CN",
    "cat": "Cat Island Airport (MYCB/CTX) in Cat Island, BS",
    "catania": "Catania Airport (LICC/CAT) in Catania, IT",
    "the": "Teresina Airport (SBTE/THE) in Teresina, BR",
    "malmo": "Malmö Sturup Airport (ESMS/MMX) in Malmö, SE",
    "runs": "Two runners were running beside the runways",
    "near": "NEAR and far, OR not: the column text",
}
CORPUS = [Passage(identity, text) for identity, text in TEXTS.items()]


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> LexicalIndex:
    return LexicalIndex.build(CORPUS, tmp_path_factory.mktemp("index") / "index.sqlite")


@pytest.fixture
def corpus_uri(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("GRAFTWORK_CACHE", str(tmp_path / "cache"))
    return write_corpus(tmp_path / "corpus.jsonl", TEXTS)


def write_corpus(path: Path, texts: dict[str, str]) -> str:
    lines = (json.dumps({"id": identity, "text": text}) + "\n" for identity, text in texts.items())
    path.write_text("".join(lines), encoding="utf-8")
    return str(path)


def lexical_index(uri: str) -> LexicalIndex:
    index = open_retriever(LexicalSpec(corpus=uri))
    assert isinstance(index, LexicalIndex)
    return index


def found(index: LexicalIndex, query: str, k: int = 3) -> list[str]:
    return [hit.passage.id for hit in index.search(query, k)]


@pytest.mark.parametrize(
    ("query", "first"),
    [
        ("Which airport has the ICAO code ZPPP?", "kunming"),
        ("zppp", "kunming"),
        ("CAT", "catania"),
        ("the airport CAT, please", "catania"),
        ("a cat on an island", "cat"),
        ("My ticket says THE. Which airport is that?", "the"),
        ("malmo sturup", "malmo"),
        ("MALMÖ", "malmo"),
        ("a runner runs", "runs"),
    ],
)
def test_codes_match_exactly_and_words_by_their_stem(index: LexicalIndex, query: str, first: str) -> None:
    assert found(index, query)[0] == first


@pytest.mark.parametrize(
    "query",
    ['"', "'", "NEAR(", "text:near", "near*", "^near", "near AND OR NOT", "{text} : near", "near\0", 'a"b near'],
)
def test_fts_syntax_is_text(index: LexicalIndex, query: str) -> None:
    assert ("near" in found(index, query)) == ("near" in query.lower())


@settings(max_examples=200, deadline=None)
@given(st.text() | st.text(alphabet='"*():^{}+-, ANDORTEXcode\\\0'), st.integers(0, 5))
def test_any_text_is_a_query(index: LexicalIndex, query: str, k: int) -> None:
    hits = index.search(query, k)
    assert len(hits) <= k
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)
    assert all(hit.passage in CORPUS for hit in hits)
    assert hits == index.search(query, k)


def test_stop_words_alone_and_nothing_at_all(index: LexicalIndex) -> None:
    assert found(index, "and the in") != []
    assert "in" in STOP_WORDS
    assert found(index, "xyzzy") == found(index, "") == found(index, "?!") == []
    assert found(index, "ZPPP", k=0) == []


def test_a_long_query_is_searched_by_its_first_words(index: LexicalIndex) -> None:
    assert found(index, "ZPPP " + " ".join(f"w{n}" for n in range(100_000)))[0] == "kunming"


def test_common_words_count_only_where_nothing_rarer_is_found(tmp_path: Path) -> None:
    crowd = [Passage(str(n), f"airport number {n} of many") for n in range(1500)]
    index = LexicalIndex.build([*crowd, Passage("sea", "airport by the sea")], tmp_path / "i.sqlite")
    assert found(index, "an airport at the sea", k=9) == ["sea"]
    assert len(found(index, "which airport", k=9)) == 9
    assert len(found(index, "airport xyzzy", k=9)) == 9


def test_threads_and_pickles_see_the_same_index(index: LexicalIndex) -> None:
    queries = ["ZPPP", "CAT island", "runs"] * 20
    expected = [index.search(query, 3) for query in queries]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda query: index.search(query, 3), queries)) == expected
    again = pickle.loads(pickle.dumps(index))
    assert [again.search(query, 3) for query in queries] == expected
    assert (len(again), again.digest) == (len(CORPUS), index.digest)
    assert again.get("cat") == CORPUS[1]
    assert again.get("dog") is None


def test_a_corpus_is_indexed_once_and_a_changed_one_again(corpus_uri: str, tmp_path: Path) -> None:
    first = lexical_index(corpus_uri)
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.sqlite")}
    assert lexical_index(corpus_uri).digest == first.digest
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.sqlite")} == files
    write_corpus(Path(corpus_uri), {**TEXTS, "new": "Newtown Airport (NNNN)"})
    changed = lexical_index(corpus_uri)
    assert changed.digest != first.digest
    assert found(changed, "NNNN") == ["new"]
    assert found(first, "NNNN") == []


def test_processes_that_start_together_build_it_once(corpus_uri: str, tmp_path: Path) -> None:
    command = (
        "from graftwork.retrieval import LexicalSpec, open_retriever; "
        f"i = open_retriever(LexicalSpec(corpus={corpus_uri!r})); print(i.digest, len(i))"
    )
    started = [subprocess.Popen([sys.executable, "-c", command], stdout=subprocess.PIPE) for _ in range(3)]
    outputs = {process.communicate(timeout=60)[0] for process in started}
    assert [process.returncode for process in started] == [0, 0, 0]
    assert len(outputs) == 1
    indexes = [path.name for path in (tmp_path / "cache" / "indexes").iterdir() if not path.name.endswith(".lock")]
    assert len(indexes) == 1


@pytest.mark.parametrize("content", [b"not a database", b"", None])
def test_what_is_no_index_is_said(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "index.sqlite"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=r"index .*index.sqlite"):
        LexicalIndex.open(path)


def row(identity: str, question: str, doc_id: str | None) -> DatasetRow:
    return DatasetRow(identity, (Message("user", question), Message("assistant", "{}")), doc_id)


def contexts_of(rows: list[DatasetRow], spec: ContextSpec) -> list[tuple[Passage, ...]]:
    context = training_context(spec, seed=0)
    return [context(row) for row in rows]


def test_training_context_is_what_will_be_retrieved_with_the_gold_passage_in_it(corpus_uri: str) -> None:
    rows = [row("1", "Cat Island or CAT?", "cat"), row("2", "ZPPP", "kunming"), row("3", "CAT", "runs")]
    contexts = contexts_of(rows, ContextSpec(corpus=corpus_uri, k=2))
    retrieved = [
        tuple(hit.passage for hit in lexical_index(corpus_uri).search(r.question[-1].content, 2)) for r in rows
    ]
    assert contexts[:2] == retrieved[:2]
    assert [passage.id for passage in contexts[2]] == ["catania", "runs"]  # missed by the retriever: in the last place
    assert contexts_of(rows[1:], ContextSpec(corpus=corpus_uri, k=2)) == contexts[1:]


def test_rates_say_how_many_rows_lack_the_gold_passage_or_any(corpus_uri: str) -> None:
    rows = [row(str(n), "Cat Island, CAT or Catania", "cat") for n in range(300)]

    def shares(**rates: float) -> tuple[float, float]:
        contexts = contexts_of(rows, ContextSpec(corpus=corpus_uri, **rates))  # type: ignore[arg-type]
        with_any = [context for context in contexts if context]
        gold = sum("cat" in {passage.id for passage in context} for context in with_any)
        return len(with_any) / len(rows), gold / max(1, len(with_any))

    assert shares() == (1.0, 1.0)
    assert shares(gold_rate=0.0) == (1.0, 0.0)
    assert shares(plain_rate=1.0) == (0.0, 0.0)
    some, gold = shares(gold_rate=0.8, plain_rate=0.25)
    assert some == pytest.approx(0.75, abs=0.1)  # 4 standard errors of a share at n=300
    assert gold == pytest.approx(0.8, abs=0.11)


@pytest.mark.parametrize("doc_id", [None, "nowhere"])
def test_a_row_without_its_gold_passage_is_named(corpus_uri: str, doc_id: str | None) -> None:
    with pytest.raises(DataError, match="row 9: doc_id"):
        contexts_of([row("9", "q", doc_id)], ContextSpec(corpus=corpus_uri))


def test_airports_are_found_by_code_and_by_name() -> None:
    """The retriever of the main job: its hit rate bounds what an arm with retrieval can answer."""
    index = lexical_index("recipe://airport-card/corpus.jsonl")
    rows = read_rows("recipe://airport-card/eval.jsonl", need="eval")
    times, hits = [], []
    for each in rows:
        start = time.perf_counter()
        hits.append(each.doc_id in found(index, each.question[-1].content))
        times.append(time.perf_counter() - start)
    assert sum(hits) / len(rows) >= 0.95  # measured .99
    assert median(times) < 0.005  # measured 0.2 ms


@given(st.text() | st.text(alphabet="aBÉßǅ9_ -²"))
def test_codes_are_the_words_that_are_codes(text: str) -> None:
    assert codes_of(text) == " ".join(code_token(word) for word in words_of(text) if is_code(word))
