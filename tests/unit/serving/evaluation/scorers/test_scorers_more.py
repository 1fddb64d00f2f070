"""Scorers beside the fields of a gold object, pinned to jsonschema, sqlite, sacrebleu and rouge-score."""

import json
import math
import sys
from collections.abc import Mapping
from importlib.metadata import EntryPoint, EntryPoints
from types import SimpleNamespace
from typing import Any

import jsonschema
import pytest
from pydantic import TypeAdapter

from graftwork import plugins
from graftwork.datasets.rows import DatasetRow
from graftwork.errors import ConfigError, DataError, RunError
from graftwork.metrics import Metric
from graftwork.prompts.render import Message
from graftwork.scoring import AnswerSchema
from graftwork.serving.evaluation.scorers import plugin
from graftwork.serving.evaluation.scorers.load import Scorers, ScorerSpec, load_scorers
from graftwork.serving.evaluation.scorers.protocol import ModelReply

SPECS: TypeAdapter[list[ScorerSpec]] = TypeAdapter(list[ScorerSpec])
TREE = {"type": "object", "required": ["a"], "properties": {"a": {"type": "integer"}}, "additionalProperties": False}
SETUP = "CREATE TABLE t(id INTEGER, name TEXT, x REAL); INSERT INTO t VALUES (1,'a',0.1),(2,'b',0.2),(3,'b',NULL);"


def scorers(*trees: Any, schema: AnswerSchema | None = None, gold: bool = True) -> Scorers:
    return load_scorers(SPECS.validate_python(list(trees)), schema, gold=gold)


def row(gold: Mapping[str, Any], answer: str | None = None) -> DatasetRow:
    said = (Message("assistant", answer),) if answer else ()
    return DatasetRow("r1", (Message("user", "?"), *said), gold=gold)


def one(tree: Any, text: str, gold: Mapping[str, Any], answer: str | None = None) -> float:
    found = scorers(tree).score(ModelReply.to(row(gold, answer), text))
    return next(iter(found.values()))


@pytest.mark.parametrize(
    ("tree", "text", "gold", "right"),
    [
        ("exact", " Miami\n", {"city": "Miami"}, 1),
        ("exact", "miami", {"city": "Miami"}, 0),
        ({"kind": "exact", "ignore_case": True}, "miami!", {"city": "Miami"}, 1),
        ({"kind": "exact", "ignore_case": True}, "1,026 ft", {"height": "1026ft"}, 1),
        ("exact", "MIA", {"codes": ["KMIA", "MIA"]}, 1),
        ({"kind": "exact", "field": "city"}, "Miami", {"city": "Miami", "country": "US"}, 1),
        ("exact", "1", {"n": 1}, 1),
    ],
)
def test_exact(tree: Any, text: str, gold: dict[str, Any], right: float) -> None:
    assert one(tree, text, gold) == right


def test_the_right_text_is_the_last_turn_where_there_is_one() -> None:
    assert one("exact", "Miami", {"a": 1, "b": 2}, answer="Miami") == 1
    with pytest.raises(DataError, match=r"row 'r1': gold: found None"):
        scorers("exact").check([row({"a": 1, "b": 2})])


def test_field_f1_is_the_harmonic_mean() -> None:
    gold = {"a": 1, "b": "x", "c": None}
    text = json.dumps({"a": 1, "b": "y", "d": 4, "e": 5})
    precision, recall = 1 / 4, 1 / 3
    assert one("field_f1", text, gold) == pytest.approx(2 * precision * recall / (precision + recall))
    assert one("field_f1", json.dumps(gold), gold) == 1
    assert one("field_f1", "a is 1", gold) == 0


@pytest.mark.parametrize("text", ['{"a": 1}', '{"a": "1"}', '{"a": 1, "b": 2}', "{}", '{"a": 1.0}', '{"a": true}'])
def test_a_schema_is_held_as_jsonschema_does(text: str) -> None:
    by_spec = scorers({"kind": "json_schema", "name": "card"}, schema=AnswerSchema(TREE))
    valid = jsonschema.Draft202012Validator(TREE).is_valid(json.loads(text))
    assert by_spec.score(ModelReply(text)) == {"card": float(valid)}


def test_a_regex_takes_the_whole_answer_or_a_part() -> None:
    whole, part = {"kind": "regex", "pattern": "[A-Z]{4}"}, {"kind": "regex", "pattern": "[A-Z]{4}", "whole": False}
    assert (one(whole, "KMIA", {}), one(whole, "It is KMIA", {}), one(part, "It is KMIA", {})) == (1, 0, 1)


def test_a_regex_that_backtracks_without_end_does_not_match() -> None:
    assert one({"kind": "regex", "pattern": "(a|aa)+b"}, "a" * 60 + "c", {}) == 0


@pytest.mark.parametrize(
    ("query", "right"),
    [
        ("SELECT name, count(*) FROM t GROUP BY name", 1),
        ("select name, count(id) as n from t group by 1 order by 2 desc;", 1),
        ("SELECT count(*), name FROM t GROUP BY name", 0),
        ("SELECT name, 1 FROM t", 0),
        ("SELECT name FROM missing", 0),
        ("not SQL", 0),
        ("", 0),
        ("SELECT 1\0", 0),
        ("SELECT 1; SELECT 2", 0),
        ("DROP TABLE t", 0),
        ("INSERT INTO t VALUES (4,'c',1) RETURNING name, id", 0),
        ("PRAGMA table_info(t)", 0),
        ("ATTACH '/tmp/other.db' AS other", 0),
        ("WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i+1 FROM n) SELECT max(i), 1 FROM n", 0),
        ("WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i+1 FROM n) SELECT i, i FROM n", 0),
        ("SELECT hex(zeroblob(1e9)), 1", 0),
    ],
)
def test_sql_is_run_and_may_only_read(query: str, right: float) -> None:
    gold = {"sql": "SELECT name, count(*) FROM t GROUP BY name", "setup": SETUP}
    assert one({"kind": "sql", "max_rows": 50, "max_steps": 1_000_000}, query, gold) == right


def test_the_order_of_rows_counts_where_gold_orders_them() -> None:
    gold = {"sql": "SELECT id FROM t ORDER BY id DESC", "setup": SETUP}
    assert one("sql", "SELECT id FROM t ORDER BY -id", gold) == 1
    assert one("sql", "SELECT id FROM t ORDER BY id", gold) == 0
    inner = {"sql": "SELECT id FROM (SELECT id FROM t ORDER BY id DESC)", "setup": SETUP}
    assert one("sql", "SELECT id FROM t ORDER BY id", inner) == 1


def test_floats_are_the_same_to_twelve_digits() -> None:
    gold = {"sql": "SELECT 0.1 + 0.2 + 0.3", "setup": ""}
    assert one("sql", "SELECT 0.3 + 0.2 + 0.1", gold) == 1


@pytest.mark.parametrize(
    ("gold", "found"),
    [
        ({"sql": "SELECT 1"}, r"gold\.setup: found None"),
        ({"setup": SETUP}, r"gold\.sql: found None"),
        ({"sql": "SELECT nothing", "setup": SETUP}, "it does not run"),
        ({"sql": "SELECT 1", "setup": "ATTACH '/tmp/x.db' AS x"}, "it does not run"),
    ],
)
def test_rows_without_a_query_that_runs_are_refused(gold: dict[str, Any], found: str) -> None:
    with pytest.raises(DataError, match=found):
        scorers("sql").check([row(gold)])


TEXTS = [
    ("the cat sat on the mat", "The cat was sitting on the mat."),
    ("Miami, Florida; 9 ft", "It is Miami in Florida at 9 ft"),
    ("one", "two"),
]


def test_bleu_and_chrf_are_sacrebleus() -> None:
    sacrebleu = pytest.importorskip("sacrebleu")
    for said, right in TEXTS:
        bleu = sacrebleu.sentence_bleu(said, [right], use_effective_order=True).score / 100
        assert one("bleu", said, {"text": right}) == pytest.approx(bleu)
        assert one("chrf", said, {"text": right}) == pytest.approx(sacrebleu.sentence_chrf(said, [right]).score / 100)


# F1 by rouge-score 0.1.2, RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=False).
ROUGE = {
    TEXTS[0]: (0.769231, 0.545455, 0.769231),
    TEXTS[1]: (0.666667, 0.2, 0.666667),
    TEXTS[2]: (0, 0, 0),
    ("a b c d e f", "f e d c b a"): (1, 0, 1 / 6),
}


@pytest.mark.parametrize(("texts", "expected"), ROUGE.items())
def test_rouge_is_rouge_scores(texts: tuple[str, str], expected: tuple[float, ...]) -> None:
    found = scorers("rouge").score(ModelReply.to(row({"text": texts[1]}), texts[0]))
    assert tuple(found.values()) == pytest.approx(expected, abs=1e-6)


def test_cost_is_tokens_and_time_by_their_prices() -> None:
    prices = {
        "kind": "cost",
        "currency": "EUR",
        "per_1k_prompt_tokens": 0.5,
        "per_1k_completion_tokens": 2,
        "per_replica_hour": 3.6,
        "answers_at_once": 10,
    }
    reply = ModelReply("x", prompt_tokens=200, completion_tokens=50, latency_ms=2000)
    per_answer = 0.2 * 0.5 + 0.05 * 2 + 3.6 * (2 / 3600) / 10
    assert scorers(prices).score(reply)["cost"] == pytest.approx(1000 * per_answer)
    assert math.isnan(scorers(prices).score(ModelReply("x"))["cost"])


def test_a_failed_request_scores_nothing_and_takes_nothing() -> None:
    failed = scorers("latency", "exact").failed_scores()
    assert failed["exact"] == 0
    assert math.isnan(failed["latency_ms"])


def test_live_traffic_has_no_gold() -> None:
    live = scorers({"kind": "regex", "pattern": ".+"}, "tokens", gold=False)
    assert live.score(ModelReply("x", prompt_tokens=3, completion_tokens=1)) == {
        "regex": 1,
        "prompt_tokens": 3,
        "completion_tokens": 1,
    }
    with pytest.raises(ConfigError, match="it needs the right answer"):
        scorers("exact", gold=False)


class Shouts:
    """An own scorer, as a package would bring it."""

    metric = Metric("shouts", "share of answers", "lower", "binary", "The answer is in capitals.")

    def __call__(self, text: str, gold: Mapping[str, Any] | None) -> float:
        return 3.0 if text == "broken" else float(text.isupper())


shouts = Shouts()
not_a_scorer = 3


def test_own_scorers_are_taken_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = EntryPoints(
        EntryPoint(name, f"{__name__}:{name}", plugin.GROUP) for name in ("shouts", "not_a_scorer", "absent")
    )
    monkeypatch.setattr(plugins, "entry_points", lambda group: installed.select(group=group))
    module = SimpleNamespace(shouts=shouts, not_a_scorer=not_a_scorer)
    monkeypatch.setitem(sys.modules, __name__, module)
    mine = scorers({"kind": "own", "name": "shouts"})
    assert mine.metrics == (Shouts.metric,)
    assert mine.score(ModelReply("LOUD")) == {"shouts": 1}
    with pytest.raises(RunError, match=r"it returned 3\.0"):
        mine.score(ModelReply("broken"))
    for name, found in (("other", "0 entry points"), ("not_a_scorer", "is no function"), ("absent", "cannot be imp")):
        with pytest.raises(ConfigError, match=found):
            scorers({"kind": "own", "name": name})


@pytest.mark.parametrize(
    ("trees", "message"),
    [
        (("fields",), "set answer_schema"),
        (("json_schema",), "set answer_schema"),
        (("exact", "exact"), "two scorers have this name"),
    ],
)
def test_scorers_that_cannot_be_had_are_refused(trees: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        scorers(*trees)


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ("bleurt", "does not match any"),
        ({"kind": "regex", "pattern": "("}, "no regular expression"),
        ({"kind": "cost"}, "needs a price"),
        ({"kind": "exact", "fields": "a"}, "Extra inputs"),
    ],
)
def test_specs_that_make_no_sense_are_refused(tree: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SPECS.validate_python([tree])


# Text answers as SQuAD scores them. The figures are the official script's (evaluate-v2.0.py) by hand: words in lower
# case without ASCII punctuation and English articles; F1 = 2 shared / (words of the answer + words of the right text).


@pytest.mark.parametrize(
    ("text", "right", "em", "f1", "contains"),
    [
        ("Denver Broncos", ["Denver Broncos"], 1, 1, 1),
        ("  the Denver broncos!\n", ["Denver Broncos"], 1, 1, 1),
        ("The inventor was Thomas Newcomen.", ["Thomas Newcomen"], 0, 2 * 2 / (4 + 2), 1),
        ("Newcomen", ["Thomas Newcomen"], 0, 2 * 1 / (1 + 2), 0),
        ("Newcomen Thomas", ["Thomas Newcomen"], 0, 1, 0),
        ("Romeo", ["Rome"], 0, 0, 0),
        ("It was in 1976", ["1975", "In 1976", "1976"], 0, 2 * 2 / (4 + 2), 1),
        ("1976", ["1975", "In 1976", "1976"], 1, 1, 1),
        ("10%", ["10"], 1, 1, 1),
        ("a cat, the cat", ["cat cat dog"], 0, 2 * 2 / (2 + 3), 0),
        ("U.S.", ["US"], 1, 1, 1),
        ("The", ["A"], 1, 1, 1),
        ("", ["Rome"], 0, 0, 0),
    ],
)
def test_texts_are_scored_as_squad_scores_them(
    text: str, right: list[str], em: float, f1: float, contains: float
) -> None:
    found = scorers("qa").score(ModelReply.to(row({"answers": right}), text))
    assert found == {"em": em, "f1": pytest.approx(f1), "contains": contains}


def test_right_texts_are_found_in_a_field_or_in_the_last_turn() -> None:
    gold = {"answers": ["Bergen", "the city of Bergen"], "country": "Norway"}
    by_field = scorers({"kind": "qa", "field": "answers"})
    assert by_field.score(ModelReply.to(row(gold, "It is Bergen."), "city of Bergen"))["em"] == 1
    assert scorers("qa").score(ModelReply.to(row(gold, "Oslo"), "Oslo"))["em"] == 1
    with pytest.raises(DataError, match="the right text is a string, or a list of them"):
        scorers("qa").check([row(gold)])
    with pytest.raises(ConfigError, match="it needs the right answer"):
        scorers("qa", gold=False)
