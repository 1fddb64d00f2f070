"""Tokens per second of an engine that decodes so many requests at once, prompts and start left out."""

import random
import threading
import time
from dataclasses import dataclass, field

from graftwork.errors import RunError
from graftwork.serving.engine.types import GenerateRequest, SamplingParams, TokenEvent
from graftwork.serving.engine_protocol import Engine
from graftwork.serving.quantize.spec import SpeedSpec

WAIT_S = 900.0


@dataclass
class _Round:
    """Arrival times of each request's tokens, in order of submission, noted in the engine's thread."""

    rows: int
    stamps: dict[str, list[float]] = field(default_factory=dict)
    ended: int = 0
    error: str | None = None
    over: threading.Event = field(default_factory=threading.Event)

    def note(self, event: TokenEvent) -> None:
        self.stamps.setdefault(event.request_id, []).append(time.perf_counter())
        self.error = event.error or self.error
        self.ended += event.finish_reason is not None
        if self.ended == self.rows:
            self.over.set()


def decode_speed(
    engine: Engine, rows: int, spec: SpeedSpec, *, adapter: str | None, vocab: int, seed: int
) -> list[float]:
    """Tokens per second of `rows` requests at once, one value a round, each with prompts of its own.

    The time between the first and the last token of the request that came in last; the earlier ones answer as much
    longer as they may have come in earlier, so that all rows decode in all of these steps. Raises RunError.
    """
    rng = random.Random(seed)
    return [_one_round(engine, rows, spec, adapter, vocab, rng) for _ in range(spec.rounds)]


def _one_round(
    engine: Engine, rows: int, spec: SpeedSpec, adapter: str | None, vocab: int, rng: random.Random
) -> float:
    seen = _Round(rows)
    for row in range(rows):
        ids = tuple(rng.randrange(vocab) for _ in range(spec.prompt_tokens))
        params = SamplingParams(max_new_tokens=spec.new_tokens + rows - 1 - row)
        engine.submit(GenerateRequest(f"speed-{row}", ids, params, adapter=adapter), seen.note)
    if not seen.over.wait(WAIT_S):
        raise RunError(f"decoding {rows} requests at once", f"not done in {WAIT_S:.0f} s", "", "lower speed.batches")
    if seen.error is not None:
        raise RunError(f"decoding {rows} requests at once", seen.error)
    last = max(seen.stamps.values(), key=lambda stamps: stamps[0])
    return rows * (len(last) - 1) / (last[-1] - last[0])
