"""Base models: resolve, load for training and serving, cache of nf4 weights, rows for additional tokens."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from graftwork.base import source
from graftwork.base.packed_experts import unpack_experts
from graftwork.base.source import BaseSpec
from graftwork.compat.hf import has_sdpa, load_errors
from graftwork.config import canonical_json
from graftwork.errors import BaseModelError
from graftwork.prequantized.convert import PackedFiles, write_plain
from graftwork.prequantized.detect import find_format, unkept_reason
from graftwork.prequantized.format import PackedFormat
from graftwork.prompts.template import (
    DEFAULT_DATE,
    TEMPLATE_FOR_TOOLS,
    Template,
    hermes_template,
    template_source,
)
from graftwork.quantization import QuantSpec, compute_dtype, dequantise_linears, load_config, resident_form
from graftwork.storage.local import Progress, build_once
from graftwork.storage.store import cache_root, read_uri

if TYPE_CHECKING:
    import torch


WORTH_BYTES = 64 * 2**20
"""Weights of a base from which on its quantised form is cached: smaller ones are quantised in no time."""
_DIGEST = "digest.txt"
_PLAIN_FORM = 2
"""Of the files that `cache_dequantised` writes; raise it when the computation of a format's values changes."""


def cache_quantised(base: Path, settings: dict[str, Any], quantise: Callable[[], Any]) -> Path:
    """Folder in Hugging Face form of the base in folder `base`, quantised with `settings` by `quantise()`: a model.

    Bit for bit what quantising at load gives (tests/unit/base/test_quantized_weights.py). SmolLM2-135M: 2.5 of a
    process' first CPU seconds went into bitsandbytes' quantiser on a CPU.

    Raises BaseModelError where the folder's digest is no longer the one it was made with, or the disk is full.
    """

    def save(empty: Path) -> None:
        model = quantise()
        # transformers 5.23 writes on rank 0 of a process group alone; whichever rank comes first builds this folder
        model.should_save_on_this_rank = lambda is_main_process: is_main_process
        model.save_pretrained(empty)

    libraries = [version(name) for name in ("bitsandbytes", "transformers")]
    what = {"base": source.base_digest(base), "settings": settings, "libraries": libraries}
    return _cached_form("quantised", base, what, save)


def cache_dequantised(resolved: "ResolvedBase", packed: PackedFormat, dtype: "torch.dtype") -> Path:
    """Folder of the weights of a packed checkpoint as plain values in `dtype`, with a config.json that says so.

    Raises BaseModelError for weights that are not packed as config.json says, and as `cache_quantised` does.
    """
    what = {
        "base": source.base_digest(resolved.folder),
        "dtype": str(dtype),
        "format": _PLAIN_FORM,
        "libraries": [version("bitsandbytes")],
    }
    config = source.read_config(resolved.folder, resolved.uri)
    return _cached_form(
        "dequantised", resolved.folder, what, lambda empty: write_plain(resolved.folder, packed, config, dtype, empty)
    )


def _cached_form(place: str, base: Path, what: Mapping[str, Any], write: Callable[[Path], None]) -> Path:
    """Folder in the cache's `place` that `write(empty folder)` filled; `what` decides its content."""
    name = hashlib.sha256(canonical_json(what).encode()).hexdigest()

    def build(empty: Path) -> None:
        write(empty)
        (empty / _DIGEST).write_text(source.base_digest(empty), encoding="utf-8")

    try:
        folder = build_once(cache_root() / place / name, build)
        found, wanted = source.base_digest(folder), (folder / _DIGEST).read_text(encoding="utf-8")
    except OSError as error:
        raise BaseModelError(
            f"{place} form of {base}",
            f"a file cannot be read or written ({error})",
            "it is stored in the cache, $GRAFTWORK_CACHE or ~/.cache/graftwork",
            "free disk space, or set GRAFTWORK_CACHE to another folder",
        ) from error
    if found != wanted:
        raise BaseModelError(
            f"{place} form of {base}",
            f"{folder} has sha256 {found}, made with {wanted}",
            "a cached base is used only as it was made",
            f"delete {folder}: it is made again",
        )
    return folder


def grow(model: Any, count: int) -> None:
    """Add rows behind the last: each is the mean of the base's own, so that equal bases stay equal everywhere."""
    old = int(model.get_input_embeddings().num_embeddings)
    model.resize_token_embeddings(old + count, mean_resizing=False)
    layers: tuple[torch.nn.Module, ...] = (model.get_input_embeddings(), model.get_output_embeddings())
    for layer in layers:
        weight: Any = layer.weight
        weight.data[old:] = weight.data[:old].float().mean(dim=0).to(weight.dtype)


@dataclass(frozen=True)
class ResolvedBase:
    """A base on this machine, verified: a folder in Hugging Face form (safetensors, tokenizer, chat template)."""

    uri: str
    folder: Path
    digest: str
    """sha256 over config, weights and tokenizer."""
    config: Mapping[str, Any]
    """The model's config.json: hidden_size, num_hidden_layers, ..."""
    overrides: Mapping[str, Any] = field(default_factory=dict)
    """Keys of `config` that differ from the file: RoPE scaling."""
    extra_tokens: int = 0
    """Rows of the embedding behind those of the file; `config` counts them."""
    template_date: date = DEFAULT_DATE
    """The day that the chat template writes as today's, where it writes one."""
    chat_template: str | None = None
    """Text of the chat template in place of the folder's."""

    @property
    def packed(self) -> PackedFormat | None:
        """Format of a quantised checkpoint; None where the weights are plain."""
        return find_format(self.config)


@dataclass(frozen=True)
class LoadedBase:
    """A frozen model, ready for an adapter or for serving. `reason` says why this dtype and this form."""

    model: Any
    dtype: "torch.dtype"
    reason: str
    stored_bytes: int
    """Bytes of the weights as quantised, scales included: what a file of them takes."""
    resident_bytes: int
    """Bytes of the weights in memory; more than `stored_bytes` where nf4 is dequantised."""


def config_file(base: BaseSpec) -> Path | None:
    """config.json of a base of which this machine has the config alone: the file itself, or a folder without weights.

    Plans and checks need no more. None: the base has weights, or is elsewhere.
    """
    path = Path(base.uri.removeprefix("file://")).expanduser()
    if path.is_file() and path.suffix == ".json":
        return path
    alone = (path / "config.json").is_file() and not any(path.glob("*.safetensors"))
    return path / "config.json" if alone else None


def config_next_to_spec(base: BaseSpec, folder: Path) -> Path | None:
    """config.json in the folder of a spec file whose base is a Hugging Face id that is not in this machine's cache.

    A plan from it downloads nothing. None: the base is here, or there is no such file.
    """
    file = folder / "config.json"
    return file if file.is_file() and source.is_uncached_hub_id(base.uri) else None


def read_config(base: BaseSpec) -> Mapping[str, Any]:
    """The config of a base, with its changes by the spec; of `config_file` too. Raises BaseModelError, StorageError."""
    file = config_file(base) or source.config_from_hub(base.uri)
    if file is None:
        return resolve(base).config
    config = source.read_config_file(file, base.uri)
    return {**config, **_overrides(base, config)}


def _overrides(base: BaseSpec, config: Mapping[str, Any]) -> dict[str, Any]:
    """Keys of the config that the spec changes."""
    changed = source.stretch(base.uri, config, base.rope_scaling) if base.rope_scaling else {}
    if base.extra_tokens:
        changed["vocab_size"] = int(config["vocab_size"]) + base.extra_tokens
    return changed


def resolve(base: BaseSpec, *, on_progress: Progress | None = None) -> ResolvedBase:
    """Fetch, verify and convert once; later calls take no time. Raises BaseModelError, StorageError."""
    try:
        folder = source.locate(base.uri, base.sha256, on_progress)
        config = source.read_config(folder, base.uri)
        digest = source.base_digest(folder)
    except OSError as error:
        raise BaseModelError(
            f"base {base.uri}",
            f"a file cannot be read or written ({error})",
            "bases are stored in the cache, $GRAFTWORK_CACHE or ~/.cache/graftwork",
            "free disk space, or set GRAFTWORK_CACHE to another folder",
        ) from error
    try:
        find_format(config)
    except BaseModelError as error:
        raise BaseModelError(f"base {base.uri}: {error.subject}", error.problem, error.rule, error.hint) from error
    if base.sha256 and not base.uri.endswith(".gguf"):
        source.expect(base.uri, base.sha256, digest)
    stretched = source.stretch(base.uri, config, base.rope_scaling) if base.rope_scaling else {}
    config = {**config, **_overrides(base, config)}
    digest = source.mark_digest(digest, config, base.rope_scaling, base.extra_tokens)
    day = base.template_date or source.template_date(folder) or DEFAULT_DATE
    replaced = None
    if base.chat_template is not None or (folder / TEMPLATE_FOR_TOOLS).is_file():
        replaced = _replaced_template(folder, base.chat_template)
        digest += f".template-{hashlib.sha256(replaced.encode()).hexdigest()[:8]}"
    return ResolvedBase(base.uri, folder, digest, config, stretched, base.extra_tokens, day, replaced)


def load(
    resolved: ResolvedBase,
    quant: QuantSpec,
    *,
    device: str,
    purpose: Literal["train", "serve"],
    shards: Literal["none", "zero3", "fsdp2"] = "none",
) -> LoadedBase:
    """The model with frozen parameters, in eval mode, on `device` ("cpu", "cuda:0"), with sdpa where its class has it.

    `shards`: zero3 reads each rank's part alone, as transformers' active DeepSpeed configuration says (a quantised base
    is read whole all the same); fsdp2 lays nf4 into words of the compute dtype, which FSDP2 can cut.

    Raises BaseModelError: no such device, no bitsandbytes, an architecture that transformers does not know, no memory.
    """
    import torch
    from safetensors import SafetensorError

    kind, _, number = device.partition(":")
    cuda = kind == "cuda" and (number or "0").isdigit() and int(number or 0) < torch.cuda.device_count()
    if device != "cpu" and not cuda:
        found = f"{torch.cuda.device_count()} CUDA devices here"
        raise BaseModelError(f"device {device!r}", found, "a device is cpu or cuda:N", "use cpu")
    dtype, dtype_reason = compute_dtype(quant, device)
    dequantise, form_reason = resident_form(quant, device, purpose)
    check_form(resolved, quant, shards)
    try:
        settings = load_config(quant, dtype, storage=dtype if shards == "fsdp2" else None)
        model, cached = _from_folder(resolved, quant, settings, None if shards == "zero3" else device, dtype)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        lines = [line for one in load_errors(error) for line in one.splitlines() if "OutOfMemoryError" in line]
        if lines or isinstance(error, torch.OutOfMemoryError):
            found = f"no room on {device} ({lines[0] if lines else error})"
            raise BaseModelError(f"base {resolved.uri} at {quant.kind}", found, "", "see `graftwork plan`") from error
        broken = isinstance(error, SafetensorError)
        pointer = any(path.read_bytes()[:7] == b"version" for path in _small_files(resolved.folder))
        raise BaseModelError(
            f"base {resolved.uri} at {quant.kind}",
            f"transformers cannot load it ({str(error)[:400]})",
            "the base must be a causal language model that the installed transformers knows",
            "" if not broken else "run `git lfs pull` in its folder" if pointer else "download its files again",
        ) from error
    if quant.is_packed and (dequantise or not cached):
        _leave_mapping(model)
    if resolved.extra_tokens:
        grow(model, resolved.extra_tokens)
    stored = weight_bytes(model)
    if dequantise:
        dequantise_linears(model)
        unpack_experts(model)
    elif quant.is_4bit and purpose == "train":
        _keep_differentiable(model)
    if purpose == "train":
        complete_for_trl(model)
    model.requires_grad_(False)
    model.eval()
    packed = f"; checkpoint={resolved.packed.label}" if resolved.packed else ""
    reason = f"dtype={str(dtype).removeprefix('torch.')} ({dtype_reason}); {form_reason}{packed}"
    return LoadedBase(model, dtype, reason, stored, weight_bytes(model) if dequantise else stored)


def _leave_mapping(model: Any) -> None:
    """Copy what stayed plain (embedding, norms) out of the checkpoint's file mapping.

    One tensor in it keeps every page resident that was read for quantising: SmolLM2-135M at nf4 938 MiB, after it 641.
    """
    for parameter in model.parameters():
        if parameter.is_floating_point() and parameter.device.type == "cpu":
            parameter.data = parameter.data.clone()


def _replaced_template(folder: Path, asked: str | None) -> str:
    """Text of `base.chat_template`, or the one text of the folder's templates. Raises BaseModelError, StorageError."""
    if asked == "hermes":
        return hermes_template(folder)
    try:
        return template_source(folder) if asked is None else read_uri(asked).decode("utf-8")
    except UnicodeDecodeError as error:
        rule = "chat_template is `hermes`, or the place of a Jinja file in UTF-8"
        raise BaseModelError(f"base.chat_template={asked}", f"it is not UTF-8 ({error.reason})", rule) from error
    except json.JSONDecodeError as error:
        raise BaseModelError(f"tokenizer of {folder}", f"it cannot be read ({error})") from error


def has_experts(config: Mapping[str, Any]) -> bool:
    """Return whether a config.json names experts (`num_experts`, `num_local_experts`, `n_routed_experts`)."""
    parts = (config, config.get("text_config") or {})
    return any(isinstance(size, int) and size > 1 and "experts" in key for part in parts for key, size in part.items())


def prompt_template(base: BaseSpec) -> Template:
    """Chat template and tokenizer of a base whose weights are not needed. Raises BaseModelError, StorageError."""
    folder = source.locate_template(base.uri, base.sha256)
    replaced = None if base.chat_template is None else _replaced_template(folder, base.chat_template)
    day = base.template_date or source.template_date(folder) or DEFAULT_DATE
    return Template.load(folder, day, chat_template=replaced, base=base.uri)


def template(resolved: ResolvedBase) -> Template:
    """Chat template and tokenizer of the base. Raises BaseModelError."""
    found = Template.load(
        resolved.folder, resolved.template_date, chat_template=resolved.chat_template, base=resolved.uri
    )
    rows = (resolved.config.get("text_config") or resolved.config).get("vocab_size")
    if rows and not resolved.extra_tokens and (over := [name for name, one in found.written().items() if one >= rows]):
        raise BaseModelError(
            f"tokenizer of {resolved.uri}",
            f"its chat template writes {', '.join(over)}, and the base has {rows} embeddings",
            "a control token has an embedding",
            "resize the embeddings and save the base again, or name another template in base.chat_template",
        )
    return found


def weight_bytes(model: "torch.nn.Module") -> int:
    """Bytes of what a model saves: weights and the scales of quantised ones; a tied head counts once.

    Measured; `graftwork.planning.memory.weight_bytes` predicts it from the shape alone.
    """
    tensors = {(t.data_ptr(), t.nbytes): t for t in model.state_dict().values() if hasattr(t, "nbytes")}
    return sum(tensor.nbytes for tensor in tensors.values())


def _from_folder(
    resolved: ResolvedBase, quant: QuantSpec, settings: Any, device: str | None, dtype: "torch.dtype"
) -> tuple[Any, bool]:
    """The model, and whether it came quantised out of the cache: then its file holds nothing but what it keeps."""
    folder, packed = resolved.folder, resolved.packed
    if packed is not None and quant.method.keeps_checkpoint:
        return _read_packed(resolved, packed, device, dtype), True
    if packed is not None:
        folder = cache_dequantised(resolved, packed, dtype)
    if quant.is_4bit:
        from graftwork.compat.packed_weights import pack_experts_at_load

        pack_experts_at_load()
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    # a GPU quantises faster than a file is read; transformers 5.24 cannot write packed experts
    if quant.is_4bit and device == "cpu" and size >= WORTH_BYTES and not has_experts(resolved.config):
        cached = cache_quantised(folder, settings.to_dict(), lambda: _read(folder, {}, settings, device, dtype))
        return _read(cached, resolved.overrides, None, device, dtype), True
    return _read(folder, resolved.overrides, settings, device, dtype), False


def check_form(resolved: ResolvedBase, quant: QuantSpec, shards: str = "none") -> None:
    """Raise BaseModelError where `quant.kind=checkpoint` cannot keep the weights of this base packed."""
    if not quant.method.keeps_checkpoint:
        return
    found, rule = unkept_reason(resolved.packed), "kind=checkpoint keeps the packed linear layers of a quantised base"
    if not found and shards != "none":
        found, rule = f"strategy.kind={shards}", "packed weights are not sharded: each worker holds all of them"
    if found:
        raise BaseModelError(
            f"quant.kind=checkpoint with base {resolved.uri}", found, rule, "set quant.kind=nf4 or none"
        )


def _read_packed(resolved: ResolvedBase, packed: PackedFormat, device: str | None, dtype: "torch.dtype") -> Any:
    """The model whose packed linears stay packed."""
    if packed.native:
        model = _read(resolved.folder, resolved.overrides, None, device, dtype)
        _keep_differentiable(model)
        return model
    from graftwork.compat.packed_weights import PackedLoadConfig

    files = PackedFiles(resolved.folder, packed)
    return _read(resolved.folder, resolved.overrides, PackedLoadConfig(files, packed, dtype), device, dtype)


def _read(folder: Path, overrides: Mapping[str, Any], settings: Any, device: str | None, dtype: "torch.dtype") -> Any:
    """The model in `folder`; a folder of quantised weights says itself how they are, and takes no `settings`.

    Without a device the weights go where DeepSpeed puts them.
    """
    from transformers import AutoConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    for part in (config, config.get_text_config()):
        if settings is not None and hasattr(part, "quantization_config"):
            del part.quantization_config  # of a packed checkpoint: `settings` are those of this load
        elif "bnb_4bit_compute_dtype" in (getattr(part, "quantization_config", None) or {}):
            part.quantization_config["bnb_4bit_compute_dtype"] = str(dtype).removeprefix("torch.")
    for key, value in overrides.items():
        setattr(config, key, value)
    model, loading = auto_class(config).from_pretrained(
        folder,
        config=config,
        output_loading_info=True,
        dtype=dtype,
        quantization_config=settings,
        attn_implementation=attention_of(config),
        device_map={"": device} if device else None,
        use_safetensors=True,
        local_files_only=True,
    )
    if missing := sorted(loading["missing_keys"]):  # transformers gives them random values
        found = f"{', '.join(missing[:3])}{f' and {len(missing) - 3} more' if len(missing) > 3 else ''}"
        rule = "a base has all weights of its class"
        raise BaseModelError(f"base {folder}", f"its files have no {found}", rule, "download its files again")
    return model


def _small_files(folder: Path) -> Iterator[Path]:
    """Files of weights that are too small to hold any."""
    return (path for path in folder.glob("*.safetensors") if path.stat().st_size < 1024)


def auto_class(config: Any) -> Any:
    """The auto class of transformers that has the model of this configuration with an output head over tokens.

    Checkpoints of images and text whose family has no text-only class (Mistral-Small 3.x) are loaded whole; the stages
    use their text decoder.
    """
    from transformers import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
    )

    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return AutoModelForCausalLM
    return AutoModelForImageTextToText


def complete_for_trl(model: Any) -> None:
    """Set what TRL 1.16 reads from every model, and what some classes of transformers 5.24 lack or have wrong.

    The number of experts (`num_local_experts` of PhiMoE and Granite), the place of the decoder below the head
    (Llama-4), and, of a dense model of a class that may have experts (Granite-4), that no loss of a router is wanted.
    """
    text = model.config.get_text_config()
    if hasattr(text, "output_router_logits"):
        counts = (getattr(text, key, None) for key in ("num_experts", "num_local_experts", "n_routed_experts"))
        experts = next((count for count in counts if count), 0)
        if not experts:
            text.router_aux_loss_coef = 0.0
        elif not hasattr(text, "num_experts"):
            text.num_experts = experts
    if model.base_model is model and hasattr(model, "model"):
        model.base_model_prefix = "model"


def attention_of(config: Any) -> Literal["sdpa", "eager"]:
    """The attention of transformers for a model of this configuration: eager where its class has no sdpa (Gemma-2)."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    kind = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    return "eager" if kind is not None and not has_sdpa(kind) else "sdpa"


def _keep_differentiable(model: "torch.nn.Module") -> None:
    """Keep packed linears from moving to the layout of the fused CPU kernel, which has no backward pass.

    bitsandbytes 0.50 moves a linear at its first forward in eval mode and never back: after the first evaluation of a
    run on a CPU with AVX512-BF16 no gradient would reach the layers below, with a warning at most.
    """
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
