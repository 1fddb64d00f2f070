"""A published index: versions by content, replaced under traffic, followed by those who search it."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from pydantic import TypeAdapter

from graftwork import cli, config
from graftwork.errors import DataError
from graftwork.prompts.render import Passage
from graftwork.retrieval import Retriever, RetrieverSpec, open_retriever
from graftwork.retrieval.index_store import LATEST_KEPT, IndexHome, PublishedIndex, RetrieverChoice
from graftwork.retrieval.retriever import AutoSpec
from graftwork.serving.rag.eval import make_index, run_eval
from graftwork.serving.rag.spec import RagSpec

ROOT = Path(__file__).parents[3]

CORPUS = [Passage("1", "the sea port"), Passage("2", "a runway by the lake"), Passage("3", "an island airport")]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> IndexHome:
    monkeypatch.setenv("GRAFTWORK_CACHE", str(tmp_path / "cache"))
    return IndexHome.from_root(str(tmp_path), "docs")


def publish(home: IndexHome, passages: list[Passage], made_from: str = "x") -> PublishedIndex:
    return home.publish("docs", passages, made_from=made_from, sources=["s"])


def follow(home: IndexHome, monkeypatch: pytest.MonkeyPatch, kind: str = "lexical") -> Retriever:
    monkeypatch.setattr("graftwork.retrieval.retriever.FRESH_S", 0.0)
    return open_retriever(
        TypeAdapter[RetrieverSpec](RetrieverSpec).validate_python({"kind": kind, "corpus": home.store.uri})
    )


def test_equal_content_is_the_same_version_and_a_change_touches_only_itself(home: IndexHome) -> None:
    first = publish(home, CORPUS)
    assert (first.added, first.removed, first.kept, first.reused) == (3, 0, 0, False)
    again = publish(home, CORPUS)
    assert (again.manifest.version, again.reused) == (first.manifest.version, True)
    changed = publish(home, [*CORPUS[:2], Passage("4", "a harbour")])
    assert (changed.added, changed.removed, changed.kept) == (1, 1, 2)
    back = publish(home, CORPUS)
    assert (back.manifest.version, home.current().version) == (first.manifest.version, first.manifest.version)


def test_searches_go_on_while_the_index_is_replaced(home: IndexHome, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each search sees one version whole: every passage of a version names its number, and all say the same."""

    def version(number: int) -> list[Passage]:
        return [Passage(str(n), f"airport edition{number}") for n in range(40)]

    publish(home, version(0))
    retriever = follow(home, monkeypatch)
    stop, seen = threading.Event(), set[str]()

    def search() -> int:
        count = 0
        while not stop.is_set() or count < 20:
            texts = {hit.passage.text for hit in retriever.search("airport", 40)}
            assert len(texts) == 1, texts
            seen.update(texts)
            count += 1
        return count

    with ThreadPoolExecutor(4) as pool:
        searching = [pool.submit(search) for _ in range(4)]
        for number in range(1, 9):
            publish(home, version(number))
        stop.set()
        assert all(one.result() >= 20 for one in searching)
    assert {hit.passage.text for hit in retriever.search("airport", 1)} == {"airport edition8"}
    assert len(home.store.list("versions")) == LATEST_KEPT


def test_a_retriever_that_knew_an_old_version_finds_the_new_one(
    home: IndexHome, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(home, CORPUS)
    retriever = follow(home, monkeypatch)
    publish(home, [*CORPUS, Passage("4", "a harbour")])
    assert [hit.passage.id for hit in retriever.search("harbour", 3)] == ["4"]
    assert retriever.get("4") is not None


def test_an_unreadable_store_stops_no_search(
    home: IndexHome, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    publish(home, CORPUS)
    retriever = follow(home, monkeypatch)
    current = Path(home.store.path("current.json"))
    current.unlink()
    current.mkdir()  # reading it now fails
    assert [hit.passage.id for hit in retriever.search("sea", 1)] == ["1"]
    assert "could not be looked up" in caplog.text


def test_auto_is_what_was_chosen_for_this_version(home: IndexHome, monkeypatch: pytest.MonkeyPatch) -> None:
    made = publish(home, CORPUS)
    assert [hit.passage.id for hit in follow(home, monkeypatch, "auto").search("sea", 1)] == ["1"]
    home.choose(RetrieverChoice(kind="lexical", version=made.manifest.version, sentence="s"))
    assert home.choice() is not None
    publish(home, CORPUS[:2])
    assert home.choice() is None  # it was measured on another corpus


def test_what_is_missing_is_said(home: IndexHome, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="does not exist"):
        home.current()
    publish(home, CORPUS)
    with pytest.raises(DataError, match="the index has no vectors"):
        follow(home, monkeypatch, "hybrid")
    (tmp_path / "c.jsonl").write_text('{"id": "1", "text": "x"}\n')
    with pytest.raises(DataError, match="it is no index"):
        open_retriever(AutoSpec(kind="auto", corpus=str(tmp_path / "c.jsonl")))
    home.store.write_bytes(b"{}", "current.json")
    with pytest.raises(DataError, match=r"current\.json can't be read"):
        home.current()


def run(argv: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    monkeypatch.setattr("sys.argv", ["graftwork", *argv])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    captured = capsys.readouterr()
    return int(ended.value.code or 0), captured.out + captured.err


def test_the_commands_from_documents_to_a_choice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GRAFTWORK_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "port.md").write_text("# Port\nThe port opens at six.\n\n# Fees\nA ship pays ten.")
    (tmp_path / "docs" / "lake.html").write_text("<h1>Lake</h1><p>Swim at noon.")
    questions = [
        {"id": "a", "question": "When does the port open?", "doc_id": "port.md", "answers": ["SIX"]},
        {"id": "b", "question": "What does a ship pay?", "doc_id": "port.md#2", "answers": ["eleven", "ten"]},
        {"id": "c", "question": "May I swim?", "doc_id": ["lake.html#1"], "answers": ["midnight"]},
    ]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(q) + "\n" for q in questions))
    spec = {"kind": "rag", "name": "t", "sources": ["docs"], "questions": "q.jsonl", "k": 1}
    (tmp_path / "s.yaml").write_text(json.dumps(spec))

    def graftwork(*argv: str) -> tuple[int, str]:
        return run(["rag", *argv], monkeypatch, capsys)

    code, said = graftwork("search", "s.yaml", "port")
    assert (code, "does not exist" in said, "rag index" in said) == (2, True, True)
    assert graftwork("index", "s.yaml", "--json")[0] == 0
    assert json.loads(graftwork("search", "s.yaml", 'swim" OR (', "--json")[1])[0]["id"] == "lake.html#1"
    code, said = graftwork("eval", "s.yaml", "--json")
    report = json.loads(said)
    scores = {name: score["value"] for name, score in report["retrievers"][0]["scores"].items()}
    assert scores == {"hit": 1.0, "mrr": 1.0, "in_context": pytest.approx(2 / 3)}
    assert (report["chosen"], report["differences"]) == ("lexical", [])
    code, said = graftwork("search", "s.yaml", "port", "--set", "chunk.max_chars=400")
    assert (code, "cut another way" in said) == (2, True)
    (tmp_path / "q.jsonl").write_text(json.dumps({**questions[0], "doc_id": "harbour.md"}) + "\n")
    code, said = graftwork("eval", "s.yaml")
    assert (code, "'harbour.md'" in said, "1 of 1 questions" in said) == (2, True, True)
    code, said = graftwork("eval", "s.yaml", "--set", "questions=null")
    assert (code, "add `questions:`" in said) == (2, True)


def test_the_example_finds_airports(tmp_path: Path) -> None:
    spec = config.load(ROOT / "examples" / "rag.yaml", [f"root={tmp_path}", "limit=100"], expect="rag")
    assert isinstance(spec, RagSpec)
    assert make_index(spec).added > 28_000
    report = run_eval(spec)
    assert report.retrievers[0].scores["hit"].low > 0.9
    assert report.retrievers[0].scores["in_context"].value > 0.9
    assert spec.home.choice() is not None
    lines = [json.loads(line) for line in Path(report.questions_uri).read_text().splitlines()]
    assert len(lines) == report.n == 100
    for name, score in report.retrievers[0].scores.items():
        each = [line["retrievers"]["lexical"]["scores"][name] for line in lines]
        assert sum(each) / len(each) == pytest.approx(score.value)
    for line in lines:
        found = line["retrievers"]["lexical"]
        assert (found["rank"] is not None and found["rank"] <= report.k) == (found["scores"]["hit"] == 1)
        assert len(found["passages"]) <= report.k
