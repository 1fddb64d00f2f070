"""Norms and gated MLPs of a decode step: transformers' own modules, one kernel each, the same roundings."""

from typing import Any

import pytest
import torch

from graftwork.serving.engine.cpu.kernels import kernels_for
from graftwork.serving.engine.cuda.kernels import elementwise
from graftwork.serving.engine.model_runner import DecodeLayers, RowKernels

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SIZES = {
    "hidden_size": 72,
    "intermediate_size": 100,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 20,
    "vocab_size": 50,
    "pad_token_id": 0,
}


def tiny(kind: str, dtype: torch.dtype) -> Any:
    """A random model whose norms have random weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZES), dtype=dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.normal_()
    return model.to(DEVICE)


def kernels(of: str, dtype: torch.dtype) -> RowKernels:
    """Triton's, or those in C; skips where this machine has none."""
    if of == "triton":
        return elementwise
    found = kernels_for(dtype)
    if found is None or DEVICE.type != "cpu":
        pytest.skip("needs a C compiler and AVX-512")
    return found


@pytest.mark.parametrize("of", ["triton", "c"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_llamas_norms_and_mlps_give_the_same_results(dtype: torch.dtype, of: str) -> None:
    model = tiny("llama", dtype)
    layers = DecodeLayers(model, dtype, kernels(of, dtype))
    assert (len(layers.norms), len(layers.mlps)) == (5, 2)
    x = torch.randn(1, 3, 72, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)
    modules = [model.model.norm, model.model.layers[1].mlp]
    with torch.inference_mode():
        before = [module(x) for module in modules]
        with layers.decoding():
            inside = [module(x) for module in modules]
        after = [module(x) for module in modules]
    bound = 1e-5 if dtype == torch.float32 else 2**-7
    for old, new, again in zip(before, inside, after, strict=True):
        torch.testing.assert_close(new, old, atol=bound, rtol=bound)
        assert float((new == old).float().mean()) > (0.1 if dtype == torch.float32 else 0.9), "the same roundings"
        assert torch.equal(again, old)
    assert all("forward" not in module.__dict__ for module in model.modules())


@pytest.mark.parametrize(("kind", "norms", "mlps"), [("qwen3", 9, 2), ("gemma2", 0, 0), ("phi3", 5, 0)])
def test_modules_that_compute_something_else_are_left_alone(kind: str, norms: int, mlps: int) -> None:
    layers = DecodeLayers(tiny(kind, torch.float32), torch.float32, elementwise)
    assert (len(layers.norms), len(layers.mlps)) == (norms, mlps)


def test_a_step_that_fails_leaves_the_modules_as_they_were() -> None:
    model = tiny("llama", torch.float32)
    layers = DecodeLayers(model, torch.float32, elementwise)
    with pytest.raises(ZeroDivisionError), layers.decoding():
        _ = 1 / 0
    assert all("forward" not in module.__dict__ for module in model.modules())


class GatedNorm(torch.nn.Module):
    """A norm that has another argument, as Qwen3-Next's: called with its input alone, it raises."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = torch.nn.Parameter(torch.ones(32)), 1e-6

    def forward(self, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.rms_norm(x, (32,), self.weight, self.variance_epsilon) * gate


class ClampedMlp(torch.nn.Module):
    """A gated MLP that clamps, which usual values do not show."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = torch.nn.Linear(32, 48, bias=False), torch.nn.Linear(32, 48, bias=False)
        self.down_proj, self.act_fn = torch.nn.Linear(48, 32, bias=False), torch.nn.SiLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x).clamp(-16, 16))
        return result


def test_gated_norms_and_clamped_mlps_are_left_alone() -> None:
    layers = DecodeLayers(torch.nn.ModuleList([GatedNorm(), ClampedMlp()]).eval(), torch.float32, elementwise)
    assert (layers.norms, layers.mlps) == ([], [])
