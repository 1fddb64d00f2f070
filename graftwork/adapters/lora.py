"""LoRA, rank-stabilised LoRA and DoRA, attached and exported by PEFT."""

import math
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from graftwork.adapters.experts import (
    adaptable_linears,
    expert_targets,
    expert_weights,
    is_stacked,
    router_weights,
    split_targets,
)
from graftwork.adapters.kind import ATTENTION_WORDS, FP32, MLP_WORDS, AdapterKind, Shape, ValueBytes, linears, within
from graftwork.adapters.target_modules import TargetModules, check_target_modules, choose, matches, saved_modules
from graftwork.errors import ConfigError

if TYPE_CHECKING:
    from peft import LoraConfig

    from graftwork.base.model_shape import ModelShape

BF16 = 2
MAX_RANK = 4096
"""Of a published adapter; what an engine serves is its own limit."""
HALF_KEY = re.compile(r"(?P<module>.+)\.lora_(?P<half>[AB])\.weight")
"""Names of the tensors, after PEFT's prefix."""
MAGNITUDE_KEY = "lora_magnitude_vector"
"""End of the names of DoRA's magnitudes."""
Targets = Literal["all-linear", "attention", "mlp"]


class LoraSpec(AdapterKind):
    """A low-rank adapter (Hu et al. 2021, arXiv 2106.09685), attached and exported by PEFT."""

    peft_type: ClassVar[str] = "LORA"
    learning_rates: ClassVar[tuple[float, float]] = (1e-4, 1e-2)
    """About ten times the rate of all weights (Schulman 2025, "LoRA Without Regret"; fifteen times in runs of under 100
    steps). Measured on SmolLM2-135M, short runs (docs/guide-training.md): 4e-3."""
    trains_tokens: ClassVar[bool] = True
    trains_score_head: ClassVar[bool] = True
    has_rank: ClassVar[bool] = True

    kind: Literal["lora"] = "lora"
    rank: int = Field(default=16, ge=1, le=256)
    """Inner dimension r of the update B·A."""
    alpha: float = Field(default=32.0, gt=0)
    """Scale: the update is multiplied by alpha / rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout on the adapter's input while training."""
    targets: Targets = "all-linear"
    """Linear layers that get an adapter; the head never does."""
    target_modules: TargetModules | None = None
    """Instead of `targets`: ends of names, `[q_proj, v_proj]`, or a regular expression of whole names, as in PEFT."""
    modules_to_save: tuple[Literal["embed_tokens", "lm_head"], ...] = ()
    """Modules that are trained and published whole, with the adapter: the embedding, the output head. Both follow each
    other where the base ties them."""
    experts: bool = False
    """Adapt the fused experts of a mixture-of-experts base too, each expert by an adapter of its own."""
    router: bool = False
    """Adapt the routers too, which then send tokens to other experts."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank): steady at high ranks (rsLoRA, arXiv 2312.03732)."""
    dora: bool = False
    """Train the magnitude of each output in addition to its direction (DoRA, arXiv 2402.09353)."""

    @model_validator(mode="after")
    def _experts_take_plain_lora(self) -> Self:
        """PEFT 0.21 adds a LoRA of experts to their weights, so it cannot drop their inputs or scale their results."""
        if (self.experts or self.router) and (self.dropout or self.dora):
            key = "experts" if self.experts else "router"
            raise ValueError(f"{'dora' if self.dora else 'dropout'} cannot take effect with {key}=true: leave it out")
        return self

    @model_validator(mode="after")
    def _one_choice_of_targets(self) -> Self:
        if self.target_modules is not None:
            if self.targets != "all-linear":
                raise ValueError(
                    f"targets={self.targets} cannot take effect with target_modules: leave one of them out"
                )
            check_target_modules(self.target_modules)
        if len(set(self.modules_to_save)) < len(self.modules_to_save):
            raise ValueError(f"modules_to_save={list(self.modules_to_save)}: each name once")
        return self

    @property
    def which(self) -> Targets | TargetModules:
        """The targets: `target_modules`, else `targets`."""
        return self.targets if self.target_modules in (None, "all-linear") else self.target_modules

    @property
    def input_dropout(self) -> float:
        return self.dropout

    @property
    def reads_base_weights(self) -> bool:
        return self.dora

    @property
    def adds_up(self) -> bool:
        return not (self.dora or self.experts or self.router or self.modules_to_save)

    def describe(self) -> str:
        """Return the adapter in a few words."""
        parts = "".join(f" with {key}" for key in ("experts", "router") if getattr(self, key))
        return f"{'rs' * self.rslora}LoRA{' with DoRA' * self.dora} r{self.rank}{parts}"

    @classmethod
    def check_config(cls, config: Mapping[str, Any]) -> None:
        """Raise ValueError for ranks and scales that are none."""
        rank, alpha = config.get("r"), config.get("lora_alpha")
        if type(rank) is not int or not 1 <= rank <= MAX_RANK:
            raise ValueError(f"r={rank!r} is no rank from 1 to {MAX_RANK}")
        if not isinstance(alpha, int | float) or not math.isfinite(alpha) or alpha <= 0:
            raise ValueError(f"lora_alpha={alpha!r} is no positive number")
        if not isinstance(config.get("rank_pattern") or {}, dict):
            raise ValueError("rank_pattern is no mapping")
        parameters = config.get("target_parameters") or []
        if not isinstance(parameters, list) or not all(isinstance(name, str) for name in parameters):
            raise ValueError("target_parameters is no list of names")

    @classmethod
    def tensor_problems(cls, config: Mapping[str, Any], shapes: Mapping[str, Shape]) -> Iterator[str]:
        """Yield each `lora_A` (rank, in) without its `lora_B` (out, rank), and each rank that is not the config's."""
        halves: dict[str, dict[str, Shape]] = {}
        for key, shape in shapes.items():
            if match := HALF_KEY.fullmatch(key):
                halves.setdefault(match["module"], {})[match["half"]] = shape
        if not halves:
            yield "no lora_A and lora_B tensors"
        for module, pair in halves.items():
            if set(pair) != {"A", "B"}:
                yield f"{module} has only lora_{''.join(pair)}"
                continue
            # the rank by literal suffix of the module: regular expressions come from the file and are not run
            patterns = (config.get("rank_pattern") or {}).items()
            named = (rank for pattern, rank in patterns if module == pattern or module.endswith("." + pattern))
            rank = next(named, config["r"])
            a, b = pair["A"], pair["B"]
            pair_fits = len(a) > 1 and len(b) > 1 and a[0] == b[1]
            if is_stacked(module, config.get("target_parameters") or ()):
                if not pair_fits or not a[0] or a[0] % rank:
                    yield f"{module} has lora_A {list(a)} and lora_B {list(b)}, no multiple of rank {rank}"
            elif not pair_fits or a[0] != rank:
                yield f"{module} has lora_A {list(a)} and lora_B {list(b)}, the config says rank {rank}"

    def peft_config(self, model: Any) -> "LoraConfig":
        """Return PEFT's LoRA, rsLoRA or DoRA. Raises ConfigError where the model has no such layer."""
        from peft import LoraConfig

        modules, parameters = self._targets_of(model)
        if self.router:
            expert_targets("adapter.router=true", model)  # refuses a dense base
            parameters = [*parameters, *router_weights(model)]
        if parameters and self.dora:
            raise ConfigError(
                "adapter.dora=true",
                f"PEFT reads an adapter of {parameters[0].removesuffix('.weight')} as one of a parameter, without DoRA",
                "DoRA adapts linear layers that PEFT targets by name",
                "set adapter.targets=attention, or adapter.dora=false",
            )
        saved, tied = saved_modules(self.modules_to_save, model)
        return LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules=modules,
            target_parameters=parameters or None,
            modules_to_save=saved or None,
            ensure_weight_tying=tied,
            use_rslora=self.rslora,
            use_dora=self.dora,
            fan_in_fan_out=any(type(module).__name__ == "Conv1D" for module in model.modules()),
            task_type="CAUSAL_LM",
        )

    def _targets_of(self, model: Any) -> tuple[list[str] | str, list[str]]:
        """PEFT's `target_modules` and `target_parameters`. Raises ConfigError."""
        if self.which != self.targets:
            return self._named_targets(model)
        asked = f"adapter.targets={self.targets}"
        words = {"attention": ATTENTION_WORDS, "mlp": MLP_WORDS, "all-linear": ("",)}[self.targets]
        experts = expert_targets("adapter.experts=true", model) if self.experts else []
        allowed = adaptable_linears(model)
        if not expert_weights(model) and (self.targets != "all-linear" or len(allowed) == len(linears(model))):
            return ("all-linear" if self.targets == "all-linear" else within(asked, words, model)), []
        found = [name for name in allowed if any(word in name.lower() for word in words)]
        if not found and not experts:
            raise ConfigError(
                asked,
                f"the only weights of {type(model).__name__} there are experts and routers",
                "a LoRA is put on experts with adapter.experts, and never on a router",
                "set adapter.experts=true, or adapter.targets=attention",
            )
        modules, parameters = split_targets(model, found)
        return modules, experts + parameters

    def _named_targets(self, model: Any) -> tuple[list[str] | str, list[str]]:
        """As `_targets_of`, of `target_modules`. A regular expression becomes the names that it matches."""
        assert self.target_modules is not None, "the caller looked"
        allowed, every = adaptable_linears(model), [name for name, _ in model.named_modules()]
        found = choose(self.target_modules, allowed, type(model).__name__, every)
        listed = not isinstance(self.target_modules, str) and not expert_weights(model)
        if listed and {name for name in every if matches(self.target_modules, name)} == set(found):
            return list(self.target_modules), []
        experts = expert_targets("adapter.experts=true", model) if self.experts else []
        modules, parameters = split_targets(model, found)
        return modules, experts + parameters

    def trained_params(self, model: "ModelShape") -> int:
        """Return the values of A, B and DoRA's magnitudes, and of the modules that are saved whole."""
        magnitudes = sum(linear.count * linear.outputs for linear in model.adapted_linears(self.which))
        whole = len(self.modules_to_save) if not model.tied else bool(self.modules_to_save)
        added = model.adapter_params(self.rank, self.which, experts=self.experts)
        added += self.router * model.expert_blocks * self.rank * (model.hidden + model.num_experts)
        return added + magnitudes * self.dora + whole * model.head_params

    def token_params(self, model: "ModelShape") -> float:
        """Return the trained values; of adapted experts a third of their weights, whose gradient PEFT computes."""
        if not self.experts:
            return self.trained_params(model)
        update = model.adapter_params(self.rank, self.which, experts=True) - model.adapter_params(self.rank, self.which)
        return self.trained_params(model) - update + model.expert_params * model.active_experts / 3

    def saved_bytes(self, model: "ModelShape", size: ValueBytes) -> float:
        """Return the bytes of the targets' inputs, of A's results, of dropout's masks and of DoRA's results."""
        targets = model.adapted_linears(self.which)
        inputs = sum(linear.count * linear.inputs for linear in targets) / model.layers
        saved = sum(linear.count for linear in targets) / model.layers * self.rank * size.computed
        if self.dropout > 0 or size.base != FP32:  # each target saves its own input
            saved += inputs * size.computed
        else:  # inputs of A: q, k and v share one, gate and up share one; o's is counted with the frozen block
            saved += model.read(self.which) * FP32
        if self.dropout > 0:
            saved += inputs * size.dropout_mask
        if self.experts:  # of their weights with the update, which have gradients
            saved += model.expert_inputs * size.base
        if self.dora:  # the base's output and the update's, to train the magnitude by
            outputs = sum(linear.count * linear.outputs for linear in targets) / model.layers
            saved += outputs * (size.base + size.computed)
        return saved

    def saved_weights(self, model: "ModelShape") -> float:
        """Return the experts' weights with the update added, as PEFT multiplies them."""
        return float(model.expert_params) if self.experts else 0.0

    def dropped_inputs(self, model: "ModelShape") -> int:
        """Return the targets' inputs."""
        if not self.dropout:
            return 0
        return sum(linear.count * linear.inputs for linear in model.adapted_linears(self.which))

    def weight_flops(self, model: "ModelShape") -> float:
        """Return the operations of DoRA's norm of the updated weights (PEFT multiplies A and B by the identity).

        Of experts those of the update, which PEFT multiplies out for all of them, and twice as many backwards.
        """
        if self.experts:
            return 3.0 * 2 * self.rank * model.expert_params
        if not self.dora:
            return 0.0
        targets = model.adapted_linears(self.which)
        return sum(x.count * 2 * self.rank * x.inputs * (x.inputs + x.outputs) for x in targets)

    def weight_scratch_bytes(self, model: "ModelShape", *, autocast: bool) -> int:
        """Return the bytes of DoRA's identity of the inputs, or of four forms of the largest weight."""
        if not self.dora:
            return 0
        targets = model.adapted_linears(self.which)
        identity = max(linear.inputs for linear in targets) ** 2 * (FP32 + BF16 * autocast)
        return max(identity, 4 * FP32 * max(linear.params for linear in targets))
