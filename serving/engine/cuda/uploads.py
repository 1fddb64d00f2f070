"""Brings adapters to the device on a side stream; a step waits for a copy where the adapter is first used."""

from collections.abc import Callable, Iterable

import torch

from graftwork.serving.engine.slots import LoadedAdapter


class Uploads:
    """Copies under way. The engine's thread alone uses it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._pending: dict[LoadedAdapter, torch.cuda.Event] = {}

    def bring(self, move: Callable[[], LoadedAdapter]) -> LoadedAdapter:
        """The adapter that `move` copies. Returns before the copy has ended.

        The side stream first waits for the work queued so far: the copy may go into memory that an adapter has just
        left, and that a prompt of it may still be reading.
        """
        if self._stream is None:
            return move()
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            weights = move()
            self._pending[weights] = torch.cuda.Event()
            self._pending[weights].record(self._stream)
        return weights

    def wait_uploads(self, adapters: Iterable[LoadedAdapter | None]) -> None:
        """Orders the current stream after the copies of these adapters."""
        for weights in adapters:
            if weights is not None and weights in self._pending:
                torch.cuda.current_stream(self._device).wait_event(self._pending.pop(weights))

    def forget(self, version: str) -> None:
        """Drops the reference to an adapter that has left the device before it was ever used."""
        self._pending = {one: event for one, event in self._pending.items() if one.version != version}
