"""Publishers, promoters and removers that race, die -9 at any moment, or run out of disk, for real."""

import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from graftwork.artifacts import publish as artifact
from graftwork.artifacts.manifest import AdapterManifest, aliases
from graftwork.artifacts.registry import UnknownAdapter, resolve, verify_adapter
from graftwork.errors import StorageError
from graftwork.storage.store import Store
from tests.adapters import facts, list_adapters, write_adapter
from tests.process_races import die_at, fork_race, outcome, start


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "root"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "out")


def test_racing_publishers_of_equal_content_leave_one_sound_version(store: Store, folder: Path) -> None:
    def publish() -> str:
        return artifact.publish(store, "support", folder, **facts(), alias="latest").version

    versions = {outcome["done"] for outcome in fork_race([publish] * 6)}
    assert len(versions) == 1
    assert verify_adapter(store, "support", versions.pop()) == []
    assert len(list_adapters(store)) == 1


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
    assert {m.version for m in list_adapters(store)} == published
    assert resolve(store, "support@latest").version in published
    assert all(verify_adapter(store, "support", version) == [] for version in published)


def test_a_promoter_and_a_remover_of_one_version_never_leave_a_dangling_alias(store: Store, folder: Path) -> None:
    ends = set()
    for number in range(15):
        task = f"task{number}"
        version = artifact.publish(store, task, folder, **facts()).version
        promoted, removed = fork_race(
            [partial(artifact.promote, store, task, "prod", version), partial(artifact.remove, store, task, version)]
        )
        there = {m.version for m in list_adapters(store) if m.task == task}
        pointed = aliases(store, task)
        assert set(pointed.values()) <= there
        assert pointed == ({"prod": version} if "done" in promoted else {})
        assert ("done" in removed) == (not there)
        assert {promoted.get("error"), removed.get("error")} <= {None, "ArtifactError", "UnknownAdapter"}
        ends.add(("done" in promoted, "done" in removed))
    assert ends <= {(True, False), (False, True), (False, False)}


@pytest.mark.parametrize("stride", [3, pytest.param(1, marks=pytest.mark.soak)])
def test_a_publisher_killed_at_any_moment_leaves_nothing_visible_and_a_rerun_completes(
    stride: int, store: Store, folder: Path, tmp_path: Path
) -> None:
    def publish(here: Store) -> AdapterManifest:
        return artifact.publish(here, "support", folder, **facts(), alias="latest")

    version = publish(store).version
    moments = {"nothing": 0, "version": 0, "version and alias": 0}
    for moment in range(1, 200, stride):
        here = Store(str(tmp_path / f"root{moment}"))
        killed = die_at(moment, partial(publish, here))
        seen, pointed = list_adapters(here), aliases(here, "support")
        for manifest in seen:
            assert verify_adapter(here, "support", manifest.version) == []
        if not seen:
            with pytest.raises(UnknownAdapter):
                verify_adapter(here, "support", version)
        assert set(pointed.values()) <= {m.version for m in seen}
        moments["version and alias" if pointed else "version" if seen else "nothing"] += 1
        if not killed:
            break
        made = publish(here)
        assert verify_adapter(here, "support", made.version) == []
        assert aliases(here, "support") == {"latest": made.version}
    assert not killed
    assert min(moments.values()) >= 1, moments
    assert moments["nothing"] >= 8 // stride, moments


def test_a_promoter_killed_at_any_moment_leaves_the_old_version_or_the_new(store: Store, tmp_path: Path) -> None:
    one, two = (
        artifact.publish(store, "support", write_adapter(tmp_path / str(seed), seed=seed), **facts()).version
        for seed in range(2)
    )
    seen = set()
    for moment in range(1, 50):
        artifact.promote(store, "support", "prod", one)
        killed = die_at(moment, lambda: artifact.promote(store, "support", "prod", two))
        seen.add(resolve(store, "support@prod").version)
        assert aliases(store, "support").keys() == {"prod"}
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
    assert "Hint: free space on the disk" in answer["text"]
    assert list_adapters(store) == []
    assert aliases(store, "support") == {}
    assert not [p for p in Path(store.uri).rglob("*") if p.name.startswith(".tmp-")]


def test_publishing_on_a_full_filesystem_is_a_storage_error_and_nothing_is_visible(tmp_path: Path) -> None:
    """A real ENOSPC, on a tmpfs of 64 KiB in a mount namespace of its own."""
    folder, mount = write_adapter(tmp_path / "large", hidden=4096), tmp_path / "small"
    mount.mkdir()
    inside = (
        "from graftwork.artifacts.manifest import aliases\n"
        "from tests.adapters import list_adapters\nfrom graftwork.storage.store import Store\n"
        "from tests.process_races import outcome, start\n"
        f"store = Store({str(mount)!r})\n"
        f"answer = outcome(start(('publish', store.uri, 'support', {str(folder)!r}, 'latest')))\n"
        "print(answer['error'], list_adapters(store), aliases(store, 'support'), answer['text'])\n"
    )
    script = 'mount -t tmpfs -o size=64k tmpfs "$0" || exit 77; exec "$1" -c "$2"'
    command = ["unshare", "--mount", "--map-root-user", "sh", "-c", script, str(mount), sys.executable, inside]
    done = subprocess.run(command, cwd=Path(__file__).parents[3], capture_output=True, text=True, check=False)
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip(f"no mount namespace here: {done.stderr.strip()}")
    assert done.stdout.startswith("StorageError [] {} StorageError: write "), done.stderr
    assert "no space (No space left on device)" in done.stdout


def test_a_store_that_cannot_be_reached_is_no_missing_adapter(tmp_path: Path) -> None:
    (tmp_path / "root").write_bytes(b"a file")
    with pytest.raises(StorageError):
        artifact.publish(Store(str(tmp_path / "root")), "support", write_adapter(tmp_path / "out"), **facts())
