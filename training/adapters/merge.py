"""LoRA adapters merged into one by PEFT's `add_weighted_adapter`, and published as a new version.

Without the base, a GPU or a cluster: deltas need only the shapes of the base.
"""

import hashlib
import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file

from graftwork import environment
from graftwork.artifacts.manifest import AdapterManifest
from graftwork.artifacts.publish import fetch, publish
from graftwork.artifacts.registry import resolve
from graftwork.artifacts.verify import CONFIG_FILE, WEIGHTS_FILE
from graftwork.config import canonical_json
from graftwork.errors import ArtifactError, ConfigError
from graftwork.prompts.render import PromptSpec
from graftwork.quantization import import_bitsandbytes
from graftwork.storage.store import Store

SUMS = ("cat", "svd", "linear")
PRUNED = ("ties", "dare_linear", "dare_ties", "magnitude_prune")
METHODS = (*SUMS, *PRUNED, *(f"{name}_svd" for name in PRUNED))
DENSITY = 0.5
_NO_SUM = {
    "use_dora": "DoRA's magnitudes are no part of a sum",
    "modules_to_save": "whole trained modules are not added",
    "trainable_token_indices": "trained token rows are not added",
    "lora_bias": "biases are not added",
    "rank_pattern": "ranks that differ by layer are not added",
    "alpha_pattern": "scales that differ by layer are not added",
    "target_parameters": "adapters of experts and of the layers next to them are not added",
}


@dataclass(frozen=True)
class MergeSpec:
    """One merge of n adapters."""

    method: str
    """cat: the weighted sum itself, as one adapter of all ranks together. svd: the nearest to it of a lower rank.
    linear: A and B summed on their own, so products of different adapters come in. ties, dare_*, magnitude_prune
    (arXiv 2306.01708, 2311.03099): small or random entries of A and B are dropped first, or with _svd those of the
    whole deltas."""
    weights: tuple[float, ...]
    density: float | None = None
    """Share of the entries that is kept; of the pruning methods."""
    rank: int | None = None
    """Of the result; of the methods that end in svd."""
    seed: int = 0
    """Of the entries that dare drops."""

    @classmethod
    def create(
        cls, method: str, count: int, weights: Sequence[float], density: float | None, rank: int | None, seed: int
    ) -> "MergeSpec":
        """Checked, defaults filled in: equal shares that sum to 1. Raises ConfigError."""
        if method not in METHODS:
            raise ConfigError(f"--method {method}", "no such method", f"methods are {', '.join(METHODS)}")
        if count < 2:
            raise ConfigError("merge", f"{count} adapter given", "a merge takes at least two", "name another one")
        if weights and len(weights) != count:
            raise ConfigError(
                f"--weights {','.join(f'{weight:g}' for weight in weights)}",
                f"{len(weights)} weights for {count} adapters",
                "one weight an adapter, in their order",
            )
        if not any(weights) and weights:
            raise ConfigError("--weights", "all are 0", "something must be left of the adapters")
        pruning = any(method.startswith(name) for name in PRUNED)
        if density is not None and not (pruning and 0 < density <= 1):
            rule = "a share above 0, up to 1" if pruning else f"it is of {', '.join(PRUNED)}"
            raise ConfigError(f"--density {density:g} with --method {method}", "it can't take effect", rule)
        if rank is not None and not (method.endswith("svd") and rank > 0):
            rule = "it is of the methods that end in svd, and above 0"
            raise ConfigError(f"--rank {rank} with --method {method}", "it can't take effect", rule)
        shares = tuple(weights) or (1 / count,) * count
        return cls(method, shares, density if density is not None else DENSITY if pruning else None, rank, seed)

    def record(self) -> dict[str, Any]:
        """As the manifest keeps it."""
        kept: dict[str, Any] = {"method": self.method, "weights": list(self.weights)}
        kept |= {"density": self.density} if self.density is not None else {}
        return kept | ({"seed": self.seed} if self.method.startswith("dare") else {})


def require_deltas(asked: str, config: Mapping[str, Any]) -> None:
    """Raise ArtifactError unless an adapter_config.json is that of plain deltas, which can be added up."""
    found, why = "", ""
    if config["peft_type"] != "LORA":
        found, why = f"it is {config['peft_type']}", "only LoRA's deltas of weights can be added up"
    for key, reason in _NO_SUM.items():
        if config.get(key):
            found, why = f"{key}={config[key]}", reason
    if found:
        raise ArtifactError(asked, found, why, "take plain LoRA adapters of one base, or train one on both data")


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
        """Factor of B·A."""
        return float(self.config.lora_alpha / self.config.r)

    def sides(self, module: str) -> tuple[torch.Tensor, torch.Tensor] | None:
        """B and A of a module in fp32; None where the adapter has none there."""
        found = (self.tensors.get(f"{PREFIX}{module}.lora_{side}.weight") for side in "BA")
        b, a = found
        return None if b is None or a is None else (b.float(), a.float())


def merge(adapters: Sequence[MergeSource], spec: MergeSpec, out: Path) -> tuple[int, float]:
    """Write the merged adapter to folder `out`; its rank, and its delta's distance from the weighted sum of theirs.

    The distance is relative, in the Frobenius norm over all modules: 0 is the sum itself. Raises ArtifactError for
    ranks that the method can't add.
    """
    _require_ranks(adapters, spec)
    model = _load_skeleton(adapters)
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
        config, tensors = _compress_adapter(config, tensors, spec.rank or max(one.config.r for one in adapters))
    config.inference_mode = True
    out.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(str(out))
    save_file(tensors, out / WEIGHTS_FILE)
    return config.r, _distance(MergeSource(MERGED, config, tensors), adapters, spec.weights)


def _compress_adapter(
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


def _load_skeleton(adapters: Sequence[MergeSource]) -> PeftModel:
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


@dataclass(frozen=True)
class Merged:
    """Outcome of a merge."""

    manifest: AdapterManifest
    rank: int
    distance: float
    """Of its delta from the weighted sum of the others', relative; 0 is the sum itself."""
    notes: tuple[str, ...]


def merge_published(
    store: Store, task: str, refs: Sequence[str], spec: MergeSpec, *, alias: str | None = "latest"
) -> Merged:
    """Merge the adapters behind `refs` and publish the result as `task`, its parents recorded.

    Raises ArtifactError: unknown or damaged ones, other bases, kinds or ranks that can't be added.
    """
    import_bitsandbytes()

    found = [resolve(store, ref) for ref in refs]
    first = found[0]
    for other in found[1:]:
        if other.base_digest != first.base_digest:
            raise ArtifactError(
                f"merge {first.ref} and {other.ref}",
                f"trained on base {first.base_digest[:12]} and on {other.base_digest[:12]}",
                "deltas of different bases have no sum",
                f"train {other.task} again on the base of run {first.run}",
            )
    with tempfile.TemporaryDirectory(prefix="gw-merge-") as name:
        folder = Path(name)
        adapters = [MergeSource.read(one.ref, fetch(store, one.task, one.version)) for one in found]
        rank, distance = merge(adapters, spec, folder)
        prompt, notes = _prompt(found)
        days = {one.template_date for one in found}
        if len(days) > 1:
            differ = "the adapters' template dates differ, so the merged adapter records none and uses the base's"
            notes = (*notes, differ)
        manifest = publish(
            store,
            task,
            folder,
            base_digest=first.base_digest,
            quant=first.quant,
            template_digest=first.template_digest,
            template_date=days.pop() if len(days) == 1 else None,
            tokenizer_digest=first.tokenizer_digest,
            method={**_method(found, rank), "merge": spec.record()},
            prompt=prompt,
            data_fingerprint=_digest([one.data_fingerprint for one in found]),
            metrics={"distance_from_sum": distance},
            run=f"merge-{_digest([spec.record(), [one.ref for one in found]])[:8]}",
            provenance=environment.collect(spec.seed),
            merged_from=[one.ref for one in found],
            alias=alias,
        )
    return Merged(manifest, rank, distance, notes)


def _method(found: Sequence[AdapterManifest], rank: int) -> dict[str, object]:
    """As a LoRA's, so that training can go on from it. Alpha equals the rank: the scale is in the weights."""
    targets = {str(one.method.get("targets")) for one in found}
    kinds = {str(one.method.get("objective", "sft")) for one in found}
    return {
        "kind": "lora",
        "rank": rank,
        "alpha": float(rank),
        "targets": targets.pop() if len(targets) == 1 else "mixed",
        "rslora": False,
        "dora": False,
        "objective": kinds.pop() if len(kinds) == 1 else "mixed",
    }


def _prompt(found: Sequence[AdapterManifest]) -> tuple[dict[str, object], tuple[str, ...]]:
    prompts = {canonical_json(one.prompt): one.prompt for one in found}
    if len(prompts) == 1:
        return dict(found[0].prompt), ()
    none = PromptSpec().model_dump(mode="json")
    return none, ("the prompts differ, so the merged one is recorded without: an arm sets its own",)


def _digest(value: object) -> str:
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()
