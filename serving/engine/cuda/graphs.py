"""How a step is kept: as a CUDA graph, or as the function itself."""

import logging
from collections.abc import Callable

import torch

_log = logging.getLogger(__name__)

Step = Callable[[], torch.Tensor]
"""Computes one decode step from what `StepInputs` holds; returns the logits [rows, V], valid until the next step."""
Capture = Callable[[Step], Step]
"""Makes a step quick to repeat."""

_MOVING_ROPE = ("dynamic", "longrope")


def direct(step: Step) -> Step:
    """The step as it is: the same kernels, launched one by one from Python (about 45 ms for 32 layers)."""
    return step


class GraphCapture:
    """Records a step's kernels once and replays them with one call. One memory pool serves all graphs of an engine.

    Steps never overlap and a step's logits are read before the next one, so graphs may share their intermediates. A
    model that asks the device something in the middle of a step cannot be recorded: it is said, and its steps run as
    they are.
    """

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._refused = False

    def __call__(self, step: Step) -> Step:
        if self._refused:
            return direct(step)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # first call: compiles kernels, picks algorithms, fills caches
            step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):  # others load adapters
                logits = step()
        except RuntimeError as error:  # what CUDA raises for a step that waits for the device
            _log.warning("decoding without CUDA graphs, about 10 times slower: this model's step waits (%s)", error)
            self._refused = True
            return direct(step)

        def replay() -> torch.Tensor:
            graph.replay()
            return logits

        return replay


def reads_positions_on_host(config: object) -> str | None:
    """The kind of RoPE that asks the device for the longest position every step, which no graph can hold; or None."""
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [rope.get("rope_type")] if "rope_type" in rope else [one.get("rope_type") for one in rope.values() if one]
    return next((kind for kind in kinds if kind in _MOVING_ROPE), None)
