"""Answers under a grammar, by a random model that has no wish of its own to answer in JSON.

jsonschema, json and re are the independent judges of what the engine lets through.
"""

import json
import re
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from graftwork.config import validate
from graftwork.errors import ConfigError
from graftwork.prompts.template import Template
from graftwork.serving.engine.engine import NativeEngine
from graftwork.serving.engine.grammar import GrammarError, Grammars, GrammarText, Vocabulary, check, read_grammar
from graftwork.serving.engine.request import GenerateRequest, SamplingParams
from graftwork.serving.spec import ArmSpec, GrammarSpec
from tests import engines
from tests.tiny import VOCAB_SIZE

_LLGUIDANCE = tuple(map(int, metadata.version("llguidance").split(".")[:2]))
PROMPT = tuple(range(10, 60))
SCHEMA = {
    "type": "object",
    "properties": {
        "icao": {"type": "string", "pattern": "^[A-Z]{4}$"},
        "kind": {"enum": ["land", "sea"]},
        "runways": {"type": "array", "items": {"type": "integer", "minimum": 1, "maximum": 36}, "maxItems": 2},
    },
    "required": ["icao", "kind", "runways"],
    "additionalProperties": False,
}
CARD = GrammarText("json_schema", json.dumps(SCHEMA))
CODE = GrammarText("regex", "[A-Z]{2}-[0-9]{3}")


@pytest.fixture(scope="module")
def template(base: Path) -> Template:
    return Template.load(base)


@pytest.fixture(scope="module")
def grammars(template: Template) -> Grammars:
    return Grammars(Vocabulary(template, VOCAB_SIZE))


@pytest.fixture
def engine(base: Path, template: Template) -> Iterator[NativeEngine]:
    engine = NativeEngine(engines.load_model(base), engines.spec(), "cpu", template.decode)
    engine.start()
    yield engine
    engine.stop()


def request(
    name: str, template: Template, grammars: Grammars, text: GrammarText | None, **sampling: Any
) -> GenerateRequest:
    params = SamplingParams(**{"max_new_tokens": 150, "temperature": 1.0, "seed": 0, **sampling})
    grammar = grammars.compile(text) if text else None
    return GenerateRequest(name, PROMPT, params, template.stop_ids, grammar=grammar)


def said(template: Template, answer: engines.Answer) -> str:
    return template.decode([token for token in answer.tokens if token not in template.stop_ids])


def test_answers_parse_where_they_end_by_themselves(
    engine: NativeEngine, template: Template, grammars: Grammars
) -> None:
    """Greedy and drawn, each grammar beside the others and beside free requests, in one batch."""
    asked = {"card": CARD, "code": CODE, "any": GrammarText("json_schema", '{"type":"object"}'), "free": None}
    requests = [
        request(f"{name}{seed}", template, grammars, text, seed=seed, temperature=float(seed > 0) * 1.5)
        for name, text in asked.items()
        for seed in range(4)
    ]
    answers = dict(zip([one.request_id for one in requests], engines.ask(engine, *requests), strict=True))
    texts = {name: said(template, answer) for name, answer in answers.items()}
    assert [answers[f"{name}{seed}"].finish for name in ("card", "code") for seed in range(4)] == ["stop"] * 8
    for seed in range(4):
        jsonschema.validate(json.loads(texts[f"card{seed}"]), SCHEMA)
        assert re.fullmatch(CODE.text, texts[f"code{seed}"])
        if answers[f"any{seed}"].finish == "stop":
            assert isinstance(json.loads(texts[f"any{seed}"]), dict)
        with pytest.raises(ValueError, match="Expecting"):
            json.loads(texts[f"free{seed}"])
    assert len({texts[f"code{seed}"] for seed in range(4)}) > 1


def test_at_the_limit_the_answer_is_cut_and_says_so(
    engine: NativeEngine, template: Template, grammars: Grammars
) -> None:
    answer = engines.ask(engine, request("short", template, grammars, CARD, max_new_tokens=5))[0]
    assert (answer.finish, len(answer.tokens)) == ("length", 5)
    assert said(template, answer).startswith("{")


def test_a_neighbours_grammar_changes_nothing(engine: NativeEngine, template: Template, grammars: Grammars) -> None:
    names = ("a", "b", "c")
    free = [request(name, template, grammars, None, seed=n, max_new_tokens=20) for n, name in enumerate(names)]
    alone = [engines.ask(engine, one)[0].tokens for one in free]
    mixed = engines.ask(engine, *free, request("card", template, grammars, CARD))
    assert [answer.tokens for answer in mixed[:3]] == alone


def test_grammar_works_with_penalties_cuts_bias_stop_strings_and_logprobs(
    engine: NativeEngine, template: Template, grammars: Grammars
) -> None:
    penalised = request(
        "p",
        template,
        grammars,
        CARD,
        top_p=0.9,
        top_k=50,
        min_p=0.01,
        repetition_penalty=1.3,
        presence_penalty=0.5,
        logit_bias=((3, 50.0),),
        logprobs=2,
    )
    cut = request("s", template, grammars, CARD, stop=('"kind"',))
    whole, stopped = engines.ask(engine, penalised, cut)
    jsonschema.validate(json.loads(said(template, whole)), SCHEMA)
    assert None not in whole.logprobs
    assert (stopped.finish, said(template, stopped).count('"kind"')) == ("stop", 1)


def test_an_answer_survives_preemption(base: Path, template: Template, grammars: Grammars) -> None:
    """KV for two of six: the others step back in mid-answer and go on; nothing of any answer changes."""
    requests = [request(f"r{seed}", template, grammars, CARD, seed=seed, max_new_tokens=120) for seed in range(6)]
    texts = []
    for kv_tokens in (8192, 512):
        limits = engines.spec(kv_tokens=kv_tokens, max_seq_len=200, prefix_cache=False)
        engine = NativeEngine(engines.load_model(base), limits, "cpu", template.decode)
        engine.start()
        texts.append([said(template, answer) for answer in engines.ask(engine, *requests)])
        preemptions = engine.stats().preemptions
        engine.stop()
    assert preemptions > 0
    assert texts[0] == texts[1]
    for text in texts[1]:
        jsonschema.validate(json.loads(text), SCHEMA)


@pytest.mark.skipif(_LLGUIDANCE < (1, 9), reason="llguidance bounds whitespace from 1.9 on")
def test_whitespace_comes_to_an_end(engine: NativeEngine, template: Template, grammars: Grammars) -> None:
    """A model that loves newlines: 40 at most between two tokens of JSON, then it must go on."""
    newline = template.encode("\n")[0]
    loves = request("n", template, grammars, CARD, temperature=0.0, logit_bias=((newline, 1000.0),), max_new_tokens=200)
    text = said(template, engines.ask(engine, loves)[0])
    assert max(len(run) for run in re.findall(r"\s+", text)) == 40


@pytest.mark.parametrize(
    ("kind", "text", "found"),
    [
        ("json_schema", '{"type":"integer","minimum":5,"maximum":3}', "minimum"),
        ("json_schema", '{"enum":[]}', "Unsatisfiable"),
        ("json_schema", '{"allOf":[{"type":"string"},{"type":"integer"}]}', "Unsatisfiable"),
        ("json_schema", '{"type":"nope"}', "nope"),
        ("json_schema", '{"type":"string","format":"color"}', "color"),
        ("json_schema", '{"not":{"type":"string"}}', "not"),
        ("json_schema", '{"type":"array","uniqueItems":true}', "uniqueItems"),
        ("json_schema", '{"x-guidance":{"lenient":true},"not":{}}', "not"),
        ("json_schema", '{"$ref":"http://127.0.0.1:9/x"}', "fetch"),
        ("json_schema", "[1]", "JSON object"),
        ("json_schema", "{", "not JSON"),
        ("json_schema", '{"allOf":' * 2000 + "1" + "}" * 2000, ""),
        ("json_schema", '{"items":' * 200 + "{}" + "}" * 200, "recursion limit"),
        ("json_schema", json.dumps({"allOf": [{"anyOf": [{"const": n}, {"const": -n}]} for n in range(20)]}), ""),
        ("regex", "(", "unclosed group"),
        ("regex", "(?=a)b", "look-around"),
        ("regex", "[^\\s\\S]", "no text matches it"),
        ("regex", "a{300000}", ""),  # too dear a step or too many states, whichever is seen first
    ],
)
def test_what_no_answer_can_satisfy_or_nobody_can_enforce_is_refused(
    grammars: Grammars, kind: Any, text: str, found: str
) -> None:
    with pytest.raises(GrammarError) as caught:
        grammars.compile(GrammarText(kind, text))
    assert found in caught.value.problem
    assert "\n" not in caught.value.problem


def chain(length: int, nesting: int) -> GrammarText:
    """A schema whose definitions refer to each other in a row, each under so many arrays."""
    definitions: dict[str, Any] = {f"d{length}": {"type": "string"}}
    for number in range(length):
        inner: dict[str, Any] = {"$ref": f"#/$defs/d{number + 1}"}
        for _ in range(nesting):
            inner = {"items": inner}
        definitions[f"d{number}"] = inner
    return GrammarText("json_schema", json.dumps({"$defs": definitions, "$ref": "#/$defs/d0"}))


def test_deep_schemas_are_compiled_or_refused_and_never_end_the_process(grammars: Grammars) -> None:
    """On a stack of 8 MiB, 40 definitions under 50 arrays each are a segmentation fault."""
    grammars.compile(chain(60, 50))
    check(chain(60, 50))
    for text, found in (
        (chain(340, 50), "too large"),
        (chain(400, 50), "levels deep"),
        (chain(8000, 1), "levels deep"),
    ):
        with pytest.raises(GrammarError, match=found):
            grammars.compile(text)


def test_a_grammar_that_grows_too_complex_ends_its_own_answer(
    engine: NativeEngine, template: Template, grammars: Grammars
) -> None:
    """Its states are more than one step may build, which shows behind its first letters."""
    monster = request("m", template, grammars, GrammarText("regex", "A{9}(.{0,60}a.{0,60}[a-m]){30}(b.*){30}"))
    ended, fine = engines.ask(engine, monster, request("f", template, grammars, CARD))
    assert (ended.finish, fine.finish) == ("error", "stop")
    assert "the grammar gave up" in (ended.error or "")


def test_a_grammar_is_compiled_once(grammars: Grammars) -> None:
    assert grammars.compile(CODE) is grammars.compile(GrammarText("regex", CODE.text))


def test_no_text_is_a_control_token(grammars: Grammars, template: Template) -> None:
    """A schema's string that spells <|im_end|> is written out in letters; the token itself would end the answer."""
    import numpy

    matcher = grammars.compile(GrammarText("regex", re.escape("<|im_end|>"))).matcher()
    words = numpy.zeros(VOCAB_SIZE // 32, numpy.int32)
    matcher.fill(words)
    allowed = numpy.flatnonzero(numpy.unpackbits(words.view(numpy.uint8), bitorder="little"))
    assert not set(allowed.tolist()) & template.special_ids


def test_an_arm_carries_a_grammar(tmp_path: Path) -> None:
    path = tmp_path / "schema.json"
    path.write_text(json.dumps(SCHEMA))
    inline = validate(ArmSpec, {"name": "a", "grammar": {"json_schema": SCHEMA}}, where="test")
    by_uri = validate(ArmSpec, {"name": "a", "grammar": {"json_schema": str(path)}}, where="test")
    assert inline.grammar is not None
    assert by_uri.grammar is not None
    assert json.loads(read_grammar(inline.grammar).text) == json.loads(read_grammar(by_uri.grammar).text) == SCHEMA
    assert ArmSpec.model_validate(inline.model_dump(mode="json")) == inline
    turned = {**SCHEMA, "properties": dict(reversed(list(SCHEMA["properties"].items())))}  # type: ignore[attr-defined]
    assert inline.digest() != validate(ArmSpec, {"name": "a", "grammar": {"json_schema": turned}}, where="t").digest()
    check(read_grammar(inline.grammar))
    with pytest.raises(GrammarError, match="unclosed"):
        check(read_grammar(GrammarSpec(regex="(")))
    for wrong in ({}, {"regex": "a", "json_schema": "{}"}, {"regex": " "}):
        with pytest.raises(ConfigError, match="grammar"):
            validate(ArmSpec, {"name": "a", "grammar": wrong}, where="test")
