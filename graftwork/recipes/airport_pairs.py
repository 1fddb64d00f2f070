"""airport-pairs: the questions of airport-card, each with the right card and one that a team would send back.

Of eight rejected answers three are right but not as asked (prose around the card, a code fence, a spelt-out number),
three have other fields (one left out, renamed, added), and two contradict what the question says.
"""

import json
import random
from collections.abc import Callable
from typing import Any

from graftwork.recipes import Built, airport_card, compact, jsonl

SOURCE, LICENCE = airport_card.SOURCE, airport_card.LICENCE
_SEED = 20260906
_OPENINGS = ("Sure! Here is the card: ", "The airport that you mean is ", "I found this: ", "Of course. ")

Card = dict[str, Any]
Worse = Callable[[Card, Card, list[str], random.Random], str]
"""(the right card, another airport's, fields that the question gives, chance) -> a rejected answer."""


def make(source: bytes) -> Built:
    """Pairs of each split, in airport-card's order."""
    rows = airport_card.make(source).files
    chance = random.Random(_SEED)
    files = {
        f"{split}.jsonl": jsonl(_pairs([json.loads(line) for line in rows[f"{split}.jsonl"].splitlines()], chance))
        for split in airport_card.SPLITS
    }
    return Built(files, {"rejected": "one of " + ", ".join(_WORSE), "questions": "as in airport-card"})


def _pairs(rows: list[Card], chance: random.Random) -> list[Card]:
    found = []
    for number, row in enumerate(rows):
        why = list(_WORSE)[number % len(_WORSE)]
        other = rows[(number + 1 + chance.randrange(len(rows) - 1)) % len(rows)]["gold"]
        question, answer = row["messages"]
        rejected = _WORSE[why](row["gold"], other, row["given_fields"], chance)
        found.append(
            {"id": row["id"], "messages": [question], "chosen": answer["content"], "rejected": rejected, "why": why}
        )
    return found


def _prose(card: Card, other: Card, asked: list[str], chance: random.Random) -> str:
    return chance.choice(_OPENINGS) + compact(card)


def _fence(card: Card, other: Card, asked: list[str], chance: random.Random) -> str:
    return f"```json\n{compact(card)}\n```"


def _spelt(card: Card, other: Card, asked: list[str], chance: random.Random) -> str:
    return compact({**card, "elevation_ft": f"{card['elevation_ft']} ft"})


def _left_out(card: Card, other: Card, asked: list[str], chance: random.Random) -> str:
    name = chance.choice([name for name in card if name not in asked])
    return compact({key: value for key, value in card.items() if key != name})


def _renamed(card: Card, other: Card, asked: list[str], chance: random.Random) -> str:
    return compact({{"elevation_ft": "elevation", "country": "country_code"}.get(k, k): v for k, v in card.items()})


def _added(card: Card, other: Card, asked: list[str], chance: random.Random) -> str:
    return compact({**card, "source": "airport database"})


def _contradicts(card: Card, other: Card, asked: list[str], chance: random.Random) -> str:
    return compact({**card, **{name: other[name] for name in asked}})


def _other_airport(card: Card, other: Card, asked: list[str], chance: random.Random) -> str:
    return compact(other)


_WORSE: dict[str, Worse] = {
    "prose": _prose,
    "left_out": _left_out,
    "contradicts": _contradicts,
    "fence": _fence,
    "renamed": _renamed,
    "other_airport": _other_airport,
    "spelt": _spelt,
    "added": _added,
}
