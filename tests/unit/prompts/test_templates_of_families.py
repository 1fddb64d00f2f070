"""Templates of model families against transformers and TRL: text, ids, masks, and what a template can't write."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from graftwork.errors import BaseModelError, DataError
from graftwork.prompts.render import Message, Prompt, Rendered, Tool, ToolCall, message_fields, render, training_rows
from graftwork.prompts.template import Template, hermes_template
from graftwork.prompts.tool_calls import parse_tool_calls
from tests.chat_templates import FAMILIES, PACKAGED, QUICK
from tests.tiny import CHATML, write_tiny_tokenizer

TOOLS: tuple[Tool, ...] = (
    {
        "type": "function",
        "function": {
            "name": "find_airport",
            "description": "Look an airport up.",
            "parameters": {
                "type": "object",
                "properties": {"code": {"type": "string", "description": "ICAO code"}, "n": {"type": "integer"}},
                "required": ["code"],
            },
        },
    },
)
CALL = ToolCall("find_airport", {"code": "ZPPP", "n": 2}, "abcdefgh1")
SECOND = ToolCall("find_airport", {"code": "LFPG", "n": 1}, "abcdefgh2")
QUESTION, ANSWER = Message("user", "Where is ZPPP?"), Message("assistant", "It is Kunming.")
CALLED = Message("assistant", "", (CALL,))
RESULT = Message("tool", '{"city": "Kunming"}', tool_call_id="abcdefgh1", name="find_airport")
SYSTEM = Message("system", "Be brief.")
THOUGHT = Message("assistant", "It is Kunming.", reasoning="ZPPP begins with Z.")

CONVERSATIONS: dict[str, tuple[tuple[Message, ...], tuple[Tool, ...]]] = {
    "plain": ((QUESTION, ANSWER, Message("user", "And KMG?"), Message("assistant", "The same.")), ()),
    "system": ((SYSTEM, QUESTION, ANSWER), ()),
    "tools": ((QUESTION, CALLED, RESULT, ANSWER, Message("user", "Thanks"), Message("assistant", "Bye.")), TOOLS),
    "functions alone": ((SYSTEM, QUESTION, ANSWER), TOOLS),
    "two calls": (
        (QUESTION, Message("assistant", "", (CALL, SECOND)), RESULT)
        + (Message("tool", "{}", tool_call_id="abcdefgh2", name="find_airport"), ANSWER),
        TOOLS,
    ),
    "text and call": ((QUESTION, Message("assistant", "Let me see.", (CALL,)), RESULT, ANSWER), TOOLS),
    "reasoning": ((QUESTION, THOUGHT, Message("user", "And KMG?"), Message("assistant", "x", reasoning="y")), ()),
    "reasoning and calls": (
        (QUESTION, Message("assistant", "", (CALL,), reasoning="First look."), RESULT, THOUGHT),
        TOOLS,
    ),
}
NEEDS = {
    "plain": "answers",
    "system": "answers system",
    "tools": "answers functions calls",
    "functions alone": "answers system functions",
    "two calls": "answers functions calls parallel",
    "text and call": "answers functions calls text",
    "reasoning": "reasoning",
    "reasoning and calls": "functions calls reasoning reasoning-with-calls",
}
"""Parts that a template writes or refuses, by conversation."""
ALL = FAMILIES | PACKAGED


def marked(name: str, *more: str) -> Any:
    slow = name in PACKAGED and name not in QUICK
    return pytest.param(name, *more, marks=[pytest.mark.long] if slow else [])


def refuses(name: str, case: str) -> bool:
    """True where the family's template leaves something of the conversation out, so that an error is raised."""
    return not {*NEEDS[case].split()}.isdisjoint(ALL[name].without.split())


WRITTEN = [marked(name, case) for name in ALL for case in CONVERSATIONS if not refuses(name, case)]
REFUSED = [marked(name, case) for name in ALL for case in CONVERSATIONS if refuses(name, case)]


class Families(dict[str, Any]):
    """A value for each family, made when a test first asks for it."""

    def __init__(self, make: Callable[[str], Any]) -> None:
        self._make = make

    def __missing__(self, name: str) -> Any:
        return self.setdefault(name, self._make(name))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    root = tmp_path_factory.mktemp("families")
    return Families(lambda name: ALL[name].write(root / name))


@pytest.fixture(scope="module")
def templates(folders: Mapping[str, Path]) -> Mapping[str, Template]:
    return Families(lambda name: Template.load(folders[name], date.today(), base=name))


@pytest.fixture(scope="module")
def tokenizers(folders: Mapping[str, Path]) -> Mapping[str, Any]:
    return Families(lambda name: AutoTokenizer.from_pretrained(folders[name]))


def as_dicts(messages: Sequence[Message], template: Template) -> list[dict[str, Any]]:
    """Messages as transformers takes them, calls and reasoning in the form that the template can write."""
    found, form = [], template.can.calls
    for message in messages:
        fields = message_fields(message)
        for call in fields.get("tool_calls", ()):
            if form is None or form.arguments == "object":
                call["function"]["arguments"] = json.loads(call["function"]["arguments"])
        if message.tool_calls and form and not message.content:
            fields["content"] = form.no_content
        if message.reasoning and template.can.reasoning == "tags":
            fields["content"] = f"<think>\n{fields.pop('reasoning_content')}\n</think>\n\n{message.content}"
        found.append(fields)
    return found


def theirs(tokenizer: Any, messages: Sequence[Message], template: Template, **options: Any) -> Mapping[str, Any]:
    """Ids, and the assistant's mask where asked for, of transformers' apply_chat_template."""
    found: Mapping[str, Any] = tokenizer.apply_chat_template(as_dicts(messages, template), return_dict=True, **options)
    return found


def spelled(rendered: Rendered, template: Template) -> str:
    return template.decode(rendered.ids, skip_special=False)


def learned(rendered: Rendered, template: Template) -> list[str]:
    """Texts that the loss falls on, one a run of True."""
    return runs(rendered.ids, rendered.loss_mask, template)


def runs(ids: Sequence[int], mask: Sequence[object], template: Template) -> list[str]:
    found: list[list[int]] = []
    for at, token in enumerate(ids):
        if mask[at]:
            found += [] if at and mask[at - 1] else [[]]
            found[-1].append(token)
    return [template.decode(run, skip_special=False) for run in found]


@pytest.mark.parametrize(("name", "case"), WRITTEN)
def test_ids_equal_transformers_and_begin_with_the_prompt(
    templates: Mapping[str, Template], tokenizers: Mapping[str, Any], name: str, case: str
) -> None:
    """Source: transformers' apply_chat_template(tools=...), of the prompt and of the whole conversation."""
    template, tokenizer = templates[name], tokenizers[name]
    messages, tools = CONVERSATIONS[case]
    rows = training_rows(messages, template, tools=tools)
    assert rows
    for row in rows:
        asked = render(row[:-1], template, tools=tools, generate=True)
        prompt = theirs(tokenizer, row[:-1], template, tools=list(tools) or None, add_generation_prompt=True)
        assert list(asked.ids) == prompt["input_ids"]
        whole = render(row, template, tools=tools, generate=False)
        assert whole.ids[: len(asked.ids)] == asked.ids
        assert whole.loss_mask[len(asked.ids)]
        assert not any(asked.loss_mask)
        texts = learned(whole, template)
        assert not any(RESULT.content in text for text in texts)
        answer = row[-1]
        calls = (call.id or "" if template.can.call_ids else call.name for call in answer.tool_calls)
        for part in (answer.content, answer.reasoning or "", *calls):
            assert part in texts[-1]
        last = max(place for place, mask in enumerate(whole.loss_mask) if mask)
        assert whole.ids[last] in template.stop_ids
        ids = theirs(tokenizer, row, template, tools=list(tools) or None)["input_ids"]
        if ids[: len(asked.ids)] == prompt["input_ids"]:  # else the prompt opens or closes reasoning: tests below
            assert list(whole.ids[: len(ids)]) == ids
            assert template.can.closes or whole.ids[len(ids) :] in ((), whole.ids[last : last + 1])


@pytest.mark.parametrize(("name", "case"), REFUSED)
def test_nothing_is_left_out_silently(templates: Mapping[str, Template], name: str, case: str) -> None:
    messages, tools = CONVERSATIONS[case]
    with pytest.raises((BaseModelError, DataError)) as caught:
        [render(row, templates[name], tools=tools, generate=False) for row in training_rows(messages, templates[name])]
    text = caught.value.text()
    missing = [part for part in NEEDS[case].split() if part in ALL[name].without.split()]
    assert any(re.search(_REASONS[part], text) for part in missing), missing
    assert "Hint: " in text


_PROMPT_DIFFERS = "its generation prompt is not how it writes the answer"
_REASONS = {
    "answers": _PROMPT_DIFFERS,  # the prompt opens reasoning with a token of the family's own
    "functions": "it leaves functions out.*(\n.*)*base.chat_template=hermes",
    "calls": "(it leaves calls or their results out|object is unsafe).*(\n.*)*base.chat_template=hermes",
    "parallel": r"messages\[1\]\.tool_calls: a turn of 2 calls",
    "text": rf"messages\[\d\]\.tool_calls: (a turn with text and a call|.* out of this turn)|{_PROMPT_DIFFERS}",
    "reasoning": rf"messages\[\d\]\.reasoning_content: .* leaves it out of this turn|{_PROMPT_DIFFERS}",
    "reasoning-with-calls": r"messages\[\d\]\.tool_calls: .* out of this turn",
    "system": "System role not supported.*(\n.*)*into the first user turn",
}
"""Error by the part that the template leaves out."""


TRAINED_BY_TRL = {
    "llama3": ("", ""),
    "qwen2_5": ("\n", "\n"),  # TRL learns the line end of the generation prompt too
    "qwen3": ("", "\n"),
    "qwen3_instruct_2507": ("", "\n"),
    "qwen3_5_think": ("<think>\n", "\n"),
    "qwen3_8": ("<think>\n", "\n"),
    "gemma": ("", "\n"),
    "gemma3": ("", "\n"),
    "phi3": ("", "\n<|endoftext|>"),
    "cohere": ("", ""),
    "cohere2": ("", "<|END_OF_TURN_TOKEN|>"),
    "phi_4": ("", ""),
    "glm4moe": ("", ""),
    "gptoss": ("<|start|>assistant", ""),
    "deepseek_r1_distill": ("<｜Assistant｜><think>\n", ""),  # noqa: RUF001
}
"""What TRL's training templates learn more: before an answer, where the prompt has it, and behind its end token."""


COMPARED = [
    (name, case)
    for name in TRAINED_BY_TRL
    for case in ("plain", "tools", "reasoning")
    # TRL writes no reasoning that is opened and closed for a DeepSeek-R1 answer without it
    if not refuses(name, case) and (name != "deepseek_r1_distill" or case == "reasoning")
]


@pytest.mark.parametrize(("name", "case"), COMPARED)
def test_masks_equal_those_of_trl(
    templates: Mapping[str, Template], tokenizers: Mapping[str, Any], name: str, case: str
) -> None:
    """Source: return_assistant_tokens_mask on TRL's training templates, which keep reasoning of earlier turns.

    Phi-4's own template marks the tokens of the assistant itself.
    """
    template, (messages, tools) = templates[name], CONVERSATIONS[case]
    row = training_rows(messages, template, tools=tools)[0]
    as_trl_takes_it = row
    if name == "deepseek_r1_distill":
        tagged = f"<think>\n{row[-1].reasoning}\n</think>\n\n{row[-1].content}"
        as_trl_takes_it = (*row[:-1], Message("assistant", tagged))
    ours = render(row, template, tools=tools, generate=False)
    options = {"chat_template": ALL[name].training_source, "return_assistant_tokens_mask": True}
    found = theirs(tokenizers[name], as_trl_takes_it, template, tools=list(tools) or None, **options)
    assert list(ours.ids) == found["input_ids"]
    before, behind = TRAINED_BY_TRL[name]
    mine = [before + text + behind for text in learned(ours, template)]
    assert mine == runs(found["input_ids"], found["assistant_masks"], template)


def test_reasoning_that_the_prompt_opens_is_closed_in_training(templates: Mapping[str, Template]) -> None:
    """DeepSeek-R1's stored answers have no reasoning, and its prompts end with `<think>`: nobody would close it."""
    template = templates["deepseek_r1_distill"]
    text = spelled(render((QUESTION, THOUGHT), template, generate=False), template)
    assert text.endswith("<think>\nZPPP begins with Z.\n</think>\n\nIt is Kunming.<｜end▁of▁sentence｜>")  # noqa: RUF001
    tagged = Message("assistant", "<think>\nZPPP begins with Z.\n</think>\n\nIt is Kunming.")
    assert spelled(render((QUESTION, tagged), template, generate=False), template) == text
    plain = render((QUESTION, ANSWER), template, generate=False)
    assert learned(plain, template) == ["\n</think>\n\nIt is Kunming.<｜end▁of▁sentence｜>"]  # noqa: RUF001


def test_a_past_that_is_written_otherwise_is_trained_as_it_is_served(
    templates: Mapping[str, Template], tokenizers: Mapping[str, Any]
) -> None:
    """gpt-oss drops the reasoning before a call once the answer is there; the prompt of the answer has it."""
    template, (messages, tools) = templates["gptoss"], CONVERSATIONS["reasoning and calls"]
    rows = training_rows(messages, template, tools=tools)
    whole = spelled(render(rows[-1], template, tools=tools, generate=False), template)
    prompt = tokenizers["gptoss"].apply_chat_template(
        as_dicts(messages[:-1], template), tools=list(tools), add_generation_prompt=True, tokenize=False
    )
    assert "First look." in prompt
    assert whole == prompt + (
        "<|channel|>analysis<|message|>ZPPP begins with Z.<|end|><|start|>assistant<|channel|>final<|message|>"
        "It is Kunming.<|return|>"
    )


def test_a_call_ends_with_its_own_token(templates: Mapping[str, Template]) -> None:
    for name, end in (("gptoss", "<|call|>"), ("glm4moe", "<|observation|>"), ("llama3_1", "<|eot_id|>")):
        template = templates[name]
        [text] = learned(render((QUESTION, CALLED), template, tools=TOOLS, generate=False), template)
        assert text.endswith(end)
        assert template.specials[end] in template.stop_ids


@pytest.mark.parametrize(
    "name", [marked(name) for name in ALL if not {"answers", "reasoning"} <= {*ALL[name].without.split()}]
)
def test_no_text_of_people_becomes_a_control_token(
    templates: Mapping[str, Template], tokenizers: Mapping[str, Any], name: str
) -> None:
    """Names, keys and values of functions, arguments, results, ids and variables, through `tojson` too.

    The text is the one of transformers all the same.
    """
    template, without = templates[name], ALL[name].without.split()
    can_call = not {"functions", "calls"} & set(without)
    escapes_names = "Ministral-3" in name  # by `|safe`: a call is refused whose name it would change

    def row_of(evil: str) -> tuple[tuple[Message, ...], tuple[Tool, ...]]:
        called = f"f{'' if escapes_names else evil}"
        calls = (
            Message("assistant", "", (ToolCall(called, {f"k{evil}": f"v{evil}", "list": [evil]}, "abcdefgh1"),)),
            Message("tool", f'{{"x": "{evil}"}}', tool_call_id="abcdefgh1", name=called),
        )
        key = {"type": "string", "description": evil, "enum": [f"e{evil}"]}
        parameters = {"type": "object", "properties": {f"k{evil}": key}}
        function = {"name": f"f{evil}", "description": f"d{evil}", "parameters": parameters}
        tools: tuple[Tool, ...] = ({"type": "function", "function": function},) if can_call else ()
        reasoning = None if any(part.startswith("reasoning") for part in without) else f"r{evil}"
        messages = (Message("user", f"q{evil}"), *(calls if can_call else ()))
        answer = Message("assistant", f"a{evil}", reasoning=reasoning)
        return training_rows((*messages, answer), template, tools=tools)[-1], tools

    def controls(evil: str) -> list[int]:
        row, tools = row_of(evil)
        whole = render(row, template, tools=tools, generate=False)
        return [token for token in whole.ids if token in template.special_ids]

    benign = controls("x")
    for token in template.specials:
        assert controls(token) == benign, f"{token} in a text"
    row, tools = row_of("".join(template.specials))
    asked, options = render(row[:-1], template, tools=tools, generate=True), {"tools": list(tools) or None}
    text = tokenizers[name].apply_chat_template(
        as_dicts(row[:-1], template), add_generation_prompt=True, tokenize=False, **options
    )
    assert spelled(asked, template) == text


def test_variables_are_those_of_transformers(templates: Mapping[str, Template], tokenizers: Mapping[str, Any]) -> None:
    template, tokenizer = templates["qwen3"], tokenizers["qwen3"]
    for kwargs in ({"enable_thinking": False}, {"enable_thinking": True}):
        ours = render((QUESTION,), template, template_kwargs=kwargs, generate=True)
        assert (
            list(ours.ids)
            == theirs(tokenizer, (QUESTION,), template, add_generation_prompt=True, **kwargs)["input_ids"]
        )
    [row] = training_rows((QUESTION, ANSWER), template, template_kwargs={"enable_thinking": False})
    whole = render(row, template, template_kwargs={"enable_thinking": False}, generate=False)
    assert learned(whole, template) == ["It is Kunming.<|im_end|>"]
    prompt = Prompt(template_kwargs={"reasoning_effort": "high"})
    text = spelled(render((QUESTION,), templates["gptoss"], prompt=prompt, generate=True), templates["gptoss"])
    assert "Reasoning: high" in text
    low = render(
        (QUESTION,), templates["gptoss"], prompt=prompt, template_kwargs={"reasoning_effort": "low"}, generate=True
    )
    assert "Reasoning: low" in spelled(low, templates["gptoss"])


def test_a_variable_that_is_never_read_is_an_error(templates: Mapping[str, Template]) -> None:
    with pytest.raises(DataError, match=r"(?s)enable_thinkin:.*qwen3.*it reads: .*enable_thinking.*enable_thinking"):
        render((QUESTION,), templates["qwen3"], template_kwargs={"enable_thinkin": False}, generate=True)
    with pytest.raises(DataError, match="it reads: none"):
        render((QUESTION,), templates["llama3"], template_kwargs={"messages": []}, generate=True)


def test_reasoning_behind_a_prompt_that_closes_it_needs_a_variable(templates: Mapping[str, Template]) -> None:
    template = templates["qwen3_5_nothink"]
    with pytest.raises(BaseModelError, match=r"(?s)data\.thinking=drop.*chat_template_kwargs.*enable_thinking"):
        render((QUESTION, THOUGHT), template, generate=False)
    thinks = render((QUESTION, THOUGHT), template, template_kwargs={"enable_thinking": True}, generate=False)
    assert learned(thinks, template) == ["ZPPP begins with Z.\n</think>\n\nIt is Kunming.<|im_end|>"]
    dropped = render((QUESTION, THOUGHT), template, thinking="drop", generate=False)
    assert learned(dropped, template) == ["It is Kunming.<|im_end|>"]


def test_a_variable_changes_where_turns_are_split(templates: Mapping[str, Template]) -> None:
    """With the reasoning of earlier turns kept, a conversation is one row."""
    messages, _ = CONVERSATIONS["reasoning"]
    assert len(training_rows(messages, templates["lfm2_2_5"])) == 2
    kept = training_rows(messages, templates["lfm2_2_5"], template_kwargs={"preserve_thinking": True})
    assert kept == [messages]


@pytest.mark.parametrize("name", ["qwen3", "gptoss", "deepseek_r1_distill", "glm4moe", "nemotron_3_nano"])
@pytest.mark.parametrize("as_tags", [False, True], ids=["field", "tags"])
def test_reasoning_is_kept_masked_or_dropped(templates: Mapping[str, Template], name: str, as_tags: bool) -> None:
    template = templates[name]
    answer = Message("assistant", "<think>\nZPPP begins with Z.\n</think>\n\nIt is Kunming.") if as_tags else THOUGHT
    keep, mask, drop = (
        render((QUESTION, answer), template, thinking=thinking, generate=False) for thinking in ("keep", "mask", "drop")
    )
    assert "ZPPP begins with Z." in "".join(learned(keep, template))
    assert mask.ids == keep.ids
    assert (
        "".join(learned(keep, template))
        == "".join(learned(mask, template)[:-1]) + "ZPPP begins with Z." + learned(mask, template)[-1]
    )
    assert drop == render((QUESTION, ANSWER), template, generate=False)
    own = Message(answer.role, answer.content, reasoning=answer.reasoning, thinking="drop")
    assert render((QUESTION, own), template, thinking="mask", generate=False).ids == drop.ids


def test_turns_without_weight_are_not_learned(templates: Mapping[str, Template]) -> None:
    first = Message("assistant", "It is Kunming.", trained=False)
    messages = (QUESTION, first, Message("user", "And KMG?"), Message("assistant", "The same."))
    whole = render(messages, templates["qwen2_5"], generate=False)
    assert learned(whole, templates["qwen2_5"]) == ["The same.<|im_end|>"]
    assert training_rows(messages, templates["qwen3"]) == [messages]
    with pytest.raises(DataError, match="no turn of the assistant is learned"):
        training_rows(messages[:2], templates["qwen2_5"])


def test_developer_is_a_role_where_the_template_knows_it(templates: Mapping[str, Template]) -> None:
    asked = (Message("developer", "Be brief."), QUESTION)
    text = spelled(render(asked, templates["gptoss"], generate=True), templates["gptoss"])
    assert "<|start|>developer<|message|># Instructions\n\nBe brief." in text
    ours = render(asked, templates["qwen2_5"], prompt=Prompt(system="Not this."), generate=True)
    assert ours == render((SYSTEM, QUESTION), templates["qwen2_5"], generate=True)


NINE = (
    "{%- for m in messages -%}{%- if m.tool_calls -%}{%- for call in m.tool_calls -%}"
    "{%- if call.id|length != 9 -%}{{ raise_exception('ids have 9 characters') }}{%- endif -%}"
    "{{ '[' + call.id + ']' + call.function.name + (call.function.arguments|tojson) }}{%- endfor -%}<|im_end|>"
    "{%- elif m.role == 'tool' -%}{{ '[' + m.tool_call_id + ']' + m.content }}"
    "{%- else -%}{{ '<|im_start|>' + m.content + '<|im_end|>' }}{%- endif -%}{%- endfor -%}"
    "{%- if tools -%}{{ tools|tojson }}{%- endif -%}"
)


def test_long_ids_are_shortened_where_the_template_takes_nine_characters(tmp_path: Path) -> None:
    """As Mistral's templates do; call and result keep one id, and ids of nine characters stay."""
    template = Template.load(write_tiny_tokenizer(tmp_path, NINE))
    for identity in ("abcdefgh1", "call_5cf0e9d2b7a84"):
        call = Message("assistant", "", (ToolCall("find_airport", {}, identity),))
        asked = (QUESTION, call, Message("tool", "{}", tool_call_id=identity))
        ids = re.findall(r"\[(\w+)\]", spelled(render(asked, template, generate=True), template))
        assert len(ids) == 2
        assert ids[0] == ids[1]
        assert (ids[0] == identity) == (len(identity) == 9)


@pytest.mark.parametrize("result_id", [None, "x"])
def test_calls_without_ids_get_one_where_the_template_takes_nine_characters(
    tmp_path: Path, result_id: str | None
) -> None:
    """ShareGPT's and ms-swift's calls have none."""
    template = Template.load(write_tiny_tokenizer(tmp_path, NINE))
    calls = Message("assistant", "", (ToolCall("find_airport", {}), ToolCall("find_airport", {})))
    asked = (QUESTION, calls, *(Message("tool", "{}", tool_call_id=result_id) for _ in range(2)))
    ids = re.findall(r"\[(\w+)\]", spelled(render(asked, template, generate=True), template))
    assert len({*ids}) == 2
    assert ids[:2] == ids[2:], "each result has the id of its call"


def test_a_refused_system_turn_is_named_where_it_is_the_cause(tmp_path: Path) -> None:
    source = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML
    template = Template.load(write_tiny_tokenizer(tmp_path, source))
    system = Message("system", "s")
    with pytest.raises(DataError) as error:
        render((system, QUESTION), template, generate=True)
    assert "system turn" in error.value.hint


BAD = {
    "call of 'find_airport'.*no result.*followed by messages\\[2\\] of the user": (
        (QUESTION, CALLED, Message("user", "Hello?"), ANSWER)
    ),
    "call of 'find_airport'.*no result.*the conversation ends": (
        QUESTION,
        Message("assistant", "", (CALL, SECOND)),
        RESULT,
    ),
    "messages\\[1\\].tool_call_id.*no call before it": (QUESTION, RESULT, ANSWER),
    "messages\\[2\\].tool_call_id.*'other'": (QUESTION, CALLED, Message("tool", "x", tool_call_id="other"), ANSWER),
    "messages\\[0\\].reasoning_content.*the turn is the user's": (Message("user", "q", reasoning="why"), ANSWER),
    "messages\\[0\\].tool_calls.*the turn is the user's": (Message("user", "q", (CALL,)), RESULT, ANSWER),
}


@pytest.mark.parametrize("found", BAD)
def test_calls_and_results_out_of_order_are_named(templates: Mapping[str, Template], found: str) -> None:
    messages = BAD[found]
    with pytest.raises(DataError, match=f"(?s){found}"):
        render(messages, templates["qwen2_5"], generate=messages[-1].role != "assistant")


def test_a_tokenizer_without_the_end_token_of_the_template_is_an_error(tmp_path: Path) -> None:
    folder = write_tiny_tokenizer(tmp_path, FAMILIES["llama3"].source)
    found = r"(?s)ends an answer with '<\|eot_id\|>', in which the tokenizer has no special token.*tokenizer\.json"
    with pytest.raises(BaseModelError, match=found):
        Template.load(folder)


def test_results_without_ids_answer_the_calls_in_order(templates: Mapping[str, Template]) -> None:
    calls = tuple(ToolCall(call.name, call.arguments) for call in (CALL, SECOND))
    messages = (QUESTION, Message("assistant", "", calls), Message("tool", "1"), Message("tool", "2"), ANSWER)
    assert len(learned(render(messages, templates["qwen2_5"], generate=False), templates["qwen2_5"])) == 2


@pytest.mark.parametrize("name", ["llama3", "gemma", "phi3", "cohere", "deepseek_r1_distill", "qwen3"])
@pytest.mark.parametrize("case", ["tools", "two calls", "text and call"])
def test_hermes_writes_calls_into_the_turns_of_any_template(
    folders: Mapping[str, Path], templates: Mapping[str, Template], tokenizers: Mapping[str, Any], name: str, case: str
) -> None:
    """Source: transformers' apply_chat_template with the same text; parsing gives the calls back."""
    source = hermes_template(folders[name])
    template, (messages, tools) = Template.load(folders[name], chat_template=source), CONVERSATIONS[case]
    calls = [call for message in messages for call in message.tool_calls]
    written = []
    for row in training_rows(messages, template, tools=tools):
        whole = render(row, template, tools=tools, generate=False)
        written += [json.loads(text) for text in re.findall(r"<tool_call>\n(\{.*?\})\n<", learned(whole, template)[0])]
        if name != "deepseek_r1_distill":
            options = {"tools": list(tools), "chat_template": source, "tokenize": False}
            assert spelled(whole, template) == tokenizers[name].apply_chat_template(as_dicts(row, template), **options)
    assert written == [{"name": call.name, "arguments": dict(call.arguments)} for call in calls]
    plain = (QUESTION, ANSWER)
    assert render(plain, template, generate=False).ids == render(plain, templates[name], generate=False).ids


NOT_READ_BACK = (
    *("gemma4_v5", "google-gemma-4-31B-it", "openbmb-MiniCPM5-1B", "meetkai-functionary-medium-v3.2", "muse-glimmer"),
    *("deepseek-ai-DeepSeek-V3.2", "deepseek-ai-DeepSeek-V4", "upstage-Solar-Open-100B", "Apertus-8B-Instruct"),
    *("Kimi-K3", "MiniMax-M2", "MiniMax-M3", "tencent-Hy3"),
)
"""Families whose form of a call `parse_tool_calls` does not read."""
READ_BACK = [name for name in ALL if not refuses(name, "tools") and name not in NOT_READ_BACK]


@pytest.mark.parametrize("name", [marked(name) for name in READ_BACK])
def test_calls_are_read_back_from_what_is_learned(templates: Mapping[str, Template], name: str) -> None:
    template = templates[name]
    for case in ("tools",) if refuses(name, "two calls") else ("tools", "two calls"):
        messages, tools = CONVERSATIONS[case]
        whole = render(messages[:2], template, tools=tools, generate=False)
        start = whole.loss_mask.index(True)
        wanted = [(call.name, dict(call.arguments)) for call in messages[1].tool_calls]
        for skip_special in (False, True):
            text = template.decode(whole.ids[start:], skip_special=skip_special)
            assert [(call.name, dict(call.arguments)) for call in parse_tool_calls(text, tools)] == wanted


IN_SYSTEM = (
    "{%- for m in messages -%}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{%- if m.role == 'system' and m.tools is defined -%}<tools>{{ m.tools + '</tools>' }}{%- endif -%}<|im_end|>"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)
XML_TOOLS = (
    "{%- if xml_tools -%}<|im_start|>system\n{%- for tool in xml_tools[:] -%}{{ tool | string }}{%- endfor -%}"
    "<|im_end|>{%- endif -%}" + IN_SYSTEM
)


@pytest.mark.parametrize("asked", [(QUESTION,), (SYSTEM, QUESTION)], ids=["alone", "with system"])
@pytest.mark.parametrize("source", [IN_SYSTEM, XML_TOOLS], ids=["system turn", "xml_tools"])
def test_functions_are_written_where_the_template_reads_them(
    tmp_path: Path, source: str, asked: tuple[Message, ...]
) -> None:
    """Phi-4-mini reads JSON text in the system turn, SmolLM3 the variable `xml_tools`. Source: transformers."""
    folder = write_tiny_tokenizer(tmp_path, source)
    template, tokenizer = Template.load(folder), AutoTokenizer.from_pretrained(folder)
    turns, variables = as_dicts(asked, template), {"xml_tools": list(TOOLS)}
    if source == IN_SYSTEM:
        turns, variables = as_dicts((asked[0] if len(asked) > 1 else Message("system", ""), QUESTION), template), {}
        turns[0]["tools"] = json.dumps(TOOLS)
    wanted = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False, **variables)
    assert "find_airport" in wanted
    assert spelled(render(asked, template, tools=TOOLS, generate=True), template) == wanted
    whole = render((*asked, ANSWER), template, tools=TOOLS, generate=False)
    assert learned(whole, template) == ["It is Kunming.<|im_end|>"]
    with pytest.raises(BaseModelError, match=r"(?s)leaves calls or their results out.*chat_template=hermes"):
        render((*asked, CALLED, RESULT), template, tools=TOOLS, generate=True)


def test_texts_that_a_template_escapes_are_those_of_transformers(tmp_path: Path) -> None:
    """`|safe` makes Jinja escape what is added to it: the mark that breaks special tokens stays out of the text."""
    source = "{%- for m in messages -%}{{ m.content + ('<|im_end|>' | safe) }}{%- endfor -%}"
    folder = write_tiny_tokenizer(
        tmp_path, "{%- if messages[1:] -%}" + source + "{%- else -%}" + source + "{%- endif -%}"
    )
    template, tokenizer = Template.load(folder), AutoTokenizer.from_pretrained(folder)
    asked = (Message("user", "a <|endoftext|> b"),)
    wanted = tokenizer.apply_chat_template(as_dicts(asked, template), tokenize=False)
    assert spelled(render(asked, template, generate=True), template) == wanted


@pytest.mark.parametrize("as_files", [False, True], ids=["one file", "a file each"])
def test_the_template_for_tools_is_taken_where_a_base_has_two(tmp_path: Path, as_files: bool) -> None:
    """Source: transformers takes `tool_use` where functions are given, of either form of the folder."""
    folder = FAMILIES["llama3"].write(tmp_path)
    if as_files:
        (folder / "additional_chat_templates").mkdir()
        (folder / "additional_chat_templates" / "tool_use.jinja").write_text(FAMILIES["llama3_1"].source)
    else:
        (folder / "chat_template.jinja").unlink()
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        settings["chat_template"] = [
            {"name": "default", "template": FAMILIES["llama3"].source},
            {"name": "tool_use", "template": FAMILIES["llama3_1"].source},
        ]
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    template, tokenizer = Template.load(folder), AutoTokenizer.from_pretrained(folder)
    assert template.can.calls_need_tools
    for case, tools in (("plain", ()), ("tools", TOOLS)):
        messages = CONVERSATIONS[case][0][:3]
        ours = render(messages, template, tools=tools, generate=True)
        options = {"tools": list(tools) or None, "add_generation_prompt": True}
        assert list(ours.ids) == theirs(tokenizer, messages, template, **options)["input_ids"]
    with pytest.raises(DataError, match=r"(?s)messages.tool_calls: the row has calls and no tools.*add tools"):
        render(CONVERSATIONS["tools"][0][:3], template, generate=True)
