"""An index that follows its corpus: what it answers is what an index built anew answers."""

import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graftwork.prompts.render import Passage
from graftwork.retrieval import LexicalIndex
from graftwork.retrieval.bm25 import STRIDE, changes, numbered

WORDS = ["sea", "port", "runway", "ZPPP", "A320", "airports", "island", "cat", "lake", "the", "of", "north"]
TEXT = st.lists(st.sampled_from(WORDS), min_size=1, max_size=6).map(" ".join)
CORPUS = st.dictionaries(st.integers(0, 12).map(str), TEXT, min_size=1, max_size=10)


def corpus(texts: dict[str, str]) -> list[Passage]:
    return [Passage(identity, text) for identity, text in texts.items()]


def answers(index: LexicalIndex) -> list[object]:
    asked = [*WORDS, "cat island airport", "ZPPP runway at the sea"]
    return [[index.search(query, 4) for query in asked], index.digest, len(index), index.get("1")]


@settings(max_examples=60, deadline=None)
@given(st.lists(CORPUS, min_size=2, max_size=4))
def test_after_any_changes_the_index_answers_like_a_new_one(states: list[dict[str, str]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        index = LexicalIndex.build(corpus(states[0]), place / "0.sqlite")
        for number, texts in enumerate(states[1:], start=1):
            index, _ = index.derive(corpus(texts), place / f"{number}.sqlite")
            assert answers(index) == answers(LexicalIndex.build(corpus(texts), place / "new.sqlite"))


def test_only_what_changed_is_touched(tmp_path: Path) -> None:
    before = corpus({str(n): f"airport number {n}" for n in range(300)})
    index = LexicalIndex.build(before, tmp_path / "before.sqlite")
    after = [*before[:100], Passage("100", "a heliport"), *before[102:], Passage("new", "an island")]
    later, found = index.derive(after, tmp_path / "after.sqlite")
    assert [passage.id for _, passage in found.removed] == ["100", "101"]
    assert [passage.id for _, passage in found.added] == ["100", "new"]
    assert found.kept == 298
    assert [hit.passage.id for hit in later.search("heliport", 2)] == ["100"]
    assert later.search("101", 2) == []
    assert [hit.passage.id for hit in index.search("101", 2)] == ["101"]  # the index before is as it was


@pytest.mark.parametrize(
    ("old", "new", "numbers"),
    [
        ("ab", "ab", []),
        ("ab", "abc", [3 * STRIDE]),
        ("ab", "cab", [STRIDE // 2]),
        ("ab", "acdeb", [STRIDE + STRIDE * n // 4 for n in (1, 2, 3)]),
        ("ab", "c", [STRIDE]),
        ("ab", "ba", None),
    ],
)
def test_newcomers_stand_where_the_corpus_has_them(old: str, new: str, numbers: list[int] | None) -> None:
    found = changes(numbered([Passage(char, char) for char in old]), [Passage(char, char) for char in new])
    assert (None if found is None else [number for number, _ in found.added]) == numbers


def test_where_no_number_is_left_all_is_built_anew(tmp_path: Path) -> None:
    ends = corpus({"first": "sea", "last": "sea"})
    crowd = [Passage(str(n), f"lake {n}") for n in range(STRIDE)]
    assert changes(numbered(ends), [ends[0], *crowd, ends[1]]) is None
    later, found = LexicalIndex.build(ends, tmp_path / "0").derive([ends[0], *crowd, ends[1]], tmp_path / "1")
    assert (found.kept, len(later)) == (0, STRIDE + 2)
    assert ids(later, "lake 7") == ["7"]


def ids(index: LexicalIndex, query: str) -> Sequence[str]:
    return [hit.passage.id for hit in index.search(query, 1)]


def test_a_query_of_words_that_stand_nearly_everywhere_keeps_the_rarest(tmp_path: Path) -> None:
    crowd = [Passage(str(n), f"port {'sea' if n % 3 else 'lake'}") for n in range(9000)]
    index = LexicalIndex.build([*crowd, Passage("x", "port sea lake")], tmp_path / "i.sqlite")
    assert len(index.search("port", 5)) == 5
    assert all("lake" in hit.passage.text for hit in index.search("port sea lake", 5))
