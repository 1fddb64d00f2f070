"""Log probabilities of an answer's tokens, told together with the text that they belong to."""

import codecs
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from typing import Any

from graftwork.serving.engine.types import TokenEvent

_UNLIKELY = -9999.0
"""Stands for minus infinity, which JSON lacks; the OpenAI API's own stand-in."""


@dataclass(frozen=True, slots=True)
class Spelled:
    """A token as bytes, and its log probability."""

    bytes: tuple[int, ...]
    logprob: float

    @property
    def text(self) -> str:
        r"""The token as text; bytes that are no character alone as `\xe2`."""
        return bytes(self.bytes).decode("utf-8", "backslashreplace")


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """One token of the answer."""

    token: Spelled
    top: tuple[Spelled, ...]
    """The most probable tokens at its place, best first."""
    offset: int
    """Characters of the answer before it."""

    @classmethod
    def load(cls, tree: Mapping[str, Any]) -> "TokenLogprob":
        """From `asdict`, or from its JSON."""
        return cls(_load(tree["token"]), tuple(_load(one) for one in tree["top"]), tree["offset"])


class LogprobStream:
    """Collects the tokens' log probabilities and gives out those whose text has been given out.

    spell: bytes of a token. silent: tokens that leave no trace in the text (control tokens).
    """

    def __init__(self, spell: Callable[[int], bytes], silent: Container[int]) -> None:
        self._spell, self._silent = spell, silent
        self._characters = codecs.getincrementaldecoder("utf-8")("replace")
        self._length = 0
        self._held: list[TokenLogprob] = []
        self.told: list[TokenLogprob] = []
        """All that was given out."""

    def push(self, event: TokenEvent) -> None:
        """One token of the answer, not one that ends it."""
        spelled = self._spell(event.token_id)
        token = _spelled(spelled, event.logprob)
        top = tuple(_spelled(self._spell(token_id), logprob) for token_id, logprob in event.top)
        self._held.append(TokenLogprob(token, top, self._length))
        if event.token_id not in self._silent:
            self._length += len(self._characters.decode(spelled))

    def take(self, text_length: int, *, whole: bool = False) -> list[TokenLogprob]:
        """Those that begin within the first `text_length` characters. whole: the answer ended of itself: the rest."""
        ready = self._held if whole else [one for one in self._held if one.offset < text_length]
        self._held = self._held[len(ready) :]
        self.told += ready
        return ready


def _spelled(spelled: bytes, logprob: float | None) -> Spelled:
    assert logprob is not None, "the request asked for log probabilities"
    return Spelled(tuple(spelled), max(logprob, _UNLIKELY))


def _load(tree: Mapping[str, Any]) -> Spelled:
    return Spelled(tuple(tree["bytes"]), tree["logprob"])
