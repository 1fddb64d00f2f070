"""Conversion of a packed checkpoint to one of plain weights, a file at a time, and the packed tensors of its layers."""

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftwork.errors import BaseModelError
from graftwork.prequantized.detect import without_format
from graftwork.prequantized.format import IGNORED, PackedFormat

if TYPE_CHECKING:
    import torch

SHARD_BYTES = 2**30
"""Plain weights that are held before they are written: the peak of memory, with the largest weight's own."""
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
GENERATION = "generation_config.json"
"""Stop tokens and sampling; transformers writes a poorer one next to the weights that it saves."""


class PackedFiles:
    """Tensors of a checkpoint's safetensors files, by name. Reading one maps its file; nothing else is in memory."""

    def __init__(self, folder: Path, packed: PackedFormat) -> None:
        from safetensors import safe_open

        self.place: dict[str, Path] = {}
        """File of each tensor."""
        dtypes: dict[str, str] = {}
        for path in _weight_files(folder):
            with safe_open(path, "pt") as file:
                if packed.check_file is not None:
                    packed.check_file(file.metadata() or {})
                self.place.update(dict.fromkeys(file.keys(), path))
                dtypes |= {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
        self.modules = packed.group(self.place)
        """Packed layers: part -> name of the tensor."""
        taken = {name for parts in self.modules.values() for name in parts.values()}
        if bare := [name for name, dtype in dtypes.items() if dtype in _FLOAT8 and name not in taken]:
            raise BaseModelError(
                f"base {folder}: {bare[0]}",
                f"it is stored as {dtypes[bare[0]]} and has no scale",
                f"a packed weight has a tensor next to it whose name ends in {' or '.join(packed.marks)}",
                "take a complete checkpoint, or the unquantised one",
            )

    def read(self, name: str) -> "torch.Tensor":
        """Return one tensor on the CPU."""
        from safetensors import safe_open

        with safe_open(self.place[name], "pt") as file:
            tensor: torch.Tensor = file.get_tensor(name)
        return tensor

    def shape(self, name: str) -> "torch.Tensor":
        """Return a tensor of the same shape and dtype on the meta device."""
        from safetensors import safe_open

        with safe_open(self.place[name], "pt") as file:
            part: torch.Tensor = file.get_tensor(name)
        return part.to("meta")


_FLOAT8 = ("F8_E4M3", "F8_E5M2")
"""Names of safetensors for the dtypes that say nothing without a scale."""


def _weight_files(folder: Path) -> list[Path]:
    """The files that transformers reads: one, those of the index, or all where there is neither."""
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if (folder / INDEX).is_file():
        named = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()
        return [folder / Path(name).name for name in sorted(set(named))]
    return sorted(folder.glob("*.safetensors"))


def write_plain(
    folder: Path, packed: PackedFormat, config: Mapping[str, Any], dtype: "torch.dtype", target: Path
) -> None:
    """Write the checkpoint in `folder` with plain weights to the empty folder `target`: weights and config.json.

    Packed weights are written in `dtype`, others as they are. Raises BaseModelError for a weight without its scales.
    """
    shard: dict[str, torch.Tensor] = {}
    places: dict[str, str] = {}

    def flush() -> None:
        from safetensors.torch import save_file

        if shard:
            name = f"model-{len(set(places.values())) + 1:05d}.safetensors"
            save_file(shard, target / name, {"format": "pt"})
            places.update(dict.fromkeys(shard, name))
            shard.clear()

    for name, tensor in _plain_tensors(folder, packed, dtype):
        shard[name] = tensor
        if sum(one.nbytes for one in shard.values()) >= SHARD_BYTES:
            flush()
    flush()
    (target / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}), encoding="utf-8")
    (target / "config.json").write_text(json.dumps(without_format(config), indent=1), encoding="utf-8")
    if (folder / GENERATION).is_file():
        shutil.copyfile(folder / GENERATION, target / GENERATION)


def _plain_tensors(folder: Path, packed: PackedFormat, dtype: "torch.dtype") -> Iterator[tuple[str, "torch.Tensor"]]:
    """Each weight in the order of the files."""
    files = PackedFiles(folder, packed)
    taken = {key for parts in files.modules.values() for key in parts.values()}
    modules = {next(parts[mark] for mark in packed.marks if mark in parts): m for m, parts in files.modules.items()}
    if not modules:
        raise BaseModelError(
            f"base {folder}",
            f"no tensor of its files is packed as {packed.label}",
            f"a packed weight has a tensor whose name ends in {' or '.join(packed.marks)}",
            "remove quantization_config from config.json where the weights are plain",
        )
    for key in files.place:
        if key in modules:
            parts = {part: files.read(name) for part, name in files.modules[modules[key]].items()}
            try:
                yield packed.weight_name(modules[key]), packed.dequantise(packed.prepare(parts), dtype).contiguous()
            except (KeyError, RuntimeError, IndexError, ValueError) as error:
                found = ", ".join(f"{part} {list(tensor.shape)}" for part, tensor in parts.items())
                raise BaseModelError(
                    f"base {folder}: {modules[key]}",
                    f"it is not packed as {packed.label} ({type(error).__name__}: {str(error)[:200]}; {found})",
                    "each weight has the tensors that its format's library writes",
                ) from error
        elif key not in taken and key.rpartition(".")[2] not in IGNORED:
            yield key, files.read(key).contiguous()
