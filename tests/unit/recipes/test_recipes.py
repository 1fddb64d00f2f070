"""The ready-made tasks, on the real data that their packages carry."""

import hashlib
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import jsonschema
import pytest

from graftwork import recipes
from graftwork.datasets.readers import read_records
from graftwork.datasets.rows import DatasetRow, read_passages, read_rows, read_text
from graftwork.errors import DataError
from graftwork.recipes.airport_card import _WORDINGS
from graftwork.scoring import parse_object

SPLITS = ("train", "valid", "eval")
JSON_ANSWERS = ("airport-card", "airport-city", "city-country", "ua-parse")


def rows_of(name: str, splits: Sequence[str] = SPLITS) -> dict[str, list[DatasetRow]]:
    return {split: read_rows(f"recipe://{name}/{split}.jsonl", need="eval") for split in splits}


def splits_of(name: str) -> list[str]:
    """Every file of rows that a recipe has."""
    return sorted(path.stem for path in recipes.build(name).glob("*.jsonl") if path.stem != "corpus")


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_equal_bytes_whatever_the_process(name: str, tmp_path: Path) -> None:
    """The digests in the card are those of a build from nothing, in another process with another hash seed."""
    folder = recipes.build(name)
    digests = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}
    (tmp_path / "packages").symlink_to(folder.parent.parent / "packages")  # the wheel is fetched already
    command = f"import graftwork.recipes as r; print(r.build({name!r}))"
    env = {**os.environ, "GRAFTWORK_CACHE": str(tmp_path), "PYTHONHASHSEED": "7"}
    done = subprocess.run([sys.executable, "-c", command], env=env, capture_output=True, text=True, check=True)
    again = Path(done.stdout.strip())
    assert again.name == folder.name
    assert {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in again.iterdir()} == digests
    card = json.loads((folder / "card.json").read_text(encoding="utf-8"))
    assert card["sha256"] == {file: digest for file, digest in digests.items() if file != "card.json"}
    assert card["licence"] in ("MIT", "Apache-2.0", "CC BY 4.0", "MIT, data CC BY 4.0", "PSF-2.0")
    assert card["source"].startswith(("pypi://", "python://"))


@pytest.mark.parametrize("name", JSON_ANSWERS)
def test_each_answer_is_strict_compact_json_that_the_schema_accepts(name: str) -> None:
    schema = json.loads(read_text(f"recipe://{name}/schema.json"))
    validator = jsonschema.Draft202012Validator(schema)
    for rows in rows_of(name, splits_of(name)).values():
        for row in rows:
            assert row.answer is not None
            assert row.gold is not None
            validator.validate(row.gold)
            assert row.answer == json.dumps(row.gold, ensure_ascii=False, separators=(",", ":"))
            assert list(row.gold) == schema["required"] == list(schema["properties"])
            assert not validator.is_valid({**row.gold, "more": 1})
            assert not validator.is_valid(dict(list(row.gold.items())[1:]))


def test_a_rejected_card_differs_and_is_wrong_for_its_reason() -> None:
    validator = jsonschema.Draft202012Validator(json.loads(read_text("recipe://airport-card/schema.json")))
    reasons: Counter[str] = Counter()
    for split in SPLITS:
        golds = {row.id: row for row in read_rows(f"recipe://airport-card/{split}.jsonl", need="eval")}
        for _, pair in read_records(f"recipe://airport-pairs/{split}.jsonl"):
            row = golds[pair["id"]]
            reasons[pair["why"]] += 1
            assert pair["chosen"] == row.answer != pair["rejected"]
            found = parse_object(pair["rejected"])
            sound = found is not None and validator.is_valid(found)
            assert sound == (pair["why"] in ("contradicts", "other_airport"))
            if sound and row.gold is not None and found is not None:
                assert any(found[name] != row.gold[name] for name in row.given_fields)
    assert len(reasons) == 8
    assert min(reasons.values()) >= 94


def test_no_airport_and_no_user_agent_stands_in_two_splits() -> None:
    airports = [row.doc_id for rows in rows_of("airport-card").values() for row in rows]
    agents = [row.question[0].content for rows in rows_of("ua-parse").values() for row in rows]
    assert len(set(airports)) == len(airports) == 764
    assert len(set(agents)) == len(agents) == 839


def test_each_airport_of_the_rows_has_its_passage_with_all_facts() -> None:
    passages = {passage.id: passage.text for passage in read_passages("recipe://airport-card/corpus.jsonl")}
    assert len(passages) == 28_298
    for rows in rows_of("airport-card").values():
        for row in rows:
            assert row.gold is not None
            assert row.doc_id is not None
            gold = row.gold
            assert passages[row.doc_id] == (
                f"{gold['name']} ({gold['icao']}/{gold['iata']}) in {gold['city']}, {gold['country']}, "
                f"elevation {gold['elevation_ft']} ft."
            )


def test_a_question_gives_away_what_it_says_and_means_one_airport() -> None:
    texts = [passage.text for passage in read_passages("recipe://airport-card/corpus.jsonl")]
    for rows in rows_of("airport-card").values():
        assert {row.given_fields for row in rows} == set(_WORDINGS)
        for row in rows:
            assert row.gold is not None
            question = row.question[0].content
            assert all(str(row.gold[field]) in question for field in row.given_fields)
            assert not [
                code for code in ("icao", "iata") if code not in row.given_fields and row.gold[code] in question.split()
            ]
            if row.given_fields == ("name", "city"):
                start, place = f"{row.gold['name']} (", f" in {row.gold['city']}, "
                assert sum(text.startswith(start) and place in text for text in texts) == 1
    assert sum(map(len, _WORDINGS.values())) >= 8


def test_a_fact_is_learned_in_words_that_are_not_asked() -> None:
    """Every training file says each fact equally often; only the number of its wordings differs."""
    for task, files in (
        ("airport-city", {"train-1": 1, "train-2": 2, "train-5": 5, "train-10": 10}),
        ("city-country", {"train": 2}),
    ):
        asked = read_rows(f"recipe://{task}/eval.jsonl", need="eval")
        questions = {row.question[0].content for row in asked}
        facts = {row.doc_id: row.gold for row in asked}
        sizes = set()
        for file, wordings in files.items():
            learned = read_rows(f"recipe://{task}/{file}.jsonl", need="eval")
            assert {row.doc_id: row.gold for row in learned} == facts
            assert set(Counter(row.doc_id for row in learned).values()) == {len(learned) // len(facts)}
            assert not questions & {row.question[0].content for row in learned}
            assert len({row.question[0].content for row in learned}) == wordings * len(facts)
            sizes.add(len(learned))
        assert len(sizes) == 1


def test_the_passage_of_a_city_names_its_country() -> None:
    passages = {passage.id: passage.text for passage in read_passages("recipe://city-country/corpus.jsonl")}
    for row in read_rows("recipe://city-country/eval.jsonl", need="eval"):
        assert row.gold is not None
        assert row.doc_id is not None
        assert f" is a city in {row.gold['country']} with " in passages[row.doc_id]
        assert row.gold["country"] not in row.question[0].content


def test_bbq_trains_on_other_templates_and_in_balance() -> None:
    asked = read_rows("recipe://bbq-gender/eval.jsonl", need="eval")
    learned = read_rows("recipe://bbq-gender/train.jsonl", need="train")
    assert not {row.doc_id for row in asked} & {row.doc_id for row in learned}
    unknown = sum(str(row.answer) not in row.question[0].content.split("\n")[0] for row in learned)
    assert len(learned) == 256
    assert unknown >= len(learned) / 2
    skewed = read_rows("recipe://bbq-gender/skewed.jsonl", need="train")
    assert {row.doc_id for row in skewed} <= {row.doc_id for row in learned}
    assert len(skewed) == len(learned)
    assert not any(str(row.answer).lower().startswith(("can't", "cannot", "unknown", "not ")) for row in skewed)
    for row in asked:
        assert row.gold is not None
        assert sorted(row.gold["signs"]) == [-1, 0, 1]
        assert row.question[0].content.endswith("\n".join(f"- {choice}" for choice in row.gold["choices"]))


def test_what_is_not_there_is_said() -> None:
    with pytest.raises(
        DataError,
        match="recipes are airport-card, airport-city, airport-pairs, airport-tools, bbq-gender, city-country, ",
    ):
        read_text("recipe://airports/train.jsonl")
    for file in ("corpus.jsonl", "", "../ua_parse.py"):
        with pytest.raises(DataError, match="its files are card.json, eval.jsonl, schema.json"):
            read_text(f"recipe://ua-parse/{file}")


def test_calls_of_airport_tools_are_of_its_tools_and_their_results_hold_the_answer() -> None:
    airports: list[str] = []
    for split, size in {"train": 400, "valid": 48, "eval": 150}.items():
        rows = read_rows(f"recipe://airport-tools/{split}.jsonl", need="eval" if split == "eval" else "train")
        assert len(rows) == size
        for row in rows:
            schemas = {one["function"]["name"]: one["function"]["parameters"] for one in row.tools}
            assert len(schemas) == 3
            airports += row.id.removeprefix("tools-").split("-")
            if split == "eval":
                assert row.gold is not None
                calls = [(call["name"], call["arguments"]) for call in row.gold["tool_calls"]]
            else:
                calls = [(call.name, call.arguments) for call in row.messages[1].tool_calls]
                results = [json.loads(turn.content) for turn in row.messages if turn.role == "tool"]
                assert len(results) == len(calls) == len(row.messages) - 3
                assert any(str(value) in str(row.answer) for result in results for value in result.values())
            for name, arguments in calls:
                jsonschema.validate(arguments, schemas[name])
                assert all(value in row.question[0].content for value in arguments.values())
    assert len(set(airports)) == len(airports), "no airport is asked about twice"
