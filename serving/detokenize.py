"""Token ids become text while they arrive: no half characters, nothing of a stop string.

Log probabilities are released together with the text that their tokens belong to.
"""

import codecs
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass

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


class LogprobStream:
    """Collects the log probabilities of tokens and releases those whose text has been released.

    spell: bytes of a token. silent: tokens that leave no trace in the text (control tokens).
    """

    def __init__(self, spell: Callable[[int], bytes], silent: Container[int]) -> None:
        self._spell, self._silent = spell, silent
        self._characters = codecs.getincrementaldecoder("utf-8")("replace")
        self._length = 0
        self._pending: list[TokenLogprob] = []
        self.released: list[TokenLogprob] = []
        """All that was released."""

    def push(self, event: TokenEvent) -> None:
        """One token of the answer, not one that ends it."""
        spelled = self._spell(event.token_id)
        token = _spelled(spelled, event.logprob)
        top = tuple(_spelled(self._spell(token_id), logprob) for token_id, logprob in event.top)
        self._pending.append(TokenLogprob(token, top, self._length))
        if event.token_id not in self._silent:
            self._length += len(self._characters.decode(spelled))

    def take(self, text_length: int, *, whole: bool = False) -> list[TokenLogprob]:
        """Those that begin within the first `text_length` characters. whole: the answer ended of itself: the rest."""
        ready = self._pending if whole else [one for one in self._pending if one.offset < text_length]
        self._pending = self._pending[len(ready) :]
        self.released += ready
        return ready


def _spelled(spelled: bytes, logprob: float | None) -> Spelled:
    assert logprob is not None, "the request asked for log probabilities"
    return Spelled(tuple(spelled), max(logprob, _UNLIKELY))


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
        """Everything released so far."""
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
        """Return the pending text up to a stop string, without an end that may grow into one."""
        if self.stopped:
            return ""
        self._pending += piece
        ready = len(self._pending)
        if self._stop:
            found = [at for at in (self._pending.find(stop) for stop in self._stop) if at >= 0]
            self.stopped = bool(found)
            ready = min(found) if found else ready - (0 if final else self._open_length())
        released, rest = self._pending[:ready], self._pending[ready:]
        self._pending = "" if self.stopped else rest
        self.text += released
        return released

    def _open_length(self) -> int:
        """Length of the longest end of the pending text that may grow into a stop string."""
        longest = max(len(stop) - 1 for stop in self._stop)
        for size in range(min(longest, len(self._pending)), 0, -1):
            if any(stop.startswith(self._pending[-size:]) for stop in self._stop):
                return size
        return 0
