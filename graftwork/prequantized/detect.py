"""Detection of a packed checkpoint from its config.json: one format of a closed table, or an error."""

from collections.abc import Callable, Mapping
from typing import Any

from graftwork.errors import BaseModelError
from graftwork.prequantized import awq, bitsandbytes, compressed_tensors, fp8, gptq, mxfp4, torchao
from graftwork.prequantized.format import HINT, PackedFormat, Settings, unsupported

FORMATS: dict[str, Callable[[Settings], PackedFormat]] = {
    "fp8": fp8.read,
    "fbgemm_fp8": fp8.read,
    "compressed-tensors": compressed_tensors.read,
    "awq": awq.read,
    "gptq": gptq.read,
    "mxfp4": mxfp4.read,
    "torchao": torchao.read,
    "bitsandbytes": bitsandbytes.read,
}
"""Readers by `quantization_config.quant_method`."""


def find_format(config: Mapping[str, Any]) -> PackedFormat | None:
    """Return the format of the weights of a base with this config.json; None where they are plain.

    Raises BaseModelError for a format, or a setting of one, that is not read.
    """
    settings = _settings(config)
    if settings is None:
        return None
    method = settings.get("quant_method") or _older_method(settings)
    reader = FORMATS.get(str(method))
    if reader is None:
        raise unsupported("quant_method", repr(method), f"formats that are read: {', '.join(FORMATS)}")
    try:
        return reader(settings)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BaseModelError(
            f"quantization_config of quant_method={method}",
            f"it cannot be read ({type(error).__name__}: {error})",
            "it holds the keys that the format's own library writes",
            HINT,
        ) from error


def unkept_reason(packed: PackedFormat | None) -> str:
    """Return the reason for which `quant.kind=checkpoint` cannot keep weights of this format; empty where it can."""
    if packed is None:
        return "its config.json has no quantization_config: its weights are plain"
    if not packed.of_linears:
        return f"{packed.label}: kept are linear layers alone"
    return ""


def without_format(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config.json of the same base with plain weights."""
    plain = {key: value for key, value in config.items() if key not in KEYS}
    for key, value in plain.items():
        if isinstance(value, dict) and any(name in value for name in KEYS):
            plain[key] = {name: inner for name, inner in value.items() if name not in KEYS}
    return plain


KEYS = ("quantization_config", "compression_config")
"""Keys of the settings; the second is that of compressed-tensors before 0.8."""


def _settings(config: Mapping[str, Any]) -> Settings | None:
    """Return the settings of the whole model, or of its text part."""
    text = config.get("text_config")
    for part in (config, text if isinstance(text, Mapping) else {}):
        for key in KEYS:
            if isinstance(found := part.get(key), Mapping):
                return found
    return None


def _older_method(settings: Settings) -> str | None:
    """Return the method of settings from before transformers wrote it."""
    if settings.get("load_in_4bit") or settings.get("load_in_8bit"):
        return "bitsandbytes"
    return "compressed-tensors" if "config_groups" in settings else None
