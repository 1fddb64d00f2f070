"""airport-city: few facts in many wordings. Which city does an airport serve? Learned by heart, or looked up.

Source: airportsdata (MIT). The same 40 facts stand in every training file, ten times each: train-1.jsonl has one
wording of a fact, train-10.jsonl ten, so that the files differ in variety and not in length. The questions of
eval.jsonl are worded in ways that no training file has. The passages are those of airport-card.
"""

import csv
import io
import random
from collections import Counter
from typing import Any

from graftwork.base.package_source import PackageFile
from graftwork.recipes import Built, airport_card, jsonl, object_schema, row

SOURCE: PackageFile = airport_card.SOURCE
LICENCE = "MIT"

FACTS = 40
VISITS = 10
VARIETIES = (1, 2, 5, 10)
_SEED = 2312
_LEARNED = (
    "Which city does {name} serve?",
    "{name}: which city is it in?",
    "Name the city of {name}.",
    "Where is {name}?",
    "I fly to {name}. Which city is that?",
    "In which city do I land at {name}?",
    "City of {name}, please.",
    "{name} belongs to which city?",
    "Tell me the city that {name} is in.",
    "What is the city of the airport called {name}?",
)
_HELD_OUT = (
    "My ticket says {name}. What city am I going to?",
    "Which town would I visit from {name}?",
    "A friend lands at {name}. In what city should I meet her?",
    "For the form: airport {name}, city?",
    "Where do people who use {name} live?",
)
_FIELDS: dict[str, dict[str, Any]] = {"city": {"type": "string", "minLength": 1}}


def make(source: bytes) -> Built:
    """Training files by number of wordings, questions, schema."""
    table = list(csv.DictReader(io.StringIO(source.decode("utf-8"))))
    facts = _facts([airport_card.card_of(record) for record in table])
    chance = random.Random(_SEED)
    files = {f"train-{varieties}.jsonl": _training(facts, varieties, chance) for varieties in VARIETIES}
    files["eval.jsonl"] = jsonl(
        [_row(f"city-{fact['icao']}-{n}", wording, fact) for fact in facts for n, wording in enumerate(_HELD_OUT)]
    )
    files["corpus.jsonl"] = airport_card.make(source).files["corpus.jsonl"]
    files["schema.json"] = object_schema("city of an airport", _FIELDS)
    about = {
        "question": "by the airport's name",
        "facts": len(facts),
        "visits_a_fact": VISITS,
        "held_out_wordings": len(_HELD_OUT),
    }
    return Built(files, about)


def _facts(cards: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Airports of one name each, in cities of their own that the name does not give away."""
    named = Counter(card["name"] for card in cards)
    fitting = [
        card
        for card in cards
        if airport_card.askable(card) and named[card["name"]] == 1
        if not any(word in card["name"].casefold() for word in card["city"].casefold().split())
    ]
    by_city = {card["city"]: card for card in fitting}
    chosen = random.Random(_SEED).sample(sorted(by_city), FACTS)
    return [by_city[city] for city in chosen]


def _training(facts: list[dict[str, Any]], varieties: int, chance: random.Random) -> bytes:
    rows = []
    for visit in range(VISITS):
        order = chance.sample(facts, len(facts))
        rows += [_row(f"city-{fact['icao']}-v{visit}", _LEARNED[visit % varieties], fact) for fact in order]
    return jsonl(rows)


def _row(row_id: str, wording: str, fact: dict[str, Any]) -> dict[str, Any]:
    return row(row_id, wording.format(name=fact["name"]), {"city": fact["city"]}, doc_id=fact["icao"])
