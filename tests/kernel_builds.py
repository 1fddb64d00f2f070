"""Compiles every GPU kernel for an H100, to the last step: needs no GPU, for Triton brings LLVM and ptxas along.

python -m tests.kernel_builds         # a JSON line a kernel: registers, spilled bytes, shared memory, tensor cores
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from graftwork.serving.engine.cuda.kernels import attention, elementwise, lora, nf4

H100 = GPUTarget("cuda", 90, 32)
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_INT64 = frozenset({"slots_ptr", "rows_ptr", "table_ptr", "starts_ptr", "caps_ptr", "lengths_ptr"})
_FLOAT = frozenset(
    {"partial_ptr", "scalings_ptr", "stats_ptr", "sums_ptr", "book_ptr", "book2_ptr", "scales2_ptr", "offset_ptr"}
)
_SCALAR = frozenset({"scale", "softcap", "eps"})
_ROUND = frozenset(  # divide by 16 in every model
    {
        "inputs",
        "span",
        "outputs",
        "size",
        "x_stride",
        "out_stride",
        "q_row",
        "q_head",
        "k_row",
        "k_head",
        "v_row",
        "v_head",
    }
)


def builds() -> dict[str, tuple[Any, str, dict[str, str], dict[str, Any]]]:
    """Kernel, dtype, other argument types and constants, by name: Llama-8B shapes."""
    attend = {"WINDOW": False, "SOFTCAP": False, "BLOCK_G": 16, "BLOCK_S": attention._BLOCK_S, "BLOCK_D": 128}
    packed = {"BLOCK": 64, "BLOCK2": 256, "BLOCK_O": nf4._BLOCK_O, "BLOCK_J": nf4._BLOCK_J}
    tile = {"ROWS": 16, "LINES": lora._LINES}
    alone = {"kv_heads": 1, "group": 1}  # Triton takes an argument of 1 for a constant
    limited = {"WINDOW": True, "SOFTCAP": True}
    one: dict[str, str] = {"out_ptr": "*fp32"}
    return {
        "shrink": (lora._shrink_kernel, "bf16", {}, {**tile, "BLOCK_K": lora._BLOCK_K}),
        "shrink fp32": (lora._shrink_kernel, "fp32", {}, {**tile, "BLOCK_K": lora._BLOCK_K}),
        "expand": (lora._expand_kernel, "bf16", {}, {**tile, "BLOCK_O": lora._BLOCK_O, "SPLITS": 16}),
        "write": (attention._write_kernel, "bf16", {}, {"BLOCK_D": 128}),
        "attend": (attention._attend_kernel, "bf16", {}, {**attend, "WHOLE": True}),
        "attend parts": (attention._attend_kernel, "bf16", one, {**attend, "WHOLE": False}),
        "attend window": (attention._attend_kernel, "bf16", {}, {**attend, **limited, "WHOLE": True}),
        "attend alone": (attention._attend_kernel, "bf16", {}, {**attend, "WHOLE": True, **alone}),
        "join": (attention._join_kernel, "bf16", {}, {"BLOCK_P": 16, "BLOCK_D": 128}),
        "norm": (elementwise._norm_kernel, "bf16", {}, {"BLOCK_H": 4096}),
        "gated": (elementwise._gated_kernel, "bf16", {}, {"BLOCK_F": elementwise._BLOCK_F}),
        "nf4 1": (
            nf4._multiply_kernel,
            "bf16",
            {"scales_ptr": "*fp32"},
            {**packed, "NESTED": False, "BIAS": False, "WHOLE": True, "BLOCK_N": 16},
        ),
        "nf4 64": (
            nf4._multiply_kernel,
            "bf16",
            {"scales_ptr": "*u8", **one},
            {**packed, "NESTED": True, "BIAS": False, "WHOLE": False, "BLOCK_N": 64},
        ),
        "nf4 sum": (nf4._sum_kernel, "bf16", {}, {"PARTS": 3, "BIAS": True, "BLOCK_O": 1024}),
    }


def build(kernel: Any, dtype: str, types: Mapping[str, str], constants: Mapping[str, Any]) -> dict[str, Any]:
    """Compiles one kernel and reads what it takes of a multiprocessor."""
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types.get(name, _type(name, dtype)) for name in names}
    aligned = {(n,) for n, name in enumerate(names) if name in _ROUND or signature[name].startswith("*")}
    source = ASTSource(
        kernel,
        signature,
        {(names.index(name),): value for name, value in constants.items()},
        {place: [["tt.divisibility", 16]] for place in aligned},
    )
    compiled = triton.compile(source, target=H100)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [str(_TOOLS / "cuobjdump"), "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None, usage
    mma = "mma.sync" in compiled.asm["ptx"] or "wgmma" in compiled.asm["ptx"]
    return {
        "registers": int(found[1]),
        "spilled": int(found[2]),
        "shared": compiled.metadata.shared,
        "tensor_cores": mma,
    }


def _type(name: str, dtype: str) -> str:
    if name in _INT64:
        return "*i64"
    if name in _FLOAT:
        return "*fp32"
    if name in _SCALAR:
        return "fp32"
    if name == "codes_ptr":
        return "*u8"
    return f"*{dtype}" if name.endswith("_ptr") else "i32"


def main() -> None:
    for name, arguments in builds().items():
        print(json.dumps({"kernel": name, **build(*arguments)}))
        sys.stdout.flush()


if __name__ == "__main__":
    main()
