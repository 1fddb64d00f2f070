"""airport-card: a question about an airport, by code or by name -> one strict JSON card. Facts can be looked up.

Source: airportsdata (MIT), 28,298 airports. All of them are passages of the corpus; questions are asked about those
that have every field. No airport stands in two splits.
"""

import csv
import io
import math
import random
import re
from collections import Counter
from typing import Any

from graftwork.base.package_source import PackageFile
from graftwork.recipes import Built, jsonl, object_schema, row

SOURCE = PackageFile(
    "airportsdata",
    "20260905",
    "airportsdata/airports.csv",
    "516c57d9d999f7a3be28ca649d2badbe3b972f07e57dc6173ab973b72d51cf52",
)
LICENCE = "MIT"

SPLITS = {"train": 400, "valid": 64, "eval": 300}
_SEED = 20260905
_WORDINGS = {
    ("icao",): (
        "Which airport has the ICAO code {icao}?",
        "Airport card for {icao}, please.",
        "I need the details of {icao}.",
        "Look up the airport with ICAO {icao}.",
        "Tell me about {icao}.",
    ),
    ("iata",): (
        "Which airport has the IATA code {iata}?",
        "My ticket says {iata}. Which airport is that?",
        "Airport card for the IATA code {iata}, please.",
        "Look up {iata}.",
        "My bag is tagged {iata}: where does it go?",
    ),
    ("name", "city"): (
        "Tell me about {name} in {city}.",
        "Give me the card of {name}, {city}.",
        "What are the codes of {name} in {city}?",
        "Look up {name} ({city}).",
        "How high above the sea is {name} in {city}?",
    ),
}
_CODE = re.compile(r"[A-Z0-9]{4}")
_WRITABLE = re.compile(r"[\w .,'’/()&-]+")
_FIELDS: dict[str, dict[str, Any]] = {
    "icao": {"type": "string", "pattern": "^[A-Z0-9]{4}$"},
    "iata": {"type": "string", "pattern": "^[A-Z]{3}$"},
    "name": {"type": "string", "minLength": 1},
    "city": {"type": "string", "minLength": 1},
    "country": {"type": "string", "pattern": "^[A-Z]{2}$"},
    "elevation_ft": {"type": "integer"},
}


def make(source: bytes) -> Built:
    """Splits, corpus and schema from airports.csv."""
    table = list(csv.DictReader(io.StringIO(source.decode("utf-8"))))
    cards = [card_of(record) for record in table]
    namesakes = Counter((card["name"], card["city"]) for card in cards)
    eligible = [card for card in cards if askable(card)]
    chance = random.Random(_SEED)
    chosen = chance.sample(eligible, sum(SPLITS.values()))
    files = {}
    for split, size in SPLITS.items():
        part, chosen = chosen[:size], chosen[size:]
        files[f"{split}.jsonl"] = jsonl([_row(card, namesakes, chance) for card in part])
    files["corpus.jsonl"] = jsonl([{"id": card["icao"], "text": _passage(card)} for card in cards])
    files["schema.json"] = object_schema("airport card", _FIELDS)
    about = {
        "question": "by ICAO code, by IATA code, or by name and city (never where two airports share both)",
        "eligible_airports": len(eligible),
        "wordings": sum(len(wordings) for wordings in _WORDINGS.values()),
    }
    return Built(files, about)


def card_of(record: dict[str, str]) -> dict[str, Any]:
    """An airport's fields, as an answer gives them."""
    return {
        "icao": record["icao"],
        "iata": record["iata"],
        "name": " ".join(record["name"].split()),
        "city": " ".join(record["city"].split()),
        "country": record["country"],
        "elevation_ft": math.floor(float(record["elevation"]) + 0.5),
    }


def askable(card: dict[str, Any]) -> bool:
    """Every field is there and can be written without escapes, none is very long."""
    texts = card["name"], card["city"]
    return bool(
        _CODE.fullmatch(card["icao"])
        and card["iata"]
        and all(4 <= len(text) <= 40 and text.isprintable() and _WRITABLE.fullmatch(text) for text in texts)
    )


def _row(card: dict[str, Any], namesakes: Counter[tuple[str, str]], chance: random.Random) -> dict[str, Any]:
    ways = [asked for asked in _WORDINGS if asked != ("name", "city") or namesakes[card["name"], card["city"]] == 1]
    asked = chance.choice(ways)
    question = chance.choice(_WORDINGS[asked]).format(**card)
    return row(f"airport-{card['icao']}", question, card, doc_id=card["icao"], given_fields=list(asked))


def _passage(card: dict[str, Any]) -> str:
    """`Kunming Wujiaba International Airport (ZPPP/KMG) in Kunming, CN, elevation 6217 ft.`"""
    codes = "/".join(filter(None, (card["icao"], card["iata"])))
    place = ", ".join(filter(None, (card["city"], card["country"])))
    return f"{card['name']} ({codes}) in {place}, elevation {card['elevation_ft']} ft."
