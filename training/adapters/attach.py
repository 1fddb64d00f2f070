"""Put the asked adapter on a loaded base; weights of a published one into it."""

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file

from graftwork.errors import ConfigError
from graftwork.training.spec import AdapterSpec, LoraSpec

ATTENTION_WORDS = ("attn", "attention")
MLP_WORDS = ("mlp", "feed_forward", "ffn", "fc")


def attach(model: Any, adapter: AdapterSpec) -> Any:
    """The model with a fresh adapter in fp32; nothing else of it is trained. Draws from torch's global generator.

    Raises ConfigError when the model has no layer of the asked kind.
    """
    attached = get_peft_model(model, peft_config(adapter, model))
    for parameter in attached.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return attached


def take_weights(model: Any, adapter: Path) -> None:
    """Set the adapter's weights to those of a published one. The folder was verified by `artifact.fetch`."""
    outcome = set_peft_model_state_dict(model, load_file(adapter / "adapter_model.safetensors"))
    unused = list(outcome.unexpected_keys) + [key for key in outcome.missing_keys if "lora_" in key]
    assert not unused, f"weights of another shape of adapter: {unused[:3]}"  # method and base were compared before


def peft_config(adapter: AdapterSpec, model: Any) -> PeftConfig:
    """PEFT's form of the adapter. Raises ConfigError when the model has no layer of the asked kind."""
    if isinstance(adapter, LoraSpec):
        return lora_config(adapter, model)
    raise ConfigError(f"adapter.kind={adapter.kind}", "it can't be trained yet", "lora can", "set adapter.kind=lora")


def lora_config(adapter: LoraSpec, model: Any) -> LoraConfig:
    """PEFT's LoRA, rsLoRA or DoRA. Raises ConfigError when the model has no layer of the asked kind."""
    return LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        lora_dropout=adapter.dropout,
        target_modules="all-linear" if adapter.targets == "all-linear" else _targets(adapter.targets, model),
        use_rslora=adapter.rslora,
        use_dora=adapter.dora,
        task_type="CAUSAL_LM",
    )


def _targets(kind: str, model: Any) -> list[str]:
    """Full names of the linear layers of the attention or of the MLP blocks."""
    words = ATTENTION_WORDS if kind == "attention" else MLP_WORDS
    head = model.get_output_embeddings()
    linear = [
        name
        for name, module in model.named_modules()
        if module is not head and (isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D")
    ]
    found = [name for name in linear if any(word in name.lower() for word in words)]
    if not found:
        known = sorted({name.rsplit(".", 1)[-1] for name in linear})
        raise ConfigError(
            f"adapter.targets={kind}",
            f"no linear layer of {type(model).__name__} lies in such a block",
            f"its linear layers: {', '.join(known)}",
            "set adapter.targets=all-linear",
        )
    return found
