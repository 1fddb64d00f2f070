"""Streamed text: whole characters, no trace of a stop string, equal to decoding everything at once."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graftwork.prompts.template import Template
from graftwork.serving.detokenize import TextStream
from tests.tiny import write_tiny_tokenizer


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Template:
    return Template.load(write_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def pieces(template: Template, ids: list[int], stop: tuple[str, ...] = ()) -> list[str]:
    stream = TextStream(template.decode, stop)
    found = [stream.push(token_id) for token_id in ids] + [stream.push(None)]
    assert "".join(found) == stream.text
    return found


def test_a_character_of_several_tokens_comes_whole(template: Template) -> None:
    ids = template.encode("aé😀z")
    assert len(ids) > 4  # the emoji takes several byte tokens
    found = [piece for piece in pieces(template, ids) if piece]
    assert "".join(found) == "aé😀z"
    assert "😀" in found


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=40))
def test_any_text_comes_back(template: Template, text: str) -> None:
    assert "".join(pieces(template, template.encode(text))) == text


@settings(max_examples=200, deadline=None)
@given(ids=st.lists(st.integers(0, 511), max_size=30))
def test_any_tokens_give_what_the_whole_gives(template: Template, ids: list[int]) -> None:
    """Broken bytes included: a random model writes them."""
    assert "".join(pieces(template, ids)) == template.decode(ids)


def test_nothing_of_a_stop_string_gets_out(template: Template) -> None:
    found = pieces(template, template.encode("before<END>after"), ("<END>",))
    assert "".join(found) == "before"


def test_what_looked_like_a_stop_string_comes_late_but_whole(template: Template) -> None:
    assert "".join(pieces(template, template.encode("a<EN"), ("<END>",))) == "a<EN"
    assert "".join(pieces(template, template.encode("a<ENTER>"), ("<END>",))) == "a<ENTER>"


def test_the_first_of_several_stop_strings_counts(template: Template) -> None:
    assert "".join(pieces(template, template.encode("one, two. three"), (".", ","))) == "one"


@settings(max_examples=200, deadline=None)
@given(text=st.text("ab", max_size=20), stop=st.text("ab", min_size=1, max_size=4))
def test_the_cut_is_where_the_whole_text_has_it(template: Template, text: str, stop: str) -> None:
    assert "".join(pieces(template, template.encode(text), (stop,))) == text.split(stop)[0]
