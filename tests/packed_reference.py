"""Values of the packings of `tests.packed_checkpoints` by each format's own library, as digests for a committed test.

Run it where compressed-tensors 0.20.1, torchao 0.18.0, AutoAWQ 0.2.9 and AutoGPTQ 0.7.1 (their sources are enough) can
be imported: `python -m tests.packed_reference` prints the table `REFERENCE_DIGESTS` of tests/unit/prequantized.
"""

import importlib
import importlib.util
import json
from typing import Any

import torch

from tests.packed_checkpoints import PACKINGS, Packing, Tensors, ct_settings, digest, sample_weight


def compressed_tensors(packing: Packing, parts: Tensors) -> torch.Tensor:
    """`decompress` of the format's compressor."""
    compressors = importlib.import_module("compressed_tensors.compressors")
    quantization = importlib.import_module("compressed_tensors.quantization")
    group = packing.settings["config_groups"]["group_0"]
    scheme = quantization.QuantizationScheme(targets=["Linear"], weights=group["weights"])
    compressor = compressors.BaseCompressor.get_value_from_registry(packing.settings["format"])
    given = {name: part for name, part in parts.items() if name != "input_scale"}
    plain: torch.Tensor = compressor.decompress(given, scheme)["weight"]
    return plain


def fp8(packing: Packing, parts: Tensors) -> torch.Tensor:
    """`Fp8Dequantize` of transformers, to fp32; blocks that do not divide the weight by compressed-tensors."""
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    scale = parts.get("weight_scale_inv", parts.get("weight_scale"))
    assert scale is not None
    block = packing.settings.get("weight_block_size")
    if block and any(size % one for size, one in zip(parts["weight"].shape, block, strict=True)):
        settings = ct_settings("float-quantized", num_bits=8, type="float", strategy="block", block_structure=block)
        return compressed_tensors(Packing(settings, packing.pack), {"weight": parts["weight"], "weight_scale": scale})
    grid = scale.reshape(1, 1) if scale.dim() == 0 else scale
    plain: torch.Tensor = Fp8Dequantize(None)._dequantize_one(parts["weight"], grid, torch.float32)
    return plain


def awq(packing: Packing, parts: Tensors) -> torch.Tensor:
    """`dequantize_gemm` of AutoAWQ, [I, O]."""
    module = _source("awq.utils.packing_utils")
    plain = module.dequantize_gemm(
        parts["qweight"], parts["qzeros"], parts["scales"], 4, packing.settings["group_size"]
    )
    found: torch.Tensor = plain.t()
    return found


def gptq(packing: Packing, parts: Tensors) -> torch.Tensor:
    """A product of AutoGPTQ's `QuantLinear` with the identity, whose sums have one term."""
    module = _source("auto_gptq.nn_modules.qlinear.qlinear_cuda")
    inputs, outputs = len(parts["g_idx"]), parts["scales"].shape[1]
    layer = module.QuantLinear(
        packing.settings["bits"], packing.settings["group_size"], inputs, outputs, False, weight_dtype=torch.float16
    )
    layer.load_state_dict(parts)
    plain: torch.Tensor = layer(torch.eye(inputs, dtype=torch.float16)).t()
    return plain


def torchao(packing: Packing, parts: Tensors) -> torch.Tensor:
    """`dequantize` of torchao's tensor class, to fp32 where the class leaves the choice."""
    library, int4 = importlib.import_module("torchao.quantization"), getattr(torch, "int4")  # noqa: B009  (no stub)
    assert packing.header is not None
    kind = json.loads(packing.header("w"))["_type"]
    data, scale, zero = (parts.get(f"_weight_{name}") for name in ("qdata", "scale", "zero_point"))
    assert data is not None
    assert scale is not None
    block = [1, data.shape[1] // scale.shape[1]]
    if kind == "Int8Tensor":
        plain = library.Int8Tensor(data, scale, block, torch.bfloat16, zero_point=zero).dequantize(torch.float32)
    elif kind == "Float8Tensor":
        plain = library.Float8Tensor(data, scale, block_size=block, dtype=torch.bfloat16).dequantize(torch.float32)
    else:
        plain = library.IntxUnpackedToInt8Tensor(data, scale, zero, int4, block, torch.bfloat16, None).dequantize()
    found: torch.Tensor = plain
    return found


def _source(name: str) -> Any:
    """One module of a package, without the package's own imports."""
    top, _, rest = name.partition(".")
    spec = importlib.util.find_spec(top)
    assert spec is not None
    assert spec.submodule_search_locations
    path = f"{spec.submodule_search_locations[0]}/{rest.replace('.', '/')}.py"
    loaded = importlib.util.spec_from_file_location(name.replace(".", "_"), path)
    assert loaded is not None
    assert loaded.loader is not None
    module = importlib.util.module_from_spec(loaded)
    loaded.loader.exec_module(module)
    return module


LIBRARIES = {
    "compressed-tensors": compressed_tensors,
    "fp8": fp8,
    "awq": awq,
    "gptq": gptq,
    "torchao": torchao,
}


def main() -> None:
    """Print the table."""
    for name, packing in PACKINGS.items():
        library = LIBRARIES.get(packing.settings["quant_method"])
        if library is None:
            continue
        try:
            found = digest(library(packing, packing.pack(sample_weight())))
            print(f'    "{name}": "{found}",')
        except Exception as error:
            print(f"    # {name}: {type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
