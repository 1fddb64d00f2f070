"""IA3: learned scales of keys, values and the MLP's inner activations."""

import re
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from graftwork.adapters.kind import FP32, KEYS, MLP_ENDS, VALUES, AdapterKind, ValueBytes, ends

if TYPE_CHECKING:
    from peft import IA3Config

    from graftwork.base.model_shape import ModelShape

FACTOR_KEY = re.compile(r"(?P<module>.+)\.ia3_l")
"""Names of the tensors, after PEFT's prefix."""


class Ia3Spec(AdapterKind):
    """Learned scales of keys, values and the MLP's inner activations (IA3, arXiv 2205.05638)."""

    peft_type: ClassVar[str] = "IA3"
    trains_matrices: ClassVar[bool] = False
    learning_rates: ClassVar[tuple[float, float]] = (1e-3, 1e-1)
    """3e-3 in its paper. Measured on SmolLM2-135M, short runs (docs/guide-training.md): 2e-2."""
    trains_score_head: ClassVar[bool] = True

    kind: Literal["ia3"] = "ia3"

    def describe(self) -> str:
        """Return the adapter in a few words."""
        return "IA3"

    def peft_config(self, model: Any) -> "IA3Config":
        """Return PEFT's IA3 with the targets of the paper. Raises ConfigError where the model has no such layers.

        PEFT's own choice of targets scales queries in place of keys for some families.
        """
        from peft import IA3Config

        inner = ends("adapter.kind=ia3", MLP_ENDS, model)
        sides = [*ends("adapter.kind=ia3", KEYS, model), *ends("adapter.kind=ia3", VALUES, model)]
        return IA3Config(target_modules=[*sides, *inner], feedforward_modules=inner, task_type="CAUSAL_LM")

    def trained_params(self, model: "ModelShape") -> int:
        """Return the scales of keys and values, and of the input of the MLP's last linear."""
        sides = sum(linear.count * linear.outputs for linear in model.match_layers((*KEYS, *VALUES)))
        return sides + sum(linear.count * linear.inputs for linear in model.match_layers(MLP_ENDS))

    def saved_bytes(self, model: "ModelShape", size: ValueBytes) -> float:
        """Return the bytes of keys and values before they are scaled, and of the input of down in fp32."""
        return 2 * model.kv_size * size.base + model.intermediate * FP32
