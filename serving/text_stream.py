"""Token ids become text while they arrive: no half characters, nothing of a stop string."""

from collections.abc import Callable, Sequence

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
