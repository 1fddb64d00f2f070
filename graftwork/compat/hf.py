"""Hooks into transformers, TRL, PEFT, accelerate, bitsandbytes and torch's schedules.

Checked with torch 2.13, transformers 5.24, TRL 1.16, PEFT 0.21, accelerate 1.15 and bitsandbytes 0.50. Nothing here
imports them at module level: the core imports this module. TRL's trainers come in as arguments.
"""

import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from logging import ERROR, getLogger
from typing import Any


def has_sdpa(model_class: type[Any]) -> bool:
    """Return whether a class of transformers' models can attend through torch's scaled_dot_product_attention.

    `from_pretrained` raises where a model that lacks it (Gemma-2) is asked to; there is no public question. Upstream:
    `PreTrainedModel._supports_sdpa`.
    """
    return bool(model_class._supports_sdpa)


def attention_name(config: Any) -> str | None:
    """Return the name of the attention function that models of this configuration call.

    Upstream: `PretrainedConfig._attn_implementation`; transformers has a public setter, on models, and no getter.
    """
    name: str | None = config._attn_implementation
    return name


def set_attention(config: Any, name: str | None) -> None:
    """Let models of this configuration call the attention function of this name, at once and without a check.

    `PreTrainedModel.set_attn_implementation`, the public setter, warns and does nothing for a model whose source it
    can't verify, and sets the vision part of a model as well. Upstream: `PretrainedConfig._attn_implementation`.
    """
    config._attn_implementation = name


def apply_gate(experts: Any, gate_up: Any) -> Any:
    """Return the products of the gate and the other half [S, I] of a module of fused experts. gate_up: [S, 2 I].

    Upstream: `_apply_gate`, which transformers' `use_experts_implementation` gives to each such class.
    """
    return experts._apply_gate(gate_up)


def adapt_packed_parameters() -> None:
    """Let PEFT put its LoRA on packed parameters of experts, and take it off after each pass.

    PEFT 0.21 reads a parameter before it puts the LoRA on, and torch then has the value without it in the cache of the
    pass. Afterwards it looks for `_LoraParameterProxy` among the parametrizations, and has put on `_LoraFactorsProxy`:
    the LoRA would stay on and be added again in each pass. The LoRA is the last one that was put on. Upstream:
    `ParamWrapper._activate_lora` and `_remove_parametrizations`, `torch.nn.utils.parametrize._cache`.
    """
    from peft.tuners.lora.layer import ParamWrapper
    from torch.nn.utils import parametrize

    activate, remove = ParamWrapper._activate_lora, ParamWrapper._remove_parametrizations
    if remove.__name__ == "remove_last":
        return

    @contextmanager
    def activate_uncached(wrapper: Any, adapters: list[str]) -> Iterator[None]:
        with activate(wrapper, adapters):
            parametrize._cache.pop((id(wrapper.get_base_layer()), wrapper.parameter_name), None)
            yield

    def remove_last(wrapper: Any) -> None:
        stacked = wrapper.get_base_layer().parametrizations[wrapper.parameter_name]
        if len(stacked) > 1:
            del stacked[-1]
        else:
            remove(wrapper)

    ParamWrapper._activate_lora, ParamWrapper._remove_parametrizations = activate_uncached, remove_last


@contextmanager
def keep_targets() -> Iterator[None]:
    """Let PEFT adapt the layers that a config names, while it lasts.

    PEFT 0.21 rewrites the targets of bases with experts for adapters of transformers 4, and takes the linear layers of
    shared experts for parts of fused ones. Upstream: `convert_peft_config_for_transformers`, which has no switch.
    """
    from peft.utils import transformers_weight_conversion as conversion

    own = conversion.convert_peft_config_for_transformers
    conversion.convert_peft_config_for_transformers = lambda *_, **__: None
    try:
        yield
    finally:
        conversion.convert_peft_config_for_transformers = own


def keep_frozen_weights(model: Any) -> None:
    """Make DDP leave a model's frozen weights as they are: every worker has read the same ones.

    DDP sends all parameters of the first worker to the others when it begins. Weights that are mapped from files, which
    the workers of a machine share, then become a copy in each process, of one worker alone too. Upstream: torch reads
    `_ddp_params_and_buffers_to_ignore` of the module (issue 43690 is to make it public).
    """
    model._ddp_params_and_buffers_to_ignore = [
        name for name, parameter in model.named_parameters() if not parameter.requires_grad
    ]


def load_errors(error: BaseException) -> list[str]:
    """Return the tracebacks of the errors in converting weights behind the one error that `from_pretrained` raised.

    It names none of them. Upstream: `LoadStateDictInfo.conversion_errors`, a local of the function that raises it
    (transformers 5.24).
    """
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if found := getattr(frame.f_locals.get("loading_info"), "conversion_errors", None):
            return list(found.values())
    return []


def step_figures(trainer: Any) -> dict[str, list[float]]:
    """Return the figures of the present step of a TRL trainer, each with one value per pass; to be changed in place.

    TRL's `log` averages and clears them. Upstream: `_metrics["train"]`, a defaultdict of lists.
    """
    figures: dict[str, list[float]] = trainer._metrics["train"]
    return figures


def takes_token_rows(trainer_class: type[Any]) -> type[Any]:
    """Return TRL's DPOTrainer or RewardTrainer without the step that turns texts into tokens.

    The rows are token ids, and the collator is ours. Upstream: `_prepare_dataset(dataset, ...)`, which returns the
    dataset; SFTTrainer has the public option `dataset_kwargs={"skip_prepare_dataset": True}`, these two have none.
    """

    class TakesTokenRows(trainer_class):  # type: ignore[misc]  # trl has no types
        def _prepare_dataset(self, dataset: Any, *args: Any) -> Any:
            return dataset

    return TakesTokenRows


def without_reference_pass(trainer_class: type[Any]) -> type[Any]:
    """Return TRL's DPOTrainer without the pass over all rows that `precompute_ref_log_probs` means.

    The caller has the reference's likelihoods, one per pair; TRL would compute them per row of the dataset, which
    lists a pair once per epoch. Upstream: `DPOTrainer._precompute_ref_logps(dataset, name, batch_size)`.
    """

    class WithoutReferencePass(trainer_class):  # type: ignore[misc]  # trl has no types
        def _precompute_ref_logps(self, dataset: Any, *args: Any) -> Any:
            return dataset

    return WithoutReferencePass


def own_rollouts(trainer_class: type[Any]) -> type[Any]:
    """Return TRL's GRPOTrainer or RLOOTrainer, which calls four methods of its subclass by names of ours.

    - `prompt_ids(prompts)`: token ids of each prompt, from `_tokenize_prompts`.
    - `answer_ids()`: token ids of an answer to each of those prompts, from `_generate_single_turn`.
    - `answer_likelihoods(model, ids, mask, answer_tokens, batch_size)`: (log probabilities, entropies), from
      `_get_per_token_logps_and_entropies`, on a CPU alone: TRL's own scores the prompts' positions too.
    - `save_model_files(folder, state_dict)`, from `_save`: TRL writes the reference and the tokenizer as well.

    After a resume it continues the trainer's count of passes, which TRL begins at 0 (`_step`, where `_prepare_inputs`
    finds no `_buffered_inputs`): answers of a step would be made or reused in the wrong pass.
    """

    class OwnRollouts(trainer_class):  # type: ignore[misc]  # trl has no types
        def _tokenize_prompts(self, prompts: list[Any]) -> tuple[list[list[int]], None, dict[str, Any]]:
            return self.prompt_ids(prompts), None, {}

        def _generate_single_turn(self, prompt_ids: Any, images: Any, fields: Any, generations: Any = None) -> Any:
            from trl import GRPOTrainer

            answers = self.answer_ids()
            return (answers, None) if isinstance(self, GRPOTrainer) else answers

        def _prepare_inputs(self, generation_batch: Any) -> Any:
            if self._buffered_inputs is None:
                self._step = int(self.state.global_step) * self.args.gradient_accumulation_steps
            return super()._prepare_inputs(generation_batch)

        def _get_per_token_logps_and_entropies(
            self,
            model: Any,
            input_ids: Any,
            attention_mask: Any,
            logits_to_keep: int,
            batch_size: int | None = None,
            compute_entropy: bool = False,
            **more: Any,
        ) -> Any:
            if input_ids.is_cuda:
                return super()._get_per_token_logps_and_entropies(
                    model, input_ids, attention_mask, logits_to_keep, batch_size, compute_entropy, **more
                )
            size = batch_size or len(input_ids)
            logps, entropies = self.answer_likelihoods(model, input_ids, attention_mask, logits_to_keep, size)
            return logps, entropies if compute_entropy else None, None

        def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
            if self.args.should_save:
                self.save_model_files(output_dir, state_dict)

    return OwnRollouts


def layer_tuner() -> type[Any]:
    """Return PEFT's base class of adapter kinds, for one whose layer wraps a linear.

    A subclass sets `prefix`, `tuner_layer_cls` (built with layer, adapter name, config; `add(name, config)` puts a
    second adapter on it) and `target_module_mapping`. Upstream: `BaseTuner._create_and_replace`, which PEFT asks of
    each kind, and `BaseTuner._replace_module`.
    """
    from peft.tuners.tuners_utils import BaseTuner

    class LayerTuner(BaseTuner):  # type: ignore[misc]  # peft has no types
        def _create_and_replace(
            self,
            peft_config: Any,
            adapter_name: str,
            target: Any,
            target_name: str,
            parent: Any,
            current_key: str,
            *,
            parameter_name: str | None = None,
        ) -> None:
            if isinstance(target, self.tuner_layer_cls):
                target.add(adapter_name, peft_config)
            else:
                layer = self.tuner_layer_cls(target, adapter_name, peft_config)
                self._replace_module(parent, target_name, layer, target)

    return LayerTuner


def shard_on_cpu() -> None:
    """Make accelerate shard on a CPU: it does so on accelerators alone, and trains whole copies on a CPU, silently.

    The list is in `AcceleratorState.__init__` (accelerate/state.py); the device stays the CPU, the group gloo.
    Upstream: `AcceleratorState._reset_state(reset_partial_state)` and `PartialState.distributed_type`.
    """
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState(cpu=True, backend="gloo").distributed_type = DistributedType.MULTI_GPU


def quiet_int8_casts() -> None:
    """Drop bitsandbytes' warning of each int8 layer and forward pass whose input is not fp16; the run's notes have it.

    Upstream: the logger of `bitsandbytes.autograd._functions`.
    """
    getLogger("bitsandbytes.autograd._functions").setLevel(ERROR)


def unpack_cpu_layout(packed: Any, state: Any) -> tuple[Any, Any]:
    """Return a 4-bit weight and its QuantState in the layout that `dequantize_4bit` reads.

    bitsandbytes repacks a linear for its fused AVX512-BF16 kernel (`packing_format_for_cpu`) at the first forward in
    eval mode, and exports no way back. `state` is changed in place. Upstream:
    `bitsandbytes.functional._convert_weight_packed_for_cpu_inverse`.
    """
    from bitsandbytes import functional

    found: tuple[Any, Any] = functional._convert_weight_packed_for_cpu_inverse(packed, state)
    return found


def set_last_rates(scheduler: Any, rates: Sequence[float]) -> None:
    """Make a learning rate scheduler report these rates as its present ones (`get_last_lr`), until its next step.

    A schedule whose lambdas change after a resume reports the checkpoint's rate for the first step otherwise.
    Upstream: `torch.optim.lr_scheduler.LRScheduler._last_lr`.
    """
    scheduler._last_lr = list(rates)
