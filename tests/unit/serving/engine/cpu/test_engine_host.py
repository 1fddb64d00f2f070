"""What is done for speed on a CPU changes no result."""

import gc
import sys

import pytest
import torch

from graftwork.serving.engine.cpu.host_tuning import PiecewiseOutput, keep_freed_memory, spare_old_objects


@pytest.mark.parametrize("vocab", [8192, 10_000])
@pytest.mark.parametrize("rows", [0, 1, 7, 128, 129])
def test_a_tall_output_layer_in_pieces_is_the_same_layer(vocab: int, rows: int) -> None:
    layer = torch.nn.Linear(64, vocab, bias=False)
    x = torch.randn(1, rows, 64, generator=torch.Generator().manual_seed(rows))
    with torch.inference_mode():
        expected = layer(x)
        pieces = PiecewiseOutput(layer)
        assert torch.allclose(layer(x), expected, atol=1e-5)
        pieces.on = False
        assert torch.equal(layer(x), expected)
        pieces.unhook()
    assert "forward" not in vars(layer)


@pytest.mark.parametrize("layer", [torch.nn.Linear(8, 300, bias=False), torch.nn.Linear(8, 9000), None])
def test_other_output_layers_are_left_alone(layer: torch.nn.Module | None) -> None:
    PiecewiseOutput(layer)
    assert layer is None or "forward" not in vars(layer)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mallopt is glibc's")
def test_freed_memory_is_kept_for_the_next_step() -> None:
    import resource

    assert keep_freed_memory()
    for _ in range(2):
        torch.empty(4_000_000).fill_(1.0)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.empty(4_000_000).fill_(1.0)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < 4_000_000 * 4 / 4096


def test_objects_that_a_process_has_frozen_stay_frozen() -> None:
    """The first call is an engine's in a usual process; the second one's, here each other test's, is left as it is."""
    gc.unfreeze()
    old: list[object] = [[]]
    assert spare_old_objects()
    assert gc.get_freeze_count() > 100_000
    new: list[object] = [[]]
    assert not spare_old_objects()
    searched = {id(one) for one in gc.get_objects()}
    assert id(old) not in searched, "frozen by the first call"
    assert id(new) in searched, "not by the second"
