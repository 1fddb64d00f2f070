"""Trained rows of the embedding and of the output layer, and trained embeddings before a prompt.

Rows come from `trainable_token_indices`, or whole from `modules_to_save`. The base's layers run as they are; afterwards
the rows of the tokens concerned are overwritten. Both layers are hooked for a step with such adapters alone.

The reference is peft 0.21 (`peft/utils/other.py`, `peft/tuners/trainable_tokens/`). Where the base ties the output
layer to the embedding, trained tokens change both, and a saved embedding does so only with `ensure_weight_tying`.
Legend: T packed tokens, M of them overwritten, N chosen tokens, K trained rows, H hidden, V vocabulary.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.functional import linear

from graftwork.adapters.kind import MODULE_PREFIX
from graftwork.serving.engine.adapters.base_view import BaseView
from graftwork.serving.engine.adapters.format import AdapterWeights, ConfigFile, InputRows, OutputRows, ReadOptions
from graftwork.serving.engine.adapters.loaded import LoadedAdapter
from graftwork.serving.engine.adapters.weights_file import TensorFile
from graftwork.serving.engine.attention import StepBatch

ROW_KEYS = frozenset({"modules_to_save", "trainable_token_indices", "ensure_weight_tying"})
Rows = tuple[InputRows | None, OutputRows | None]


def replaced_rows(config: ConfigFile, tensors: TensorFile, base: BaseView, dtype: torch.dtype) -> Rows:
    """(embedding rows, output rows) that the adapter brings; None for what it leaves as it is."""
    names = config.names("modules_to_save", optional=True)
    names = (names,) if isinstance(names, str) else names
    whole = [_layer(config, "modules_to_save", name, base) for name in names]
    indices = _token_indices(config, base)
    both = sorted(set(whole) & set(indices))
    if both:
        raise config.make_error(
            "trainable_token_indices", f"{both[0]} is in modules_to_save as well; peft takes either"
        )
    saved, trained = (
        _read_whole_module(config, whole, tensors, base, dtype),
        _read_some_rows(config, indices, tensors, base, dtype),
    )
    return saved[0] or trained[0], saved[1] or trained[1]


def read(config: ConfigFile, tensors: TensorFile, base: BaseView, options: ReadOptions) -> AdapterWeights:
    """Return an adapter of peft_type TRAINABLE_TOKENS: nothing but trained rows."""
    config.require_known({"token_indices", "target_modules"}, {"init_weights"}, {})
    targets = config.values.get("target_modules")
    names = [base.embedding_name] if targets is None else [targets] if isinstance(targets, str) else []
    names = names or list(config.names("target_modules"))
    ids = _ids(config, "token_indices", config.values.get("token_indices"), base)
    indices = {_layer(config, "target_modules", one, base): ids for one in names}
    inputs, outputs = _read_some_rows(config, indices, tensors, base, options.dtype, "trainable_tokens_delta")
    tied_copy = f"{MODULE_PREFIX}{base.output_name}.trainable_tokens_delta"
    if base.tied and tensors.holds(tied_copy):
        tensors.take(tied_copy, (len(ids), base.hidden_size), options.dtype)  # peft saves a tied layer's rows twice
    tensors.require_empty(f"{MODULE_PREFIX}MODULE.trainable_tokens_delta")
    return AdapterWeights(inputs=inputs, outputs=outputs)


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


def _token_indices(config: ConfigFile, base: BaseView) -> dict[str, list[int]]:
    """Token ids by layer."""
    key = "trainable_token_indices"
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


def _read_whole_module(
    config: ConfigFile, names: Sequence[str], tensors: TensorFile, base: BaseView, dtype: torch.dtype
) -> Rows:
    inputs = outputs = None
    shape = (base.vocab_size, base.hidden_size)
    tie = bool(config.values.get("ensure_weight_tying")) and base.tied and bool(names)
    if base.embedding_name in names or tie:
        rows_VH = tensors.take(f"{MODULE_PREFIX}{base.embedding_name}.weight", shape, dtype)
        inputs = InputRows(_scale_rows(rows_VH, base), None)
        outputs = OutputRows(rows_VH, None) if tie else None
    key = f"{MODULE_PREFIX}{base.output_name}"
    if base.output_name in names and not tie:
        rows_VH = tensors.take(f"{key}.weight", shape, dtype)
        bias = tensors.take(f"{key}.bias", shape[:1], dtype) if base.output.bias is not None else None
        outputs = OutputRows(rows_VH, None, bias)
    elif tie and tensors.holds(f"{key}.weight"):
        tensors.take(f"{key}.weight", shape, dtype)  # the same values, saved twice
    return inputs, outputs


def _read_some_rows(
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
        inputs = InputRows(_scale_rows(rows_KH, base), {token: place for place, token in enumerate(input_ids)})
        outputs = OutputRows(rows_KH, torch.tensor(input_ids)) if follows else None
    if output_ids is not None and not follows:
        rows_KH = tensors.take(
            f"{MODULE_PREFIX}{base.output_name}.{suffix}", (len(output_ids), base.hidden_size), dtype
        )
        outputs = OutputRows(rows_KH, torch.tensor(output_ids))
    if outputs is not None and base.output.bias is not None:
        raise config.make_error("trainable_token_indices", "peft drops the output layer's bias here; this base has one")
    return inputs, outputs


def _scale_rows(rows: torch.Tensor, base: BaseView) -> torch.Tensor:
    scale = base.embedding_scale
    return rows if scale is None else rows * scale.to(rows.device, rows.dtype)


Change = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(input of the layer, its result) -> the result, changed in place where it may be."""


@contextmanager
def changed_result(layer: Any, change: Change) -> Iterator[None]:
    """Within it, `change` is applied to what the layer returns."""
    inner: Callable[..., torch.Tensor] = layer.forward
    hooked = layer.__dict__.get("forward")  # another hook's
    layer.forward = lambda x, *args, **kwargs: change(x, inner(x, *args, **kwargs))
    try:
        yield
    finally:
        if hooked is None:
            del layer.forward
        else:
            layer.forward = hooked


class InputChange:
    """Overwrites the embeddings of some packed tokens: rows_MH at places_M."""

    def __init__(self, places_M: torch.Tensor, rows_MH: torch.Tensor) -> None:
        self._places_M, self._rows_MH = places_M, rows_MH

    def __call__(self, ids_1T: torch.Tensor, result_1TH: torch.Tensor) -> torch.Tensor:
        result_1TH[0].index_copy_(0, self._places_M, self._rows_MH)
        return result_1TH


class OutputChange:
    """Computes some logits of some chosen tokens by other rows of the output layer."""

    def __init__(self, parts: Sequence[tuple[torch.Tensor, OutputRows]]) -> None:
        self._parts = parts

    def __call__(self, hidden_1NH: torch.Tensor, logits_1NV: torch.Tensor) -> torch.Tensor:
        for rows_M, replaced in self._parts:
            own_MK = linear(hidden_1NH[0].index_select(0, rows_M), replaced.rows_KH, replaced.bias_V)
            if replaced.ids_K is None:
                logits_1NV[0].index_copy_(0, rows_M, own_MK)
            else:
                logits_1NV[0][rows_M[:, None], replaced.ids_K] = own_MK
        return logits_1NV


def input_change(batch: StepBatch, adapters: Sequence[LoadedAdapter | None]) -> InputChange | None:
    """adapters: of each chunk. None: every token has the base's embedding."""
    places: list[int] = []
    rows: list[torch.Tensor] = []
    first = 0
    for chunk, weights in zip(batch.chunks, adapters, strict=True):
        if weights is not None:
            lead = weights.virtual_tokens.count if weights.virtual_tokens is not None else 0
            trained = min(max(lead - chunk.start, 0), len(chunk.ids)) if lead else 0
            if trained and weights.virtual_tokens is not None and weights.virtual_tokens.embeddings_NH is not None:
                places += range(first, first + trained)
                rows.append(weights.virtual_tokens.embeddings_NH[chunk.start : chunk.start + trained])
            if weights.inputs is not None:
                known, table = weights.inputs.places, weights.inputs.rows_KH
                hits = [(n, token) for n, token in enumerate(chunk.ids) if known is None or token in known]
                places += [first + n for n, _ in hits]
                rows.append(table[[token if known is None else known[token] for _, token in hits]])
        first += len(chunk.ids)
    if not places:
        return None
    return InputChange(torch.tensor(places, device=batch.ids_1T.device), torch.cat(rows))


def output_change(
    batch: StepBatch, adapters: Sequence[LoadedAdapter | None], wanted: Sequence[int]
) -> OutputChange | None:
    """wanted: packed places of the chosen tokens. None: all are chosen by the base's output layer."""
    rows: dict[LoadedAdapter, list[int]] = {}
    owners = [weights for chunk, weights in zip(batch.chunks, adapters, strict=True) for _ in chunk.ids]
    for n, place in enumerate(wanted):
        weights = owners[place]
        if weights is not None and weights.outputs is not None:
            rows.setdefault(weights, []).append(n)
    device = batch.ids_1T.device
    parts = [(torch.tensor(own, device=device), weights.outputs) for weights, own in rows.items() if weights.outputs]
    return OutputChange(parts) if parts else None
