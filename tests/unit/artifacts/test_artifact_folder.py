"""What is refused before it is published: pickles under any name, broken safetensors, configs that do harm."""

import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from graftwork.artifacts import publish as artifact
from graftwork.artifacts import verify
from graftwork.errors import ArtifactError
from graftwork.storage.store import Store
from tests.adapters import facts, write_adapter, write_config

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
Tensors = dict[str, NDArray[np.floating]]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "root"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "out")


def torch_zip(path: Path) -> None:
    """The container of `torch.save`: a zip with a pickle in it."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"weight": [1.0]}))


def edit_header(path: Path, change: Callable[[dict[str, object]], None]) -> None:
    """Rewrite the header of a safetensors file, its data untouched."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])


def set_first(key: str, value: object) -> Callable[[Path], None]:
    """Change one entry of the first tensor in the header."""

    def change(folder: Path) -> None:
        def edit(header: dict[str, object]) -> None:
            name = sorted(key for key in header if key != "__metadata__")[0]
            entry = header[name]
            assert isinstance(entry, dict)
            header[name] = {**entry, key: value}

        edit_header(folder / WEIGHTS, edit)

    return change


def save_with(folder: Path, change: Callable[[Tensors], object]) -> None:
    """Change the tensors and save them again as a sound file."""
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def poison(tensors: Tensors) -> None:
    tensors[min(tensors)][0, 0] = np.nan


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "pickle by name": (lambda f: (f / "adapter_model.bin").write_bytes(b"x"), "adapter_model.bin is a pickle"),
    "trainer's pickle": (lambda f: (f / "training_args.bin").write_bytes(b"x"), "training_args.bin is a pickle"),
    "pickle renamed": (lambda f: (f / WEIGHTS).write_bytes(pickle.dumps({"a": 1})), "it is a pickle"),
    "torch.save renamed": (lambda f: torch_zip(f / WEIGHTS), "it is a pickle"),
    "old pickle renamed": (lambda f: (f / WEIGHTS).write_bytes(pickle.dumps([1], 0)), "not a safetensors file"),
    "pickle as config": (lambda f: (f / CONFIG).write_bytes(pickle.dumps({"r": 4})), "it is a pickle"),
    "second weights a pickle": (lambda f: (f / "b.safetensors").write_bytes(pickle.dumps(1)), "b.safetensors: "),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), "adapter_model.safetensors missing"),
    "no config": (lambda f: (f / CONFIG).unlink(), "adapter_config.json missing"),
    "empty weights": (lambda f: (f / WEIGHTS).write_bytes(b""), "not a safetensors file"),
    "cut in the header": (lambda f: os.truncate(f / WEIGHTS, 100), "cut short"),
    "cut in the data": (lambda f: os.truncate(f / WEIGHTS, (f / WEIGHTS).stat().st_size - 1), "cut short or extended"),
    "grown": (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes() + b"\0"), "cut short or extended"),
    "header of 2^63 bytes": (lambda f: (f / WEIGHTS).write_bytes(b"\xff" * 7 + b"\x7f{}"), "not a safetensors file"),
    "shape too large": (set_first("shape", [2**40, 2**40]), "does not fill bytes"),
    "negative shape": (set_first("shape", [-1, -32]), "has shape"),
    "shape of floats": (set_first("shape", [4.0, 8.0]), "has shape"),
    "dtype of objects": (set_first("dtype", "O"), "has dtype 'O'"),
    "integers": (set_first("dtype", "I32"), "has dtype 'I32'"),
    "offsets outside": (set_first("data_offsets", [1 << 40, (1 << 40) + 128]), "starts at byte"),
    "offsets of three": (set_first("data_offsets", [0, 1, 2]), "has shape"),
    "overlapping tensors": (lambda f: edit_header(f / WEIGHTS, overlap), "starts at byte"),
    "a key twice": (lambda f: (f / CONFIG).write_text('{"r": 4, "r": 8}'), "a key stands twice"),
    "config is a list": (lambda f: (f / CONFIG).write_text("[]"), "expected a JSON object"),
    "config nested deeply": (lambda f: (f / CONFIG).write_text('{"a":' * 100_000), "nested too deeply"),
    "rank differs": (lambda f: write_config(f, r=8), "the config says rank 8"),
    "rank of another kind": (lambda f: write_config(f, r=True), "r=True is no rank"),
    "alpha infinite": (lambda f: write_config(f, lora_alpha=float("inf")), "Infinity is no JSON number"),
    "another method": (lambda f: write_config(f, peft_type="LOHA"), "peft_type='LOHA', served are LORA, IA3"),
    "imports a library": (lambda f: write_config(f, auto_mapping={"parent_library": "evil.mod"}), "names 'evil.mod'"),
    "half a pair": (lambda f: save_with(f, lambda t: t.pop(min(t))), "has only lora_B"),
    "not one pair": (lambda f: save_file({"x": np.zeros(3, np.float32)}, f / WEIGHTS), "no lora_A and lora_B"),
    "NaN": (lambda f: save_with(f, poison), "NaN or infinity in 1 tensors"),
    "linked weights": (lambda f: link_weights(f), "is no plain file"),
    "folder as weights": (lambda f: folder_as_weights(f), "is no plain file"),
    "template of bytes": (lambda f: (f / "chat_template.jinja").write_bytes(b"\xff\xfe"), "chat_template.jinja: "),
}


def overlap(header: dict[str, object]) -> None:
    names = sorted(key for key in header if key != "__metadata__")
    header[names[2]] = header[names[0]]


def folder_as_weights(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).mkdir()


def link_weights(folder: Path) -> None:
    shutil.move(folder / WEIGHTS, folder.parent / "elsewhere")
    (folder / WEIGHTS).symlink_to(folder.parent / "elsewhere")


@pytest.mark.parametrize(("damage", "found"), BROKEN.values(), ids=BROKEN)
def test_an_unsafe_or_broken_folder_is_refused_and_nothing_is_published(
    store: Store, folder: Path, damage: Callable[[Path], object], found: str
) -> None:
    damage(folder)
    with pytest.raises(ArtifactError) as caught:
        artifact.publish(store, "support", folder, **facts(), alias="latest")
    assert found in caught.value.problem
    assert caught.value.hint
    assert store.list() == []


def test_a_missing_folder_is_named(store: Store, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"nowhere: it does not exist"):
        artifact.publish(store, "support", tmp_path / "nowhere", **facts())


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_finite_weights_of_any_float_pass_and_infinite_ones_do_not(dtype: type, folder: Path) -> None:
    name = "base_model.model.q_proj.lora_{}.weight"
    tensors: Tensors = {
        name.format("A"): np.full((4, 8), np.finfo(dtype).max, dtype),
        name.format("B"): np.zeros((8, 4), dtype),
    }
    save_file(tensors, folder / WEIGHTS)
    assert WEIGHTS in verify.read_folder(folder)
    tensors[name.format("B")][7, 3] = -np.inf
    save_file(tensors, folder / WEIGHTS)
    with pytest.raises(ArtifactError, match="NaN or infinity"):
        verify.read_folder(folder)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_a_header_is_accepted_exactly_when_the_safetensors_library_accepts_it(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """No file that we accept may be refused by the library that the engine reads it with, whatever bytes changed."""
    path = tmp_path_factory.mktemp("fuzz") / WEIGHTS
    save_file({"a": np.ones((2, 3), np.float32), "b": np.ones(4, np.float16)}, path)
    blob = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        blob[data.draw(st.integers(0, len(blob) - 1))] = data.draw(st.integers(0, 255))
    blob = blob[: data.draw(st.integers(0, len(blob)))] if data.draw(st.booleans()) else blob
    path.write_bytes(blob)
    try:
        ours = verify.parse_header(bytes(blob), len(blob))
    except ValueError:
        return
    with safe_open(path, framework="numpy") as theirs:
        assert {key: list(info.shape) for key, info in ours.items()} == {
            key: theirs.get_slice(key).get_shape()
            for key in theirs.keys()  # noqa: SIM118 (it is no dict)
        }
