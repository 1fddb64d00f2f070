"""The fused 4-bit matmul against bitsandbytes' own dequantise-then-multiply, within the bound its docstring states."""

from typing import Any

import pytest
import torch

from graftwork.serving.engine.cuda.graph_decode import MOST_ROWS, DecodeLinears, packed_weight
from graftwork.serving.engine.cuda.kernels.nf4 import multiply

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def packed_linear(
    outputs: int, inputs: int, dtype: torch.dtype, *, nested: bool, kind: str = "nf4", block: int = 64
) -> Any:
    """A bitsandbytes Linear4bit with a bias."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    generator = torch.Generator().manual_seed(outputs)
    linear = Linear4bit(inputs, outputs, compute_dtype=dtype, compress_statistics=nested, quant_type=kind)
    weight = torch.randn(outputs, inputs, generator=generator).to(dtype)
    linear.weight = Params4bit(
        weight, requires_grad=False, quant_type=kind, compress_statistics=nested, blocksize=block, module=linear
    )
    linear.bias = torch.nn.Parameter(torch.randn(outputs, generator=generator).to(dtype), requires_grad=False)
    linear.support_avx512bf16_for_cpu = False  # that CPU's kernel wants the weights in another order
    return linear.to(DEVICE).eval()


def unpacked(linear: Any) -> torch.Tensor:
    from bitsandbytes.functional import dequantize_4bit

    weight: torch.Tensor = dequantize_4bit(linear.weight.data, linear.weight.quant_state)
    return weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("rows", "outputs", "inputs", "nested", "kind", "block"),
    [
        (1, 64, 64, False, "nf4", 64),
        (3, 100, 192, True, "nf4", 64),
        (17, 70, 1088, False, "nf4", 64),
        (64, 33, 576, True, "fp4", 64),
        (2, 40, 512, False, "nf4", 256),
    ],
)
def test_product_is_within_the_stated_bound(
    rows: int, outputs: int, inputs: int, nested: bool, kind: str, block: int, dtype: torch.dtype
) -> None:
    linear = packed_linear(outputs, inputs, dtype, nested=nested, kind=kind, block=block)
    x = torch.randn(rows, inputs, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)
    ours = multiply(x, packed_weight(linear.weight), linear.bias)
    weight = unpacked(linear).double()
    exact = x.double() @ weight.T + linear.bias.double()
    summed = x.double().abs() @ weight.abs().T + linear.bias.double().abs()
    bound = inputs * 2**-23 * summed
    if dtype == torch.bfloat16:
        bound = bound + exact.abs() * 2**-8  # the rounding of the result
    assert bool(((ours.double() - exact).abs() <= bound).all())
    assert ours.dtype == dtype


def test_few_decoding_rows_take_the_kernel_and_prompts_stay_bitwise() -> None:
    linear = packed_linear(96, 128, torch.float32, nested=False)
    own = linear.forward
    linears = DecodeLinears()
    forward = linears.forward_of(linear)
    few, many = torch.randn(1, 5, 128, device=DEVICE), torch.randn(1, MOST_ROWS + 1, 128, device=DEVICE)
    assert torch.equal(forward(few), own(few)), "a short prompt is no decode step"
    with linears.decoding():
        fused = forward(few)
        assert torch.equal(forward(many), own(many))
    torch.testing.assert_close(fused, own(few), atol=1e-4, rtol=1e-4)
    assert fused.shape == (1, 5, 96)
    linear.weight.data.zero_()
    with linears.decoding():
        assert not torch.equal(forward(few), fused), "the packed weight is read in place, not a copy of it"


def test_other_linears_keep_their_forward() -> None:
    from bitsandbytes.nn import Linear8bitLt

    plain, eight = torch.nn.Linear(8, 8), Linear8bitLt(64, 8, has_fp16_weights=False)
    assert DecodeLinears().forward_of(plain) == plain.forward
    assert DecodeLinears().forward_of(eight) == eight.forward
    small = packed_linear(8, 64, torch.float32, nested=False, block=32)
    assert DecodeLinears().forward_of(small) == small.forward
