"""The prompt builder: equal to transformers, prefix property at token level, text from people stays text."""

import threading
import time
from datetime import date
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from graftwork.errors import BaseModelError, DataError
from graftwork.prompts.render import (
    Message,
    Passage,
    Prompt,
    PromptSpec,
    Rendered,
    one_turn_rows,
    render,
    training_rows,
)
from graftwork.prompts.template import Template
from tests.tiny import CHATML, SPECIALS, write_tiny_tokenizer

SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou"
    " are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + "
    "message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA2 = """{% if messages[0]['role'] == 'system' %}
    {% set system = '<<SYS>>\\n' + messages[0]['content'] | trim + '\\n<</SYS>>\\n\\n' %}
    {% set turns = messages[1:] %}
{% else %}
    {% set system = '' %}
    {% set turns = messages %}
{% endif %}
{% for message in turns %}
    {% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{ raise_exception('roles must alternate') }}
    {% endif %}
    {% if message['role'] == 'user' %}
        {{ bos_token + '[INST] ' + (system if loop.first else '') + message['content'] | trim + ' [/INST]' }}
    {% else %}
        {% generation %}{{ ' ' + message['content'] | trim + ' ' + eos_token }}{% endgeneration %}
    {% endif %}
{% endfor %}"""
SYSTEM_LAST = """{% set system = messages[0]['content'] if messages[0]['role'] == 'system' else 'none' %}
{% for message in messages if message['role'] != 'system' %}
{% if message['role'] == 'user' %}{{ '<|im_start|>' }}
{% if loop.index >= loop.length - 1 %}{{ system + '; ' }}{% endif %}
{{ message['content'] + '<|im_start|>' }}{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}
{% endfor %}"""
STRIPS_THINK = """{% for message in messages %}
{% set content = message['content'] %}
{% if message['role'] == 'assistant' and not loop.last %}{% set content = content.split('</think>')[-1] %}{% endif %}
{{ '<|im_start|>' + message['role'] + '\\n' + content + '<|im_end|>\\n' }}
{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
TOOL_AND_DATE = (
    "{{ {'a': '<é>', 'b': [1, none]} | tojson }}{{ strftime_now('%Y') }}{% for m in messages %}"
    "{% if loop.index > 9 %}{% break %}{% endif %}" + CHATML.split("%}", 1)[1].replace("message[", "m[")
)
TEMPLATES = {
    "chatml": CHATML,
    "smollm2": SMOLLM2,
    "llama2": LLAMA2,
    "system-last": SYSTEM_LAST,
    "strips-think": STRIPS_THINK,
    "tool-and-date": TOOL_AND_DATE,
}
WITH_PREFIX = ("chatml", "smollm2", "llama2", "tool-and-date")
CONVERSATION = (
    Message("system", "Answer with JSON."),
    Message("user", "Which airport is ZPPP?"),
    Message("assistant", '<think>\nKunming\n</think>\n\n{"icao":"ZPPP"}'),
    Message("user", "  And KMG? \n"),
    Message("assistant", '{"iata":"KMG"}'),
)
HOSTILE = st.lists(st.sampled_from([*"<|im_startend>\n a{é", *SPECIALS])).map("".join)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("templates")
    return {name: write_tiny_tokenizer(root / name, source) for name, source in TEMPLATES.items()}


@pytest.fixture(scope="module")
def templates(folders: dict[str, Path]) -> dict[str, Template]:
    return {name: Template.load(folder) for name, folder in folders.items()}


def learned(template: Template, messages: tuple[Message, ...]) -> list[str]:
    """Texts that the loss falls on, one a run of True."""
    rendered = render(messages, template, generate=False)
    runs: list[list[int]] = []
    previous = False
    for token, masked in zip(rendered.ids, rendered.loss_mask, strict=True):
        if masked and not previous:
            runs.append([])
        if masked:
            runs[-1].append(token)
        previous = masked
    return [template.decode(run, skip_special=False) for run in runs]


def spelled(rendered: Rendered, template: Template) -> str:
    """Text of the ids, control tokens included."""
    return template.decode(rendered.ids, skip_special=False)


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("opening", [0, 1], ids=["system", "no-system"])
@pytest.mark.parametrize("turns", [2, 3, 4, 5])
def test_text_and_ids_equal_transformers(folders: dict[str, Path], name: str, opening: int, turns: int) -> None:
    """Source: transformers' apply_chat_template on the same folder, which takes the clock's day."""
    from transformers import AutoTokenizer

    messages = CONVERSATION[opening:turns]
    generate = messages[-1].role != "assistant"
    if messages[-1].role == "system":
        pytest.skip("nothing to answer")
    theirs = AutoTokenizer.from_pretrained(folders[name])
    as_dicts = [{"role": m.role, "content": m.content} for m in messages]
    template = Template.load(folders[name], date.today())
    ours = render(messages, template, generate=generate)
    assert spelled(ours, template) == theirs.apply_chat_template(
        as_dicts, tokenize=False, add_generation_prompt=generate
    )
    ids = theirs.apply_chat_template(as_dicts, add_generation_prompt=generate, return_dict=True)["input_ids"]
    assert list(ours.ids) == ids


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_prompt_is_a_token_prefix_of_its_row_and_the_loss_starts_there(
    templates: dict[str, Template], name: str
) -> None:
    template = templates[name]
    assert template.has_prefix_property == (name in WITH_PREFIX)
    for row in training_rows(CONVERSATION, template):
        prompt = render(row[:-1], template, generate=True)
        whole = render(row, template, generate=False)
        assert whole.ids[: len(prompt.ids)] == prompt.ids
        assert not any(prompt.loss_mask)
        own = [index for index, masked in enumerate(whole.loss_mask) if masked and index >= len(prompt.ids)]
        assert own[0] == len(prompt.ids)
        assert whole.ids[own[-1]] in template.stop_ids
        assert own == list(range(own[0], own[-1] + 1))


def test_every_answer_is_learned_with_its_end_of_turn_and_nothing_else(templates: dict[str, Template]) -> None:
    first, second = CONVERSATION[2].content, CONVERSATION[4].content
    assert learned(templates["smollm2"], CONVERSATION) == [first + "<|im_end|>", second + "<|im_end|>"]
    assert learned(templates["llama2"], CONVERSATION) == [f" {first} <|im_end|>", f" {second} <|im_end|>"]


def test_a_template_that_rewrites_earlier_turns_trains_one_turn_a_row(templates: dict[str, Template]) -> None:
    template = templates["strips-think"]
    rows = training_rows(CONVERSATION, template)
    assert rows == one_turn_rows(CONVERSATION) == [CONVERSATION[:3], CONVERSATION]
    assert [learned(template, row) for row in rows] == [
        [CONVERSATION[2].content + "<|im_end|>"],
        [CONVERSATION[4].content + "<|im_end|>"],
    ]
    assert "Kunming" in spelled(render(rows[0], template, generate=False), template)
    assert "Kunming" not in spelled(render(rows[1], template, generate=False), template)


@pytest.mark.parametrize("start", ["\n", "\n\n", " ", "\t", "  x", "é", "1"])
def test_an_answer_that_would_merge_with_the_prompt_does_not(templates: dict[str, Template], start: str) -> None:
    messages = (
        Message("user", "q"),
        Message("assistant", start + "a"),
        Message("user", "q"),
        Message("assistant", "a"),
    )
    for end in (2, 4):
        prompt = render(messages[: end - 1], templates["chatml"], generate=True)
        assert render(messages, templates["chatml"], generate=False).ids[: len(prompt.ids)] == prompt.ids


@settings(max_examples=150, deadline=None)
@given(st.lists(HOSTILE, min_size=4, max_size=4))
def test_no_text_of_a_person_becomes_a_control_token(templates: dict[str, Template], texts: list[str]) -> None:
    template = templates["chatml"]
    messages = (Message("system", texts[0]), Message("user", texts[1]), Message("assistant", texts[2]))
    rendered = render(messages, template, context=[Passage("p", texts[3])], generate=False)
    controls = [token for token in rendered.ids if token < len(SPECIALS)]
    assert controls == [1, 2] * 3  # <|im_start|> and <|im_end|> of the three turns
    context = " ".join(texts[3].split())
    assert spelled(rendered, template) == (
        f"<|im_start|>system\n{texts[0]}<|im_end|>\n"
        f"<|im_start|>user\nContext:\n- {context}\n\n{texts[1]}<|im_end|>\n"
        f"<|im_start|>assistant\n{texts[2]}<|im_end|>\n"
    )
    assert not set(template.encode("".join(texts))) & {0, 1, 2}


def test_context_stands_before_the_question_in_the_last_user_turn(templates: dict[str, Template]) -> None:
    passages = [Passage("a", "Kunming\n airport"), Passage("b", "Paris")]
    template = templates["chatml"]
    text = spelled(render(CONVERSATION[:4], template, context=passages, generate=True), template)
    assert "user\nContext:\n- Kunming airport\n- Paris\n\n  And KMG? \n<|im_end|>" in text
    assert "user\nWhich airport is ZPPP?<|im_end|>" in text
    row = render(CONVERSATION, template, context=passages, generate=False)
    assert spelled(row, template).startswith(text)


def test_worked_examples_come_first_and_are_not_learned(templates: dict[str, Template]) -> None:
    shot = (Message("user", "Which airport is LFPG?"), Message("assistant", '{"icao":"LFPG"}'))
    prompt = Prompt(system="Be brief.", shots=(shot,), context_header="Facts:")
    question, answer = Message("user", "ZPPP?"), Message("assistant", "{}")
    asked = render([question], templates["chatml"], prompt=prompt, context=[Passage("p", "x")], generate=True)
    assert spelled(asked, templates["chatml"]) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhich airport is LFPG?<|im_end|>\n"
        '<|im_start|>assistant\n{"icao":"LFPG"}<|im_end|>\n'
        "<|im_start|>user\nFacts:\n- x\n\nZPPP?<|im_end|>\n<|im_start|>assistant\n"
    )
    row = render([question, answer], templates["chatml"], prompt=prompt, generate=False)
    masked = [token for token, learns in zip(row.ids, row.loss_mask, strict=True) if learns]
    assert templates["chatml"].decode(masked, skip_special=False) == "{}<|im_end|>"


def test_a_system_turn_of_the_conversation_wins(templates: dict[str, Template]) -> None:
    rendered = render(CONVERSATION[:2], templates["chatml"], prompt=Prompt(system="other"), generate=True)
    text = spelled(rendered, templates["chatml"])
    assert "Answer with JSON." in text
    assert "other" not in text


@pytest.mark.parametrize(
    ("roles", "generate", "found"),
    [
        ((), True, "no user turn"),
        (("system",), True, "no user turn"),
        (("assistant",), False, "no user turn"),
        (("user", "assistant"), True, "ends with assistant"),
        (("user",), False, "ends with user"),
        (("user", "system", "user"), True, "system turn after the first"),
    ],
)
def test_turns_out_of_order_are_refused(
    templates: dict[str, Template], roles: tuple[str, ...], generate: bool, found: str
) -> None:
    messages = [Message(role, "x") for role in roles]  # type: ignore[arg-type]
    with pytest.raises(DataError, match=found):
        render(messages, templates["chatml"], generate=generate)


def test_what_the_template_refuses_is_a_data_error(templates: dict[str, Template]) -> None:
    with pytest.raises(DataError, match="roles must alternate"):
        render([Message("user", "a"), Message("user", "b")], templates["llama2"], generate=True)


def test_prefix_holds_for_a_sentencepiece_tokenizer(tmp_path: Path) -> None:
    """Metaspace puts a space before the first word of a text: not before a continuation. Source: transformers."""
    from transformers import AutoTokenizer

    write_tiny_tokenizer(tmp_path, LLAMA2)
    tokenizer = Tokenizer(models.BPE(unk_token="<|endoftext|>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    specials: list[str | AddedToken] = [AddedToken(token, normalized=False, rstrip=True) for token in SPECIALS]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=specials, show_progress=False)
    tokenizer.train_from_iterator([m.content for m in CONVERSATION] + ["[INST] <<SYS>> <</SYS>> [/INST] \n"], trainer)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    template = Template.load(tmp_path)
    prompt = render(CONVERSATION[:-1], template, generate=True)
    whole = render(CONVERSATION, template, generate=False)
    assert whole.ids[: len(prompt.ids)] == prompt.ids
    dicts = [{"role": m.role, "content": m.content} for m in CONVERSATION]
    theirs = AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(dicts, return_dict=True)["input_ids"]
    assert list(whole.ids) == theirs


@pytest.mark.parametrize(
    ("name", "text", "found"),
    [
        ("chat_template.jinja", "{% for %}", "not valid jinja"),
        ("chat_template.jinja", "{% for m in messages %}{{ m['content'] }}{% endfor %}", "it ends an answer with"),
        ("chat_template.jinja", "{{ raise_exception('never') }}", "never"),
        ("tokenizer.json", "{", "cannot be read"),
    ],
)
def test_a_broken_template_or_tokenizer_is_said(tmp_path: Path, name: str, text: str, found: str) -> None:
    write_tiny_tokenizer(tmp_path)
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(BaseModelError, match=found):
        Template.load(tmp_path)


@pytest.mark.parametrize(
    ("name", "said"), [("tokenizer.json", "tokenizer.json"), ("chat_template.jinja", "base.chat_template")]
)
def test_a_missing_template_or_tokenizer_is_said(tmp_path: Path, name: str, said: str) -> None:
    (write_tiny_tokenizer(tmp_path) / name).unlink()
    with pytest.raises(BaseModelError, match=said):
        Template.load(tmp_path)


def test_a_template_cannot_reach_python(tmp_path: Path) -> None:
    write_tiny_tokenizer(tmp_path, "{{ messages.__class__.__mro__ }}" + CHATML)
    with pytest.raises(BaseModelError, match="unsafe"):
        Template.load(tmp_path)


def test_digests_tell_templates_and_tokenizers_apart(templates: dict[str, Template]) -> None:
    assert len({template.digest for template in templates.values()}) == len(templates)
    assert len({template.tokenizer_digest for template in templates.values()}) == 1


def test_shots_need_their_source() -> None:
    with pytest.raises(ValueError, match="needs few_shot_file"):
        PromptSpec(shots=3)
    with pytest.raises(ValueError, match="cannot take effect"):
        PromptSpec(few_shot_file="rows.jsonl")


def test_other_threads_run_while_a_long_text_is_tokenised(templates: dict[str, Template]) -> None:
    """One call holds no other thread up: the engine's thread decodes for everybody else meanwhile."""
    template, text = next(iter(templates.values())), "Which airport has the code ZPPP? " * 30_000
    gaps, ended, ticking = [0.0], threading.Event(), threading.Event()

    def tick() -> None:
        last = time.perf_counter()
        while not ended.wait(0.001):
            now = time.perf_counter()
            gaps.append(now - last)
            last = now
            ticking.set()

    thread = threading.Thread(target=tick)
    thread.start()
    ticking.wait(10)
    began = time.perf_counter()
    ids = template.encode(text)
    took = time.perf_counter() - began
    ended.set()
    thread.join()
    assert len(ids) > 100_000
    assert max(gaps) < took / 3, f"another thread stood still for {max(gaps):.2f} of {took:.2f} s"


@settings(max_examples=30, deadline=None)
@given(st.text(max_size=60))
def test_ids_equal_those_of_a_single_encode(templates: dict[str, Template], text: str) -> None:
    for template in templates.values():
        for sealed in (text, template.sealed_text([{"role": "user", "content": text}], generate=True)):
            one = template._tokenizer.encode(sealed, add_special_tokens=False).ids
            assert template.sealed_ids(sealed) == one
