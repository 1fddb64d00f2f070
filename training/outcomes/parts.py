"""What a model is asked, as token ids, and what it said. Plain records: the driver makes them, workers answer them."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from graftwork.memory.sizes import BATCH_ROWS, BATCH_TOKENS, TokenWork


@dataclass(frozen=True)
class Item:
    """One question: continuations are weighed, or an answer is written, or both."""

    id: str
    prompt: tuple[int, ...]
    """At least one token."""
    continuations: tuple[tuple[int, ...], ...] = ()
    write: int = 0
    """Most tokens to be written; 0: none."""

    @property
    def tokens(self) -> int:
        """What it costs, roughly: tokens that are computed."""
        return sum(len(self.prompt) + len(one) for one in self.continuations) + 8 * self.write


@dataclass(frozen=True)
class ItemGroup:
    """Questions of one kind. Picklable."""

    name: str
    items: tuple[Item, ...]
    stop_ids: tuple[int, ...]
    pad_id: int

    def digest(self) -> str:
        """sha256 hex over what is asked: equal digests, equal questions in equal tokens."""
        asked = [(item.id, item.prompt, item.continuations, item.write) for item in self.items]
        return hashlib.sha256(repr((self.name, asked, sorted(self.stop_ids))).encode()).hexdigest()


@dataclass(frozen=True)
class ItemOutput:
    """What a model made of one item."""

    logprobs: tuple[float, ...] = ()
    """Of each continuation: summed over its tokens, in nats."""
    text: str = ""
    """Written greedily, special tokens left out."""

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> "ItemOutput":
        """From what `as_dict` gave, through JSON."""
        return cls(tuple(record["logprobs"]), record["text"])


def work_of(parts: Sequence[ItemGroup]) -> TokenWork:
    """The work of measuring these parts once."""
    items = [item for part in parts for item in part.items]
    weighed = [(len(item.prompt) + len(one), len(one)) for item in items for one in item.continuations]
    asked = [(len(item.prompt), item.write) for item in items if item.write]
    steps = sum(write / min(BATCH_ROWS, max(1, BATCH_TOKENS // (prompt + write))) for prompt, write in asked)
    return TokenWork(
        sum(all_ for all_, _ in weighed),
        sum(one for _, one in weighed),
        sum(prompt for prompt, _ in asked),
        sum(write for _, write in asked),
        steps,
    )


def shares(items: Sequence[Item], rank: int, world: int) -> list[int]:
    """Places of the items that a rank takes: dealt by cost, so that all are ready at about the same time."""
    return sorted(range(len(items)), key=lambda at: -items[at].tokens)[rank::world]
