"""Put the asked adapter on a loaded base; weights of a published one into it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import (
    IA3Config,
    LoraConfig,
    PeftConfig,
    PeftModel,
    PrefixTuningConfig,
    get_peft_model,
    set_peft_model_state_dict,
)
from peft.tuners.cartridge.utils import initialize_kv_prefix_from_past_key_values
from safetensors.torch import load_file

from graftwork.adapters import target_modules as adapter_places
from graftwork.adapters.spec import AdapterSpec, BottleneckSpec, FullSpec, Ia3Spec, LoraSpec, PrefixSpec
from graftwork.errors import ConfigError
from graftwork.training.adapters import bottleneck
from graftwork.training.adapters.merge import MergeSource, MergeSpec, merge
from graftwork.training.objectives.reward_head import ScoreHead


def attach(model: Any, adapter: AdapterSpec, trained_tokens: Sequence[int] = ()) -> Any:
    """The model with a fresh adapter in fp32; nothing else of it is trained. Draws from torch's global generator.

    trained_tokens: ids whose embeddings are trained and saved with a LoRA; of a tied base their output rows too.
    With kind full it is the model itself, all of it trained, in fp32. Raises ConfigError when the model has no layer
    of the asked kind.
    """
    full = isinstance(adapter, FullSpec)
    attached = model if full else get_peft_model(model, _config_for_model(adapter, model, trained_tokens))
    if trained_tokens and not full:
        # PEFT 0.21 saves the whole embedding beside the rows where it has more than this folder's config.json says
        attached.active_peft_config.base_model_name_or_path = ""
    if isinstance(adapter, PrefixSpec):
        _begin_as_words(attached, adapter.tokens)
    for parameter in attached.parameters():
        if full:
            parameter.requires_grad_(True)
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return attached


def load_adapter_weights(model: Any, adapter: Path) -> None:
    """Set the adapter's weights to those of a published one. The folder was verified by `artifact.fetch`."""
    outcome = set_peft_model_state_dict(model, load_file(adapter / "adapter_model.safetensors"))
    own = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    if model.active_peft_config.is_prompt_learning:
        own = set()  # laid into the encoder, its shape compared, after the state dict was gone through
    unused = [key for key in outcome.unexpected_keys if key != "prompt_embeddings"] + sorted(
        own & {*outcome.missing_keys}
    )
    assert not unused, f"weights of another shape of adapter: {unused[:3]}"  # method and base were compared before


@torch.no_grad()
def _begin_as_words(model: Any, tokens: int) -> None:
    """Let a prefix begin as keys and values of real words, drawn at random: the paper's remedy against a slow start.

    Noise, PEFT's beginning, is nothing that the base has ever seen: tiny or large, it draws the attention or none.
    """
    base = model.get_base_model()
    ids_1P = torch.randint(base.config.vocab_size, (1, tokens)).to(base.device)
    past = base(input_ids=ids_1P, attention_mask=torch.ones_like(ids_1P), use_cache=True).past_key_values
    initialize_kv_prefix_from_past_key_values(model, past_key_values=past, num_virtual_tokens=tokens)


def _config_for_model(adapter: AdapterSpec, model: Any, trained_tokens: Sequence[int]) -> PeftConfig:
    """The adapter's config for this model; a score head is trained and saved whole with it (PEFT's SEQ_CLS)."""
    config = peft_config(adapter, model)
    if trained_tokens:
        assert isinstance(config, LoraConfig), "other adapters are refused where rows are to be trained"
        config.trainable_token_indices = list(trained_tokens)
    if isinstance(getattr(model, "score", None), ScoreHead):
        config.task_type = "SEQ_CLS"
    return config


def peft_config(adapter: AdapterSpec, model: Any) -> PeftConfig:
    """PEFT's form of the adapter. Raises ConfigError when the model has no layer of the asked kind."""
    assert not isinstance(adapter, FullSpec), "full weights are no adapter"
    if isinstance(adapter, LoraSpec):
        return lora_config(adapter, model)
    if isinstance(adapter, Ia3Spec):
        return ia3_config(model)
    if isinstance(adapter, PrefixSpec):
        return PrefixTuningConfig(num_virtual_tokens=adapter.tokens, task_type="CAUSAL_LM")
    return bottleneck_config(adapter, model)


def lora_config(adapter: LoraSpec, model: Any) -> LoraConfig:
    """PEFT's LoRA, rsLoRA or DoRA. Raises ConfigError when the model has no layer of the asked kind."""
    words = adapter_places.ATTENTION_WORDS if adapter.targets == "attention" else adapter_places.MLP_WORDS
    some = adapter.targets != "all-linear"
    return LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        lora_dropout=adapter.dropout,
        target_modules=adapter_places.within(f"adapter.targets={adapter.targets}", words, model)
        if some
        else "all-linear",
        use_rslora=adapter.rslora,
        use_dora=adapter.dora,
        task_type="CAUSAL_LM",
    )


def ia3_config(model: Any) -> IA3Config:
    """Factors on keys, values and the MLP's inner activations, as in the paper. Raises ConfigError without such layers.

    Not PEFT's own choice of targets, which for some families scales queries in place of keys.
    """
    inner = adapter_places.ends("adapter.kind=ia3", adapter_places.MLP_ENDS, model)
    sides = [
        *adapter_places.ends("adapter.kind=ia3", adapter_places.KEYS, model),
        *adapter_places.ends("adapter.kind=ia3", adapter_places.VALUES, model),
    ]
    return IA3Config(target_modules=[*sides, *inner], feedforward_modules=inner, task_type="CAUSAL_LM")


def bottleneck_config(adapter: BottleneckSpec, model: Any) -> bottleneck.BottleneckConfig:
    """Behind the last linear of each MLP block, and with Houlsby of each attention. Raises ConfigError without them."""
    bottleneck.register()
    asked = f"adapter.kind=bottleneck, placement={adapter.placement}"
    targets = adapter_places.ends(asked, adapter_places.MLP_ENDS, model)
    if adapter.placement == "houlsby":
        targets += adapter_places.ends(asked, adapter_places.ATTENTION_ENDS, model)
    return bottleneck.BottleneckConfig(
        bottleneck_size=adapter.size, activation=adapter.activation, target_modules=set(targets), task_type="CAUSAL_LM"
    )


# A frozen LoRA below the one that is trained: part of the base for the loop, and summed with the other in the end.


def attach_frozen_adapter(model: Any, folder: Path) -> None:
    """Let each linear of a loaded base add the published LoRA's delta, in fp32, before any adapter is attached.

    By hooks: the weights are in no state dict, so no checkpoint copies them, and a quantised base stays as it is.
    `adapter_disabled` leaves it on: what training began from is the base with it.
    """
    lora = MergeSource.read("base_adapter", folder)
    for name, module in model.named_modules():
        sides = lora.sides(name)
        if sides is not None:
            device = next(module.parameters()).device
            module.register_forward_hook(_adds(sides[1].to(device), sides[0].to(device) * lora.scale))


def sum_of(trained: Path, below: Path, out: Path) -> int:
    """Write the trained adapter and the one below as one to folder `out`; its rank. The deltas are added exactly."""
    both = [MergeSource.read("the trained adapter", trained), MergeSource.read("base_adapter", below)]
    rank, _ = merge(both, MergeSpec("cat", (1.0, 1.0)), out)
    return rank


def _adds(a_RI: torch.Tensor, b_OR: torch.Tensor) -> Any:
    def hook(_module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], result: torch.Tensor) -> torch.Tensor:
        delta = torch.nn.functional.linear(torch.nn.functional.linear(inputs[0].float(), a_RI), b_OR)
        return result + delta.to(result.dtype)

    return hook


# The base that lies under a trained adapter: a reference model, and the figures "before", without a second copy.


@contextmanager
def adapter_disabled(model: Any) -> Iterator[None]:
    """Inside it the model of `attach`, or a trainer's wrapping of it, answers as the base does; every kind but full.

    Gradients of what runs inside do not reach the adapter. Raises ConfigError where all weights are trained.
    """
    inner = model
    while not isinstance(inner, PeftModel) and hasattr(inner, "module"):
        inner = inner.module  # DistributedDataParallel, DeepSpeed's engine
    if not isinstance(inner, PeftModel):
        raise ConfigError(
            "the base under adapter.kind=full",
            "training all weights leaves no base behind",
            "a base is kept beside an adapter alone",
            "set adapter.kind=lora, or load the base a second time",
        )
    with inner.disable_adapter():
        yield
