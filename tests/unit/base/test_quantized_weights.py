"""The kept form of an nf4 base: bit for bit what bitsandbytes gives at load. Source: that very load."""

from pathlib import Path

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from torch.testing._internal.distributed.fake_pg import FakeStore

from graftwork.base import load as base_quantised
from graftwork.base.load import LoadedBase, ResolvedBase, load, resolve
from graftwork.base.source import BaseSpec
from graftwork.errors import BaseModelError
from graftwork.quantization import QuantSpec
from tests.tiny import write_tiny_base


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ResolvedBase:
    """A tiny base that counts as worth keeping, and an empty cache."""
    monkeypatch.setenv("GRAFTWORK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(base_quantised, "WORTH_BYTES", 1)
    return resolve(BaseSpec(uri=str(write_tiny_base(tmp_path / "base"))))


def kept_folders(base: ResolvedBase) -> list[Path]:
    return list((base.folder.parent / "cache" / "quantised").glob("[0-9a-f]*"))


def logits(loaded: LoadedBase) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = loaded.model(torch.arange(3, 67).reshape(4, 16)).logits
    return found


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_kept_weights_equal_those_quantised_at_load(
    base: ResolvedBase, monkeypatch: pytest.MonkeyPatch, double_quant: bool, dtype: str
) -> None:
    quant = QuantSpec(double_quant=double_quant, dtype=dtype)  # type: ignore[arg-type]
    made, read = (load(base, quant, device="cpu", purpose="train") for _ in range(2))
    assert len(kept_folders(base)) == 1
    monkeypatch.setattr(base_quantised, "WORTH_BYTES", 2**40)
    fresh = load(base, quant, device="cpu", purpose="train")
    for kept in (made, read):
        tensors, wanted = kept.model.state_dict(), fresh.model.state_dict()
        assert list(tensors) == list(wanted)
        for name, tensor in wanted.items():
            assert tensors[name].dtype == tensor.dtype, name
            assert torch.equal(tensors[name], tensor), name
        layers = [module for module in kept.model.modules() if isinstance(module, Linear4bit)]
        assert len(layers) == 14
        assert {(layer.compute_dtype, layer.weight.quant_state.dtype) for layer in layers} == {
            (getattr(torch, dtype), getattr(torch, dtype))
        }
        assert torch.equal(logits(kept), logits(fresh))
        assert (kept.stored_bytes, kept.reason) == (fresh.stored_bytes, fresh.reason)


def test_any_rank_may_be_the_one_that_builds(base: ResolvedBase) -> None:
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=1, world_size=2)
    try:
        made, read = (load(base, QuantSpec(), device="cpu", purpose="train") for _ in range(2))
    finally:
        torch.distributed.destroy_process_group()
    assert torch.equal(logits(made), logits(read))


def test_a_form_that_fsdp_can_cut_is_kept_apart(base: ResolvedBase) -> None:
    quant = QuantSpec(dtype="float32")
    plain = load(base, quant, device="cpu", purpose="train")
    for _ in range(2):
        words = load(base, quant, device="cpu", purpose="train", shards="fsdp2")
        assert {module.weight.dtype for module in words.model.modules() if isinstance(module, Linear4bit)} == {
            torch.float32
        }
        assert torch.equal(logits(words), logits(plain))
    assert len(kept_folders(base)) == 2


def test_served_values_are_those_quantised_at_load(base: ResolvedBase, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = load(base, QuantSpec(), device="cpu", purpose="serve")
    monkeypatch.setattr(base_quantised, "WORTH_BYTES", 2**40)
    assert torch.equal(logits(kept), logits(load(base, QuantSpec(), device="cpu", purpose="serve")))


def test_another_base_is_kept_apart(base: ResolvedBase, tmp_path: Path) -> None:
    other = resolve(BaseSpec(uri=str(write_tiny_base(tmp_path / "other", seed=1))))
    first, second = (load(one, QuantSpec(), device="cpu", purpose="train") for one in (base, other))
    assert len(kept_folders(base)) == 2
    assert not torch.equal(logits(first), logits(second))


def test_a_changed_byte_is_refused(base: ResolvedBase) -> None:
    load(base, QuantSpec(), device="cpu", purpose="train")
    (folder,) = kept_folders(base)
    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(BaseModelError, match=f"delete {folder}"):
        load(base, QuantSpec(), device="cpu", purpose="train")
