"""The real model class of a base on PyTorch's meta device: shapes without weights, in a second and a few MiB.

`count` reads sizes and traits from it, `tests/fake_step.py` takes a training step on it.
"""

import importlib
import json
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from graftwork.adapters.experts import adaptable_linears, expert_weights, experts_problem
from graftwork.adapters.kind import ATTENTION_WORDS, MLP_WORDS, linears, text_linears
from graftwork.adapters.lora import LoraSpec
from graftwork.base.load import attention_of, auto_class, complete_for_trl
from graftwork.base.model_shape import MLP_OUTPUTS, BaseFacts, Linear, ModelShape, Targets
from graftwork.compat.hf import apply_gate
from graftwork.errors import BaseModelError, GraftworkError
from graftwork.prequantized.detect import find_format
from graftwork.quantization import import_bitsandbytes

ATTACH = ("graftwork.training.adapters.attach", "attach")
RUNNER = ("graftwork.serving.engine.model_runner", "Runner")
"""Code that trains and serves a base, tried on its meta model. By dotted name, as in `config.SPEC_KINDS`: this module
is part of the core, which imports neither package."""
TARGETS: tuple[Targets, ...] = ("all-linear", "attention", "mlp")
LEFT_OUT = ("dtype", "torch_dtype", "quantization_config", "auto_map")
"""Keys of config.json that play no part. `auto_map` names code of the repository's own, which transformers would ask on
the terminal to run for a class that it lacks."""
LATENT = tuple(
    f".self_attn.{end}" for end in ("q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
)
"""Linears of multi-head latent attention."""
_NUMBER = re.compile(r"\.\d+(?=\.|$)")


def build(config: Mapping[str, Any], dtype: Any = None) -> Any:
    """Return the model of this config.json on the meta device, in eval mode. Raises BaseModelError."""
    import torch

    with torch.device("meta"):
        return model_from(config, dtype)


def model_from(config: Mapping[str, Any], dtype: Any = None) -> Any:
    """Return a model of this config.json with random weights, in eval mode. Raises BaseModelError."""
    import torch
    from transformers import AutoConfig

    given = {key: value for key, value in config.items() if key not in LEFT_OUT}
    try:
        with TemporaryDirectory() as folder:  # read as a base's own file is, special values of JSON included
            (Path(folder) / "config.json").write_text(json.dumps(given), encoding="utf-8")
            known = AutoConfig.from_pretrained(folder, local_files_only=True)
        model = auto_class(known).from_config(
            known, dtype=dtype or torch.float32, attn_implementation=attention_of(known)
        )
    except Exception as error:  # code of any architecture, given a config of any content
        hint = "take a base with a text-only config.json, or install a transformers that knows it"
        raise BaseModelError(
            f"base of model_type={config.get('model_type')!r}",
            f"transformers {version('transformers')} cannot build it ({_first_line(error)})",
            "a base is a causal language model that the installed transformers knows",
            "install the library that it names" if isinstance(error, ImportError) else hint,
        ) from error
    return model.eval()


def count(config: Mapping[str, Any]) -> BaseFacts:
    """Count sizes and traits of the base with this config.json. Raises BaseModelError."""
    import_bitsandbytes()
    model = build(config)
    complete_for_trl(model)
    adapted: dict[Targets, tuple[Linear, ...]] = {}
    unattached: dict[Targets, str] = {}
    for which in TARGETS:
        try:
            adapted[which] = _adapted_linears(build(config), which)
        except Exception as error:  # PEFT on a model of any architecture
            adapted[which], unattached[which] = (
                (),
                _first_line(error).partition(" Incompatible modules")[0],
            )  # a set of names
    text = {*text_linears(model)}
    grouped = tuple(
        one
        for inside in (True, False)
        for one in _group_linears(
            ((name, *_sizes(model.get_submodule(name))) for name in linears(model) if (name in text) == inside),
            outside=not inside,
        )
    )
    shape = _packed_shape(model, config, _shape(model, config, grouped, adapted))
    unserved, kv = _serving_facts(build(config))
    if kv:  # as the attention is called with them; a config need not name them
        shape = replace(shape, kv_values=sum(2 * layer.heads * layer.head_dim for layer in kv))
    if len(set(kv)) == 1 and not hasattr(model.config.get_text_config(), "kv_lora_rank"):  # of MLA: keys of two parts
        shape = replace(shape, kv_heads=kv[0].heads, head_dim=kv[0].head_dim)
    if shape.eager or shape.latent_size:
        shape = replace(shape, score_bytes=(_score_bytes(config, "float32"), _score_bytes(config, "bfloat16")))
    shape = replace(shape, unplanned=_unplanned_reason(model, shape))
    return BaseFacts(
        shape=shape,
        model_type=str(config["model_type"]),
        model_class=type(model).__name__,
        attention=attention_of(model.config),
        fixed=tuple(dict.fromkeys(map(_pattern, sorted({*linears(model)} - {*adaptable_linears(model)})))),
        unadapted_experts=_unadapted_experts(model),
        recurrent=is_recurrent(model.config),
        transposed=any(type(module).__name__ == "Conv1D" for module in model.modules()),
        packs=_packs(build(config)),
        reads_weights="" if expert_weights(model) else _reads_weights(build(config)),
        bodied=model.base_model is not model,
        unattached=unattached,
        unserved=unserved,
    )


def _shape(
    model: Any, config: Mapping[str, Any], linears: tuple[Linear, ...], adapted: Mapping[Targets, tuple[Linear, ...]]
) -> ModelShape:
    text = model.config.get_text_config()
    hidden, layers = int(text.hidden_size), int(text.num_hidden_layers)
    heads = int(getattr(text, "num_attention_heads", None) or 1)
    kv_heads = int(getattr(text, "num_key_value_heads", None) or heads)
    # of a config whose layers differ in it the attribute raises an error of transformers' own (Gemma-4)
    head_dim = int(text.to_dict().get("head_dim") or hidden // heads)
    latent = getattr(text, "kv_lora_rank", None) is not None
    inner = [x.inputs for x in linears if x.part == "mlp" and x.name.endswith(MLP_OUTPUTS)]
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    parts = [part for part in (model.get_decoder(), head) if part is not None]
    inside = {id(parameter) for part in parts for parameter in part.parameters()}
    found = expert_weights(model)
    experts = _group_linears((one.name, one.inputs, one.outputs) for one in found for _ in range(one.experts))
    return ModelShape(
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate=max(inner, default=0),
        vocab=int(text.vocab_size),
        tied=head is not None and head.weight is embedding.weight,
        params=sum(parameter.numel() for parameter in model.parameters()),
        outside_params=sum(parameter.numel() for parameter in model.parameters() if id(parameter) not in inside),
        linears=linears,
        adapted=adapted,
        kv_values=2 * layers * kv_heads * head_dim,
        file_bytes=4 if (config.get("dtype") or config.get("torch_dtype")) == "float32" else 2,
        experts=experts,
        qk_norm=any(name.endswith(".q_norm") for name, _ in model.named_modules()),
        norms=max(2.0, _norms(model, hidden) / layers),
        gate_values=_gate_values(model.get_submodule(found[0].module)) if found else 1.5,
        num_experts=found[0].experts if found else 1,
        experts_per_token=_top_k(model, found[0].module) if found else 1,
        eager=attention_of(model.config) == "eager",
        latent_size=heads * (text.qk_nope_head_dim + text.qk_rope_head_dim + text.v_head_dim) // 2 if latent else 0,
        latent_ranks=(text.q_lora_rank or 0) + text.kv_lora_rank if latent else 0,
        latent_rest=heads * text.qk_nope_head_dim if latent else 0,
        router_loss=hasattr(text, "output_router_logits") and getattr(text, "router_aux_loss_coef", 0.0) != 0.0,
    )


def _norms(model: Any, hidden: int) -> int:
    """Number of norms over the hidden size in the decoder's blocks; of queries and keys `qk_norm` says so."""
    inside = (one for one in model.get_decoder().named_modules() if _NUMBER.search(one[0]))
    named = (module for name, module in inside if "norm" in name.lower() and not name.endswith((".q_norm", ".k_norm")))
    return sum(tuple(getattr(getattr(one, "weight", None), "shape", ())) == (hidden,) for one in named)


def _gate_values(experts: Any) -> float:
    """Values that autograd keeps of the gate of an expert, for each output of its first projection."""
    import torch

    if experts_problem(experts):
        return 1.5  # silu(gate) * up
    gate_up = torch.ones(1, 2 * PROBE_TOKENS, device="meta", requires_grad=True)
    with _saved_tensors() as kept:
        apply_gate(experts, gate_up * 1.0)
    return sum(size for _, size in kept.values()) / gate_up.nbytes


PROBE_TOKENS = 37
"""Of a pass whose matrices of scores are looked for: no size of a model is equal to it."""


def _score_bytes(config: Mapping[str, Any], dtype: str) -> float:
    """Bytes that autograd keeps of each score in one block: its tensors of a query's and a key's size (and a sink)."""
    import torch

    model = build(config, getattr(torch, dtype))
    with _saved_tensors() as kept:
        _step_unpacked(model, PROBE_TOKENS)
    sides = (PROBE_TOKENS, PROBE_TOKENS + 1)
    found = [size for shape, size in kept.values() if len(shape) > 2 and shape[-2] in sides and shape[-1] in sides]
    text = model.config.get_text_config()
    heads = int(getattr(text, "num_attention_heads", None) or 1)  # Mamba-2 has none
    return round(sum(found) / (PROBE_TOKENS**2 * heads * int(text.num_hidden_layers)))


@contextmanager
def _saved_tensors() -> Iterator[dict[int, tuple[tuple[int, ...], int]]]:
    """Shape and bytes of each storage that autograd keeps in the block."""
    import torch

    kept: dict[int, Any] = {}

    def keep(tensor: Any) -> Any:
        kept[id(tensor.untyped_storage())] = tensor
        return tensor

    sizes: dict[int, tuple[tuple[int, ...], int]] = {}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield sizes
    sizes |= {key: (tuple(one.shape), one.untyped_storage().nbytes()) for key, one in kept.items()}


def _packed_shape(model: Any, config: Mapping[str, Any], shape: ModelShape) -> ModelShape:
    """The sizes with those of the linears that a quantised checkpoint packs, and of its dequantised file."""
    packed = find_format(config)
    if packed is None:
        return shape
    sizes = [_sizes(model.get_submodule(name)) for name in linears(model) if packed.packs(name)]
    return replace(
        shape,
        file_bytes=4,  # fp32 on most CPUs: the dtype of compute
        packed_params=sum(inputs * outputs for inputs, outputs in sizes),
        packed_bytes=sum(packed.packed_bytes(inputs, outputs) for inputs, outputs in sizes),
    )


def _top_k(model: Any, experts: str) -> int:
    """Experts that a token passes: of the router next to a module of experts, or as the config names it."""
    block = model.get_submodule(experts.rpartition(".")[0])
    owners = (*block.modules(), model.config.get_text_config())
    named = (getattr(one, key, None) for one in owners for key in ("top_k", "num_experts_per_tok"))
    found = next((int(found) for found in named if isinstance(found, int)), None)
    if found is None:
        name, problem = type(model).__name__, "its config.json has no num_experts_per_tok"
        raise BaseModelError(name, problem, "experts are chosen for each token", "add the number of the model's page")
    return found


def _unadapted_experts(model: Any) -> str:
    """The engine computes experts by the marks of transformers' `use_experts_implementation`."""
    for one in expert_weights(model):
        kind = type(model.get_submodule(one.module))
        if problem := experts_problem(model.get_submodule(one.module)):
            return f"{problem} ({kind.__name__})"
    return ""


def _adapted_linears(model: Any, which: Targets) -> tuple[Linear, ...]:
    """The linears on which PEFT puts a LoRA; none where the only ones are experts and routers."""
    if which == "mlp" and expert_weights(model) and not any(_part(name) == "mlp" for name in adaptable_linears(model)):
        return ()
    attached = _named(ATTACH)(model, LoraSpec(rank=1, targets=which)).get_base_model()
    found = []
    for name, module in attached.named_modules():
        if "default" in getattr(module, "lora_A", ()):
            found.append((name, module.lora_A["default"].in_features, module.lora_B["default"].out_features))
    return _group_linears(found)


def _named(place: tuple[str, str]) -> Any:
    return getattr(importlib.import_module(place[0]), place[1])


def _serving_facts(model: Any) -> tuple[str, list[Any]]:
    """Return (why the engine cannot run the model, or "", and the `KvShape` of each layer)."""
    _choose_nothing(model)
    try:
        return "", _named(RUNNER)(model, "meta").kv_shapes
    except Exception as error:  # code of any architecture
        return _first_line(error), []


def _step(model: Any, tokens: int = 8, **positions: Any) -> None:
    """A forward pass in training mode over tokens that have no values."""
    import torch

    _choose_nothing(model)
    model.train()(input_ids=torch.zeros(1, tokens, dtype=torch.long, device="meta"), use_cache=False, **positions)


def _choose_nothing(model: Any) -> None:
    """Take the paths of a model's code that do not read values, which a meta tensor lacks."""
    with suppress(Exception):  # a config may refuse it (ModernBERT); its model does not look for padding
        model.config.pad_token_id = None  # GPT-2 looks for padding among the tokens
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("batched_mm")  # the others read the router's choice


def _packs(model: Any) -> bool:
    """Return whether transformers looks for packed documents when it makes masks (5.24: `masking_utils`)."""
    import torch
    from transformers import masking_utils

    seen: list[Any] = []

    def found(position_ids: Any) -> Any:
        seen.append(position_ids)
        return torch.zeros_like(position_ids)

    own, masking_utils.find_packed_sequence_indices = masking_utils.find_packed_sequence_indices, found
    try:
        _step(model, position_ids=torch.zeros(1, 8, dtype=torch.long, device="meta"))
    except RuntimeError:  # code that reads values
        return False
    finally:
        masking_utils.find_packed_sequence_indices = own
    return bool(seen)


def _reads_weights(model: Any) -> str:
    """The error of a step whose linears have bytes for weights, as packed ones do; empty where none is read."""
    import torch

    def product(outputs: int, inputs: Any) -> Any:
        return inputs.new_empty(*inputs.shape[:-1], outputs)

    for name in linears(model):
        linear = model.get_submodule(name)
        packed = torch.empty(linear.weight.numel() // 2, 1, dtype=torch.uint8, device="meta")
        linear.forward = partial(product, _sizes(linear)[1])
        linear.weight = torch.nn.Parameter(packed, requires_grad=False)
    try:
        _step_unpacked(model)
    except NotImplementedError:  # code that reads values
        return ""
    except RuntimeError as error:
        return _first_line(error)
    return ""


def _step_unpacked(model: Any, tokens: int = 8) -> None:
    """A step with an empty cache: transformers then does not look for packed documents, which takes values."""
    from transformers import DynamicCache

    with warnings.catch_warnings():  # transformers 5.24 renames the argument to `cache` in some families only
        warnings.filterwarnings("ignore", "`past_key_values` is deprecated", FutureWarning)
        _step(model, tokens, past_key_values=DynamicCache(config=model.config))


def is_recurrent(config: Any) -> bool:
    """Return whether the model's cache holds states of convolutions or of linear attention in some layer."""
    from transformers import DynamicCache
    from transformers.cache_utils import LinearAttentionCacheLayerMixin

    return any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in DynamicCache(config=config).layers)


def _unplanned_reason(model: Any, shape: ModelShape) -> str:
    """Reason why the closed forms of `graftwork.planning.memory` do not predict a training step's activations."""
    found = ""
    if any(".experts." in name for name in linears(model)):
        found = "experts that are linear layers"
    elif is_recurrent(model.config):
        found = "recurrent layers"
    elif shape.experts and _unadapted_experts(model):
        found = f"this base: {_unadapted_experts(model)}"
    elif any(type(module).__name__ == "NewGELUActivation" for module in model.modules()):
        found = "an activation function of several operations (gelu_new), each of which keeps its input"
    elif not _is_uniform(shape):
        found = "blocks that are not one attention and one MLP of equal sizes"
    return found and f"activations are not predicted for {found}"


def _is_uniform(shape: ModelShape) -> bool:
    """Return whether every block is q, k, v, o and a plain or gated MLP, fused or not, of the sizes in the config.

    Of a base with experts: attention of equal sizes, and gated MLPs next to the experts or in their place.
    """
    attention = shape.hidden * (2 * shape.q_size + 2 * shape.kv_size)
    if shape.latent_size:
        latent = [x for x in shape.linears if x.name.endswith(LATENT) and x.count == shape.layers]
        attention = sum(x.params for x in latent)
    if shape.experts:
        inner = sum(x.count * x.inputs for x in shape.linears if x.part == "mlp" and x.name.endswith(MLP_OUTPUTS))
        return shape.linear_params == shape.layers * attention + 3 * shape.hidden * inner
    mlp = (3 if shape.gated else 2) * shape.hidden * shape.intermediate
    text = [x for x in shape.linears if x.part != "outside"]
    every = all(x.part != "other" and x.count == shape.layers for x in text)
    return every and sum(x.count * x.params for x in text) == shape.layers * (attention + mlp)


def _sizes(module: Any) -> tuple[int, int]:
    """(inputs, outputs)."""
    if type(module).__name__ == "Conv1D":  # of GPT-2, which stores [in, out]
        inputs, outputs = module.weight.shape
        return int(inputs), int(outputs)
    return module.in_features, module.out_features


def _group_linears(found: Iterable[tuple[str, int, int]], *, outside: bool = False) -> tuple[Linear, ...]:
    """Equal layers of different blocks as one entry, in the model's order. outside: of the text decoder."""
    blocks: dict[tuple[str, int, int], list[int]] = {}
    for name, inputs, outputs in found:
        number = _NUMBER.search(name)
        blocks.setdefault((_pattern(name), inputs, outputs), []).append(int(number[0][1:]) if number else -1)
    return tuple(
        Linear(*key, len(at), "outside" if outside else _part(key[0]), tuple(at) if _are_blocks(at) else ())
        for key, at in blocks.items()
    )


def _are_blocks(numbers: Sequence[int]) -> bool:
    return len(set(numbers)) == len(numbers) and -1 not in numbers


def _part(name: str) -> Literal["attention", "mlp", "other"]:
    if any(word in name.lower() for word in ATTENTION_WORDS):
        return "attention"
    return "mlp" if any(word in name.lower() for word in MLP_WORDS) else "other"


def _pattern(name: str) -> str:
    return _NUMBER.sub(".*", name)


def _first_line(error: Exception) -> str:
    """The problem that an error names, without its rule and hint; of a foreign one its kind too."""
    if isinstance(error, GraftworkError):
        return error.problem
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}"
