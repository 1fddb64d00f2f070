"""airport-card: a question about a real airport -> one strict JSON object. The whole table is the corpus.

The form (six keys, in order) can be learned from a few examples; the facts of an unseen airport cannot: they must be
retrieved. Training and evaluation airports are disjoint.
"""

import collections
import csv
import json
import random
from pathlib import Path
from typing import Any

from graftwork.package_files import PackageFile, fetch
from graftwork.recipes.files import Recipe, row, write_card, write_jsonl

TRAIN_ROWS, EVAL_ROWS = 1000, 400
SOURCE = PackageFile(
    "airportsdata",
    "20260905",
    "airportsdata/airports.csv",
    "516c57d9d999f7a3be28ca649d2badbe3b972f07e57dc6173ab973b72d51cf52",
)
FIELDS = ("icao", "iata", "name", "city", "country", "elevation_ft")

BY_CODE = (
    "Give me the card of the airport {code}.",
    "Which airport has the code {code}?",
    "Airport card for {code}, please.",
    "{code}?",
    "I need the data of airport {code}.",
    "What do you know about {code}?",
    "Look up the airport with code {code}.",
    "Show airport {code}.",
)
BY_NAME = (
    "Give me the card of {name} in {city}.",
    "Airport card for {name}, {city}, please.",
    "I need the data of {name} ({city}).",
    "What do you know about {name} in {city}?",
    "Look up {name}, {city}.",
    "{name}, {city}?",
)
SCHEMA = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "type": "object",
    "additionalProperties": False,
    "required": list(FIELDS),
    "properties": {
        "icao": {"type": "string", "pattern": "^[A-Z0-9]{4}$"},
        "iata": {"type": "string", "pattern": "^[A-Z0-9]{3}$"},
        "name": {"type": "string", "minLength": 1},
        "city": {"type": "string", "minLength": 1},
        "country": {"type": "string", "pattern": "^[A-Z]{2}$"},
        "elevation_ft": {"type": "integer"},
    },
}


def write(folder: Path) -> None:
    """Write train.jsonl, eval.jsonl, corpus.jsonl, schema.json and card.json."""
    with fetch(SOURCE).open(encoding="utf-8", newline="") as table:
        airports = [_airport(line) for line in csv.DictReader(table)]
    chance = random.Random(20260905)
    usable = [airport for airport in airports if _usable(airport)]
    chance.shuffle(usable)
    places = collections.Counter((airport["name"], airport["city"]) for airport in airports)
    rows = [_row(airport, number, places, chance) for number, airport in enumerate(usable[: TRAIN_ROWS + EVAL_ROWS])]
    write_jsonl(folder / "train.jsonl", rows[:TRAIN_ROWS])
    write_jsonl(folder / "eval.jsonl", rows[TRAIN_ROWS:])
    write_jsonl(folder / "corpus.jsonl", ({"id": airport["icao"], "text": passage(airport)} for airport in airports))
    (folder / "schema.json").write_text(json.dumps(SCHEMA, indent=1) + "\n", encoding="utf-8")
    write_card(folder, RECIPE, "questions about real airports, answered by a JSON card; the corpus is the whole table")


def passage(airport: dict[str, Any]) -> str:
    """The airport in a sentence, as the corpus has it."""
    codes = "/".join(code for code in (airport["icao"], airport["iata"]) if code)
    place = ", ".join(part for part in (airport["city"], airport["country"]) if part)
    return f"{airport['name']} ({codes}) in {place}, elevation {airport['elevation_ft']} ft."


def _airport(line: dict[str, str]) -> dict[str, Any]:
    text = {key: " ".join(line[key].split()) for key in FIELDS[:-1]}
    return {**text, "elevation_ft": round(float(line["elevation"] or 0))}


def _usable(airport: dict[str, Any]) -> bool:
    """Every field has a value that the schema allows, and none is so long that it drowns the rest."""
    filled = all(airport[key] for key in FIELDS[:-1])
    plain = airport["icao"].isalnum() and airport["iata"].isalnum() and airport["icao"].isascii()
    short = len(airport["name"]) <= 60 and len(airport["city"]) <= 40
    return (
        bool(filled and plain and short) and len(airport["iata"]) == 3 and '"' not in airport["name"] + airport["city"]
    )


def _row(
    airport: dict[str, Any], number: int, places: collections.Counter[tuple[str, str]], chance: random.Random
) -> dict[str, Any]:
    """ICAO code, IATA code and name take turns; a name that two airports share is never asked by name."""
    way = number % 3
    if way == 2 and places[airport["name"], airport["city"]] > 1:
        way = 0
    if way == 2:
        question, asked = chance.choice(BY_NAME).format(name=airport["name"], city=airport["city"]), ("name", "city")
    else:
        field = ("icao", "iata")[way]
        question, asked = chance.choice(BY_CODE).format(code=airport[field]), (field,)
    gold = {key: airport[key] for key in FIELDS}
    return row(airport["icao"], question, gold, asked, doc_id=airport["icao"])


RECIPE = Recipe(SOURCE, "MIT", 1, write)
