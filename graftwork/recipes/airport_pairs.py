"""airport-pairs: the questions of airport-card, each with the right card and one that a team would send back.

Of eight rejected answers three are right but not as asked (prose around the card, a code fence, a spelt-out number),
three have other fields (one left out, renamed, added), and two contradict what the question says.
"""

import json
import random
from typing import Any

from graftwork.recipes import Built, airport_card, compact, jsonl

SOURCE, LICENCE = airport_card.SOURCE, airport_card.LICENCE
_SEED = 20260906
_OPENINGS = ("Sure! Here is the card: ", "The airport that you mean is ", "I found this: ", "Of course. ")

_KINDS = ("prose", "left_out", "contradicts", "fence", "renamed", "other_airport", "spelt", "added")
"""Of rejected answers, in turn."""

Card = dict[str, Any]


def make(source: bytes) -> Built:
    """Pairs of each split, in airport-card's order."""
    rows = airport_card.make(source).files
    chance = random.Random(_SEED)
    files = {
        f"{split}.jsonl": jsonl(_pairs([json.loads(line) for line in rows[f"{split}.jsonl"].splitlines()], chance))
        for split in airport_card.SPLITS
    }
    return Built(files, {"rejected": "one of " + ", ".join(_KINDS), "questions": "as in airport-card"})


def _pairs(rows: list[Card], chance: random.Random) -> list[Card]:
    found = []
    for number, row in enumerate(rows):
        why = _KINDS[number % len(_KINDS)]
        other = rows[(number + 1 + chance.randrange(len(rows) - 1)) % len(rows)]["gold"]
        question, answer = row["messages"]
        rejected = _rejected(why, row["gold"], other, row["given_fields"], chance)
        found.append(
            {"id": row["id"], "messages": [question], "chosen": answer["content"], "rejected": rejected, "why": why}
        )
    return found


def _rejected(kind: str, card: Card, other: Card, given: list[str], chance: random.Random) -> str:
    """Return a rejected answer. `other`: another airport's card. `given`: fields that the question gives."""
    match kind:
        case "prose":
            return chance.choice(_OPENINGS) + compact(card)
        case "fence":
            return f"```json\n{compact(card)}\n```"
        case "left_out":
            name = chance.choice([name for name in card if name not in given])
            return compact({key: value for key, value in card.items() if key != name})
        case "renamed":
            names = {"elevation_ft": "elevation", "country": "country_code"}
            return compact({names.get(key, key): value for key, value in card.items()})
        case "added":
            return compact({**card, "source": "airport database"})
        case "spelt":
            return compact({**card, "elevation_ft": f"{card['elevation_ft']} ft"})
        case "contradicts":
            return compact({**card, **{name: other[name] for name in given}})
    return compact(other)  # other_airport
