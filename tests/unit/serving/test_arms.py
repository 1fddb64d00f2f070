"""An arm's prompt: what training renders, plus nothing; retrieved, never cut."""

import json
from pathlib import Path

import pytest

from graftwork.datasets.rows import DatasetRow, render_question
from graftwork.errors import BaseModelError, ConfigError, DataError, StorageError
from graftwork.prompts import render as chat
from graftwork.prompts.render import Message, Passage, Prompt, PromptSpec, ToolCall
from graftwork.prompts.template import Template
from graftwork.retrieval import LexicalSpec
from graftwork.retrieval.index_store import IndexHome
from graftwork.serving.api.errors import ApiError, PromptTooLong, as_api_errors
from graftwork.serving.arms import (
    Catalog,
    arm_of_row,
    build_prompt,
    check_arms,
    messages_of,
    require_bytes,
    size_of,
    warm,
)
from graftwork.serving.evaluation.answers import question
from graftwork.serving.spec import ArmSpec, ServeSpec
from tests.chat_templates import FAMILIES
from tests.tiny import write_tiny_tokenizer

ASKED = (Message("user", "Which airport has the ICAO code ZPPP?"),)
CORPUS = {
    "ZPPP": "ZPPP Kunming Wujiaba International Airport, Kunming, China",
    "EDDF": "EDDF Frankfurt am Main Airport, Frankfurt, Germany",
    "KJFK": "KJFK John F Kennedy International Airport, New York, United States",
}


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Template:
    return Template.load(write_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("GRAFTWORK_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"id": id_, "text": text}) + "\n" for id_, text in CORPUS.items()))
    return str(path)


def shots_file(tmp_path: Path) -> str:
    path = tmp_path / "train.jsonl"
    turns = [[{"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": f"a{n}"}] for n in range(4)]
    rows = [{"id": f"r{n}", "messages": messages} for n, messages in enumerate(turns)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_a_served_prompt_is_the_beginning_of_the_training_row(template: Template, corpus: str) -> None:
    arm = ArmSpec(name="rag", prompt=PromptSpec(system="Answer as JSON."), retriever=LexicalSpec(corpus=corpus, k=2))
    served = build_prompt(arm, ASKED, template, max_seq_len=512)
    passages = [Passage(id_, CORPUS[id_]) for id_ in served.retrieved_ids]
    row = (*ASKED, Message("assistant", '{"icao":"ZPPP"}'))
    trained = chat.render(row, template, prompt=Prompt("Answer as JSON."), context=passages, generate=False)
    assert served.ids == trained.ids[: len(served.ids)]
    assert trained.loss_mask.index(True) == len(served.ids)
    assert served.stop_ids == trained.stop_ids


def test_the_question_finds_its_passage(template: Template, corpus: str) -> None:
    arm = ArmSpec(name="rag", retriever=LexicalSpec(corpus=corpus, k=1))
    earlier = (Message("user", "Frankfurt?"), Message("assistant", "Germany"), *ASKED)
    found = build_prompt(arm, earlier, template, max_seq_len=512)
    assert found.retrieved_ids == ("ZPPP",)  # the last user turn is the query
    assert CORPUS["ZPPP"] in template.decode(found.ids)


def test_worked_examples_come_first(template: Template, tmp_path: Path) -> None:
    arm = ArmSpec(name="shots", prompt=PromptSpec(shots=2, few_shot_file=shots_file(tmp_path)))
    text = template.decode(build_prompt(arm, ASKED, template, max_seq_len=512).ids)
    assert text.index("q0") < text.index("a0") < text.index("q1") < text.index("a1") < text.index("Which")
    assert "q2" not in text


def test_an_arm_without_a_prompt_takes_the_adapters(template: Template) -> None:
    trained, arm = PromptSpec(system="As trained."), ArmSpec(name="adapter", adapter="card@latest")
    assert "As trained." in template.decode(build_prompt(arm, ASKED, template, max_seq_len=512, trained=trained).ids)
    own = (Message("system", "Mine."), *ASKED)
    text = template.decode(build_prompt(arm, own, template, max_seq_len=512, trained=trained).ids)
    assert "Mine." in text
    assert "As trained." not in text
    explicit = ArmSpec(name="adapter", adapter="card@latest", prompt=PromptSpec())
    assert "As trained." not in template.decode(
        build_prompt(explicit, ASKED, template, max_seq_len=512, trained=trained).ids
    )


def test_an_arms_own_system_prompt_cannot_be_replaced(template: Template) -> None:
    arm = ArmSpec(name="fixed", prompt=PromptSpec(system="Fixed."))
    with pytest.raises(DataError, match="the arm has its own system prompt"):
        build_prompt(arm, (Message("system", "Mine."), *ASKED), template, max_seq_len=512)


def test_a_long_prompt_is_refused_with_its_figures_and_never_cut(template: Template) -> None:
    arm = ArmSpec(name="base", max_new_tokens=16)
    size = len(build_prompt(arm, ASKED, template, max_seq_len=512).ids)
    assert build_prompt(arm, ASKED, template, max_seq_len=size + 16).ids
    with pytest.raises(
        PromptTooLong, match=f"(?s){size} tokens with up to 16 new ones.*max_seq_len={size + 15}"
    ) as caught:
        build_prompt(arm, ASKED, template, max_seq_len=size + 15)
    assert caught.value.hint


def test_without_a_limit_the_answer_may_fill_the_sequence(template: Template) -> None:
    arm = ArmSpec(name="base", max_new_tokens=None)
    size = len(build_prompt(arm, ASKED, template, max_seq_len=512).ids)
    assert build_prompt(arm, ASKED, template, max_seq_len=512).max_new_tokens == 512 - size
    assert build_prompt(arm, ASKED, template, max_seq_len=512, max_new_tokens=7).max_new_tokens == 7
    with pytest.raises(PromptTooLong):
        build_prompt(arm, ASKED, template, max_seq_len=size)


def test_plain_text_is_continued_as_it_stands(template: Template) -> None:
    arm = ArmSpec(name="base", prompt=PromptSpec(system="not in it"), max_new_tokens=5)
    prompt = build_prompt(arm, "The quick<|im_end|>", template, max_seq_len=64)
    assert template.decode(prompt.ids) == "The quick<|im_end|>"
    assert not set(prompt.ids) & template.stop_ids  # text is data
    assert prompt.max_new_tokens == 64 - len(prompt.ids)
    with pytest.raises(PromptTooLong):
        build_prompt(arm, "The quick " * 50, template, max_seq_len=64, max_new_tokens=1)


@pytest.mark.parametrize(
    "turn", [{"role": "function", "content": "x"}, {"role": "user"}, {"role": "user", "content": 3}, {}]
)
def test_a_turn_must_be_a_turn(turn: dict[str, str]) -> None:
    with pytest.raises(DataError, match="a message has a role"):
        messages_of([turn])


def test_a_row_of_a_comparison_is_asked_with_its_functions(tmp_path: Path) -> None:
    """The prompt of an arm equals the one that training renders for the row, order of keys included."""
    template = Template.load(FAMILIES["qwen3"].write(tmp_path))
    tool = {"type": "function", "function": {"name": "find", "parameters": {"type": "object"}, "description": "Find."}}
    call = ToolCall("find", {"z": 1, "a": "é"}, "call00001")
    turns = (
        Message("user", "Where?"),
        Message("assistant", "", (call,), reasoning="Look."),
        Message("tool", "here", tool_call_id="call00001", name="find"),
        Message("assistant", "There."),
    )
    row = DatasetRow("1", turns, tools=(tool,), template_kwargs={"enable_thinking": False})
    asked = render_question(row, template, Prompt(), (), "keep")
    arm = ArmSpec(name="base", tools=(json.dumps({**tool, "function": {"name": "other"}}),))
    sent = json.loads(json.dumps(question(row)))
    of_row = arm_of_row(arm, row)
    assert build_prompt(of_row, messages_of(sent), template, max_seq_len=2048).ids == asked.ids
    assert arm_of_row(arm, DatasetRow("2", turns)) is arm
    assert ArmSpec.model_validate_json(of_row.model_dump_json()) == of_row
    assert not {"tools", "chat_template_kwargs"} & ArmSpec(name="base").model_dump().keys()


def test_an_arm_that_the_template_does_not_take_is_refused_at_the_start(tmp_path: Path, template: Template) -> None:
    tool = json.dumps({"type": "function", "function": {"name": "find"}})
    with pytest.raises(BaseModelError, match=r"leaves functions out.*"):
        check_arms([ArmSpec(name="calls", tools=(tool,))], lambda: template)
    for arm in (
        ArmSpec(name="thinks", chat_template_kwargs={"enable_thinking": True}),
        ArmSpec(name="thinks", prompt=PromptSpec(chat_template_kwargs={"enable_thinking": True})),
    ):
        with pytest.raises(ConfigError, match=r"arm 'thinks': chat_template_kwargs: enable_thinking"):
            check_arms([arm], lambda: template)
    takes = Template.load(FAMILIES["qwen3"].write(tmp_path))
    check_arms([ArmSpec(name="calls", tools=(tool,), chat_template_kwargs={"enable_thinking": True})], lambda: takes)
    check_arms([ArmSpec(name="plain")], lambda: pytest.fail("no template is needed"))


def test_an_endpoint_sets_the_variables_of_its_base() -> None:
    tree = {"base": "hub/base", "chat_template_kwargs": {"enable_thinking": False}, "arms": [{"name": "own"}]}
    spec = ServeSpec.model_validate(tree)
    catalog = Catalog(spec)
    assert catalog.arm("base").chat_template_kwargs == {"enable_thinking": False}
    assert catalog.arm("arm/own").chat_template_kwargs == {}
    assert catalog.arm("base:task").chat_template_kwargs == {}
    assert ServeSpec.model_validate(spec.model_dump(mode="json")) == spec
    assert "chat_template_kwargs" not in ServeSpec.model_validate({"base": "hub/base"}).model_dump()


def test_missing_arm_data_shows_when_it_is_warmed_up(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"nosuch\.jsonl"):
        warm(None, LexicalSpec(corpus=str(tmp_path / "nosuch.jsonl")))
    with pytest.raises(StorageError, match=r"nosuch\.jsonl"):
        warm(PromptSpec(shots=1, few_shot_file=str(tmp_path / "nosuch.jsonl")), None)


def test_passages_without_room_are_left_out_whole_and_told(template: Template, corpus: str) -> None:
    everything = "ZPPP, EDDF and KJFK, please: Kunming, Frankfurt, New York"
    asked = (Message("user", everything),)

    def built(context_tokens: int | None) -> tuple[set[str], set[str], str]:
        retriever = LexicalSpec(corpus=corpus, k=3, context_tokens=context_tokens)
        prompt = build_prompt(ArmSpec(name="rag", retriever=retriever), asked, template, max_seq_len=2048)
        return set(prompt.retrieved_ids), set(prompt.left_out_ids), template.decode(prompt.ids)

    whole, none_left, text = built(None)
    assert (whole, none_left) == (set(CORPUS), set())
    block = text[text.index("Context:") : text.index(everything)].rstrip()
    room = len(template.encode(block))
    assert built(room) == (whole, none_left, text)
    kept, left_out, shorter = built(room - 1)
    assert (len(kept), kept | left_out, kept & left_out) == (2, set(CORPUS), set())
    assert all((CORPUS[identity] in shorter) == (identity in kept) for identity in CORPUS)
    kept, left_out, text = built(8)
    assert (kept, left_out, "Context:" in text) == (set(), set(CORPUS), False)


def test_numbered_passages_are_cited_by_their_number(template: Template, corpus: str) -> None:
    arm = ArmSpec(name="rag", prompt=PromptSpec(citations=True), retriever=LexicalSpec(corpus=corpus, k=2))
    both = (Message("user", "Kunming or Frankfurt Airport?"),)
    served = build_prompt(arm, both, template, max_seq_len=512)
    text = template.decode(served.ids)
    first, second = served.retrieved_ids
    assert f"Context:\n[1] {CORPUS[first]}\n[2] {CORPUS[second]}\n\nKunming or" in text
    assert served.citations
    row = (*both, Message("assistant", "Kunming [1]"))
    context = [Passage(identity, CORPUS[identity]) for identity in served.retrieved_ids]
    trained = chat.render(row, template, prompt=Prompt(citations=True), context=context, generate=False)
    assert served.ids == trained.ids[: len(served.ids)]
    assert chat.cited_passage_ids("See [2], [2] and [7], not (1) or [x].", served.retrieved_ids) == (second,)


def test_an_arm_follows_its_index(template: Template, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAFTWORK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("graftwork.retrieval.retriever.FRESH_S", 0.0)
    home = IndexHome.from_root(str(tmp_path), "airports")
    passages = [Passage(identity, text) for identity, text in CORPUS.items()]
    home.publish("airports", passages[1:], made_from="x", sources=["s"])
    arm = ArmSpec(name="rag", retriever=LexicalSpec(corpus=home.store.uri, k=1))
    assert build_prompt(arm, ASKED, template, max_seq_len=512).retrieved_ids != ("ZPPP",)
    home.publish("airports", passages, made_from="x", sources=["s"])
    assert build_prompt(arm, ASKED, template, max_seq_len=512).retrieved_ids == ("ZPPP",)


def test_a_prompt_of_too_many_bytes_is_refused_before_it_is_tokenised(template: Template) -> None:
    longest = template.longest_token_bytes
    pieces = json.loads(template.sealed_tokenizer())["model"]["vocab"]
    assert longest >= max(len(template.decode([n]).encode()) for n in range(len(pieces)))
    room = 64 * longest
    require_bytes(size_of("a" * room), longest, 64)
    require_bytes(size_of((Message("user", "ä" * (room // 2)),)), longest, 64)
    for asked in ("a" * (room + 1), (Message("user", "ä" * (room // 2 + 1)),)):
        with pytest.raises(PromptTooLong, match=rf"(?s)64 tokens hold at most {room} bytes.*max_seq_len=64"):
            require_bytes(size_of(asked), longest, 64)


def test_too_many_new_tokens_are_the_fault_of_max_tokens(template: Template) -> None:
    arm = ArmSpec(name="base")
    size = len(build_prompt(arm, ASKED, template, max_seq_len=512).ids)
    with pytest.raises(ApiError) as refused, as_api_errors():
        build_prompt(arm, ASKED, template, max_seq_len=512, max_new_tokens=513 - size)
    assert (refused.value.param, refused.value.code) == ("max_tokens", "context_length_exceeded")
    assert f"Ask for at most {512 - size} new tokens" in refused.value.message
    with pytest.raises(ApiError) as refused, as_api_errors():
        build_prompt(arm, ASKED, template, max_seq_len=size, max_new_tokens=1)
    assert refused.value.param == "messages"
