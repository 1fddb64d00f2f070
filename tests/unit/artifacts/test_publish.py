"""Adapters on a disk: published, found by name, promoted, removed. On S3: tests/s3/test_artifact_s3.py."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from graftwork.artifacts import publish as artifact
from graftwork.artifacts.manifest import aliases
from graftwork.artifacts.registry import UnknownAdapter, open_adapter, resolve, verify_adapter
from graftwork.errors import ArtifactError
from graftwork.storage.store import Store
from tests.adapters import facts, list_adapters, write_adapter, write_config
from tests.tiny import write_tiny_base

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


def test_a_published_adapter_is_found_by_version_and_by_alias_with_all_its_facts(store: Store, folder: Path) -> None:
    made = artifact.publish(store, "support", folder, **facts(), parent="0" * 12, alias="latest")
    for ref in (made.version, "latest"):
        assert open_adapter(store, "support", ref) == made
        assert resolve(store, f"support@{ref}") == made
    assert made.task == "support"
    assert made.base_digest == "b" * 64
    assert made.metrics == {"eval_loss": 1.25}
    assert made.parent == "0" * 12
    assert set(made.files) == {CONFIG, WEIGHTS}
    assert made.files[WEIGHTS].size_bytes == (folder / WEIGHTS).stat().st_size
    assert list_adapters(store) == [made]


def test_what_is_fetched_is_what_the_safetensors_library_wrote(store: Store, folder: Path, version: str) -> None:
    fetched = artifact.fetch(store, "support", version)
    assert sorted(p.name for p in fetched.iterdir()) == [CONFIG, WEIGHTS, "manifest.json"]
    before, after = load_file(folder / WEIGHTS), load_file(fetched / WEIGHTS)
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[key], after[key]) for key in before)
    assert verify_adapter(store, "support", version) == []


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
    assert len(list_adapters(store)) == len(versions)


def test_the_version_digest_is_pinned(version: str) -> None:
    """A change of this value would orphan every published adapter: raise `format` in the manifest with it."""
    assert version == "dc7df3c7f6dc"


def test_metrics_of_numpy_are_recorded_and_nan_is_refused(store: Store, folder: Path) -> None:
    made = artifact.publish(store, "support", folder, **facts(metrics={"eval_loss": np.float32(0.5)}))
    assert made.metrics == {"eval_loss": 0.5}
    with pytest.raises(ArtifactError, match=r"metrics\.eval_loss"):
        artifact.publish(store, "other", folder, **facts(metrics={"eval_loss": float("nan")}))
    assert len(list_adapters(store)) == 1


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


@pytest.mark.parametrize(
    "name", ["../x", "a/b", "/etc", "..", "", "A", "a b", "x" * 64, "a\n", "latest\x00", ".hidden"]
)
def test_names_that_are_paths_or_no_names_are_refused_everywhere(store: Store, folder: Path, name: str) -> None:
    made = artifact.publish(store, "support", folder, **facts())
    uses: list[Callable[[], object]] = [
        lambda: artifact.publish(store, name, folder, **facts()),
        lambda: artifact.publish(store, "support", folder, **facts(), alias=name or "/"),
        lambda: open_adapter(store, "support", name),
        lambda: open_adapter(store, name, made.version),
        lambda: resolve(store, f"{name}@latest"),
        lambda: resolve(store, f"support@{name}"),
        lambda: artifact.promote(store, "support", name, made.version),
        lambda: artifact.promote(store, name, "latest", made.version),
        lambda: artifact.remove(store, "support", name),
        lambda: aliases(store, name),
    ]
    for use in uses:
        with pytest.raises(ArtifactError, match="name"):
            use()
    assert list_adapters(store) == [made]
    assert aliases(store, "support") == {}


def test_an_unknown_adapter_is_answered_with_what_there_is(store: Store, folder: Path) -> None:
    made = artifact.publish(store, "support", folder, **facts(), alias="prod")
    for ref in ("latest", "0" * 12):
        with pytest.raises(UnknownAdapter) as caught:
            open_adapter(store, "support", ref)
        assert f"support@{ref}" in str(caught.value)
        assert f"prod ({made.version})" in str(caught.value)
    with pytest.raises(UnknownAdapter, match=r"(?s)tasks: support.*did you mean 'support@prod'"):
        resolve(store, "suport@prod")


def test_an_adapter_for_another_base_is_refused_with_both_digests(store: Store, version: str) -> None:
    manifest = open_adapter(store, "support", version)
    artifact.require_base(manifest, "b" * 64)
    with pytest.raises(ArtifactError) as caught:
        artifact.require_base(manifest, "a" * 64)
    assert "b" * 64 in str(caught.value)
    assert "a" * 64 in str(caught.value)
    assert "Hint: set base:" in str(caught.value)


def test_an_alias_moves_and_remembers_where_it_was(store: Store, folder: Path, tmp_path: Path) -> None:
    one = artifact.publish(store, "support", folder, **facts(), alias="latest").version
    two = artifact.publish(store, "support", write_adapter(tmp_path / "2", seed=2), **facts(), alias="latest").version
    artifact.promote(store, "support", "prod", "latest")
    assert aliases(store, "support") == {"latest": two, "prod": two}
    assert store.read_json("aliases", "support", "latest.json")["previous"] == one
    artifact.promote(store, "support", "prod", one)
    assert open_adapter(store, "support", "prod").version == one
    with pytest.raises(ArtifactError, match="looks like a version"):
        artifact.promote(store, "support", "0123456789ab", one)
    with pytest.raises(UnknownAdapter):
        artifact.promote(store, "support", "prod", "0" * 12)
    assert open_adapter(store, "support", "prod").version == one


def test_a_version_is_removed_only_when_no_alias_points_at_it(store: Store, folder: Path, tmp_path: Path) -> None:
    one = artifact.publish(store, "support", folder, **facts(), alias="latest").version
    two = artifact.publish(store, "support", write_adapter(tmp_path / "2", seed=2), **facts()).version
    with pytest.raises(ArtifactError, match="latest points at it"):
        artifact.remove(store, "support", one)
    artifact.promote(store, "support", "latest", two)
    artifact.remove(store, "support", one)
    assert [m.version for m in list_adapters(store)] == [two]
    with pytest.raises(UnknownAdapter):
        artifact.remove(store, "support", one)
