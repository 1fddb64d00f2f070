"""What is refused when it is opened: flipped bits, cut files, forged manifests, files that do not belong."""

import hashlib
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from graftwork.artifacts import publish as artifact
from graftwork.artifacts.manifest import aliases, content_version
from graftwork.artifacts.registry import locate, open_adapter, verify_adapter
from graftwork.errors import ArtifactError
from graftwork.storage.store import Store
from tests.adapters import facts, list_adapters, write_adapter

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


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
            assert any(name in problem for problem in verify_adapter(store, "support", version))
            with pytest.raises(ArtifactError, match="sha256 differs"):
                artifact.fetch(store, "support", version)
            path.write_bytes(sound)
    assert verify_adapter(store, "support", version) == []


DAMAGED: list[tuple[Callable[[Path], object], str]] = [
    (lambda v: os.truncate(v / WEIGHTS, 50), "adapter_model.safetensors: 50 bytes, the manifest has"),
    (lambda v: (v / WEIGHTS).write_bytes(b"x" * 10_000), "10000 bytes, the manifest has"),
    (lambda v: (v / WEIGHTS).unlink(), "adapter_model.safetensors: no such file"),
    (lambda v: (v / "evil.bin").write_bytes(b"x"), "evil.bin: 1 bytes, the manifest has no such file"),
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
]


@pytest.mark.parametrize(("damage", "found"), DAMAGED)
def test_a_damaged_version_is_refused_by_everyone_and_left_out_of_lists(
    store: Store, version: str, damage: Callable[[Path], object], found: str, caplog: pytest.LogCaptureFixture
) -> None:
    damage(on_disk(store, version))
    assert found in "; ".join(verify_adapter(store, "support", version))
    for use in (open_adapter, artifact.fetch):
        with pytest.raises(ArtifactError) as caught:
            use(store, "support", version)
        assert found in caught.value.problem
    with pytest.raises(ArtifactError):
        artifact.promote(store, "support", "prod", version)
    assert aliases(store, "support") == {}
    assert list_adapters(store) == []
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
    assert open_adapter(store, "support", fields["version"]).version == fields["version"]
    with pytest.raises(ArtifactError, match="it is a pickle"):
        artifact.fetch(store, "support", fields["version"])


def test_a_damaged_version_can_be_removed_by_name(store: Store, version: str) -> None:
    on_disk(store, version, "manifest.json").write_bytes(b"{")
    assert locate(store, f"support@{version}") == ("support", version)
    artifact.remove(store, "support", version)
    assert not on_disk(store, version).exists()


def test_a_damaged_version_is_healed_by_publishing_its_content_again(
    store: Store, folder: Path, version: str, caplog: pytest.LogCaptureFixture
) -> None:
    flip(on_disk(store, version, WEIGHTS), 300)
    on_disk(store, version, "evil.bin").write_bytes(b"x")
    again = artifact.publish(store, "support", folder, **facts())
    assert again.version == version
    assert verify_adapter(store, "support", version) == []
    assert "is damaged" in caplog.text
