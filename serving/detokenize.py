"""Log probabilities of an answer's tokens, told together with the text that they belong to."""

import codecs
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from graftwork.serving.engine.request import TokenEvent

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


# Token ids become text while they arrive: no half characters, nothing of a stop string.


HOLE = "\ufffd"
"""What a decoder writes for bytes that are no character yet."""


class TextStream:
    """The text of one growing answer. All pieces joined equal the text of `finish`'s whole answer.

    Only the last few tokens are decoded again with each new one. Those before `_sent_ids` are there for their context:
    some tokenizers write the first token of a text differently (without its leading space).
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stop: Sequence[str] = ()) -> None:
        self._decode, self._stop = decode, tuple(stop)
        self._ids: list[int] = []
        self._start, self._sent_ids = 0, 0
        self._pending = ""
        self.text = ""
        """Everything given out so far."""
        self.stopped = False
        """A stop string was met; what follows it is dropped."""

    def push(self, token_id: int) -> str:
        """The text that is certain now that this token came; often empty."""
        self._ids.append(token_id)
        before = self._decode(self._ids[self._start : self._sent_ids])
        now = self._decode(self._ids[self._start :])
        if now.endswith(HOLE) or len(now) <= len(before):
            return ""
        self._start, self._sent_ids = self._sent_ids, len(self._ids)
        return self._give(now[len(before) :], final=False)

    def finish(self) -> str:
        """What was held back, once no more tokens come. An unfinished character stays as the decoder's replacement."""
        before = self._decode(self._ids[self._start : self._sent_ids])
        rest = self._decode(self._ids[self._start :])[len(before) :]
        return self._give(rest, final=True)

    def _give(self, piece: str, *, final: bool) -> str:
        if self.stopped:
            return ""
        self._pending += piece
        cut = min((at for at in (self._pending.find(stop) for stop in self._stop) if at >= 0), default=-1)
        if cut >= 0:
            self.stopped, ready, self._pending = True, self._pending[:cut], ""
        else:
            held = 0 if final else self._held_length()
            ready, self._pending = (
                self._pending[: len(self._pending) - held],
                self._pending[len(self._pending) - held :],
            )
        self.text += ready
        return ready

    def _held_length(self) -> int:
        """Length of the longest end of the pending text that may grow into a stop string."""
        longest = max((len(stop) - 1 for stop in self._stop), default=0)
        for size in range(min(longest, len(self._pending)), 0, -1):
            if any(stop.startswith(self._pending[-size:]) for stop in self._stop):
                return size
        return 0
