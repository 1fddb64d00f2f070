"""Adapters on a disk: published whole or not at all, found by alias, refused when unsafe. On S3: tests/s3/."""

import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from graftwork import artifact, artifact_check
from graftwork.artifact_manifest import content_version
from graftwork.errors import ArtifactError, StorageError
from graftwork.storage import Store
from tests.adapters import facts, write_adapter, write_config
from tests.processes import die_at, fork_race, outcome, start
from tests.tiny import write_tiny_base

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
Tensors = dict[str, NDArray[np.floating]]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "root"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "out")


@pytest.fixture
def version(store: Store, folder: Path) -> str:
    """A published version of the task `support`."""
    return artifact.publish(store, "support", folder, **facts()).version


def on_disk(store: Store, version: str, name: str = "") -> Path:
    """Path of a published file, for tests that damage it."""
    return Path(store.path("adapters", "support", version)) / name


# --- publishing -------------------------------------------------------------------------------------------------------


def test_a_published_adapter_is_found_by_version_and_by_alias_with_all_its_facts(store: Store, folder: Path) -> None:
    made = artifact.publish(store, "support", folder, **facts(), parent="0" * 12, alias="latest")
    for ref in (made.version, "latest"):
        assert artifact.open_adapter(store, "support", ref) == made
        assert artifact.resolve(store, f"support@{ref}") == made
    assert made.task == "support"
    assert made.base_digest == "b" * 64
    assert made.metrics == {"eval_loss": 1.25}
    assert made.parent == "0" * 12
    assert set(made.files) == {CONFIG, WEIGHTS}
    assert made.files[WEIGHTS].size_bytes == (folder / WEIGHTS).stat().st_size
    assert artifact.list_adapters(store) == [made]


def test_what_is_fetched_is_what_the_safetensors_library_wrote(store: Store, folder: Path, version: str) -> None:
    fetched = artifact.fetch(store, "support", version)
    assert sorted(p.name for p in fetched.iterdir()) == [CONFIG, WEIGHTS, "manifest.json"]
    before, after = load_file(folder / WEIGHTS), load_file(fetched / WEIGHTS)
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[key], after[key]) for key in before)
    assert artifact.verify(store, "support", version) == []


def test_publishing_equal_content_again_changes_nothing(store: Store, folder: Path) -> None:
    first = artifact.publish(store, "support", folder, **facts())
    stamps = {p: p.stat().st_mtime_ns for p in on_disk(store, first.version).iterdir()}
    again = artifact.publish(store, "support", folder, **facts(run="support-89abcdef"))
    assert again == first
    assert {p: p.stat().st_mtime_ns for p in on_disk(store, first.version).iterdir()} == stamps


def test_peft_writes_its_sets_in_any_order_and_its_machine_path_and_both_are_one_version(
    store: Store, folder: Path, version: str
) -> None:
    write_config(folder, target_modules=["v_proj", "q_proj"], base_model_name_or_path="/other/machine")
    assert artifact.publish(store, "support", folder, **facts()).version == version
    config = json.loads((artifact.fetch(store, "support", version) / CONFIG).read_text())
    assert config["base_model_name_or_path"] is None
    assert config["target_modules"] == ["q_proj", "v_proj"]


def test_whatever_decides_the_answers_makes_another_version(store: Store, folder: Path, tmp_path: Path) -> None:
    publish = artifact.publish
    versions = [
        publish(store, "support", folder, **facts()).version,
        publish(store, "support", folder, **facts(base_digest="a" * 64)).version,
        publish(store, "support", folder, **facts(quant={"kind": "int8"})).version,
        publish(store, "support", folder, **facts(prompt={"system": "Other."})).version,
        publish(store, "support", folder, **facts(template_digest="f" * 64)).version,
        publish(store, "support", write_adapter(tmp_path / "seed1", seed=1), **facts()).version,
    ]
    write_config(folder, lora_alpha=16)
    versions.append(publish(store, "support", folder, **facts()).version)
    write_config(folder)
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    versions.append(publish(store, "support", folder, **facts()).version)
    assert len(set(versions)) == len(versions)
    assert len(artifact.list_adapters(store)) == len(versions)


def test_the_version_digest_is_pinned(version: str) -> None:
    """A change of this value would orphan every published adapter: raise `format` in the manifest with it."""
    assert version == "dc7df3c7f6dc"


def test_metrics_of_numpy_are_recorded_and_nan_is_refused(store: Store, folder: Path) -> None:
    made = artifact.publish(store, "support", folder, **facts(metrics={"eval_loss": np.float32(0.5)}))
    assert made.metrics == {"eval_loss": 0.5}
    with pytest.raises(ArtifactError, match=r"metrics\.eval_loss"):
        artifact.publish(store, "other", folder, **facts(metrics={"eval_loss": float("nan")}))
    assert len(artifact.list_adapters(store)) == 1


def test_what_peft_saves_is_published_and_peft_loads_what_is_fetched(store: Store, tmp_path: Path) -> None:
    import torch
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM

    base = write_tiny_base(tmp_path / "base")
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    trained = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).eval()
    trained.save_pretrained(tmp_path / "out")
    made = artifact.publish(store, "support", tmp_path / "out", **facts())
    fetched = artifact.fetch(store, "support", made.version)
    served = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), fetched).eval()
    ids_BT = torch.arange(24).reshape(2, 12)
    with torch.inference_mode():
        assert torch.equal(trained(ids_BT).logits, served(ids_BT).logits)
        with served.disable_adapter():
            assert not torch.equal(trained(ids_BT).logits, served(ids_BT).logits)
    assert str(tmp_path) not in (fetched / CONFIG).read_text()


# --- what is refused before it is published ---------------------------------------------------------------------------


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
    "another method": (lambda f: write_config(f, peft_type="PREFIX_TUNING"), "only 'LORA' is served"),
    "imports a library": (lambda f: write_config(f, auto_mapping={"parent_library": "evil.mod"}), "names 'evil.mod'"),
    "half a pair": (lambda f: save_with(f, lambda t: t.pop(min(t))), "has only lora_B"),
    "not one pair": (lambda f: save_file({"x": np.zeros(3, np.float32)}, f / WEIGHTS), "no lora_A and lora_B"),
    "NaN": (lambda f: save_with(f, poison), "NaN or infinity in 1 tensors"),
    "linked weights": (lambda f: link_weights(f), "is no plain file"),
    "folder as weights": (lambda f: folder_as_weights(f), "is no plain file"),
    "template of bytes": (lambda f: (f / "chat_template.jinja").write_bytes(b"\xff\xfe"), "chat_template.jinja: "),
}  # fmt: skip


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
    assert found in caught.value.found
    assert caught.value.next_move
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
    assert WEIGHTS in artifact_check.read_folder(folder)
    tensors[name.format("B")][7, 3] = -np.inf
    save_file(tensors, folder / WEIGHTS)
    with pytest.raises(ArtifactError, match="NaN or infinity"):
        artifact_check.read_folder(folder)


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
        ours = artifact_check.parse_safetensors(bytes(blob))
    except ValueError:
        return
    with safe_open(path, framework="numpy") as theirs:
        assert {key: list(info.shape) for key, info in ours.items()} == {
            key: theirs.get_slice(key).get_shape()
            for key in theirs.keys()  # noqa: SIM118 (it is no dict)
        }


# --- what is refused when it is opened --------------------------------------------------------------------------------


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_a_flipped_bit_anywhere_is_found(store: Store, version: str) -> None:
    for name in (WEIGHTS, CONFIG):
        path = on_disk(store, version, name)
        sound = path.read_bytes()
        for at in (0, 9, len(sound) // 2, len(sound) - 1):
            flip(path, at)
            assert any(name in problem for problem in artifact.verify(store, "support", version))
            with pytest.raises(ArtifactError, match="sha256 differs"):
                artifact.fetch(store, "support", version)
            path.write_bytes(sound)
    assert artifact.verify(store, "support", version) == []


DAMAGED: list[tuple[Callable[[Path], object], str]] = [
    (lambda v: os.truncate(v / WEIGHTS, 50), "adapter_model.safetensors: 50 bytes, the manifest says"),
    (lambda v: (v / WEIGHTS).write_bytes(b"x" * 10_000), "10000 bytes, the manifest says"),
    (lambda v: (v / WEIGHTS).unlink(), "adapter_model.safetensors: no such file"),
    (lambda v: (v / "evil.bin").write_bytes(b"x"), "evil.bin: 1 bytes, the manifest says no such file"),
    (lambda v: (v / "folder").mkdir(), "folder: a folder"),
    (lambda v: (v / "manifest.json").write_bytes(b"{"), "not valid at JSON"),
    (lambda v: (v / "manifest.json").write_bytes(b" " * (2 << 20)), "manifest.json has 2097152 bytes"),
    (lambda v: edit(v, task="other"), "its manifest is that of other@"),
    (lambda v: edit(v, base_digest="a" * 64), "its manifest is that of"),
    (lambda v: edit(v, prompt={"system": "Obey me."}), "its manifest is that of"),
    (lambda v: edit(v, surprise=1), "not valid at surprise"),
    (lambda v: edit(v, format=2), "not valid at format"),
    (lambda v: rename_file(v, "../../../../etc/passwd"), "not valid at files"),
    (lambda v: rename_file(v, "/etc/passwd.safetensors"), "not valid at files"),
    (lambda v: rename_file(v, "adapter_model.bin"), "not valid at files"),
]  # fmt: skip


@pytest.mark.parametrize(("damage", "found"), DAMAGED)
def test_a_damaged_version_is_refused_by_everyone_and_left_out_of_lists(
    store: Store, version: str, damage: Callable[[Path], object], found: str, caplog: pytest.LogCaptureFixture
) -> None:
    damage(on_disk(store, version))
    assert found in "; ".join(artifact.verify(store, "support", version))
    for use in (artifact.open_adapter, artifact.fetch):
        with pytest.raises(ArtifactError) as caught:
            use(store, "support", version)
        assert found in caught.value.found
    with pytest.raises(ArtifactError):
        artifact.promote(store, "support", "prod", version)
    assert artifact.aliases(store, "support") == {}
    assert artifact.list_adapters(store) == []
    assert found in caplog.text


def edit(version: Path, **changed: object) -> None:
    path = version / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))


def rename_file(version: Path, name: str) -> None:
    files = json.loads((version / "manifest.json").read_text())["files"]
    edit(version, files={**files, name: files[WEIGHTS]})


def test_a_pickle_that_its_manifest_vouches_for_is_refused_all_the_same(store: Store, version: str) -> None:
    """Somebody who can write to the store makes the manifest fit; the content is still looked at."""
    evil = pickle.dumps({"weight": "evil"})
    shutil.copytree(on_disk(store, version), on_disk(store, "forged"))
    forged = on_disk(store, "forged")
    (forged / WEIGHTS).write_bytes(evil)
    fields = json.loads((forged / "manifest.json").read_text())
    fields["files"][WEIGHTS] = {"sha256": hashlib.sha256(evil).hexdigest(), "size_bytes": len(evil)}
    fields["version"] = content_version(fields)
    (forged / "manifest.json").write_text(json.dumps(fields))
    forged.rename(on_disk(store, fields["version"]))
    assert artifact.open_adapter(store, "support", fields["version"]).version == fields["version"]
    with pytest.raises(ArtifactError, match="it is a pickle"):
        artifact.fetch(store, "support", fields["version"])


def test_a_damaged_version_can_be_removed_by_name(store: Store, version: str) -> None:
    on_disk(store, version, "manifest.json").write_bytes(b"{")
    assert artifact.locate(store, f"support@{version}") == ("support", version)
    artifact.remove(store, "support", version)
    assert not on_disk(store, version).exists()


def test_a_damaged_version_is_healed_by_publishing_its_content_again(
    store: Store, folder: Path, version: str, caplog: pytest.LogCaptureFixture
) -> None:
    flip(on_disk(store, version, WEIGHTS), 300)
    on_disk(store, version, "evil.bin").write_bytes(b"x")
    again = artifact.publish(store, "support", folder, **facts())
    assert again.version == version
    assert artifact.verify(store, "support", version) == []
    assert "is damaged" in caplog.text


@pytest.mark.parametrize(
    "name", ["../x", "a/b", "/etc", "..", "", "A", "a b", "x" * 64, "a\n", "latest\x00", ".hidden"]
)
def test_names_that_are_paths_or_no_names_are_refused_everywhere(store: Store, folder: Path, name: str) -> None:
    made = artifact.publish(store, "support", folder, **facts())
    uses: list[Callable[[], object]] = [
        lambda: artifact.publish(store, name, folder, **facts()),
        lambda: artifact.publish(store, "support", folder, **facts(), alias=name or "/"),
        lambda: artifact.open_adapter(store, "support", name),
        lambda: artifact.open_adapter(store, name, made.version),
        lambda: artifact.resolve(store, f"{name}@latest"),
        lambda: artifact.resolve(store, f"support@{name}"),
        lambda: artifact.promote(store, "support", name, made.version),
        lambda: artifact.promote(store, name, "latest", made.version),
        lambda: artifact.remove(store, "support", name),
        lambda: artifact.aliases(store, name),
    ]
    for use in uses:
        with pytest.raises(ArtifactError, match="name"):
            use()
    assert artifact.list_adapters(store) == [made]
    assert artifact.aliases(store, "support") == {}


def test_an_unknown_adapter_is_answered_with_what_there_is(store: Store, folder: Path) -> None:
    made = artifact.publish(store, "support", folder, **facts(), alias="prod")
    for ref in ("latest", "0" * 12):
        with pytest.raises(artifact.UnknownAdapter) as caught:
            artifact.open_adapter(store, "support", ref)
        assert f"support@{ref}" in str(caught.value)
        assert f"prod ({made.version})" in str(caught.value)
    with pytest.raises(artifact.UnknownAdapter, match="tasks: support"):
        artifact.resolve(store, "suport@prod")


def test_an_adapter_for_another_base_is_refused_with_both_digests(store: Store, version: str) -> None:
    manifest = artifact.open_adapter(store, "support", version)
    artifact.require_base(manifest, "b" * 64)
    with pytest.raises(ArtifactError) as caught:
        artifact.require_base(manifest, "a" * 64)
    assert "b" * 64 in str(caught.value)
    assert "a" * 64 in str(caught.value)
    assert "Next: set base:" in str(caught.value)


# --- aliases and removal ----------------------------------------------------------------------------------------------


def test_an_alias_moves_and_remembers_where_it_was(store: Store, folder: Path, tmp_path: Path) -> None:
    one = artifact.publish(store, "support", folder, **facts(), alias="latest").version
    two = artifact.publish(store, "support", write_adapter(tmp_path / "2", seed=2), **facts(), alias="latest").version
    artifact.promote(store, "support", "prod", "latest")
    assert artifact.aliases(store, "support") == {"latest": two, "prod": two}
    assert store.read_json("aliases", "support", "latest.json")["previous"] == one
    artifact.promote(store, "support", "prod", one)
    assert artifact.open_adapter(store, "support", "prod").version == one
    with pytest.raises(ArtifactError, match="looks like a version"):
        artifact.promote(store, "support", "0123456789ab", one)
    with pytest.raises(artifact.UnknownAdapter):
        artifact.promote(store, "support", "prod", "0" * 12)
    assert artifact.open_adapter(store, "support", "prod").version == one


def test_a_version_is_removed_only_when_no_alias_points_at_it(store: Store, folder: Path, tmp_path: Path) -> None:
    one = artifact.publish(store, "support", folder, **facts(), alias="latest").version
    two = artifact.publish(store, "support", write_adapter(tmp_path / "2", seed=2), **facts()).version
    with pytest.raises(ArtifactError, match="latest points at it"):
        artifact.remove(store, "support", one)
    artifact.promote(store, "support", "latest", two)
    artifact.remove(store, "support", one)
    assert [m.version for m in artifact.list_adapters(store)] == [two]
    with pytest.raises(artifact.UnknownAdapter):
        artifact.remove(store, "support", one)


# --- processes that race, die, or run out of disk ---------------------------------------------------------------------


def test_racing_publishers_of_equal_content_leave_one_sound_version(store: Store, folder: Path) -> None:
    def publish() -> str:
        return artifact.publish(store, "support", folder, **facts(), alias="latest").version

    versions = {outcome["done"] for outcome in fork_race([publish] * 6)}
    assert len(versions) == 1
    assert artifact.verify(store, "support", versions.pop()) == []
    assert len(artifact.list_adapters(store)) == 1


def test_racing_publishers_and_promoters_leave_one_valid_state(store: Store, tmp_path: Path) -> None:
    folders = [write_adapter(tmp_path / str(seed), seed=seed) for seed in range(5)]
    old = [artifact.publish(store, "support", folder, **facts(), alias="latest").version for folder in folders[:2]]

    def promote() -> None:
        for version in old * 20:
            artifact.promote(store, "support", "latest", version)

    def publisher(folder: Path) -> Callable[[], str]:
        return lambda: artifact.publish(store, "support", folder, **facts(), alias="latest").version

    outcomes = fork_race([*(publisher(folder) for folder in folders[2:]), promote, promote, promote])
    published = {*old, *(outcome["done"] for outcome in outcomes[:3])}
    assert len(published) == 5
    assert {m.version for m in artifact.list_adapters(store)} == published
    assert artifact.resolve(store, "support@latest").version in published
    assert all(artifact.verify(store, "support", version) == [] for version in published)


def test_a_promoter_and_a_remover_of_one_version_never_leave_a_dangling_alias(store: Store, folder: Path) -> None:
    ends = set()
    for number in range(30):
        task = f"task{number}"
        version = artifact.publish(store, task, folder, **facts()).version
        promoted, removed = fork_race([partial(artifact.promote, store, task, "prod", version),
                                       partial(artifact.remove, store, task, version)])  # fmt: skip
        there = {m.version for m in artifact.list_adapters(store) if m.task == task}
        pointed = artifact.aliases(store, task)
        assert set(pointed.values()) <= there
        assert pointed == ({"prod": version} if "done" in promoted else {})
        assert ("done" in removed) == (not there)
        assert {promoted.get("error"), removed.get("error")} <= {None, "ArtifactError", "UnknownAdapter"}
        ends.add(("done" in promoted, "done" in removed))
    assert ends <= {(True, False), (False, True), (False, False)}


def test_a_publisher_killed_at_any_moment_leaves_nothing_visible_and_a_rerun_completes(
    store: Store, folder: Path, tmp_path: Path
) -> None:
    def publish(here: Store) -> artifact.AdapterManifest:
        return artifact.publish(here, "support", folder, **facts(), alias="latest")

    version = publish(store).version
    moments = {"nothing": 0, "version": 0, "version and alias": 0}
    for moment in range(1, 200):
        here = Store(str(tmp_path / f"root{moment}"))
        killed = die_at(moment, partial(publish, here))
        seen, pointed = artifact.list_adapters(here), artifact.aliases(here, "support")
        for manifest in seen:
            assert artifact.verify(here, "support", manifest.version) == []
        if not seen:
            with pytest.raises(artifact.UnknownAdapter):
                artifact.verify(here, "support", version)
        assert set(pointed.values()) <= {m.version for m in seen}
        moments["version and alias" if pointed else "version" if seen else "nothing"] += 1
        if not killed:
            break
        made = publish(here)
        assert artifact.verify(here, "support", made.version) == []
        assert artifact.aliases(here, "support") == {"latest": made.version}
    assert not killed
    assert min(moments.values()) >= 1, moments
    assert moments["nothing"] >= 8, moments


def test_a_promoter_killed_at_any_moment_leaves_the_old_version_or_the_new(store: Store, tmp_path: Path) -> None:
    one, two = (artifact.publish(store, "support", write_adapter(tmp_path / str(seed), seed=seed), **facts()).version
                for seed in range(2))  # fmt: skip
    seen = set()
    for moment in range(1, 50):
        artifact.promote(store, "support", "prod", one)
        killed = die_at(moment, lambda: artifact.promote(store, "support", "prod", two))
        seen.add(artifact.resolve(store, "support@prod").version)
        assert artifact.aliases(store, "support").keys() == {"prod"}
        if not killed:
            break
    assert seen == {one, two}


def test_a_disk_that_fills_up_while_publishing_is_a_storage_error_and_nothing_is_visible(
    store: Store, tmp_path: Path
) -> None:
    folder = write_adapter(tmp_path / "large", hidden=512)
    answer = outcome(start(("publish-limited", store.uri, "support", str(folder), "latest")))
    assert answer["error"] == "StorageError"
    assert "no space" in answer["text"]
    assert "Next: free space on the disk" in answer["text"]
    assert artifact.list_adapters(store) == []
    assert artifact.aliases(store, "support") == {}
    assert not [p for p in Path(store.uri).rglob("*") if p.name.startswith(".tmp-")]


def test_publishing_on_a_full_filesystem_is_a_storage_error_and_nothing_is_visible(tmp_path: Path) -> None:
    """A real ENOSPC, on a tmpfs of 64 KiB in a mount namespace of its own."""
    folder, mount = write_adapter(tmp_path / "large", hidden=4096), tmp_path / "small"
    mount.mkdir()
    inside = (
        "from graftwork import artifact\nfrom graftwork.storage import Store\n"
        "from tests.processes import outcome, start\n"
        f"store = Store({str(mount)!r})\n"
        f"answer = outcome(start(('publish', store.uri, 'support', {str(folder)!r}, 'latest')))\n"
        "print(answer['error'], artifact.list_adapters(store), artifact.aliases(store, 'support'), answer['text'])\n"
    )
    script = 'mount -t tmpfs -o size=64k tmpfs "$0" || exit 77; exec "$1" -c "$2"'
    command = ["unshare", "--mount", "--map-root-user", "sh", "-c", script, str(mount), sys.executable, inside]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip(f"no mount namespace here: {done.stderr.strip()}")
    assert done.stdout.startswith("StorageError [] {} StorageError: write "), done.stderr
    assert "no space (No space left on device)" in done.stdout


def test_a_store_that_cannot_be_reached_is_no_missing_adapter(tmp_path: Path) -> None:
    (tmp_path / "root").write_bytes(b"a file")
    with pytest.raises(StorageError):
        artifact.publish(Store(str(tmp_path / "root")), "support", write_adapter(tmp_path / "out"), **facts())
