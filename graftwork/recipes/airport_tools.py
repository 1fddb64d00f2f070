"""airport-tools: questions about airports that are answered by calling tools: question, call, result, answer.

The airports are those of airport-card (airportsdata, MIT). Three tools look an airport up, by ICAO code, by IATA code
or by name and city. A quarter of the questions compares two airports and needs two calls in one turn.
"""

import csv
import io
import json
import math
import random
from collections import Counter
from typing import Any

from graftwork.recipes import Built, airport_card, jsonl

SOURCE, LICENCE = airport_card.SOURCE, airport_card.LICENCE

SPLITS = {"train": 400, "valid": 48, "eval": 150}
"""Rows of each split. No airport stands in two splits."""
_SEED = 20260907
_PAIR_EVERY = 4
_ARGUMENTS: dict[str, dict[str, tuple[str, str]]] = {
    "airport_by_icao": {"icao": ("icao", "Four-character ICAO code.")},
    "airport_by_iata": {"iata": ("iata", "Three-letter IATA code.")},
    "search_airport": {"name": ("name", "Name of the airport."), "city": ("city", "City that it serves.")},
}
"""Tool -> argument -> (field of the airport, description)."""
_PURPOSE = {
    "airport_by_icao": "Look an airport up by its ICAO code.",
    "airport_by_iata": "Look an airport up by its IATA code.",
    "search_airport": "Look an airport up by its name and city.",
}
_NAMED = {"airport_by_icao": "{icao}", "airport_by_iata": "{iata}", "search_airport": "{name} in {city}"}
_WORDINGS = {
    "elevation_ft": ("How high above the sea is {}?", "What is the elevation of {}?", "Tell me the height of {}."),
    "city": ("Which city does {} serve?", "In which city do I land at {}?", "{}: which city is that?"),
    "country": ("Which country is {} in?", "Tell me the country of {}.", "{}: in what country?"),
    "name": ("What is the name of {}?", "What is {} called?", "Tell me the full name of {}."),
}
_PAIR_WORDINGS = ("Which one is higher, {} or {}?", "Compare the elevations of {} and {}.", "Is {} higher than {}?")
_ANSWERS = {
    "elevation_ft": "It lies {elevation_ft} ft above the sea.",
    "city": "It serves {city}.",
    "country": "It is in {country}.",
    "name": "It is {name}.",
}

Card = dict[str, Any]


def make(source: bytes) -> Built:
    """Conversations to learn from, and the first turns with their right calls (`gold.tool_calls`)."""
    cards = [airport_card.card_of(record) for record in csv.DictReader(io.StringIO(source.decode("utf-8")))]
    namesakes = Counter((card["name"], card["city"]) for card in cards)
    eligible = [card for card in cards if airport_card.askable(card) and namesakes[card["name"], card["city"]] == 1]
    chance = random.Random(_SEED)
    chosen = iter(chance.sample(eligible, sum(size + math.ceil(size / _PAIR_EVERY) for size in SPLITS.values())))
    files = {}
    for split, size in SPLITS.items():
        rows = []
        for number in range(size):
            pair = number % _PAIR_EVERY == 0
            rows.append(_row([next(chosen) for _ in range(1 + pair)], chance, asked=split == "eval"))
        files[f"{split}.jsonl"] = jsonl(rows)
    about = {"question": "one airport, or two compared", "tools": list(_ARGUMENTS), "eligible_airports": len(eligible)}
    return Built(files, about)


def tools() -> list[Card]:
    """The three tools, in OpenAI's form."""
    return [
        {
            "type": "function",
            "function": {
                "name": name,
                "description": _PURPOSE[name],
                "parameters": {
                    "type": "object",
                    "properties": {
                        key: {"type": "string", "description": text} for key, (_, text) in arguments.items()
                    },
                    "required": list(arguments),
                    "additionalProperties": False,
                },
            },
        }
        for name, arguments in _ARGUMENTS.items()
    ]


def _row(cards: list[Card], chance: random.Random, *, asked: bool) -> Card:
    """One conversation; `asked`: its first turn alone, with the right calls as gold."""
    calls = [_call(card, chance) for card in cards]
    named = [_NAMED[name].format(**card) for (name, _), card in zip(calls, cards, strict=True)]
    if len(cards) == 1:
        field = chance.choice([field for field in _WORDINGS if field not in calls[0][1]])
        question = chance.choice(_WORDINGS[field]).format(*named)
        answer = _ANSWERS[field].format(**cards[0])
    else:
        question = chance.choice(_PAIR_WORDINGS).format(*named)
        answer = _comparison(*cards)
    row: Card = {"id": "tools-" + "-".join(card["icao"] for card in cards), "tools": tools()}
    user = {"role": "user", "content": question}
    if asked:
        return row | {
            "messages": [user],
            "gold": {"tool_calls": [{"name": name, "arguments": arguments} for name, arguments in calls]},
        }
    turn = {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {"id": f"call_{number}", "type": "function", "function": {"name": name, "arguments": json.dumps(arguments)}}
            for number, (name, arguments) in enumerate(calls)
        ],
    }
    results = [
        {
            "role": "tool",
            "tool_call_id": f"call_{number}",
            "name": name,
            "content": json.dumps(card, ensure_ascii=False),
        }
        for number, ((name, _), card) in enumerate(zip(calls, cards, strict=True))
    ]
    return row | {"messages": [user, turn, *results, {"role": "assistant", "content": answer}]}


def _call(card: Card, chance: random.Random) -> tuple[str, Card]:
    """(tool, arguments) that finds the airport."""
    name = chance.choice(list(_ARGUMENTS))
    return name, {key: card[field] for key, (field, _) in _ARGUMENTS[name].items()}


def _comparison(one: Card, other: Card) -> str:
    high, low = sorted((one, other), key=lambda card: -card["elevation_ft"])
    if high["elevation_ft"] == low["elevation_ft"]:
        return f"Both lie {high['elevation_ft']} ft above the sea."
    return f"{high['name']}, at {high['elevation_ft']} ft; {low['name']} lies at {low['elevation_ft']} ft."
