"""Adapters of every kind on a loaded base: attach one, load a published one, stack it on a frozen LoRA, disable it."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file

from graftwork.adapters.experts import adaptable_linears
from graftwork.adapters.kind import AdapterKind
from graftwork.base.packed_experts import as_parameters
from graftwork.compat.hf import keep_frozen_weights, keep_targets
from graftwork.errors import ConfigError
from graftwork.training.adapters.merge import MergeSource, MergeSpec, merge
from graftwork.training.objectives.reward_head import ScoreHead


def attach(model: Any, adapter: AdapterKind, trained_tokens: Sequence[int] = (), *, begin: bool = True) -> Any:
    """Return the model with a fresh adapter in fp32; only the adapter is trained. Draws from torch's global generator.

    trained_tokens: ids whose embeddings are trained and saved with the adapter; of a tied base their output rows too.
    begin: set the kind's start values, which needs real tensors. Raises ConfigError where the model has no layer that
    the kind adapts. A kind that trains the base returns the model itself, all of its text decoder and its head trained,
    in fp32; text gives no gradient to towers for images and sound.
    """
    full = adapter.trains_base
    attached = model
    if not full:
        config = adapter.peft_config(model)
        if isinstance(getattr(model, "score", None), ScoreHead):
            config.task_type = "SEQ_CLS"  # PEFT trains the score head and saves it whole
        if trained_tokens:
            assert adapter.trains_tokens, "other adapters are refused where rows are to be trained"
            config.trainable_token_indices = list(trained_tokens)
        attached = _attach(model, config)
        if trained_tokens:
            # PEFT 0.21 saves the whole embedding next to the rows where it has more than this folder's config.json says
            attached.active_peft_config.base_model_name_or_path = ""
    if begin:
        adapter.begin(attached)
    if full:
        for part in (model.get_decoder(), model.get_output_embeddings()):
            part.requires_grad_(True)
    for parameter in attached.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    keep_frozen_weights(attached)
    return attached


def _attach(model: Any, config: Any) -> Any:
    """PEFT's `get_peft_model`. Linear layers that the config names as parameters are adapted as linear layers.

    The config that is saved keeps the names that PEFT reads (`adapters.experts.split_targets`).
    """
    parameters = set(getattr(config, "target_parameters", None) or ())
    linears = set(adaptable_linears(model)) if parameters else set()
    weights = {name for name in parameters if name.removesuffix(".weight") in linears}
    if not weights:
        with as_parameters(model):
            return _peft_model(model, config)
    saved = sorted(config.target_modules), sorted(parameters)
    config.target_modules = {*config.target_modules, *(name.removesuffix(".weight") for name in weights)}
    config.target_parameters = sorted(parameters - weights) or None
    with keep_targets(), as_parameters(model):
        attached = _peft_model(model, config)
    config.target_modules, config.target_parameters = set(saved[0]), saved[1]
    config.lora_dropout = 0.0  # PEFT refuses it for parameters; the layers here have theirs
    return attached


def _peft_model(model: Any, config: Any) -> PeftModel:
    """PEFT's `get_peft_model` without the warning of a name that PEFT 0.21 reads and transformers 5.24 renamed."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        return get_peft_model(model, config)


def load_adapter_weights(model: Any, adapter: Path) -> None:
    """Set the adapter's weights to those of a published one. The folder was verified by `artifact.fetch`."""
    outcome = set_peft_model_state_dict(model, load_file(adapter / "adapter_model.safetensors"))
    own = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    if model.active_peft_config.is_prompt_learning:
        own = set()  # copied into the encoder, its shape compared, after the state dict was read
    unused = [key for key in outcome.unexpected_keys if key != "prompt_embeddings"] + sorted(
        own & {*outcome.missing_keys}
    )
    assert not unused, f"weights of another shape of adapter: {unused[:3]}"  # method and base were compared before


def attach_frozen_adapter(model: Any, folder: Path) -> None:
    """Let each linear of a loaded base add the published LoRA's delta, in fp32, before any adapter is attached.

    `publish` adds it to the trained one (`stack_loras`). By hooks: the weights are in no state dict, so no checkpoint
    copies them, and a quantised base stays as it is. `adapter_disabled` leaves it on: training began from the base with
    it.
    """
    lora = MergeSource.read("base_adapter", folder)
    for name, module in model.named_modules():
        sides = lora.sides(name)
        if sides is not None:
            device = next(module.parameters()).device
            module.register_forward_hook(_delta_hook(sides[1].to(device), sides[0].to(device) * lora.scale))


def stack_loras(trained: Path, below: Path, out: Path) -> int:
    """Write the trained adapter and the one below as one LoRA to folder `out`: their exact sum. Returns its rank."""
    both = [MergeSource.read("the trained adapter", trained), MergeSource.read("base_adapter", below)]
    rank, _ = merge(both, MergeSpec("cat", (1.0, 1.0)), out)
    return rank


def _delta_hook(a_RI: torch.Tensor, b_OR: torch.Tensor) -> Any:
    def hook(_module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], result: torch.Tensor) -> torch.Tensor:
        delta = torch.nn.functional.linear(torch.nn.functional.linear(inputs[0].float(), a_RI), b_OR)
        return result + delta.to(result.dtype)

    return hook


@contextmanager
def adapter_disabled(model: Any) -> Iterator[None]:
    """Let the model of `attach`, or a trainer's wrapping of it, answer as the base does; every kind but full.

    A reference model, and the figures "before", without a second copy of the base.

    Gradients of what runs inside do not reach the adapter. Raises ConfigError where all weights are trained.
    """
    inner = model
    while not isinstance(inner, PeftModel) and hasattr(inner, "module"):
        inner = inner.module  # DistributedDataParallel, DeepSpeed's engine
    if not isinstance(inner, PeftModel):
        raise ConfigError(
            "the base under adapter.kind=full",
            "training all weights leaves no base behind",
            "only an adapter leaves the base unchanged",
            "set adapter.kind=lora, or load the base a second time",
        )
    with inner.disable_adapter():
        yield
