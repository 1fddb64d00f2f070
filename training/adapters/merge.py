"""LoRA adapters merged into one, by PEFT's `add_weighted_adapter`, without their base: deltas need its shapes alone."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file

from graftwork.artifact_check import CONFIG_FILE, WEIGHTS_FILE
from graftwork.errors import ArtifactError
from graftwork.training.adapters.merge_spec import MergeSpec

PREFIX = "base_model.model."
MERGED = "merged"
_NO_SUM = {
    "use_dora": "DoRA's magnitudes are no part of a sum",
    "modules_to_save": "whole trained modules are not added",
    "trainable_token_indices": "trained token rows are not added",
    "lora_bias": "biases are not added",
    "rank_pattern": "ranks that differ by layer are not added",
    "alpha_pattern": "scales that differ by layer are not added",
}


@dataclass(frozen=True)
class Lora:
    """One adapter of a merge."""

    ref: str
    config: LoraConfig
    tensors: dict[str, torch.Tensor]

    @classmethod
    def read(cls, ref: str, folder: Path) -> "Lora":
        """From a published folder. Raises ArtifactError for what has no delta that could be added."""
        values = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        if values["peft_type"] != "LORA":
            raise _not_added(ref, f"it is {values['peft_type']}", "only LoRA's deltas of weights can be added up")
        for key, why in _NO_SUM.items():
            if values.get(key):
                raise _not_added(ref, f"{key}={values[key]}", why)
        config = LoraConfig.from_pretrained(str(folder))
        # PEFT keeps use_rslora and sets alpha to the new rank, which multiplies the result by its square root
        alpha = config.lora_alpha * math.sqrt(config.r) if config.use_rslora else config.lora_alpha
        plain = replace(config, use_rslora=False, lora_alpha=alpha, lora_dropout=0.0, fan_in_fan_out=False)
        return cls(ref, plain, load_file(folder / WEIGHTS_FILE))

    @property
    def scale(self) -> float:
        """What B·A is multiplied by."""
        return float(self.config.lora_alpha / self.config.r)

    def sides(self, module: str) -> tuple[torch.Tensor, torch.Tensor] | None:
        """B and A of a module in fp32; None where the adapter has none there."""
        found = (self.tensors.get(f"{PREFIX}{module}.lora_{side}.weight") for side in "BA")
        b, a = found
        return None if b is None or a is None else (b.float(), a.float())


def merge(adapters: Sequence[Lora], spec: MergeSpec, out: Path) -> tuple[int, float]:
    """Write the merged adapter to folder `out`; its rank, and how far its delta lies from the weighted sum of theirs.

    The distance is relative, in the Frobenius norm over all modules: 0 is the sum itself. Raises ArtifactError for
    ranks that the method can't add.
    """
    _require_ranks(adapters, spec)
    model = _without_base(adapters)
    torch.manual_seed(spec.seed)
    model.add_weighted_adapter(
        [f"a{number}" for number in range(len(adapters))],
        list(spec.weights),
        MERGED,
        combination_type=spec.method,
        svd_rank=spec.rank,
        svd_full_matrices=False,
        density=spec.density,
    )
    state = get_peft_model_state_dict(model, adapter_name=MERGED, save_embedding_layers=False)
    tensors = {name: tensor.detach().float().contiguous() for name, tensor in state.items()}
    config = model.peft_config[MERGED]
    config.inference_mode = True
    out.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(str(out))
    save_file(tensors, out / WEIGHTS_FILE)
    return config.r, _distance(Lora(MERGED, config, tensors), adapters, spec.weights)


def _require_ranks(adapters: Sequence[Lora], spec: MergeSpec) -> None:
    ranks = {one.ref: one.config.r for one in adapters}
    if len(set(ranks.values())) > 1 and spec.method != "cat" and not spec.method.endswith("svd"):
        move = "cat or svd" if spec.method == "linear" else f"{spec.method}_svd"
        raise ArtifactError(
            f"merge by {spec.method}",
            "ranks differ: " + ", ".join(f"{ref} has {rank}" for ref, rank in ranks.items()),
            f"{spec.method} adds A to A and B to B",
            f"--method {move}",
        )


def _without_base(adapters: Sequence[Lora]) -> PeftModel:
    """A model of nothing but empty linears in the places that the adapters change, with all of them loaded."""
    shapes: dict[str, tuple[int, int]] = {}
    for one in adapters:
        for key in one.tensors:
            module = key.removeprefix(PREFIX).partition(".lora_")[0]
            sides = one.sides(module)
            assert sides is not None, f"{key}: checked when it was published"
            shape = (sides[0].shape[0], sides[1].shape[1])
            if shapes.setdefault(module, shape) != shape:
                raise _not_added(one.ref, f"{module} is {list(shape)}", f"in another one it is {list(shapes[module])}")
    model = PeftModel(_skeleton(shapes), adapters[0].config, adapter_name="a0")
    for number, one in enumerate(adapters):
        if number:
            model.add_adapter(f"a{number}", one.config)
        outcome = set_peft_model_state_dict(model, one.tensors, adapter_name=f"a{number}")
        assert not outcome.unexpected_keys, f"{one.ref}: {outcome.unexpected_keys[:3]}"
    return model


def _skeleton(shapes: dict[str, tuple[int, int]]) -> torch.nn.Module:
    root = torch.nn.Module()
    for name, (rows, columns) in shapes.items():
        *way, last = name.split(".")
        parent = root
        for part in way:
            if part not in dict(parent.named_children()):
                parent.add_module(part, torch.nn.Module())
            parent = parent.get_submodule(part)
        linear = torch.nn.Linear(columns, rows, bias=False, device="meta")
        linear.weight = torch.nn.Parameter(torch.zeros(1).expand(rows, columns), requires_grad=False)  # 4 bytes
        parent.add_module(last, linear)
    return root


def _distance(merged: Lora, adapters: Sequence[Lora], weights: Sequence[float]) -> float:
    off, whole = 0.0, 0.0
    modules = {key.removeprefix(PREFIX).partition(".lora_")[0] for key in merged.tensors}
    for module in modules:
        ours = merged.sides(module)
        assert ours is not None, "a merge has both sides of each module"
        delta = ours[0] @ ours[1] * merged.scale
        wanted = torch.zeros_like(delta)
        for one, weight in zip(adapters, weights, strict=True):
            if sides := one.sides(module):
                wanted += sides[0] @ sides[1] * (one.scale * weight)
        off, whole = off + float((delta - wanted).square().sum()), whole + float(wanted.square().sum())
    return math.sqrt(off / whole) if whole else 0.0


def _not_added(ref: str, found: str, why: str) -> ArtifactError:
    return ArtifactError(f"merge {ref}", found, why, "merge plain LoRA adapters of one base, or train one on both data")
