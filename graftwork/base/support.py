"""The stages that support a base, each with the reason where it does not: checked before a stage spends compute.

Everything is computed from the real model class on the meta device (`model_shape.facts_of`), nothing from a list of
families; docs/bases.md shows the result for the families that tests build.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol, cast

from graftwork.adapters.target_modules import choose_linears
from graftwork.base.model_shape import HOW_UNPLANNED, BaseFacts, Targets, facts_of
from graftwork.config import Spec
from graftwork.errors import BaseModelError
from graftwork.planning.hardware import GIB
from graftwork.prequantized.detect import find_format, unkept_reason
from graftwork.prequantized.format import PackedFormat
from graftwork.quantization import METHODS, PRECISIONS, QuantKind, QuantSpec

Stage = Literal["plan", "train LoRA", "train full", "packing", "serve", "serve adapters"] | QuantKind
FORMS: tuple[QuantKind, ...] = tuple(kind for kind, method in METHODS.items() if not method.keeps_checkpoint)
STAGES: tuple[Stage, ...] = ("plan", *FORMS, "train LoRA", "train full", "packing", "serve", "serve adapters")
"""Of every base. `plan`: of training. `FORMS`: values of `quant.kind`, in training and in serving; a quantised
checkpoint has one more, `checkpoint`."""


class StrategyKeys(Protocol):
    """Keys of `strategy` that a base can rule out."""

    @property
    def kind(self) -> str: ...

    @property
    def context_parallel(self) -> int: ...


class AdapterKeys(Protocol):
    """Properties of `adapter` that a base can rule out."""

    @property
    def kind(self) -> str: ...


class TrainingRun(Protocol):
    """Keys of a training spec that a base can rule out; `TrainSpec` has them."""

    @property
    def max_length(self) -> int: ...

    @property
    def quant(self) -> QuantSpec: ...

    @property
    def adapter(self) -> AdapterKeys: ...

    @property
    def objective(self) -> object: ...

    @property
    def strategy(self) -> StrategyKeys: ...


@dataclass(frozen=True)
class Support:
    """One stage: supported where `reason` is empty."""

    reason: str = ""
    hint: str = ""


UNPACKED = "--set quant.kind=none"
SHARDED_WEIGHTS = ("zero3", "fsdp2")
ADAPT_EXPERTS = "--set adapter.experts=true"


@dataclass(frozen=True)
class BaseSupport:
    """Support of a base by each stage."""

    model_type: str
    model_class: str
    stages: Mapping[Stage, Support]
    lora: Mapping[Targets, Support] = field(default_factory=dict)
    """Training a LoRA, by `adapter.targets`."""
    train_packed: Support = Support()
    """Training on quantised weights."""
    packed: str = ""
    """Format of a quantised checkpoint; empty where its weights are plain."""
    experts: Support = Support()
    """Training a LoRA on experts (`adapter.experts`)."""
    packed_experts: bool = False
    """4-bit methods pack experts next to linear layers."""

    @property
    def names(self) -> tuple[Stage, ...]:
        """The stages of this base, in the order of a report."""
        kept: tuple[Stage, ...] = ("checkpoint",) if self.packed else ()
        place = 1 + len(FORMS)
        return (*STAGES[:place], *kept, *STAGES[place:])

    def format_line(self) -> str:
        """As a line of a plan: the stages that support the base, and the reason of each that does not."""
        known = ", ".join(stage for stage in self.names if not self.stages[stage].reason)
        reasons = "".join(
            f"; not {stage}: {self.stages[stage].reason}" for stage in self.names if self.stages[stage].reason
        )
        form = f" packed as {self.packed}" if self.packed else ""
        return f"base {self.model_type} ({self.model_class}){form} supports {known}{reasons}"

    def require(self, stage: Stage | Support, asked: str) -> None:
        """Raise BaseModelError where the stage does not support the base. `asked`: key and value that ask for it."""
        support = stage if isinstance(stage, Support) else self.stages[stage]
        if support.reason:
            raise BaseModelError(
                f"{asked} with a base of model_type={self.model_type} ({self.model_class})",
                support.reason,
                "a stage starts only with a base that it supports (docs/bases.md)",
                support.hint,
            )


def base_support(config: Mapping[str, Any]) -> BaseSupport:
    """Return the stages that support the base with this config.json. Raises BaseModelError as `facts_of` does."""
    facts = facts_of(config)
    quantised = Support()
    if experts := facts.shape.expert_params:
        share = facts.shape.linear_params / (facts.shape.linear_params + experts)
        quantised = Support(
            f"{share:.0%} of its weights would be packed: 8 bits are for linear layers alone, and the experts are 3-D "
            f"parameters ({experts / 1e9:.3g} billion weights, {2 * experts / GIB:.3g} GiB in 16 bits)",
            "--set quant.kind=nf4",
        )
    packed_form = find_format(config)
    lora = {which: _lora_support(facts, which) for which in facts.shape.adapted}
    full, packed, pack = _training_support(facts)
    train = full
    if not full.reason and all(one.reason for one in lora.values()):
        train = Support(lora["all-linear"].reason, "--set adapter.kind=full --set quant.kind=none")
    serve, serve_adapters = _serving_support(facts)
    return BaseSupport(
        facts.model_type,
        facts.model_class,
        {
            "plan": Support(facts.shape.unplanned, HOW_UNPLANNED),
            **{kind: quantised if method.bits == 8 else Support() for kind, method in METHODS.items()},
            "checkpoint": _checkpoint_support(facts, packed_form, towers="text_config" in config),
            "train LoRA": train,
            "train full": full,
            "packing": pack,
            "serve": serve,
            "serve adapters": serve_adapters,
        },
        lora,
        packed,
        packed_form.label if packed_form else "",
        _experts_support(facts),
        bool(facts.shape.experts),
    )


def check_training(spec: TrainingRun, config: Mapping[str, Any]) -> BaseSupport:
    """Check a training spec against its base with this config.json. Raises BaseModelError, ConfigError."""
    support = base_support(config)
    support.require(spec.quant.kind, f"quant.kind={spec.quant.kind}")
    if spec.quant.is_packed:
        support.require(support.train_packed, f"quant.kind={spec.quant.kind}")
    support.require("train full" if spec.adapter.kind == "full" else "train LoRA", f"adapter.kind={spec.adapter.kind}")
    targets, experts = getattr(spec.adapter, "targets", None), getattr(spec.adapter, "experts", False)
    if experts:
        support.require(support.experts, "adapter.experts=true")
    asked = [key for key in ("experts", "router") if getattr(spec.adapter, key, False)]
    if asked and not support.packed_experts:
        support.require(Support("it has no experts", f"leave adapter.{asked[0]} out"), f"adapter.{asked[0]}=true")
    if asked and spec.strategy.kind in SHARDED_WEIGHTS:
        whole = Support("PEFT adds the update to whole weights", "--set strategy.kind=zero2")
        support.require(whole, f"adapter.{asked[0]}=true with strategy.kind={spec.strategy.kind}")
    if targets is not None and not (experts and support.lora[targets].hint == ADAPT_EXPERTS):
        support.require(support.lora[targets], f"adapter.targets={targets}")
    if spec.quant.is_4bit and support.packed_experts and spec.strategy.kind in SHARDED_WEIGHTS:
        unsharded = Support(
            "packed experts are not sharded: each worker holds all of them", "--set strategy.kind=zero2"
        )
        support.require(unsharded, f"quant.kind={spec.quant.kind} with strategy.kind={spec.strategy.kind}")
    _check_context_parallel(spec, config)
    _check_base_adapter(spec, config, support)
    names = getattr(spec.adapter, "target_modules", None)
    if names not in (None, "all-linear"):
        facts = facts_of(config)
        choose_linears(names, facts.shape.adapted["all-linear"], facts.model_class)
    if getattr(spec.objective, "packing", "none") != "none":
        support.require("packing", "objective.packing=best_fit")
    return support


def _check_base_adapter(spec: TrainingRun, config: Mapping[str, Any], support: BaseSupport) -> None:
    """Raise BaseModelError where the sum with `base_adapter` is none that PEFT can write."""
    below = getattr(spec, "base_adapter", None)
    if below is None or not support.packed_experts:
        return
    from graftwork.base.meta_model import build

    adapter: Any = spec.adapter
    if names := adapter.peft_config(build(config)).target_parameters:
        module = sorted(names)[0].removesuffix(".weight")
        reason = f"PEFT reads a LoRA on {module} as one of a parameter, and only LoRAs on linear layers are added up"
        asked = f"base_adapter={below} with adapter.targets={getattr(adapter, 'targets', None)}"
        support.require(Support(reason, "--set adapter.targets=attention, or leave base_adapter out"), asked)


def _check_context_parallel(spec: TrainingRun, config: Mapping[str, Any]) -> None:
    """Raise BaseModelError where attention is not computed over parts of a row (`training.context_parallel`)."""
    size = spec.strategy.context_parallel
    if size == 1:
        return
    text = config.get("text_config") or config
    heads, window = int(text.get("num_attention_heads") or 0), text.get("sliding_window")
    problem, hint = "", "set strategy.context_parallel=1"
    if heads % size:
        whole = next(n for n in range(min(size, heads), 0, -1) if heads % n == 0)
        problem, hint = f"the base has {heads} attention heads", f"set a divisor of it: {whole}"
    elif facts_of(config).shape.router_loss:
        problem = "the base has a router loss, which is over whole rows"
    elif text.get("attn_logit_softcapping") or text.get("model_type") == "gpt_oss":
        problem = "the base's attention has soft-capping or sinks"
    elif window and text.get("use_sliding_window", True) and spec.max_length > window:
        problem, hint = f"the base's attention has a sliding window of {window} tokens", f"set max_length={window}"
    if problem:
        rule = "a worker computes an equal number of heads, as a causal softmax over all tokens"
        raise BaseModelError(f"strategy.context_parallel={size}, max_length={spec.max_length}", problem, rule, hint)


def check_serving(spec: Any) -> None:
    """Check that our engine serves the base of a serve, compare or quantize spec, or a study's.

    Reads the base's config. Raises BaseModelError.
    """
    from graftwork.base.load import read_config

    engine, config = getattr(spec, "engine", None), read_config(spec.base)
    if engine is not None and engine.kind != "graftwork":
        if packed := find_format(config):
            form = f"{spec.base.uri} is packed as {packed.label}"
            rule = "vLLM computes a quantised checkpoint with kernels that round activations: other answers"
            raise BaseModelError(f"engine.kind={engine.kind}", form, rule, "--set engine.kind=graftwork")
        return  # vLLM knows other families; it refuses by itself
    support = base_support(config)
    if spec.kind == "quantize":
        for precision in spec.precisions:
            found = support.stages[PRECISIONS[precision].kind]
            support.require(replace(found, hint="--set 'precisions=[fp32, bf16]'"), f"precisions: {precision}")
    else:
        support.require(spec.quant.kind, f"quant.kind={spec.quant.kind}")
    support.require("serve", f"serving of {spec.base.uri}")
    if getattr(spec, "adapters", ()) or any(arm.adapter is not None for arm in getattr(spec, "arms", ())):
        support.require("serve adapters", f"serving of adapters on {spec.base.uri}")


def check_local(spec: Spec, folder: Path | None = None) -> None:
    """Check the base of a spec where this machine has its config, so that nothing is fetched. Raises UserError.

    `folder`: of the spec's file, in which a config.json stands for a base that is not here.
    """
    from graftwork.base.load import config_file, config_next_to_spec, read_config

    kind, base = getattr(spec, "kind", ""), getattr(spec, "base", None)
    if base is not None and folder and (file := config_next_to_spec(base, folder)):
        spec = spec.with_({"base.uri": str(file)})
        base = getattr(spec, "base", None)
    if base is None or not (Path(base.uri).is_dir() or config_file(base)):
        return
    if kind == "train":
        check_training(cast(TrainingRun, spec), read_config(base))
    elif kind in ("serve", "compare", "quantize"):
        check_serving(spec)


PROBE_LENGTH = 12
"""Tokens of each of the two texts of `probe_ids`."""
MOST_MIXED = {"float32": 0.05, "bfloat16": 0.5}
MOST_MIXED_8BIT = 0.5
"""Of what a text before it moves the logits by. Rounding alone, on the 135M base: 0 in fp32, 0.05 in bf16, 0.24 with
int8. Models that do not keep texts apart: 1 with recurrent layers alone, 0.18 where attention is next to them."""


def probe_ids(vocabulary: int) -> list[int]:
    """Return two texts, one behind the other, on which loaded weights are tried: packing, requests of one pass."""
    return [token * 7 % vocabulary for token in range(2 * PROBE_LENGTH)]


def most_mixed(model: Any) -> float:
    """Return the largest `mixed_share` that rounding explains on a loaded model."""
    if any(type(module).__name__ == "Linear8bitLt" for module in model.modules()):
        return MOST_MIXED_8BIT
    dtype = str(model.get_input_embeddings().weight.dtype).removeprefix("torch.")
    return MOST_MIXED.get(dtype, MOST_MIXED["bfloat16"])


def mixed_share(*, alone: Any, one: Any, two: Any) -> float:
    """Return how far the first text moves the logits of the second, as a share of what it does within one text.

    The arguments are logits of the second text: alone, behind the first as one text, and behind it as two.
    """
    share: float = ((two - alone).abs().mean() / (one - alone).abs().mean().clamp(min=1e-9)).item()
    return share


def _checkpoint_support(facts: BaseFacts, packed: PackedFormat | None, *, towers: bool) -> Support:
    """Return whether the weights of a quantised checkpoint stay as they are."""
    exact = f"quant.kind=none (the exact values, {2 * facts.shape.params / GIB:.3g} GiB in 16 bits)"
    hint = f"--set quant.kind=nf4 (4 bits, rounded again), or {exact}"
    if experts := facts.shape.expert_params:
        whole = experts + facts.shape.linear_params
        form = f"packed as {packed.label}, " if packed else ""
        reason = (
            f"its experts, {experts / whole:.0%} of its weights, are {form}3-D parameters: kept are linear layers alone"
        )
        return Support(reason if packed else unkept_reason(packed), hint)
    if reason := unkept_reason(packed):
        return Support(reason, hint)
    return Support("it has towers, and layers have other names in its files", hint) if towers else Support()


def _lora_support(facts: BaseFacts, which: Targets) -> Support:
    """Return whether a LoRA on these targets can be trained, published and loaded."""
    others = (one for one in facts.shape.adapted if not facts.unattached.get(one) and facts.shape.adapted[one])
    hint = next((f"--set adapter.targets={one}" for one in others), "--set adapter.kind=full --set quant.kind=none")
    if reason := facts.unattached.get(which):
        return Support(f"PEFT cannot attach a LoRA there ({reason})", hint)
    if not facts.shape.adapted[which]:
        return Support("its weights there are experts and routers", ADAPT_EXPERTS)
    return Support()


def _experts_support(facts: BaseFacts) -> Support:
    """Return whether a LoRA on experts can be trained, published and served."""
    hint = "leave adapter.experts out"
    if not facts.shape.experts:
        return Support("it has no experts in parameters of three dimensions", hint)
    return Support(facts.unadapted_experts, hint)


def _training_support(facts: BaseFacts) -> tuple[Support, Support, Support]:
    """Training of all weights, training on quantised ones, and packing; `require_apart` tries it on the weights."""
    train, packed, pack = Support(), Support(), Support()
    if not facts.bodied:
        train = Support("TRL's losses find no decoder below its output head (base_model_prefix)", "take another base")
    if facts.reads_weights:
        packed = Support(f"its code uses the weights of linear layers by itself ({facts.reads_weights})", UNPACKED)
    if facts.recurrent:
        pack = Support("recurrent layers carry a state from one document to the next", "--set objective.packing=none")
    elif not facts.packs:
        pack = Support("its masks do not follow the positions of packed documents", "--set objective.packing=none")
    return train, packed, pack


def _serving_support(facts: BaseFacts) -> tuple[Support, Support]:
    """Return the support of serving, and that of serving adapters."""
    reason = "recurrent layers carry a state that the engine does not keep" if facts.recurrent else facts.unserved
    if reason:
        serve = Support(reason, "serve it with engine.kind=vllm on a GPU, or take another base")
        return serve, serve
    return Support(), Support()
