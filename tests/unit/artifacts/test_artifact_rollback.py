"""An alias goes back: one version a call, as far as it remembers, and never to one that is gone."""

from pathlib import Path

import pytest

from graftwork.artifacts import publish as artifact
from graftwork.artifacts.manifest import HISTORY, before, roll_back
from graftwork.artifacts.registry import resolve
from graftwork.errors import ArtifactError
from graftwork.storage.store import Store
from tests.adapters import facts, write_adapter


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "root"))


def publish(store: Store, tmp_path: Path, seed: int, alias: str | None = "prod") -> str:
    return artifact.publish(store, "card", write_adapter(tmp_path / str(seed), seed), **facts(), alias=alias).version


def test_each_roll_back_goes_one_version_further(store: Store, tmp_path: Path) -> None:
    versions = [publish(store, tmp_path, seed) for seed in range(4)]
    assert before(store, "card", "prod") == versions[2]
    for old, new in zip(versions[:0:-1], versions[-2::-1], strict=True):
        assert roll_back(store, "card", "prod") == (old, new)
        assert resolve(store, "card@prod").version == new
    with pytest.raises(ArtifactError, match="is the first it pointed at"):
        roll_back(store, "card", "prod")
    assert resolve(store, "card@prod").version == versions[0]


def test_a_promotion_after_a_roll_back_can_be_rolled_back(store: Store, tmp_path: Path) -> None:
    first, second = publish(store, tmp_path, 0), publish(store, tmp_path, 1)
    roll_back(store, "card", "prod")
    third = publish(store, tmp_path, 2)
    assert roll_back(store, "card", "prod") == (third, first)
    artifact.promote(store, "card", "prod", second)
    assert before(store, "card", "prod") == first


def test_a_version_that_is_gone_is_not_rolled_back_to(store: Store, tmp_path: Path) -> None:
    first, second = publish(store, tmp_path, 0), publish(store, tmp_path, 1)
    artifact.remove(store, "card", first)
    with pytest.raises(ArtifactError, match="removed meanwhile"):
        roll_back(store, "card", "prod")
    assert resolve(store, "card@prod").version == second
    assert before(store, "card", "prod") == first


def test_an_alias_remembers_so_many(store: Store, tmp_path: Path) -> None:
    versions = [publish(store, tmp_path, seed, None) for seed in range(3)]
    for turn in range(3 * HISTORY):
        artifact.promote(store, "card", "prod", versions[turn % 3])
    for _ in range(HISTORY):
        roll_back(store, "card", "prod")
    with pytest.raises(ArtifactError, match="is the first it pointed at"):
        roll_back(store, "card", "prod")


def test_an_unknown_alias_cannot_be_rolled_back(store: Store) -> None:
    with pytest.raises(ArtifactError, match="no such alias"):
        roll_back(store, "card", "nosuch")
