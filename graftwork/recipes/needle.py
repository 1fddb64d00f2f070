"""needle: one planted sentence in a long real text, to be found again (needle in a haystack).

Filler: the Python language reference (see python-docs; PSF licence). `length` is about the tokens of the row's text, at
four characters each; `depth` where in it the planted sentence stands, in percent.
"""

import random
from collections.abc import Iterator
from typing import Any

from graftwork.recipes import Built, PythonSource, jsonl, python_docs, split_of

SOURCE: PythonSource = python_docs.SOURCE
LICENCE = "PSF-2.0"

LENGTHS = (128, 256, 512, 1024, 2048, 4096, 8192, 16384)
TRAIN_LENGTHS = LENGTHS[:4]
DEPTHS = (0, 25, 50, 75, 100)
EVAL_REPEATS = 4
TRAIN_REPEATS = 24
CHARACTERS = 4
_THINGS = ("red", "blue", "old", "new", "north", "south", "spare", "main", "upper", "lower", "inner", "outer")
_PLACES = ("door", "gate", "safe", "lift", "shed", "store", "tower", "cellar", "garage", "office", "ward", "vault")


def make(source: bytes) -> Built:
    """Train rows of up to 1,024 tokens, lengths mixed; eval rows by length, the shortest first, five depths each."""
    topics = python_docs.topics_of(source)
    held_out = [text for name, text in topics.items() if split_of(name) != "train"]
    trained = [text for name, text in topics.items() if split_of(name) == "train"]
    train = [
        row for n in range(TRAIN_REPEATS) for length in TRAIN_LENGTHS for row in _rows("train", trained, length, n)
    ]
    questions = [row for length in LENGTHS for n in range(EVAL_REPEATS) for row in _rows("eval", held_out, length, n)]
    return Built({"train.jsonl": jsonl(train), "eval.jsonl": jsonl(questions)}, {"split": "by the filler's topic"})


def _rows(part: str, topics: list[str], length: int, repeat: int) -> Iterator[dict[str, Any]]:
    """One row a depth: other filler, other sentence."""
    for depth in DEPTHS:
        rng = random.Random(f"{part} {length} {repeat} {depth}")
        what, code = f"{rng.choice(_THINGS)} {rng.choice(_PLACES)}", str(rng.randrange(1000, 10000))
        planted = f"The code of the {what} is {code}."
        paragraphs = _filler(topics, length * CHARACTERS - len(planted), rng)
        place = round(len(paragraphs) * depth / 100)
        text = "\n\n".join([*paragraphs[:place], planted, *paragraphs[place:]])
        turns = [
            {"role": "user", "content": f"{text}\n\nWhat is the code of the {what}?"},
            {"role": "assistant", "content": code},
        ]
        name = f"{part}-{length}-{depth}-{repeat}"
        yield {"id": name, "messages": turns, "gold": {"code": code}, "length": length, "depth": depth}


def _filler(topics: list[str], characters: int, rng: random.Random) -> list[str]:
    """Paragraphs in their order from a random place on, the last one cut to the room."""
    start = rng.randrange(len(topics))
    paragraphs = [part for topic in topics[start:] + topics[:start] for part in topic.split("\n\n")]
    taken: list[str] = []
    room = characters
    while room > 2:
        for part in paragraphs:
            taken.append(part[: room - 2])
            room -= len(taken[-1]) + 2
            if room <= 2:
                break
    return taken
