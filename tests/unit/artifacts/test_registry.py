"""A store listed again and again: what changed is seen at once, what did not is not opened."""

import os
from pathlib import Path

import pytest

from graftwork.artifacts import publish as artifact
from graftwork.artifacts.registry import Listing
from graftwork.storage.store import Store
from tests.adapters import facts, write_adapter


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "root"))


def publish(store: Store, task: str, folder: Path, seed: int, alias: str | None = None) -> str:
    return artifact.publish(store, task, write_adapter(folder, seed=seed), **facts(), alias=alias).version


def named(listing: Listing) -> dict[str, list[str]]:
    return {manifest.ref: aliases for manifest, aliases in listing.read()}


def overwrite(path: Path, data: bytes) -> None:
    """Other bytes of the same length in the same file, which bears the same time as before."""
    before = path.stat()
    with open(path, "r+b") as file:
        file.write(data.ljust(before.st_size)[: before.st_size])
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_each_listing_tells_the_store_as_it_is_now(store: Store, tmp_path: Path) -> None:
    listing = Listing(store)
    assert listing.read() == []
    one = publish(store, "support", tmp_path / "1", 1, alias="latest")
    other = publish(store, "agent", tmp_path / "2", 2)
    assert list(named(listing).items()) == [(f"agent@{other}", []), (f"support@{one}", ["latest"])]
    two = publish(store, "support", tmp_path / "3", 3, alias="latest")
    artifact.promote(store, "support", "prod", one)
    assert named(listing) == {f"agent@{other}": [], f"support@{one}": ["prod"], f"support@{two}": ["latest"]}
    for number in range(20):  # at once, within a tick of the disk's clock
        artifact.promote(store, "support", "prod", (one, two)[number % 2])
        assert named(listing)[f"support@{(one, two)[number % 2]}"][-1] == "prod"
    artifact.remove(store, "support", one)
    assert named(listing) == {f"agent@{other}": [], f"support@{two}": ["latest", "prod"]}
    assert named(listing) == named(Listing(store))


def test_what_has_not_changed_is_not_opened(store: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    version = publish(store, "support", tmp_path / "1", 1, alias="latest")
    listing = Listing(store)
    known = listing.read()
    manifest = Path(store.path("adapters", "support", version, "manifest.json"))
    alias = Path(store.path("aliases", "support", "latest.json"))
    for path in (manifest, alias):
        overwrite(path, b"no JSON")
    assert listing.read() == known
    assert Listing(store).read() == []
    caplog.clear()
    for path in (manifest, alias):
        os.utime(path)
    assert listing.read() == []
    assert [record.getMessage().split(":")[2] for record in caplog.records] == [
        f" adapter support@{version}",
        " alias support@latest",
    ]
    caplog.clear()
    assert listing.read() == []
    assert caplog.text == "", "what is damaged is named once"


def test_a_damaged_alias_hides_no_version(store: Store, tmp_path: Path) -> None:
    version = publish(store, "support", tmp_path / "1", 1, alias="prod")
    store.write_bytes(b"{", "aliases", "support", "latest.json")
    store.write_bytes(b"{}", "aliases", "support", "NO NAME.json")
    assert named(Listing(store)) == {f"support@{version}": ["prod"]}
