"""Trained rows of the embedding and of the output layer: `trainable_token_indices`, or whole by `modules_to_save`.

The reference is peft 0.21 (`peft/utils/other.py`, `peft/tuners/trainable_tokens/`). Where the base ties the output
layer to the embedding, trained tokens change both, and a saved embedding does so only with `ensure_weight_tying`.
"""

from collections.abc import Mapping, Sequence

import torch

from graftwork.serving.engine.adapters.base_view import BaseView
from graftwork.serving.engine.adapters.changes import AdapterWeights, InputRows, OutputRows
from graftwork.serving.engine.adapters.config_file import ConfigFile
from graftwork.serving.engine.adapters.tensor_file import MODULE_PREFIX, TensorFile

ROW_KEYS = frozenset({"modules_to_save", "trainable_token_indices", "ensure_weight_tying"})
Rows = tuple[InputRows | None, OutputRows | None]


def replaced_rows(config: ConfigFile, tensors: TensorFile, base: BaseView, dtype: torch.dtype) -> Rows:
    """(embedding rows, output rows) that the adapter brings; None for what it leaves as it is."""
    whole = _saved_modules(config, base)
    indices = _token_indices(config, "trainable_token_indices", base)
    both = sorted(set(whole) & set(indices))
    if both:
        raise config.make_error(
            "trainable_token_indices", f"{both[0]} is in modules_to_save as well; peft takes either"
        )
    saved, trained = _whole(config, whole, tensors, base, dtype), _some(config, indices, tensors, base, dtype)
    return saved[0] or trained[0], saved[1] or trained[1]


def read_trained_tokens(
    config: ConfigFile, tensors: TensorFile, base: BaseView, *, dtype: torch.dtype
) -> AdapterWeights:
    """An adapter of peft_type TRAINABLE_TOKENS: nothing but trained rows."""
    config.require_known({"token_indices", "target_modules"}, {"init_weights"}, {})
    name = config.values.get("target_modules")
    names = (
        [base.embedding_name]
        if name is None
        else [name]
        if isinstance(name, str)
        else list(config.names("target_modules"))
    )
    ids = _ids(config, "token_indices", config.values.get("token_indices"), base)
    indices = {_layer(config, "target_modules", one, base): ids for one in names}
    inputs, outputs = _some(config, indices, tensors, base, dtype, "trainable_tokens_delta")
    tied_copy = f"{MODULE_PREFIX}{base.output_name}.trainable_tokens_delta"
    if base.tied and tensors.holds(tied_copy):
        tensors.take(tied_copy, (len(ids), base.hidden_size), dtype)  # peft saves a tied layer's rows twice
    tensors.require_empty(f"{MODULE_PREFIX}MODULE.trainable_tokens_delta")
    return AdapterWeights(inputs=inputs, outputs=outputs)


def _saved_modules(config: ConfigFile, base: BaseView) -> list[str]:
    """Full names of the whole layers that the adapter replaces."""
    names = config.optional_names("modules_to_save")
    return [_layer(config, "modules_to_save", name, base) for name in ((names,) if isinstance(names, str) else names)]


def _layer(config: ConfigFile, key: str, name: str, base: BaseView) -> str:
    """The full name of the embedding or the output layer that `name` means; other modules are refused."""
    found = [full for full in base.modules_ending(name) if full]
    allowed = {base.embedding_name, base.output_name}
    if len(found) == 1 and found[0] in allowed:
        return found[0]
    rule = (
        f"whole modules are served for the embedding ({base.embedding_name}) and the output layer ({base.output_name})"
    )
    raise config.make_error(key, rule, f"train without {name}, or serve it merged as its own base", value=name)


def _token_indices(config: ConfigFile, key: str, base: BaseView) -> dict[str, list[int]]:
    """Token ids by layer."""
    value = config.values.get(key)
    if not value:
        return {}
    by_name = value if isinstance(value, Mapping) else {base.embedding_name: value}
    return {_layer(config, key, str(name), base): _ids(config, key, ids, base) for name, ids in by_name.items()}


def _ids(config: ConfigFile, key: str, value: object, base: BaseView) -> list[int]:
    ids = value if isinstance(value, list) else [None]
    if (
        not ids
        or any(type(one) is not int or not 0 <= one < base.vocab_size for one in ids)
        or len(set(ids)) < len(ids)
    ):
        raise config.make_error(key, f"token ids differ and are from 0 to {base.vocab_size - 1}")
    return list(ids)


def _whole(config: ConfigFile, names: Sequence[str], tensors: TensorFile, base: BaseView, dtype: torch.dtype) -> Rows:
    inputs = outputs = None
    shape = (base.vocab_size, base.hidden_size)
    tie = bool(config.values.get("ensure_weight_tying")) and base.tied and bool(names)
    if base.embedding_name in names or tie:
        rows_VH = tensors.take(f"{MODULE_PREFIX}{base.embedding_name}.weight", shape, dtype)
        inputs = InputRows(_scaled(rows_VH, base), None)
        outputs = OutputRows(rows_VH, None) if tie else None
    key = f"{MODULE_PREFIX}{base.output_name}"
    if base.output_name in names and not tie:
        rows_VH = tensors.take(f"{key}.weight", shape, dtype)
        bias = tensors.take(f"{key}.bias", shape[:1], dtype) if base.output.bias is not None else None
        outputs = OutputRows(rows_VH, None, bias)
    elif tie and tensors.holds(f"{key}.weight"):
        tensors.take(f"{key}.weight", shape, dtype)  # the same values, saved twice
    return inputs, outputs


def _some(
    config: ConfigFile,
    indices: Mapping[str, list[int]],
    tensors: TensorFile,
    base: BaseView,
    dtype: torch.dtype,
    suffix: str = "token_adapter.trainable_tokens_delta",
) -> Rows:
    inputs = outputs = None
    input_ids, output_ids = indices.get(base.embedding_name), indices.get(base.output_name)
    follows = base.tied and input_ids is not None
    follows &= output_ids in (None, input_ids) or bool(config.values.get("ensure_weight_tying"))
    if input_ids is not None:
        rows_KH = tensors.take(
            f"{MODULE_PREFIX}{base.embedding_name}.{suffix}", (len(input_ids), base.hidden_size), dtype
        )
        inputs = InputRows(_scaled(rows_KH, base), {token: place for place, token in enumerate(input_ids)})
        outputs = OutputRows(rows_KH, torch.tensor(input_ids)) if follows else None
    if output_ids is not None and not follows:
        rows_KH = tensors.take(
            f"{MODULE_PREFIX}{base.output_name}.{suffix}", (len(output_ids), base.hidden_size), dtype
        )
        outputs = OutputRows(rows_KH, torch.tensor(output_ids))
    if outputs is not None and base.output.bias is not None:
        raise config.make_error("trainable_token_indices", "peft drops the output layer's bias here; this base has one")
    return inputs, outputs


def _scaled(rows: torch.Tensor, base: BaseView) -> torch.Tensor:
    scale = base.embedding_scale
    return rows if scale is None else rows * scale.to(rows.device, rows.dtype)
