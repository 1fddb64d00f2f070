"""Checks of an adapter's files: a PEFT config and safetensors, read as data and never run.

Nothing here unpickles, imports or allocates by a size that a file claims. The checks yield problems as sentences; the
caller that publishes, fetches or verifies decides what to do with them. Format: https://github.com/huggingface/safetensors#format
"""

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graftwork.adapters.spec import PEFT_KINDS
from graftwork.errors import ArtifactError, StorageError

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
TEMPLATE_FILE = "chat_template.jinja"
MANIFEST_FILE = "manifest.json"
MAX_TEXT_BYTES = 1 << 20
MAX_HEADER_BYTES = 16 << 20
SAFETENSORS_ONLY = "an adapter is adapter_config.json and safetensors; pickle runs code when it is read, so it never is"

_SAFETENSORS_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}\.safetensors")
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".npy", ".npz")
_PICKLE_STARTS = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
_FLOAT_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
_EXPONENT = {"F64": 0x7FF << 52, "F32": 0xFF << 23, "F16": 0x1F << 10, "BF16": 0xFF << 7}
PEFT_TYPES = (*PEFT_KINDS, "PROMPT_TUNING", "P_TUNING", "TRAINABLE_TOKENS")
"""Kinds that are published; what of each can be served is decided where it is loaded."""
_SET_KEYS = ("target_modules", "exclude_modules", "modules_to_save", "feedforward_modules", "target_parameters")


@dataclass(frozen=True)
class TensorInfo:
    """One entry of a safetensors header; `start` and `stop` are byte offsets in the whole file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def is_adapter_file(name: str) -> bool:
    """Return whether an adapter may hold a file of this name (the manifest is not among them)."""
    return name in (CONFIG_FILE, TEMPLATE_FILE) or _SAFETENSORS_NAME.fullmatch(name) is not None


def read_folder(folder: Path) -> dict[str, bytes]:
    """The adapter files of a PEFT folder; other files (a README) stay behind.

    The config is in one form for equal configs: keys and PEFT's sets sorted, no path of the machine that trained it.
    Raises ArtifactError: no folder, a needed file missing, a pickle by name or content, a link, any `problems`.
    """
    if not folder.is_dir():
        raise ArtifactError(f"adapter folder {folder}", "it does not exist", "", "check the path")
    paths = sorted(folder.iterdir())
    refused = [f"{path.name} is a pickle" for path in paths if path.name.endswith(_PICKLE_SUFFIXES)]
    refused += [
        f"{path.name} is no plain file"
        for path in paths
        if is_adapter_file(path.name) and (path.is_symlink() or not path.is_file())
    ]
    _raise_problems(f"adapter folder {folder}", refused)
    try:
        files = {path.name: path.read_bytes() for path in paths if is_adapter_file(path.name)}
    except OSError as error:
        raise StorageError(f"read {folder}", str(error), "", "check the folder's rights and the disk") from error
    _raise_problems(f"adapter folder {folder}", list(problems(files)))
    config = parse_config(files[CONFIG_FILE])
    for key in _SET_KEYS:
        if isinstance(config.get(key), list):
            config[key] = sorted(config[key], key=str)
    if str(config.get("base_model_name_or_path") or "").startswith(("/", "~", ".")):
        config["base_model_name_or_path"] = None  # a path of the machine that trained it
    return {**files, CONFIG_FILE: (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()}


def _raise_problems(asked: str, found: list[str]) -> None:
    """Raise ArtifactError that names every problem; return when there is none."""
    if found:
        raise ArtifactError(
            asked,
            "; ".join(found),
            SAFETENSORS_ONLY,
            "take the file from a source you trust, or export it again with PEFT's save_pretrained",
        )


def problems(files: Mapping[str, bytes]) -> Iterator[str]:
    """Yield the problems of the content of an adapter's files, one sentence each."""
    missing = [name for name in (CONFIG_FILE, WEIGHTS_FILE) if name not in files]
    if missing:
        yield f"{' and '.join(missing)} missing"
        return
    config: dict[str, Any] = {}
    tensors: dict[str, dict[str, TensorInfo]] = {}
    sound = True
    for name, data in files.items():
        try:
            if name == CONFIG_FILE:
                config = parse_config(data)
            elif name == TEMPLATE_FILE:
                _require_text(data)
            else:
                tensors[name] = parse_header(data, len(data))
        except ValueError as error:
            sound = False
            yield f"{name}: {error}"
    if sound:
        if kind := PEFT_KINDS.get(config["peft_type"]):
            shapes = {key: info.shape for key, info in tensors[WEIGHTS_FILE].items()}
            yield from (f"{WEIGHTS_FILE}: {problem}" for problem in kind.tensor_problems(config, shapes))
        for name, infos in tensors.items():
            if odd := [key for key, info in infos.items() if not _is_finite(files[name], info)]:
                yield f"{name}: NaN or infinity in {len(odd)} tensors, first {odd[0]}"


def header_bytes(head: bytes, file_bytes: int) -> int:
    """Length of the header in a safetensors file of `file_bytes` that begins with `head` (9 bytes or more).

    ValueError for a pickle, and for a length that the file can't hold: nothing is read or allocated by its word.
    """
    if head[8:9] != b"{":  # a header of 0x0280 to 0x0580 bytes begins like a pickle does
        _refuse_pickle(head)
    size = int.from_bytes(head[:8], "little") if len(head) >= 8 else -1
    if not 2 <= size <= min(MAX_HEADER_BYTES, file_bytes - 8) or head[8:9] != b"{":
        raise ValueError(f"not a safetensors file, or cut short (header of {size} bytes in a file of {file_bytes})")
    return size


def parse_header(data: bytes, file_bytes: int) -> dict[str, TensorInfo]:
    """Every tensor of a safetensors file of `file_bytes`; `data` holds at least its header. ValueError otherwise.

    The tensors fill the file without gap or overlap, in a float dtype, each as large as its shape says.
    """
    size = header_bytes(data, file_bytes)
    header = _parse_object(data[8 : 8 + size])
    header.pop("__metadata__", None)
    tensors: dict[str, TensorInfo] = {}
    for name, entry in header.items():
        if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
            raise ValueError(f"the header entry of {name} is malformed")
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or dtype not in _FLOAT_BYTES:
            raise ValueError(f"tensor {name} has dtype {dtype!r}, expected one of {', '.join(_FLOAT_BYTES)}")
        lists = isinstance(shape, list) and isinstance(offsets, list) and len(offsets) == 2
        if not lists or any(type(number) is not int or number < 0 for number in [*shape, *offsets]):
            raise ValueError(f"tensor {name} has shape {shape!r} and offsets {offsets!r}")
        if offsets[1] - offsets[0] != math.prod(shape) * _FLOAT_BYTES[dtype]:
            raise ValueError(f"tensor {name}: {dtype} {shape} does not fill bytes {offsets}")
        tensors[name] = TensorInfo(dtype, tuple(shape), 8 + size + offsets[0], 8 + size + offsets[1])
    if not tensors:
        raise ValueError("it holds no tensors")
    end = 8 + size
    for name, info in sorted(tensors.items(), key=lambda item: item[1].start):
        if info.start != end:
            raise ValueError(f"tensor {name} starts at byte {info.start}, expected {end}")
        end = info.stop
    if end != file_bytes:
        raise ValueError(f"the header describes {end} bytes, the file has {file_bytes}: cut short or extended")
    return tensors


def parse_config(data: bytes) -> dict[str, Any]:
    """A PEFT config whose keys can do no harm. Raises ValueError with the problem."""
    _require_text(data)
    config = _parse_object(data)
    if config.get("peft_type") not in PEFT_TYPES:
        raise ValueError(f"peft_type={config.get('peft_type')!r}, served are {', '.join(PEFT_TYPES)}")
    mapping = config.get("auto_mapping") or {}
    library = mapping.get("parent_library", "transformers") if isinstance(mapping, dict) else mapping
    if str(library).split(".")[0] != "transformers":
        raise ValueError(f"auto_mapping names {library!r}, which PEFT would import")
    if kind := PEFT_KINDS.get(config["peft_type"]):
        kind.check_config(config)
    return config


def _is_finite(data: bytes, info: TensorInfo) -> bool:
    import numpy as np

    words = np.frombuffer(data[info.start : info.stop], dtype=f"<u{_FLOAT_BYTES[info.dtype]}")
    mask = words.dtype.type(_EXPONENT[info.dtype])
    return not bool(np.any((words & mask) == mask))


def _parse_object(data: bytes) -> dict[str, Any]:
    """JSON object without repeated keys and without NaN. ValueError otherwise."""
    try:
        value = json.loads(data.decode(), object_pairs_hook=_unique_keys, parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError("JSON nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError(f"expected a JSON object, found {type(value).__name__}")
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands twice")
    return found


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON number")


def _require_text(data: bytes) -> None:
    _refuse_pickle(data)
    if len(data) > MAX_TEXT_BYTES:
        raise ValueError(f"{len(data)} bytes of text, at most {MAX_TEXT_BYTES} are read")
    if "\0" in data.decode():
        raise ValueError("it is no text")


def _refuse_pickle(data: bytes) -> None:
    if data.startswith(_PICKLE_STARTS):
        raise ValueError("it is a pickle (torch.save or pickle.dump) under another name")
