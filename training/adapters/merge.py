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
from graftwork.training.adapters.merge_spec import MergeSpec, require_deltas

PREFIX = "base_model.model."
MERGED = "merged"


@dataclass(frozen=True)
class MergeSource:
    """One adapter of a merge."""

    ref: str
    config: LoraConfig
    tensors: dict[str, torch.Tensor]

    @classmethod
    def read(cls, ref: str, folder: Path) -> "MergeSource":
        """From a published folder. Raises ArtifactError for what has no delta that could be added."""
        values = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        require_deltas(f"merge {ref}", values)
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


def merge(adapters: Sequence[MergeSource], spec: MergeSpec, out: Path) -> tuple[int, float]:
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
        combination_type="cat" if spec.method == "svd" else spec.method,
        svd_rank=spec.rank,
        svd_full_matrices=False,
        density=spec.density,
    )
    state = get_peft_model_state_dict(model, adapter_name=MERGED, save_embedding_layers=False)
    tensors = {name: tensor.detach().float().contiguous() for name, tensor in state.items()}
    config = model.peft_config[MERGED]
    if spec.method == "svd":
        config, tensors = _compressed(config, tensors, spec.rank or max(one.config.r for one in adapters))
    config.inference_mode = True
    out.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(str(out))
    save_file(tensors, out / WEIGHTS_FILE)
    return config.r, _distance(MergeSource(MERGED, config, tensors), adapters, spec.weights)


def _compressed(
    config: LoraConfig, tensors: dict[str, torch.Tensor], rank: int
) -> tuple[LoraConfig, dict[str, torch.Tensor]]:
    """The nearest adapter of a lower rank, by the singular values of its factors.

    PEFT 0.21 takes those of the whole deltas: the same values, a minute a merge for 135M weights in place of a second.
    """
    small = dict(tensors)
    for key in tensors:
        module, found, _ = key.partition(".lora_B.")
        if found:
            a_RI, b_OR = tensors[f"{module}.lora_A.weight"], tensors[key]
            (q_b, r_b), (q_a, r_a) = torch.linalg.qr(b_OR), torch.linalg.qr(a_RI.T)
            u, s, vh = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
            kept = min(rank, len(s))
            b, a = q_b @ u[:, :kept] * s[:kept], vh[:kept] @ q_a.T
            pad = torch.nn.functional.pad
            small[key] = pad(b, (0, rank - kept)).contiguous()
            small[f"{module}.lora_A.weight"] = pad(a, (0, 0, 0, rank - kept)).contiguous()
    return replace(config, r=rank, lora_alpha=rank), small


def _require_ranks(adapters: Sequence[MergeSource], spec: MergeSpec) -> None:
    ranks = {one.ref: one.config.r for one in adapters}
    if len(set(ranks.values())) > 1 and spec.method != "cat" and not spec.method.endswith("svd"):
        move = "cat or svd" if spec.method == "linear" else f"{spec.method}_svd"
        raise ArtifactError(
            f"merge by {spec.method}",
            "ranks differ: " + ", ".join(f"{ref} has {rank}" for ref, rank in ranks.items()),
            f"{spec.method} adds A to A and B to B",
            f"--method {move}",
        )


def _without_base(adapters: Sequence[MergeSource]) -> PeftModel:
    """A model of nothing but empty linears in the places that the adapters change, with all of them loaded."""
    shapes: dict[str, tuple[int, int]] = {}
    for one in adapters:
        for key in one.tensors:
            module = key.removeprefix(PREFIX).partition(".lora_")[0]
            sides = one.sides(module)
            assert sides is not None, f"{key}: checked when it was published"
            shape = (sides[0].shape[0], sides[1].shape[1])
            if shapes.setdefault(module, shape) != shape:
                raise ArtifactError(
                    f"merge {one.ref}", f"{module} is {list(shape)}", f"in another one it is {list(shapes[module])}"
                )
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


def _distance(merged: MergeSource, adapters: Sequence[MergeSource], weights: Sequence[float]) -> float:
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
