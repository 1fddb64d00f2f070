"""bitsandbytes' fp4: its bytes, a training run on it, and an engine that answers as PEFT does on the same weights."""

import sys
from pathlib import Path

from graftwork.base import load as base_model
from graftwork.base.model_shape import ModelShape
from graftwork.planning.memory import weight_bytes
from graftwork.quantization import PRECISIONS, QuantSpec
from tests.docs.extending.common import check_served_as_peft, require_copy, small_task, train_and_fetch

TABLE_BYTES = 160
"""bitsandbytes' table and settings of one layer."""


def main(work: Path) -> None:
    require_copy(work)
    assert QuantSpec.model_validate("fp4") in PRECISIONS.values()
    spec = small_task(work, quant={"kind": "fp4", "dtype": "float32"})
    base = base_model.resolve(spec.base)
    shape = ModelShape.from_config(base.config)
    loaded = base_model.load(base, spec.quant, device="cpu", purpose="train")
    more = loaded.stored_bytes - weight_bytes(shape, spec.quant)
    assert 0 <= more <= TABLE_BYTES * sum(linear.count for linear in shape.linears), more
    packed = [module.weight for module in loaded.model.modules() if type(module).__name__ == "Linear4bit"]
    assert {weight.quant_state.quant_type for weight in packed} == {"fp4"}
    check_served_as_peft(spec, train_and_fetch(spec))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
